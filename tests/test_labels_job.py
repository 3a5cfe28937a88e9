"""Jobs that measure label maps as they are given: no model, the same flow, numbers of numpy and nibabel."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geopandas
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from world import NODATA, PIXEL, Ended, World, command, only_run, write_raster, write_volume, write_yaml

from segpipe.classes import color_of, load_classes, with_found
from segpipe.config import Job
from segpipe.deliver import done_record, export_scene, failed_record
from segpipe.errors import RequestError, SceneError
from segpipe.labelled import find_labels, prepare_labelled
from segpipe.measure import measure_scene
from segpipe.report.record import load_record
from segpipe.request import check_request
from segpipe.run import Run, finish_run
from segpipe.scene import create_stages, pending_blocks, prepare_scene
from segpipe.sources import discover
from segpipe.steps import finish_labels, predict_blocks

CT = Path(__file__).parents[1].parent / "shared" / "data" / "totalsegmentator_ct"
needs_ct = pytest.mark.skipif(not CT.exists(), reason=f"TotalSegmentator's example CT is not at {CT}")
VOXEL = 27
"""mm³."""


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def run_all(job: Job) -> tuple[Path, list[str]]:
    """A job's steps in this process, as the tasks call them: the run's folder and notes of its scenes."""
    request = check_request(job)
    run = Run(job.outputs.dir, job.name, f"run-{request.mark}", "2024-05-06T07:08:09+00:00")
    records = []
    for ref in request.scenes:
        scene = prepare_labelled(job, ref)
        measured, done = measure_scene(scene, "test")
        files = export_scene(scene, measured, run)
        records.append(done_record(scene, measured, files, {"measure": done}, 1))
    finish_run(run, job, request.settings, records)
    return Path(run.location), [note for r in records for note in r.notes]


def job_of(out: Path, scene: Path, labels: Path | str, **fields: Any) -> Job:
    data = {"name": "given", "scenes": [str(scene)], "labels": str(labels), "outputs": {"dir": str(out)}}
    return Job.model_validate({**data, **fields})


# ------------------------------------------------------------------ a CT and its 117 structures


@pytest.fixture(scope="module")
def ct_job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ct")
    job = {
        "name": "ct",
        "scenes": [str(CT / "example_ct_sm.nii.gz")],
        "labels": str(CT / "example_seg.nii.gz"),
        "measure": {"intensity": True},
        "outputs": {"dir": str(folder / "out")},
    }
    return write_yaml(folder / "ct.yaml", job)


@pytest.fixture(scope="module")
def ct(ct_job: Path, server: str) -> Path:
    """The folder of a run through the flow."""
    ended = command("run", str(ct_job), api=server)
    assert ended.code == 0, ended
    return only_run(ct_job.parent / "out", "ct")


@pytest.fixture(scope="module")
def voxels() -> tuple[np.ndarray, np.ndarray]:
    """HU and structures, as nibabel reads them."""
    names = ("example_ct_sm", "example_seg")
    hu, structures = (np.asarray(nib.load(CT / f"{name}.nii.gz").dataobj) for name in names)
    return hu, structures


@needs_ct
def test_volumes_are_voxel_counts_times_their_size(ct: Path, voxels: tuple[np.ndarray, np.ndarray]) -> None:
    values, counts = np.unique(voxels[1], return_counts=True)
    table = read(ct / "regions.csv").set_index("value")
    assert sorted(table.index) == values.tolist()
    assert len(table) == 42
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        row = table.loc[value]
        assert (row["count"], row["volume_mm3"]) == (count, count * VOXEL)
        assert row["class"] == (str(value) if value else "background")
        assert row["state"] == "measured"


@needs_ct
def test_intensities_are_numpys(ct: Path, voxels: tuple[np.ndarray, np.ndarray]) -> None:
    hu, structures = voxels
    table = read(ct / "intensity.csv").set_index("value")
    assert sorted(table.index) == np.unique(structures).tolist()
    for value, row in table.iterrows():
        here = hu[structures == value].astype(np.float64)
        assert row["n"] == here.size
        assert row["mean"] == pytest.approx(here.mean(), rel=1e-5)
        assert row["mean"] == pytest.approx(here.mean(), rel=1e-12)
        assert row["sd"] == pytest.approx(here.std(), rel=1e-12)
        assert (row["min"], row["max"]) == (here.min(), here.max())
        expected = np.quantile(here, [0.05, 0.5, 0.95], method="inverted_cdf")
        found = row[["p05", "p50", "p95"]].to_numpy(dtype=np.float64)
        if row["bin"] == 1:
            np.testing.assert_array_equal(found, expected)
        assert np.abs(found - expected).max() < row["bin"] <= 4
    assert (table["bin"] == 1).sum() > 30
    parquet = pd.read_parquet(ct / "intensity.parquet").set_index("value")
    numbers = parquet.select_dtypes("float").columns
    assert len(numbers) == 9
    np.testing.assert_array_equal(table[numbers], parquet[numbers])


@needs_ct
def test_the_steps_and_the_flow_give_the_same_tables(ct: Path, ct_job: Path, tmp_path: Path) -> None:
    data = {**load_record((ct / "run.json").read_bytes()).job, "outputs": {"dir": str(tmp_path)}}
    folder, _ = run_all(Job.model_validate(data))
    for name in ("regions.csv", "intensity.csv"):
        assert (folder / name).read_bytes() == (ct / name).read_bytes()


@needs_ct
def test_the_files_are_the_labels_on_the_scenes_grid(ct: Path) -> None:
    made, given = nib.load(ct / "scenes/example_ct_sm/labels.nii.gz"), nib.load(CT / "example_seg.nii.gz")
    np.testing.assert_array_equal(np.asarray(made.dataobj), np.asarray(given.dataobj))
    assert made.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(made.affine, given.affine)
    assert (ct / "scenes/example_ct_sm/preview.png").stat().st_size > 10_000


@needs_ct
def test_the_record_and_the_page_say_that_no_model_was_run(ct: Path) -> None:
    record = load_record((ct / "run.json").read_bytes())
    assert record.model is None
    assert len(record.legend) == 42
    assert record.notes == ("labels measured as given: no model was run",)
    (scene,) = record.scenes
    assert set(scene.keys) == {"labels", "measure", "previews"}
    assert set(scene.timings) == {"measure", "export"}
    assert f"labels measured as given: {CT / 'example_seg.nii.gz'}" in scene.notes
    page = (ct / "report.html").read_text()
    assert "labels measured as given: no model was run" in page
    assert 'id="model"' not in page
    stages = {p.name.split("-")[0] for p in (ct.parents[1] / ".store").iterdir()}
    assert stages <= {"measure", "stop"}  # nothing ingested, nothing predicted


@needs_ct
def test_a_finished_run_is_not_done_again_and_its_report_can_be(
    ct: Path, ct_job: Path, here: Callable[..., Ended]
) -> None:
    again = here("run", str(ct_job))
    assert (again.code, again.out.splitlines()[0][:14]) == (0, "nothing to do:")
    before = {name: (ct / name).read_bytes() for name in ("regions.csv", "intensity.csv", "report.html")}
    for name in before:
        (ct / name).unlink()
    assert here("report", str(ct)).code == 0
    assert {name: (ct / name).read_bytes() for name in before} == before


@needs_ct
def test_the_plan_of_given_labels(ct_job: Path, here: Callable[..., Ended]) -> None:
    ended = here("plan", str(ct_job))
    assert ended.code == 0
    assert "labels measured as given" in ended.out.splitlines()[0]
    assert "1 tiles to measure of" in ended.out
    assert "passes" not in ended.out


@needs_ct
def test_classes_of_a_file_come_first_and_the_others_by_number(tmp_path: Path) -> None:
    names = tmp_path / "names.csv"
    names.write_text("value, name, color\n0,air,\n5,liver,#aa3311\n200,nothing here,\n")
    scene = CT / "example_ct_sm.nii.gz"
    folder, _ = run_all(job_of(tmp_path / "out", scene, CT / "example_seg.nii.gz", classes=str(names)))
    table = read(folder / "regions.csv")
    assert table["class"].tolist()[:4] == ["air", "liver", "nothing here", "1"]
    assert table.loc[table["class"] == "nothing here", "count"].tolist() == [0]
    assert len(table) == 43
    legend = load_record((folder / "run.json").read_bytes()).legend
    assert [(c.value, c.color, c.background) for c in legend[:2]] == [
        (0, "#000000", True),
        (5, "#aa3311", False),
    ]
    table_of_colours = (folder / "scenes/example_ct_sm/labels.ctbl").read_text()
    assert "5 liver 170 51 17 255" in table_of_colours
    assert "117 117 " in table_of_colours


# ------------------------------------------------------------------ objects


def blobs(seed: int, shift: int = 0) -> np.ndarray:
    """(y, x) ids of squares of 3 to 9 pixels on a lattice, some of them missing."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((72, 96), np.int32)
    for number, (y, x) in enumerate(np.ndindex(6, 8), start=1):
        size = rng.integers(3, 10)
        if rng.random() < 0.8:
            ids[12 * y + 1 + shift :, :][:size, 12 * x + 1 : 12 * x + 1 + size] = number * 7
    return ids


