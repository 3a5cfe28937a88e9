"""The command line, and what a run leaves on disk, number by number."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import rasterio
from PIL import Image
from world import NODATA, OBLIQUE, PIXEL, PROGRAM, Ended, World, command, nearest_label, only_run

import segpipe
from segpipe.config.job import Job

ROOT = Path(__file__).parents[1]
Here = Callable[..., Ended]


@dataclass(frozen=True)
class Made:
    """A finished run."""

    run: Path
    scene: Path
    ended: Ended


@pytest.fixture(scope="module")
def raster(world: World, server: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A raster with districts and reference, read from a file that the tests may take away."""
    folder = tmp_path_factory.mktemp("raster")
    scene = Path(shutil.copy(world / "scene1.tif", folder))
    job = world.job(
        folder / "out",
        scenes=[str(scene)],
        description="Made for tests.",
        regions={"path": str(world / "districts.geojson"), "name": "district"},
        reference={"path": str(world / "truth")},
    )
    ended = command("run", str(job), api=server)
    assert ended.code == 0, ended
    return Made(only_run(folder / "out"), scene, ended)


@pytest.fixture(scope="module")
def volume(world: World, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A volume, on Prefect's own temporary server: no PREFECT_API_URL."""
    folder = tmp_path_factory.mktemp("volume")
    scene = Path(shutil.copy(world / "volume.nii.gz", folder))
    ended = command("run", str(world.job(folder / "out", card="nearest-volume", scenes=[str(scene)])))
    assert ended.code == 0, ended
    return Made(only_run(folder / "out"), scene, ended)


TABLES = ("regions", "metrics", "summary", "agreement", "confusion")


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


# ------------------------------------------------------------------ the run's folder


def test_the_folder_of_a_run_holds_what_the_design_says(raster: Made) -> None:
    files = {str(p.relative_to(raster.run)) for p in raster.run.rglob("*") if p.is_file()}
    assert files == {
        "report.html",
        "run.json",
        "columns.json",
        "results.json",
        "catalog.json",
        "manifest.json",
        *(f"{name}.{kind}" for name in TABLES for kind in ("csv", "parquet")),
        *(
            f"scenes/scene1/{name}"
            for name in ("labels.tif", "labels.tif.aux.xml", "labels.qml", "preview.png", "regions.gpkg")
        ),
        *(f"scenes/scene1/{name}.json" for name in ("item", "manifest")),
    }
    assert raster.run.parent.name == "trial"
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{8}", raster.run.name)


def test_the_last_lines_are_the_numbers_and_the_page(raster: Made, world: World) -> None:
    lines = raster.ended.out.splitlines()
    assert lines[0] == "trial: 1 of 1 scenes done"
    assert lines[-1] == f"report: {raster.run}/report.html"
    assert [line.split()[0] for line in lines[1:4]] == ["ground", "crop", "water"]
    assert "Traceback" not in raster.ended.err


def test_the_labels_are_the_models_answer_on_the_scenes_grid(raster: Made, world: World) -> None:
    with rasterio.open(raster.run / "scenes/scene1/labels.tif") as made, rasterio.open(raster.scene) as scene:
        np.testing.assert_array_equal(made.read(1), world.labels())
        assert made.transform == scene.transform
        assert made.crs == scene.crs
        assert made.shape == scene.shape
        assert made.dtypes == ("uint8",)
        assert made.nodata == NODATA


def test_the_labels_are_a_cloud_optimised_geotiff(raster: Made) -> None:
    from rio_cogeo.cogeo import cog_validate

    assert cog_validate(raster.run / "scenes/scene1/labels.tif", strict=True) == (True, [], [])


def test_areas_are_counts_times_the_pixels_area(raster: Made, world: World) -> None:
    table = read(raster.run / "regions.csv")
    labels = world.labels()
    weights = np.ones(labels.shape)
    boxes = {"north": np.s_[:40, :], "south east": np.s_[40:, 48:]}
    weights[40:, 48] = 0.5  # the district's edge runs through the middle of this column
    expected = []
    for name, box in boxes.items():
        seen = weights[box][labels[box] != NODATA].sum()
        for value, class_name in enumerate(("ground", "crop", "water")):
            count = weights[box][labels[box] == value].sum()
            expected.append((name, class_name, value, count, count * PIXEL**2, count / seen))
    mine = table[table["region"] != "scene"]
    columns = ["region", "class", "value", "count", "area_m2", "share"]
    for found, wanted in zip(mine[columns].itertuples(index=False), expected, strict=True):
        assert tuple(found)[:3] == wanted[:3]
        assert tuple(found)[3:] == pytest.approx(wanted[3:], rel=1e-12)
    assert set(table["state"]) == {"measured"}
    north = mine[mine["region"] == "north"]
    assert set(north["seen"]) == {1 - 9 * 12 / (40 * 96)}  # the corner without data
    assert "attempts" not in table  # how a run went is no part of what is the same after any crash


def test_the_tables_are_the_same_as_csv_and_as_parquet(raster: Made) -> None:
    for name in ("regions", "metrics", "summary"):
        csv, parquet = read(raster.run / f"{name}.csv"), pd.read_parquet(raster.run / f"{name}.parquet")
        assert list(csv.columns) == list(parquet.columns)
        for column in csv.columns:
            left = csv[column].astype(object).where(csv[column].notna(), None).tolist()
            right = parquet[column].astype(object).where(parquet[column].notna(), None).tolist()
            blank = [None if value == "" else value for value in right]
            assert left == blank, column


def test_overlap_is_counted_against_the_reference(raster: Made, world: World) -> None:
    table = read(raster.run / "metrics.csv")
    labels, truth = world.labels()[:40], world.reference()[:40]
    valid = labels != NODATA
    for row in table[table["region"] == "north"].to_dict("records"):
        mine, true = (labels == row["value"]) & valid, (truth == row["value"]) & valid
        tp, fp, fn = (mine & true).sum(), (mine & ~true).sum(), (~mine & true).sum()
        assert (row["tp"], row["fp"], row["fn"]) == (tp, fp, fn)
        assert row["iou"] == pytest.approx(tp / (tp + fp + fn), rel=1e-12)
        assert row["dice"] == pytest.approx(2 * tp / (2 * tp + fp + fn), rel=1e-12)


def test_the_record_tells_job_model_versions_and_scenes(raster: Made, world: World) -> None:
    import hashlib

    record = json.loads((raster.run / "run.json").read_text())
    weights = hashlib.sha256((world.models / "nearest.pt").read_bytes()).hexdigest()
    assert record["model"]["fingerprint"] == weights
    assert record["job"]["compute"]["threads"] == "1"
    assert record["versions"]["segpipe"] == segpipe.__version__
    assert re.fullmatch(r"cpu-\w+-t1", record["versions"]["device"])
    assert record["notes"] == ["Made for tests."]
    [scene] = record["scenes"]
    assert scene["state"] == "done"
    assert scene["uri"] == str(raster.scene)
    assert scene["geometry"]["shape"] == [72, 96]
    assert scene["geometry"]["spacing"] == [PIXEL, PIXEL]
    assert set(scene["keys"]) == {"ingest", "predict", "labels", "measure", "previews"}
    assert (scene["plan"]["windows"], scene["plan"]["window"]) == (9, "32x32")
    for file in scene["files"].values():
        assert (raster.run / file).is_file()
    with Image.open(raster.run / scene["files"]["preview"]) as picture:
        assert np.asarray(picture.convert("RGB")).std() > 0
    page = (raster.run / "report.html").read_text()
    assert "south east" in page
    assert not re.search(r"(src|href)=[\"']https?://", page)  # one self-contained page


def test_a_volume_is_written_on_the_sources_affine_and_shape(volume: Made, world: World) -> None:
    made, source = nib.load(volume.run / "scenes/volume/labels.nii.gz"), nib.load(volume.scene)
    np.testing.assert_array_equal(np.asarray(made.dataobj), nearest_label(world.voxels()))
    np.testing.assert_array_equal(made.affine, source.affine)
    assert made.shape == source.shape
    for kind in ("sform", "qform"):
        assert int(made.header[f"{kind}_code"]) == int(source.header[f"{kind}_code"])
    np.testing.assert_array_equal(made.get_sform(), source.get_sform())
    assert made.header.get_xyzt_units()[0] == "mm"
    table = read(volume.run / "regions.csv")
    counts = np.bincount(nearest_label(world.voxels()).ravel())
    assert list(table["count"]) == list(counts)
    voxel = abs(np.linalg.det(OBLIQUE[:3, :3]))
    np.testing.assert_allclose(table["volume_mm3"], counts * voxel, rtol=1e-6)
    assert not (volume.run / "metrics.csv").exists()  # no reference, no metrics
    assert "Beginning flow run" in volume.ended.err  # on a server of its own


# ------------------------------------------------------------------ commands


def test_a_report_is_made_again_from_tallies_alone(raster: Made, here: Here) -> None:
    names = (
        "report.html",
        *(f"{n}.{k}" for n in ("regions", "metrics", "summary") for k in ("csv", "parquet")),
    )
    before = {name: (raster.run / name).read_bytes() for name in (*names, "run.json")}
    away = raster.scene.rename(raster.scene.with_suffix(".away"))
    try:
        for name in names:
            (raster.run / name).unlink()
        ended = here("report", str(raster.run))
    finally:
        away.rename(raster.scene)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == raster.ended.out
    assert {name: (raster.run / name).read_bytes() for name in (*names, "run.json")} == before


def test_a_report_of_something_else_is_refused(here: Here, tmp_path: Path) -> None:
    for wrong in (tmp_path, tmp_path / "nothing"):
        ended = here("report", str(wrong))
        assert ended.code == 2
        assert ended.err.splitlines() == [
            f"error: {wrong}: no run here (no run.json); give a folder <out>/<job>/<run>"
        ]


def plan_line(ended: Ended, scene: str) -> str:
    assert (ended.code, ended.err) == (0, "")
    [line] = [line for line in ended.out.splitlines() if line.startswith(f"  {scene}: ")]
    return line.removeprefix(f"  {scene}: ")


def test_a_plan_says_what_it_would_do_and_does_nothing(world: World, here: Here, tmp_path: Path) -> None:
    job = world.job(tmp_path / "out", card="convolutions", scenes=[str(world / "large.tif")])
    line = plan_line(here("plan", str(job), "--set", "tiling.block=112"), "large")
    assert line.startswith(
        "30 blocks of 112x112, 30 windows of 128x128, 30 passes (redundancy 1.000), memory "
    )
    other = here("plan", str(job), "--set", "tiling.window=64", "--set", "compute.tta=flips")
    windows = 12 * 14  # steps of 64 − 2 · 8 = 48 over 560 × 672
    assert f", {windows} windows of 64x64, {4 * windows} passes" in plan_line(other, "large")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [job]


def test_models_are_listed_and_shown(world: World, here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    listed = here("models", "--folder", str(world.models))
    assert listed.code == 0
    rows = [
        [c.strip() for c in re.split("[│|]", line)][1:-1]
        for line in listed.out.splitlines()
        if "nearest" in line
    ]
    assert rows == [
        ["nearest", "raster", "torchscript", "ground, crop, water", "nearest, for tests"],
        ["nearest-volume", "volume", "torchscript", "ground, crop, water", "nearest-volume, for tests"],
    ]
    shown = here("models", "show", str(world.models / "convolutions.yaml"))
    assert shown.code == 0
    facts = dict(
        [c.strip() for c in re.split("[│|]", line)][1:3] for line in shown.out.splitlines() if "│" in line
    )
    width = 80
    count = (2 * 9 + 1) * width + 3 * (width * 9 + 1) * width + (width * 9 + 1) * 3
    assert facts["parameters"] == f"{count:,}"
    assert facts["window"] == "128x128"
    assert facts["halo"] == "8x8"
    assert facts["total stride"] == "8"
    assert facts["input"] == "nir, red"
    assert facts["classes"] == "0 ground, 1 crop, 2 water"


def test_the_schema_is_the_jobs_and_the_committed_file_is_what_is_printed(here: Here) -> None:
    ended = here("schema")
    assert json.loads(ended.out) == Job.model_json_schema()
    assert (ROOT / "configs" / "job.schema.json").read_text() == ended.out, (
        "out of date: segpipe schema > configs/job.schema.json"
    )


def test_the_version(here: Here) -> None:
    assert here("--version") == Ended(0, f"segpipe {segpipe.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["schema"]])
def test_questions_are_answered_without_torch_or_prefect(arguments: list[str]) -> None:
    code = (
        "import sys, segpipe\n"
        "from segpipe.cli.main import execute\n"
        f"code = execute({arguments!r})\n"
        "heavy = {'torch', 'prefect', 'zarr', 'rasterio', 'pandas'} & set(sys.modules)\n"
        "print('LOADED', code, sorted(heavy))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "LOADED 0 []"


def test_the_program_is_installed() -> None:
    done = subprocess.run([PROGRAM, "--help"], capture_output=True, text=True, check=True)
    words = done.stdout.split()
    assert {"run", "plan", "report", "schema", "serve", "models"} <= set(words)
