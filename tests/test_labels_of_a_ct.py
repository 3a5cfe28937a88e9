"""A CT and its 117 structures measured as given: no model, the same flow, numbers of numpy and nibabel."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from world import Ended, command, only_run, write_yaml

from segpipe.config.job import Job
from segpipe.tables.record import load_record
from tests.given import job_of, read, run_all

CT = Path(__file__).parents[1].parent / "shared" / "data" / "totalsegmentator_ct"
needs_ct = pytest.mark.skipif(not CT.exists(), reason=f"TotalSegmentator's example CT is not at {CT}")
VOXEL = 27
"""mm³."""


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
    assert stages <= {"measure", "stop", "uses"}  # nothing ingested, nothing predicted


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
