"""After `segpipe erase` nothing in the folder of results names the subject; all others are as they were."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pandas as pd
import pytest
from world import World, command, only_run, write_yaml

NAME = "sub-0Zebra"
OTHER = "sub-0Zebra2"


@pytest.fixture
def lake(world: World, tmp_path: Path) -> Path:
    """A BIDS tree of two subjects; the name of one begins as the other's."""
    for subject in (NAME, OTHER):
        folder = tmp_path / "bids" / subject / "anat"
        folder.mkdir(parents=True)
        shutil.copy(world / "volume.nii.gz", folder / f"{subject}_T1w.nii.gz")
    return tmp_path / "bids"


def named_in(folder: Path, name: str) -> list[str]:
    """Paths and files that name a subject, and no longer name of another."""

    def names(text: bytes) -> bool:
        return name.encode() in text.replace(OTHER.encode(), b"") if name == NAME else name.encode() in text

    found = [path for path in folder.rglob("*") if names(str(path.relative_to(folder)).encode())]
    found += [path for path in folder.rglob("*") if path.is_file() and names(path.read_bytes())]
    return sorted({str(path.relative_to(folder)) for path in found})


def run_jobs(world: World, lake: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A run of both subjects, one of the subject alone, and one that never ended."""
    out = tmp_path / "out"
    extra = {"PREFECT_HOME": str(tmp_path / "prefect")}
    scenes = [str(lake / name / "anat" / f"{name}_T1w.nii.gz") for name in (NAME, OTHER)]
    job = {"card": "nearest-volume", "outputs": {"dir": str(out), "formats": ["nifti", "bids"]}}
    for name, listed in (("both", scenes), ("alone", scenes[:1]), ("torn", scenes[:1])):
        tiling = {"blend": "gaussian"} if name == "torn" else {}
        path = world.job(tmp_path / name, name=name, scenes=listed, tiling=tiling, **job)
        assert command("run", str(path), "--local", **extra).code == 0
    (only_run(out, "torn") / "run.json").unlink()
    return out, extra


def test_a_subject_is_gone_and_the_other_stays(world: World, lake: Path, tmp_path: Path) -> None:
    out, extra = run_jobs(world, lake, tmp_path)
    before = pd.read_csv(only_run(out, "both") / "regions.csv")
    assert len(named_in(out, NAME)) > 10
    ended = command("erase", NAME, "--in", str(out), "--yes", **extra)
    assert (ended.code, ended.err) == (0, ""), ended
    assert named_in(out, NAME) == []
    folder = only_run(out, "both")
    after = pd.read_csv(folder / "regions.csv")
    kept = before[before["scene"] == f"{OTHER}_T1w"].reset_index(drop=True)
    pd.testing.assert_frame_equal(after, kept)
    assert command("check", str(folder), **extra).code == 0
    assert list((out / "alone").iterdir()) == []
    for what in ("stage", "run", "scene of a run", "rows of tables, pages"):
        assert any(line.startswith(what) for line in ended.out.splitlines()), ended.out
    again = command("erase", NAME, "--in", str(out), "--yes", **extra)
    assert (again.code, again.out) == (0, f"nothing of {NAME} is kept in {out}\n")


def test_nothing_is_removed_without_a_yes(world: World, lake: Path, tmp_path: Path) -> None:
    out, extra = run_jobs(world, lake, tmp_path)
    before = named_in(out, NAME)
    ended = command("erase", NAME, "--in", str(out), **extra)
    assert ended.code == 1
    assert named_in(out, NAME) == before


def test_what_cannot_be_reached_is_told(world: World, lake: Path, tmp_path: Path) -> None:
    out, extra = run_jobs(world, lake, tmp_path)
    (out / "notes.txt").write_text(f"{NAME} was difficult")
    server = "http://127.0.0.1:1/api"
    ended = command("erase", NAME, "--in", str(out), "--yes", PREFECT_API_URL=server, **extra)
    assert ended.code == 1
    assert ended.err.splitlines() == [
        f"not reached: {server}: delete its flow runs, artifacts and events of this subject there",
        "not reached: notes.txt: still names it",
    ]


def test_a_name_that_files_have_too_removes_no_files(world: World, tmp_path: Path) -> None:
    extra = {"PREFECT_HOME": str(tmp_path / "prefect")}
    assert command("run", str(world.job(tmp_path / "out")), "--local", **extra).code == 0
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    command("erase", "labels", "--in", str(tmp_path / "out"), "--yes", **extra)
    assert sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file()) == files


@pytest.mark.slow
def test_a_scan_and_prefects_history(world: World, lake: Path, tmp_path: Path) -> None:
    out, extra = tmp_path / "out", {"PREFECT_HOME": str(tmp_path / "prefect")}
    scan = write_yaml(
        tmp_path / "scan.yaml",
        {
            "name": "nightly",
            "lake": {"location": str(lake), "kind": "bids", "settle_seconds": 0},
            "model": str(world.models / "nearest-volume.yaml"),
            "compute": {"device": "cpu", "threads": 1},
            "outputs": {"dir": str(out)},
        },
    )
    assert command("scan", str(scan), **extra).code == 0
    database = tmp_path / "prefect/prefect.db"

    def history() -> str:
        with closing(sqlite3.connect(database)) as opened:
            return "\n".join(opened.iterdump()).replace(OTHER, "")

    assert NAME in history()
    ended = command("erase", NAME, "--in", str(out), "--yes", **extra)
    assert (ended.code, ended.err) == (0, ""), ended
    assert named_in(out, NAME) == []
    assert NAME not in history()
    assert named_in(tmp_path / "prefect", NAME) == []
    assert named_in(out, OTHER)
    assert command("scan", str(scan), **extra).code == 0  # Prefect's database and the ledger work
