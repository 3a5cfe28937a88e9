"""A stage that another run drops while it is read: what is made of it is right, or nothing is."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zarr
from finished import finish
from world import World

from segpipe.api import as_job
from segpipe.runs.check import check_request
from segpipe.runs.find_run import open_run
from segpipe.runs.steps import begin_scene, compute_scene
from segpipe.store.stage import Stage
from tests.flows import object_world

Make = Callable[[Path], Path]
"""A job's file, by its output folder."""


@pytest.fixture(scope="module")
def jobs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Make]:
    """By what reads the store: tallies, surfaces, pictures and files; clean-up; the joining of objects."""
    folder = object_world.write_world(tmp_path_factory.mktemp("objects"))
    outputs = {"formats": ["cog", "ome-zarr", "nifti"], "scores": True, "uncertainty": True}
    truth, scene = {"path": str(world / "truth")}, [str(world / "scene2.tif")]
    volume = {"card": "nearest-volume", "scenes": [str(world / "volume.nii.gz")]}
    return {
        "files and measures": lambda out: world.job(
            out, reference=truth, measure={"surface": True}, outputs=outputs, tiling={"block": "40"}
        ),
        "volume": lambda out: world.job(out, outputs=outputs, **volume),
        "clean-up": lambda out: world.job(out, card="convolutions", scenes=scene),
        "objects": lambda out: object_world.write_job(folder, out),
    }


def files(out: Path) -> dict[str, bytes]:
    """Tables and maps that people see."""
    shown = [*out.glob("*/*/*.csv"), *out.glob("*/*/scenes/*/**/*")]
    kept = [p for p in shown if p.is_file() and p.suffix not in (".json", ".html")]
    return {p.relative_to(next(out.glob("*/*-*-*"))).as_posix(): p.read_bytes() for p in kept}


@pytest.mark.parametrize("name", ["files and measures", "volume", "clean-up", "objects"])
def test_a_stage_dropped_in_the_middle_of_a_read(
    jobs: dict[str, Make], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the worst instant: after the receipts were looked at and before the array is read."""
    predicted, reads = tmp_path / "predicted", 0
    resolved = check_request(as_job(jobs[name](predicted)))
    run, _ = open_run(resolved.job, resolved.fingerprint)
    for ref in resolved.scenes:
        compute_scene(begin_scene(resolved, ref, run))
    read_array, last = zarr.Array.__getitem__, 0

    def counted(array: zarr.Array[Any], where: Any) -> Any:
        nonlocal reads
        reads += 1
        if reads == last:
            for stage in sorted((out / ".store").iterdir()):
                Stage(str(out), stage.name).drop()
        return read_array(array, where)

    out = tmp_path / "whole"
    shutil.copytree(predicted, out)
    monkeypatch.setattr(zarr.Array, "__getitem__", counted)
    assert finish(jobs[name](out))[1].done
    expected, count = files(out), reads
    assert count >= 3
    failures = 0
    for number in {1, count, *random.Random(name).sample(range(1, count + 1), min(count, 2))}:
        out, reads, last = tmp_path / f"dropped at {number}", 0, number
        shutil.copytree(predicted, out)
        [scene] = finish(jobs[name](out))[1].scenes
        assert reads >= number
        failures += scene.state == "failed"
        if scene.state == "failed":
            assert "dropped by another run" in scene.error and "run the job again" in scene.error
            wrong = {p for p, data in files(out).items() if p.startswith("scenes/") and data != expected[p]}
            assert not wrong
            last = 0
            assert not finish(jobs[name](out))[1].failed
        assert files(out) == expected
    assert failures
