"""A disk that is full: one line that names the folder, exit code 1; with room again, the same bytes."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from finished import finish
from world import World, command, only_run

from segpipe.api import as_job
from segpipe.runs.check import check_request
from segpipe.runs.plan import forecast, plan_scenes

KEPT = (".tif", ".csv", ".parquet", ".gpkg", ".png")


def job_of(world: World, folder: Path, out: Path) -> Path:
    """Images, scores, clean-up and all kinds of files of a raster: about twelve megabytes."""
    outputs = {"dir": str(out), "scores": True, "formats": ["cog", "ome-zarr"]}
    regions = {"path": str(world / "districts.geojson"), "name": "district"}
    scenes = [str(world / "large.tif")]
    return world.job(
        folder / "job", card="convolutions", scenes=scenes, tiling={"block": 112}, regions=regions,
        outputs=outputs,
    )  # fmt: skip


def files(out: Path) -> dict[str, bytes]:
    run = only_run(out)
    found = (p for p in run.rglob("*") if p.is_file() and p.suffix in KEPT)
    return {p.relative_to(run).as_posix(): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    assert command("run", "--local", str(job_of(world, folder, folder / "out"))).code == 0
    return files(folder / "out")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    small = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(small, capture_output=True, check=False).returncode:
        pytest.skip("nobody may mount a disk here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(disk: Path, kib: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={kib}k", str(disk)], check=True)


def test_a_plan_says_what_a_run_takes_at_most(world: World, tmp_path: Path) -> None:
    """Noise hardly compresses: the bound is held against the bytes of a run, and is not far from them."""
    job = job_of(world, tmp_path, tmp_path / "out")
    resolved = check_request(as_job(job))
    [plan] = plan_scenes(resolved)
    run, record = finish(job)
    assert record.done
    made = {name: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) for name, folder in
            (("disk_bytes", tmp_path / "out" / ".store"), ("run_bytes", Path(run.location)))}  # fmt: skip
    for name, size in made.items():
        assert size <= plan.numbers[name] <= 8 * size, name
    line, fits = forecast(resolved, [plan])
    assert fits
    assert line.startswith("disk: at most ") and line.endswith(" are free")


def test_a_plan_warns_of_a_disk_that_is_too_small(world: World, disk: Path, tmp_path: Path) -> None:
    ended = command("plan", str(job_of(world, tmp_path, disk / "out")))
    assert ended.code == 0
    assert "KiB are free" in ended.out or "MiB are free" in ended.out
    assert "warning: the disk may be too small" in ended.err
    resize(disk, 100_000)
    assert "warning" not in command("plan", str(job_of(world, tmp_path, disk / "out"))).err


def test_a_run_stops_in_one_line_and_goes_on_when_there_is_room(
    world: World, whole: dict[str, bytes], disk: Path, tmp_path: Path
) -> None:
    """In the middle of the store, of the label map's file, of the scores'."""
    out = disk / "out"
    job = job_of(world, tmp_path, out)
    for kib in (300, 2500, 6500, 12_500):
        resize(disk, kib)
        ended = command("run", "--local", str(job))
        assert ended.code == 1, (kib, ended)
        [line] = ended.errors
        assert line.startswith(f"error: {out}"), line
        assert "no space left on the disk" in line and "run the same job again" in line
        assert "Traceback" not in ended.err
        assert not [p for p in out.rglob("*") if p.is_file() and ("#" in p.name or ".draft-" in str(p))]
    resize(disk, 100_000)
    assert command("run", "--local", str(job)).code == 0
    assert files(out) == whole