def test_ids_of_objects_are_matched(world: World, tmp_path: Path) -> None:
    predicted, truth = blobs(1, shift=1), np.where(blobs(1) % 5 == 0, 0, blobs(1))
    labels = write_raster(tmp_path / "ids.tif", predicted[None])
    reference = write_raster(tmp_path / "truth.tif", truth[None])
    job = job_of(
        tmp_path / "out",
        world / "scene1.tif",
        labels,
        reference={"path": str(reference)},
        measure={"objects": True, "smallest": 10},
    )
    folder, _ = run_all(job)

    def large(ids: np.ndarray) -> list[int]:
        return [int(i) for i in np.unique(ids) if i and (ids == i).sum() >= 10]

    ious = {}
    for i in large(predicted):
        for j in large(truth):
            common = ((predicted == i) & (truth == j)).sum()
            if common:
                ious[i, j] = common / ((predicted == i) | (truth == j)).sum()
    table = read(folder / "objects.csv").set_index("threshold")
    for threshold in (0.5, 0.75):
        tp = sum(iou >= threshold for iou in ious.values())
        row = table.loc[threshold]
        assert (row["tp"], row["fp"]) == (tp, len(large(predicted)) - tp)
        assert row["fn"] == len(large(truth)) - tp
    matched = {pair: iou for pair, iou in ious.items() if iou > 0.5}
    over_all = table[table.index.isna()].iloc[0]
    total = len(large(predicted)) + len(large(truth))
    assert over_all["pq"] == pytest.approx(sum(matched.values()) / (total / 2), rel=1e-12)
    objects = read(folder / "instances.csv")
    pairs = objects[(objects["side"] == "predicted") & objects["partner"].notna()]
    assert {(r.id, r.partner): r.iou for r in pairs.itertuples()} == pytest.approx(matched)
    # everything else is of objects against the ground
    regions = read(folder / "regions.csv").set_index("value")
    assert regions.loc[1, "count"] == (predicted > 0).sum() and set(regions.index) == {0, 1}
    iou = ((predicted > 0) & (truth > 0)).sum() / ((predicted > 0) | (truth > 0)).sum()
    assert read(folder / "metrics.csv").set_index("value").loc[1, "iou"] == pytest.approx(iou, rel=1e-12)


