"""The Python door: what people call from a notebook, without Prefect."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import geopandas
import nibabel as nib
import numpy as np
import pytest
import rasterio
import shapely
import xarray
import yaml
from affine import Affine
from world import World

import segpipe

CRS = "EPSG:32617"
TRANSFORM = (10.0, 0.0, 500_000.0, 0.0, -10.0, 4_000_000.0)


def write_raster(path: Path, values: np.ndarray, nodata: float | None = None) -> Path:
    profile = {"driver": "GTiff", "width": values.shape[2], "height": values.shape[1], "count": len(values)}
    profile |= {"crs": CRS, "transform": Affine(*TRANSFORM), "dtype": values.dtype.name, "nodata": nodata}
    with rasterio.open(path, "w", **profile) as file:
        file.write(values)
    return path


def labels_array(values: np.ndarray) -> xarray.DataArray:
    """A label map that says where it is, as rioxarray would make it."""
    a, _, c, _, e, f = TRANSFORM
    rows, columns = values.shape
    coords = {"y": f + e * (np.arange(rows) + 0.5), "x": c + a * (np.arange(columns) + 0.5)}
    wkt = {"crs_wkt": rasterio.crs.CRS.from_string(CRS).to_wkt()}
    return xarray.DataArray(values, dims=("y", "x"), coords=coords).assign_coords(spatial_ref=((), 0, wkt))


def test_importing_segpipe_is_light() -> None:
    """`import segpipe` loads neither torch nor Prefect nor arrays, and every public name is there."""
    loaded = "{'torch', 'prefect', 'numpy'} & set(sys.modules)"
    code = f"import segpipe, sys; print(*segpipe.__all__); print({loaded})"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, loaded = told.stdout.splitlines()
    assert loaded == "set()"
    assert all(hasattr(segpipe, name) for name in names.split())


def test_a_run_has_tables_labels_and_a_page(world: World, tmp_path: Path) -> None:
    steps = []
    run = segpipe.run(world.job(tmp_path / "out"), progress=steps.append)
    assert run.failed == {}
    [scene] = run.scenes
    labels = run.labels()
    assert labels.dims == ("y", "x")
    with rasterio.open(Path(run.path) / "scenes" / scene / "labels.tif") as file:
        expected, transform = file.read(1), file.transform
    np.testing.assert_array_equal(labels.values, expected)
    np.testing.assert_array_equal(labels[3:9:2, ::-3].values, expected[3:9:2, ::-3])
    assert labels[5, -1].item() == expected[5, -1]
    assert labels.x.values[0] == pytest.approx((transform * (0.5, 0.5))[0])
    whole = run.regions[run.regions["region"] == "scene"]
    for value, count in zip(whole["value"], whole["count"], strict=True):
        assert count == (expected == value).sum()
    assert Path(run.report).is_file()
    assert [step.done for step in steps][-2:] == [steps[-2].total, 0] and steps[-1].record is not None
    again = segpipe.open_run(run.path)
    assert again.record == run.record and scene in run._repr_html_() + repr(run) + run.path
    assert segpipe.run(world.job(tmp_path / "out")).path == run.path


def test_changes_are_merged_and_mistakes_are_told(world: World, tmp_path: Path) -> None:
    job = world.job(tmp_path / "out")
    [one] = segpipe.plan(job, tiling={"block": "64"})
    [other] = segpipe.plan(yaml.safe_load(Path(job).read_text()))
    assert not one.failed and one.numbers["block"] == "64x64" != other.numbers["block"]
    with pytest.raises(segpipe.RequestError, match=r"tiling\.blok: unknown key; did you mean `block`"):
        segpipe.plan(job, tiling={"blok": 1})


def test_a_scene_that_fails_is_told_and_the_others_are_done(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0 not a raster")
    run = segpipe.run(world.job(tmp_path / "out", scenes=[str(broken), str(world / "scene1.tif")]))
    assert list(run.failed) == ["broken"] and len(run.scenes) == 1
    with pytest.raises(segpipe.RequestError, match="scene: found 'broken'"):
        run.labels("broken")


def test_a_source_is_read_lazily_and_says_where_it_is(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 9, (2, 40, 30)).astype(np.int16)
    with segpipe.open(write_raster(tmp_path / "a.tif", values, nodata=3), bands=["red", "nir"]) as source:
        array = source.to_xarray()
        np.testing.assert_array_equal(array.sel(band="nir")[5:9, 2:30:4].values, values[1, 5:9, 2:30:4])
        np.testing.assert_array_equal(array.valid.values, (values != 3).all(axis=0))
        assert array.spatial_ref.attrs["GeoTransform"] == "500000.0 10.0 0.0 4000000.0 0.0 -10.0"
        assert array[0, 0:0].values.shape == (0, 30)


def test_arrays_files_and_what_was_opened_give_the_same_labels(world: World, tmp_path: Path) -> None:
    """The same pixels as a file, as what `open` made of it, and by a whole run."""
    scene, card = world / "scene1.tif", yaml.safe_load(Path(world.job(tmp_path / "x")).read_text())["model"]
    job = yaml.safe_load(Path(world.job(tmp_path / "y")).read_text())
    keys = {"bands": job.get("bands", [])}
    by_file = segpipe.predict(scene, model=card, **keys)
    with segpipe.open(scene, bands=keys["bands"]) as source:
        by_array = segpipe.predict(source.to_xarray(), model=card)
    np.testing.assert_array_equal(by_array.values, by_file.values)
    assert by_array.attrs["classes"] == by_file.attrs["classes"]
    scores = segpipe.predict(scene, model=card, scores=True, **keys)
    best = scores.argmax("class").values
    names = [
        by_file.attrs["classes"][v] for v in by_file.values.ravel().tolist() if v in by_file.attrs["classes"]
    ]
    valid = np.isin(by_file.values, list(by_file.attrs["classes"]))
    assert [str(scores["class"].values[i]) for i in best[valid]] == names


def test_areas_of_an_array_are_those_of_its_polygons() -> None:
    """A square of 12 × 8 pixels of 10 m in a district that holds three quarters of it."""
    values = np.zeros((40, 50), np.uint8)
    values[10:18, 20:32] = 1
    district = shapely.box(500_200, 3_999_800, 500_290, 4_000_000)  # columns 20 to 28, rows 0 to 19
    layer = geopandas.GeoDataFrame({"name": ["west"]}, geometry=[district], crs=CRS)
    truth = np.zeros_like(values)
    truth[10:18, 20:28] = 1
    run = segpipe.measure(
        labels_array(values), regions=layer, reference=labels_array(truth), classes={0: "ground", 1: "house"}
    )
    areas = run.regions.set_index(["region", "class"])["area_m2"]
    assert areas[("scene", "house")] == 12 * 8 * 100
    assert areas[("west", "house")] == 9 * 8 * 100
    assert run.metrics is not None
    iou = run.metrics.set_index(["region", "class"])["iou"]
    assert iou[("scene", "house")] == pytest.approx(8 / 12)


def test_volumes_keep_their_affine(tmp_path: Path) -> None:
    """Volumes in mL of a box of labels on an oblique grid, from a file and from what was opened."""
    affine = nib.affines.from_matvec(np.diag([-2.0, 1.5, 3.0]), [10, -20, 5])
    labels = np.zeros((20, 18, 16), np.uint8)
    labels[4:9, 3:10, 2:7] = 2
    nib.save(nib.Nifti1Image(labels, affine), tmp_path / "labels.nii.gz")
    by_file = segpipe.measure(tmp_path / "labels.nii.gz")
    with segpipe.open(tmp_path / "labels.nii.gz") as source:
        array = source.to_xarray()
        np.testing.assert_array_equal(array[0].values, labels.T)
        by_array = segpipe.measure(array, volume=True)
    for run in (by_file, by_array):
        [volume] = run.regions.loc[run.regions["value"] == 2, "volume_mm3"]
        assert volume == 5 * 7 * 5 * 9.0


def test_a_temporary_run_is_deleted_with_its_object() -> None:
    run = segpipe.measure(labels_array(np.ones((4, 5), np.uint8)))
    path = Path(run.path)
    assert path.is_dir()
    del run
    gc.collect()
    assert not path.exists()


def test_arrays_that_cannot_be_scenes_are_refused() -> None:
    with pytest.raises(segpipe.RequestError, match="found 1 axes"):
        segpipe.measure(np.zeros(5, np.uint8))
    crooked = labels_array(np.zeros((4, 5), np.uint8)).assign_coords(x=[0.0, 1.0, 2.0, 4.0, 5.0])
    with pytest.raises(segpipe.RequestError, match="'x' has no constant step"):
        segpipe.measure(crooked)


def test_a_run_in_this_process_leaves_what_a_flow_leaves(world: World, tmp_path: Path) -> None:
    """The command line with Prefect and without: the same tables and labels."""
    job = world.job(tmp_path / "flow")
    command = [sys.executable, "-m", "segpipe.cli", "run", str(job)]
    subprocess.run(command, check=True, capture_output=True)
    [flow] = (tmp_path / "flow").glob("*/*/run.json")
    local = segpipe.run(job, outputs={"dir": str(tmp_path / "local")})
    name = local.scenes[0]
    for file in ("regions.csv", f"scenes/{name}/labels.tif"):
        assert (Path(local.path) / file).read_bytes() == (flow.parent / file).read_bytes(), file
    assert json.loads(flow.read_text())["scenes"][0]["keys"] == local.record.scenes[0].keys
