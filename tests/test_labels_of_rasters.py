"""Label maps of rasters and ids of objects measured as given: numbers of numpy and shapely."""

from __future__ import annotations

import pickle
from pathlib import Path

import geopandas
import nibabel as nib
import numpy as np
import pytest
import rasterio
import shapely
from world import NODATA, PIXEL, World, write_raster, write_volume

from segpipe.config.card import read_card
from segpipe.config.job import Job
from segpipe.errors import RequestError, SceneError
from segpipe.export.run_folder import RunFolder
from segpipe.export.scene_files import export_scene, failed_record
from segpipe.pipeline.given_scene import find_labels, prepare_labelled
from segpipe.pipeline.measure import measure_scene
from segpipe.pipeline.model_scene import create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.runs.check import check_request
from segpipe.runs.finish import finish_run
from segpipe.sources import discover
from tests.given import job_of, read, run_all

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
    with pytest.raises(ValueError, match=r"`measure\.objects` needs a `reference`"):
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
    run = RunFolder(job.outputs.dir, job.name, "run", "2024-05-06T07:08:09+00:00")
    finish_run(run, request, [failed_record(request.scenes[0], "damaged")])
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
    scene = create_stages(prepare_scene(job, read_card(job.model), ref, request.settings))
    predict_blocks(scene, pending_blocks(scene))
    finish_labels(scene)
    first, _ = measure_scene(scene)
    files = export_scene(scene, first, RunFolder(job.outputs.dir, job.name, "run", ""))
    pattern = f"{tmp_path}/out/segment/*/scenes/*/labels.tif"
    assert find_labels(pattern, "scene1").endswith(files["labels"])
    second, _ = measure_scene(
        prepare_labelled(job_of(tmp_path / "two", world / "scene1.tif", pattern, measure=measure), ref),
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


def test_labels_that_change_are_measured_again_and_never_half(
    world: World, maps: Path, tmp_path: Path
) -> None:
    (ref,) = discover([str(world / "scene1.tif")])
    job = job_of(tmp_path / "out", world / "scene1.tif", maps)
    scene = prepare_labelled(job, ref)
    assert pickle.loads(pickle.dumps(scene)) == scene  # as it travels to workers
    first, done = measure_scene(scene)
    assert (done.computed, done.reused) == (1, 0)
    _, done = measure_scene(prepare_labelled(job, ref))
    assert (done.computed, done.reused) == (0, 1)
    mark = check_request(job).fingerprint
    write_raster(maps / "scene1_labels.tif", np.ones((1, 72, 96), np.uint8))
    with pytest.raises(SceneError, match="changed since it was planned"):
        measure_scene(scene)
    assert check_request(job).fingerprint != mark
    second, done = measure_scene(prepare_labelled(job, ref))
    assert done.computed == 1
    assert second.values == [1]
    assert first.stage != second.stage
    asked = prepare_labelled(
        job_of(tmp_path / "out", world / "scene1.tif", maps, measure={"intensity": True}), ref
    )
    assert measure_scene(asked)[1].computed == 1