def test_objects_need_ids_on_both_sides(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`measure\.objects` needs `labels` and `reference`"):
        job_of(tmp_path, world / "scene1.tif", "x.tif", measure={"objects": True})


# ------------------------------------------------------------------ rasters


@pytest.fixture
def maps(world: World, tmp_path: Path) -> Path:
    """A folder of the scenes' right answers, with nodata."""
    for seed in (1, 2):
        write_raster(tmp_path / "maps" / f"scene{seed}_labels.tif", world.labels(seed)[None], nodata=NODATA)
    return tmp_path / "maps"


def test_a_folder_of_maps_with_districts_and_reference(world: World, maps: Path, tmp_path: Path) -> None:
    job = job_of(
        tmp_path / "out",
        world / "scene*.tif",
        maps,
        regions={"path": str(world / "districts.geojson"), "name": "district"},
        reference={"path": str(world / "truth")},
        measure={"intensity": True},
    )
    folder, _ = run_all(job)
    regions = read(folder / "regions.csv").set_index(["scene", "region", "value"])
    metrics = read(folder / "metrics.csv").set_index(["scene", "region", "value"])
    intensity = read(folder / "intensity.csv").set_index(["scene", "region", "value", "channel"])
    for seed in (1, 2):
        labels, truth, pixels = world.labels(seed), world.reference(seed), world.pixels(seed)
        valid = labels != NODATA
        weights = np.zeros(labels.shape)
        weights[40:, 48:] = 1
        weights[40:, 48] = 0.5  # the district's edge runs through the middle of this column
        for value in range(3):
            here = labels == value
            row = regions.loc[(f"scene{seed}", "south east", value)]
            assert row["count"] == weights[here].sum()
            assert row["area_m2"] == weights[here].sum() * PIXEL**2
            found = metrics.loc[(f"scene{seed}", "scene", value)]
            assert found["tp"] == (here & (truth == value)).sum()
            assert found["fn"] == (valid & ~here & (truth == value)).sum()
            for channel, name in enumerate(("red", "nir")):
                stats = intensity.loc[(f"scene{seed}", "south east", value, name)]
                assert stats["n"] == weights[here].sum()
                mean = np.average(pixels[channel][here], weights=weights[here])
                assert stats["mean"] == pytest.approx(mean, rel=1e-12)
        assert regions.loc[(f"scene{seed}", "scene", 0)]["seen"] == valid.mean()
        with rasterio.open(folder / f"scenes/scene{seed}/labels.tif") as made:
            np.testing.assert_array_equal(made.read(1), labels)
            assert made.nodata == NODATA


def test_the_regions_go_to_a_gis_as_they_were_given_with_their_numbers(
    world: World, maps: Path, tmp_path: Path
) -> None:
    job = job_of(
        tmp_path / "out",
        world / "scene1.tif",
        maps,
        regions={"path": str(world / "districts.geojson"), "name": "district"},
        reference={"path": str(world / "truth")},
    )
    folder, _ = run_all(job)
    given = geopandas.read_file(world / "districts.geojson").set_index("district")
    layer = geopandas.read_file(folder / "scenes/scene1/regions.gpkg").set_index("region")
    assert layer.crs == given.crs and list(layer.index) == list(given.index)
    assert shapely.equals_exact(layer.geometry, given.geometry.loc[layer.index], 1e-9).all()
    regions = read(folder / "regions.csv").set_index(["region", "class"])
    metrics = read(folder / "metrics.csv").set_index(["region", "class"])
    for region, row in layer.iterrows():
        for name in ("1", "2"):
            assert row[f"{name} area_m2"] == regions.loc[(region, name), "area_m2"]
            np.testing.assert_equal(row[f"{name} iou"], metrics.loc[(region, name), "iou"])
        assert row["seen"] == regions.loc[(region, "1"), "seen"]


def test_squares_of_the_ground_as_regions(world: World, maps: Path, tmp_path: Path) -> None:
    job = job_of(tmp_path / "out", world / "scene1.tif", maps, regions={"path": "grid:1500"})
    folder, _ = run_all(job)
    regions = read(folder / "regions.csv")
    cells = regions[regions["region"] != "scene"]
    whole = regions[regions["region"] == "scene"].set_index("class")["count"]
    # each share is rounded to 1/65536, so where four cells meet in a pixel they may be off by one
    assert cells.groupby("class")["count"].sum().to_dict() == pytest.approx(whole.to_dict(), abs=1e-4)
    assert set(geopandas.read_file(folder / "scenes/scene1/regions.gpkg")["region"]) == set(cells["region"])


def test_intervals_resample_patients_where_the_job_names_them(
    world: World, maps: Path, tmp_path: Path
) -> None:
    def job(text: str, name: str) -> Job:
        groups = tmp_path / f"{name}.csv"
        groups.write_text(text)
        measure = {"groups": str(groups)}
        reference = {"path": str(world / "truth")}
        return job_of(tmp_path / name, world / "scene*.tif", maps, measure=measure, reference=reference)

    for text, said in (
        ("scene,patient\nscene1,a\n", "valid: scene,group"),
        ("scene,group\nscene1,a\n", "has no group for 'scene2'"),
        ("scene,group\nscene1,a\nscene1,b\n", "'scene1' in two groups"),
    ):
        with pytest.raises(RequestError, match=said):
            check_request(job(text, "wrong"))
    one, _ = run_all(job("scene,group\nscene1,a\nscene2,a\n", "one"))
    two, _ = run_all(job("scene,group\nscene1,a\nscene2,b\n", "two"))
    summaries = [read(folder / "summary.csv").set_index("metric") for folder in (one, two)]
    intervals = [summary.loc["mIoU", "interval"] for summary in summaries]
    assert intervals[0].startswith("none") and intervals[1] == "2 groups"


def test_a_class_that_only_the_reference_has_was_missed(world: World, tmp_path: Path) -> None:
    """Without a list of classes it still enters the means: else an empty map would look good."""
    empty = write_raster(tmp_path / "empty.tif", np.zeros((1, *world.raster_shape), np.uint8))
    job = job_of(tmp_path / "out", world / "scene1.tif", empty, reference={"path": str(world / "truth")})
    folder, _ = run_all(job)
    metrics = read(folder / "metrics.csv").set_index("value")
    assert metrics.loc[[1, 2], "iou"].tolist() == [0, 0]
    assert metrics.loc[[1, 2], "fn"].tolist() == [(world.reference() == v).sum() for v in (1, 2)]
    assert not metrics["reason"].fillna("").str.contains("no class").any()
    means = read(folder / "summary.csv").set_index(["metric", "over"])["value"]
    assert means[means.index.get_level_values(0) == "mIoU"].tolist() == [0]


def test_a_run_of_which_nothing_is_left_has_a_page(world: World, tmp_path: Path) -> None:
    job = job_of(tmp_path / "out", world / "scene1.tif", world / "truth", measure={"intensity": True})
    request = check_request(job)
    run = Run(job.outputs.dir, job.name, "run", "2024-05-06T07:08:09+00:00")
    finish_run(run, job, request.settings, [failed_record(request.scenes[0], "damaged")])
    folder = Path(run.location)
    assert len(read(folder / "regions.csv")) == len(read(folder / "intensity.csv")) == 0
    assert "damaged" in (folder / "report.html").read_text()


def test_the_model_and_its_own_labels_measure_the_same(world: World, tmp_path: Path) -> None:
    """Intensities of a model's job, and a second job over the map that it made."""
    measure = {"intensity": True}
    job = Job.model_validate(
        {
            "scenes": [str(world / "scene1.tif")],
            "model": str(world.models / "nearest.yaml"),
            "compute": {"device": "cpu", "threads": 1},
            "measure": measure,
            "outputs": {"dir": str(tmp_path / "out")},
        }
    )
    request = check_request(job)
    (ref,) = request.scenes
    scene = create_stages(prepare_scene(job, ref, request.settings))
    predict_blocks(scene, pending_blocks(scene), "test")
    finish_labels(scene)
    first, _ = measure_scene(scene, "test")
    files = export_scene(scene, first, Run(job.outputs.dir, job.name, "run", ""))
    pattern = f"{tmp_path}/out/segment/*/scenes/*/labels.tif"
    assert find_labels(pattern, "scene1").endswith(files["labels"])
    second, _ = measure_scene(
        prepare_labelled(job_of(tmp_path / "two", world / "scene1.tif", pattern, measure=measure), ref),
        "test",
    )
    assert second.tally == first.tally
    assert [c.name for c in first.channels] == ["nir", "red"]  # the model's order
    assert [c.name for c in second.channels] == ["red", "nir"]  # the file's
    assert first.intensity is not None and second.intensity is not None
    for (region, value, channel), cell in first.intensity.cells.items():
        assert second.intensity.cells[region, value, 1 - channel].to_json() == cell.to_json()
    nir, labels = world.pixels()[1], world.labels()
    assert first.intensity.cells[0, 2, 0].total == int(nir[labels == 2].sum()) << 16


def test_ids_of_any_size(tmp_path: Path) -> None:
    scene = write_volume(tmp_path / "scene.nii.gz", np.full((5, 6, 7), 7, np.int16))
    ids = np.zeros((5, 6, 7), np.int32)
    ids[1], ids[2], ids[3, 0, 0] = 70_000, 65_534, 2**31 - 1
    labels = write_volume(tmp_path / "ids.nii.gz", ids)
    folder, notes = run_all(job_of(tmp_path / "out", scene, labels))
    table = read(folder / "regions.csv").set_index("class")
    counts = {"background": 125, "65534": 42, "70000": 42, "2147483647": 1}
    assert table["count"].to_dict() == counts
    assert any("no file of labels was written: its values go up to 2147483647" in note for note in notes)
    ids[ids > 65_534] = 300
    write_volume(tmp_path / "ids.nii.gz", ids)
    folder, _ = run_all(job_of(tmp_path / "out", scene, labels))
    made = nib.load(folder / "scenes/scene/labels.nii.gz")
    np.testing.assert_array_equal(np.asarray(made.dataobj), ids)
    assert made.get_data_dtype() == np.uint16


def test_a_map_of_255s_keeps_them(world: World, tmp_path: Path) -> None:
    """0 and 255, as masks often are: 255 is a class here, and nodata gets another number."""
    mask = np.where(world.labels() == 1, 255, 0).astype(np.int32)
    mask[0, 0] = -7
    write_raster(tmp_path / "mask.tif", mask[None], nodata=-7)
    folder, _ = run_all(job_of(tmp_path / "out", world / "scene1.tif", tmp_path / "mask.tif"))
    with rasterio.open(folder / "scenes/scene1/labels.tif") as made:
        assert (made.nodata, made.dtypes) == (65535, ("uint16",))
        np.testing.assert_array_equal(made.read(1), np.where(mask == -7, 65535, mask))
    assert read(folder / "regions.csv")["class"].tolist() == ["background", "255"]


# ------------------------------------------------------------------ what is refused, and resumed


def test_what_does_not_fit_is_refused(world: World, tmp_path: Path) -> None:
    scene = world / "scene1.tif"
    (ref,) = discover([str(scene)])
    small = write_raster(tmp_path / "small.tif", np.zeros((1, 5, 5), np.uint8))
    with pytest.raises(SceneError, match=r"labels .*small.tif lie on another grid .*\(72, 96\).*\(5, 5\)"):
        prepare_labelled(job_of(tmp_path, scene, small), ref)
    moved = write_raster(
        tmp_path / "moved.tif", world.labels()[None], transform=rasterio.Affine(30, 0, 500_015, 0, -30, 4e6)
    )
    with pytest.raises(SceneError, match=r"corners are 0\.5 elements apart"):
        prepare_labelled(job_of(tmp_path, scene, moved), ref)
    (tmp_path / "many").mkdir()
    for name in ("scene1_a.tif", "scene1_b.tif"):
        write_raster(tmp_path / "many" / name, world.labels()[None])
    with pytest.raises(SceneError, match=r"several label maps fit: .*narrow `labels` with a glob"):
        prepare_labelled(job_of(tmp_path, scene, tmp_path / "many"), ref)
    with pytest.raises(SceneError, match="no label map fits"):
        find_labels(str(tmp_path / "many"), "another")
    negative = write_raster(tmp_path / "negative.tif", np.full((1, 72, 96), -3, np.int16))
    with pytest.raises(SceneError, match="holds -3; labels are 0 or more"):
        measure_scene(prepare_labelled(job_of(tmp_path, scene, negative), ref), "test")


@pytest.mark.parametrize(
    "fields, match",
    [
        ({"labels": "gone.tif"}, "labels: gone.tif does not exist"),
        ({"classes": "gone.csv"}, "classes: gone.csv cannot be read"),
        ({"classes": "names.txt"}, "give a CSV with columns value,name or a YAML file"),
        ({"outputs": {"scores": True}}, "`outputs.scores` needs a model"),
        ({"labels": "", "model": "card.yaml", "classes": "c.csv"}, "`classes` goes with `labels`"),
    ],
)
def test_requests_that_cannot_be(
    world: World, tmp_path: Path, fields: dict[str, Any], match: str, here: Callable[..., Ended]
) -> None:
    data = {"scenes": [str(world / "scene1.tif")], "labels": str(world / "truth"), **fields}
    data["outputs"] = {"dir": str(tmp_path / "out"), **data.get("outputs", {})}
    ended = here("plan", str(write_yaml(tmp_path / "job.yaml", data)))
    assert ended.code == 2
    assert match in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    "name, text, match",
    [
        ("c.csv", "id,name\n1,a\n", "has columns id, name; needed: value, name"),
        ("c.csv", "value,name\n1,a\n1,b\n", "a value stands once; found twice: 1"),
        ("c.csv", "value,name\nx,a\n", r"classes.0.value: found 'x'"),
        ("c.csv", "value,name\n-1,a\n", r"classes.0.value"),
        ("c.csv", "value,name,color\n1,a,red\n", r"classes.0.color: found 'red'"),
        ("c.yaml", "1: [a\n", "not valid YAML"),
        ("c.yaml", "classes: []\n", "classes"),
    ],
)
def test_files_of_classes_that_are_wrong(tmp_path: Path, name: str, text: str, match: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestError, match=match):
        load_classes(str(tmp_path / name))


