"""Generations of a stage: made once, dropped for good, written in whole shards."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from segpipe.errors import SceneError
from segpipe.geometry.geometry import RasterGeometry
from segpipe.store.arrays import ArraySpec
from segpipe.store.stage import Stage
from segpipe.tiling.windows import Blocks

GEOMETRY = RasterGeometry((20, 30), (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), None)
BLOCKS = Blocks((20, 30), (8, 10), (0, 0))
ARRAYS = [ArraySpec("image", "uint8", 0, channels=2), ArraySpec("labels", "uint16", 9, labels=True)]


def make(folder: Path, blocks: Blocks = BLOCKS, key: str = "stage-1") -> Stage:
    """A handle of its own of a stage that exists."""
    stage = Stage(str(folder), key)
    stage.create(GEOMETRY, blocks, ARRAYS, {"scene": "s"})
    return stage


def test_eight_threads_make_one_generation(tmp_path: Path) -> None:
    for attempt in range(5):
        start = threading.Barrier(8)

        def one(number: int, key: str = f"stage-{attempt}", start: threading.Barrier = start) -> Stage:
            start.wait()
            # each asks for blocks of its own: only one of them gets its wish
            stage = make(tmp_path, replace(BLOCKS, block=(8, 10 if number % 2 else 15)), key)
            part = (slice(0, 8), slice(0, 30))
            assert stage.array("labels")[...].shape == (20, 30)
            assert stage.array("image")[(slice(None), *part)].sum() == 0
            return stage

        with ThreadPoolExecutor(8) as pool:
            stages = list(pool.map(one, range(8)))
        assert len({s.generation for s in stages}) == 1
        values = np.arange(8 * 30, dtype=np.uint16).reshape(8, 30)
        stages[0].write("labels", (slice(0, 8), slice(0, 30)), values)
        stages[0].commit("a", {"n": 1}, {})
        for stage in stages:
            np.testing.assert_array_equal(stage.array("labels")[:8], values)
            assert stage.receipts() == {"a": {"n": 1, "files": {}}}


MAKE_MANY = """
import os, sys, time
from segpipe.geometry.geometry import RasterGeometry
from segpipe.tiling.plan import Blocks
from segpipe.store.arrays import ArraySpec
from segpipe.store.stage import Stage

geometry = RasterGeometry((20, 30), (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), None)
arrays = [ArraySpec("image", "uint8", 0, channels=2), ArraySpec("labels", "uint16", 9)]
print("ready", flush=True)
begin = float(sys.stdin.readline())
for n in range(50):
    while time.time() < begin + n * 0.03:
        pass
    stage = Stage(sys.argv[1], f"stage-{n}")
    stage.create(geometry, Blocks((20, 30), (8, 10), (0, 0)), arrays, {})
    print(stage.generation.token, stage.array("labels").shape, stage.array("image").shape)
sys.stdout.flush()
os._exit(0)  # obstore's threads may abort an interpreter that ends right after a read
"""


def test_two_processes_make_one_generation(tmp_path: Path) -> None:
    """Threads of one process may wait for each other in a library's lock; processes do not."""
    command = [sys.executable, "-c", MAKE_MANY, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    begin = time.time() + 0.2
    for process in running:
        process.stdin.write(f"{begin}\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=60) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert ended[0][0] == ended[1][0]
    assert len(set(ended[0][0].splitlines())) == 50


def test_a_dropped_generation_is_never_believed(tmp_path: Path) -> None:
    values = np.full((8, 10), 7, np.uint16)
    part = (slice(8, 16), slice(10, 20))
    old = make(tmp_path)
    other_old = make(tmp_path)
    assert other_old.generation == old.generation
    files = old.write("labels", part, values)
    old.commit("00001.00001", {"valid": 80}, files)
    old.compact()
    old.commit("00000.00000", {"valid": 80}, {})
    assert old.current
    old.check()

    Stage(str(tmp_path), "stage-1").drop()
    assert not old.exists
    assert not old.current
    with pytest.raises(SceneError, match=r"stage-1 was dropped by another run"):
        old.check()
    with pytest.raises(SceneError, match=r"stage-1 is gone"):
        Stage(str(tmp_path), "stage-1").array("labels")
    assert [p for p in (tmp_path / ".store").rglob("*") if p.is_file()] == []

    new = make(tmp_path, replace(BLOCKS, block=(4, 10)))
    assert new.generation.token != old.generation.token
    assert new.generation.blocks.block == (4, 10)
    assert new.receipts() == {}
    assert new.done() == set()
    assert (np.asarray(new.array("labels")[...]) == 9).all()
    assert not old.current
    with pytest.raises(SceneError, match="dropped by another run"):
        old.check()

    with pytest.raises(SceneError, match="dropped by another run"):
        old.commit("00001.00001", {"valid": 80}, {})
    old.write_json(f"receipts-{old.generation.token}/00001.00001.json", {"valid": 80})
    assert new.done() == set()
    assert Stage(str(tmp_path), "stage-1").receipts() == {}


def test_an_old_handle_does_not_drop_the_new_generation(tmp_path: Path) -> None:
    values = np.arange(80, dtype=np.uint16).reshape(8, 10)
    part = (slice(8, 16), slice(10, 20))
    old, other_old = make(tmp_path), make(tmp_path)
    assert old.generation == other_old.generation
    old.drop()
    new = make(tmp_path)
    new.write("labels", part, values)
    new.commit("00001.00001", {"valid": 80}, {})
    other_old.drop()
    old.drop()
    assert new.current
    assert new.receipts() == {"00001.00001": {"valid": 80, "files": {}}}
    np.testing.assert_array_equal(new.array("labels")[part], values)
    # the same handle may make it anew, and then drops what it made
    new.drop()
    new.create(GEOMETRY, BLOCKS, ARRAYS, {})
    assert new.current
    assert new.receipts() == {}
    new.drop()
    assert not new.exists


@pytest.mark.parametrize(
    "part",
    [
        (slice(0, 8), slice(5, 10)),
        (slice(0, 8), slice(0, 5)),
        (slice(4, 12), slice(0, 10)),
        (slice(8, 15), slice(0, 10)),
        (slice(16, 19), slice(0, 10)),
    ],
    ids=str,
)
def test_a_write_that_is_not_whole_shards_is_refused(tmp_path: Path, part: tuple[slice, ...]) -> None:
    stage = make(tmp_path)
    values = np.full([s.stop - s.start for s in part], 3, np.uint16)
    with pytest.raises(AssertionError, match="labels: slice"):
        stage.write("labels", part, values)
    with pytest.raises(AssertionError, match="image: slice"):
        stage.write("image", part, np.stack([values, values]))
    assert (np.asarray(stage.array("labels")[...]) == 9).all()


def test_whole_shards_are_written_up_to_the_scenes_edge(tmp_path: Path) -> None:
    stage = make(tmp_path)
    stage.write("labels", (slice(16, 20), slice(10, 30)), np.full((4, 20), 3, np.uint16))
    expected = np.full((20, 30), 9)
    expected[16:, 10:] = 3
    np.testing.assert_array_equal(stage.array("labels")[...], expected)
