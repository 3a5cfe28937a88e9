"""Killed at an fsync drawn by seed, without power, a run begun again ends with the same bytes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from power_loss import Disk
from world import PROGRAM, World, only_run

TABLES = ("regions", "metrics", "summary", "agreement", "confusion")
KILLS = int(os.environ.get("KILLS", "60"))


def job_of(world: World, out: Path) -> Path:
    """Thirty blocks, clean-up, tallies, files."""
    return world.job(
        out,
        card="convolutions",
        scenes=[str(world / "large.tif")],
        tiling={"block": 112},
        reference={"path": str(world / "large_truth.tif")},
        regions={"path": str(world / "districts.geojson"), "name": "district"},
    )


def results(out: Path) -> dict[str, bytes]:
    run = only_run(out)
    tables = {f"{name}.{kind}": run / f"{name}.{kind}" for name in TABLES for kind in ("csv", "parquet")}
    files = {name: run / "scenes" / "large" / name for name in ("labels.tif", "preview.png")}
    return {name: path.read_bytes() for name, path in {**tables, **files}.items()}


@pytest.fixture(scope="module")
def whole(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], int]:
    """The results of a run that nobody disturbed, and how often it flushed."""
    folder = tmp_path_factory.mktemp("whole")
    disk = Disk(folder / "out", folder / "aside")
    flushes = disk.run([PROGRAM, "run", "--local", str(job_of(world, disk.root))])
    assert flushes > 60
    return results(disk.root), flushes


def kill_and_run(
    world: World, folder: Path, whole: tuple[dict[str, bytes], int], seed: int, kills: int
) -> int:
    """Kill a run so many times, each time with a power loss, then let it end; how much was lost in all."""
    expected, flushes = whole
    draw = random.Random(seed)
    disk = Disk(folder / "out", folder / "aside")
    command = [PROGRAM, "run", "--local", str(job_of(world, disk.root))]
    lost = 0
    for number in range(kills):
        disk.run(command, draw.randint(1, flushes // (number + 1)), draw.uniform(0, 0.05))
        lost += disk.lose_power(draw.randrange(2**32))
    disk.run(command)
    assert results(disk.root) == expected
    return lost


def test_a_power_loss(world: World, whole: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    assert kill_and_run(world, tmp_path, whole, seed=2, kills=1) > 0


@pytest.mark.slow
def test_many_power_losses(world: World, whole: tuple[dict[str, bytes], int], tmp_path: Path) -> None:
    lost = [kill_and_run(world, tmp_path / str(n), whole, seed=100 + n, kills=3) for n in range(KILLS // 3)]
    print(f"{3 * len(lost)} kills, {sum(lost)} files and names lost, the same bytes each time")
    assert sum(lost) > len(lost)