def test_files_of_classes(world: World, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("0: other\n7: wood\n")
    made = load_classes(str(tmp_path / "a.yaml"))
    assert [(c.value, c.name, c.background) for c in made] == [(0, "other", True), (7, "wood", False)]
    assert [c.name for c in load_classes(str(world.models / "nearest.yaml"))] == ["ground", "crop", "water"]
    (tmp_path / "b.csv").write_text("value,name,color,background\n0,sea,#0000ff,false\n3,rest,,true\n")
    assert [(c.color, c.background) for c in load_classes(str(tmp_path / "b.csv"))] == [
        ("#0000ff", False),
        (color_of(3), True),
    ]
    assert [c.name for c in with_found(made, [9, 7, 2])] == ["other", "wood", "2", "9"]
    assert len({color_of(value) for value in range(118)}) == 118


def test_labels_that_change_are_measured_again_and_never_half(
    world: World, maps: Path, tmp_path: Path
) -> None:
    (ref,) = discover([str(world / "scene1.tif")])
    job = job_of(tmp_path / "out", world / "scene1.tif", maps)
    scene = prepare_labelled(job, ref)
    assert pickle.loads(pickle.dumps(scene)) == scene  # as it travels to workers
    first, done = measure_scene(scene, "test")
    assert (done.computed, done.reused) == (1, 0)
    _, done = measure_scene(prepare_labelled(job, ref), "test")
    assert (done.computed, done.reused) == (0, 1)
    mark = check_request(job).mark
    write_raster(maps / "scene1_labels.tif", np.ones((1, 72, 96), np.uint8))
    with pytest.raises(SceneError, match="changed since it was planned"):
        measure_scene(scene, "test")
    assert check_request(job).mark != mark
    second, done = measure_scene(prepare_labelled(job, ref), "test")
    assert done.computed == 1
    assert second.values == [1]
    assert first.stage != second.stage
    asked = prepare_labelled(
        job_of(tmp_path / "out", world / "scene1.tif", maps, measure={"intensity": True}), ref
    )
    assert measure_scene(asked, "test")[1].computed == 1


def test_torch_and_prefect_stay_out(world: World, tmp_path: Path) -> None:
    """A labels job's steps in a process of its own."""
    job = {
        "scenes": [str(world / "scene1.tif")],
        "labels": str(world / "truth"),
        "measure": {"intensity": True},
        "outputs": {"dir": str(tmp_path / "out")},
    }
    code = (
        "import json, sys\n"
        "from segpipe.config import Job\n"
        "from segpipe.deliver import done_record, export_scene\n"
        "from segpipe.labelled import prepare_labelled\n"
        "from segpipe.measure import measure_scene\n"
        "from segpipe.request import check_request\n"
        "from segpipe.run import Run, finish_run\n"
        f"job = Job.model_validate({job!r})\n"
        "request = check_request(job)\n"
        "scene = prepare_labelled(job, request.scenes[0])\n"
        "measured, done = measure_scene(scene, 'test')\n"
        "run = Run(job.outputs.dir, job.name, 'run', '2024-05-06T07:08:09+00:00')\n"
        "files = export_scene(scene, measured, run)\n"
        "record = done_record(scene, measured, files, {'measure': done}, 1)\n"
        "finish_run(run, job, request.settings, [record])\n"
        "print(json.dumps([name in sys.modules for name in ('torch', 'prefect')]))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == [False, False]
    assert (tmp_path / "out/segment/run/intensity.csv").exists()
