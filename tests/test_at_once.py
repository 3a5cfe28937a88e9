"""The same request, run by several at once: they share a folder and a store, and nobody fails for it."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import zarr
from finished import finish
from world import CLASSES, World, polygon, write_polygons, write_volume

from segpipe.config.card import Class
from segpipe.export.bids import write_bids
from segpipe.export.ome_zarr import write_ome_zarr
from segpipe.export.run_folder import check_manifest
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import volume_geometry
from segpipe.lake.ledger import Ledger
from segpipe.runs.finish import write_run
from segpipe.store.location import check_writable, delete_objects, open_store
from tests.lake.test_ledger import done, found

SEVERAL = 4
UMASK = os.umask(0o022)
os.umask(UMASK)  # as it is before any test: a process has one for all its threads


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """Call a function in several threads that start together; their numbers are its arguments."""
    start = Barrier(SEVERAL)

    def begin(number: int) -> Any:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(SEVERAL) as pool:
        return list(pool.map(begin, range(SEVERAL)))


def test_whether_an_output_can_be_written_is_looked_at(tmp_path: Path) -> None:
    def look(number: int) -> None:
        for _ in range(50):
            check_writable(str(tmp_path))

    at_once(look)
    assert list(tmp_path.iterdir()) == []


def test_objects_are_deleted(tmp_path: Path) -> None:
    names = [f"{number:03d}" for number in range(50)]
    for _ in range(20):
        for name in names:
            (tmp_path / name).write_bytes(b"")
        at_once(lambda _: delete_objects(open_store(str(tmp_path)), names))
        assert list(tmp_path.iterdir()) == []


def test_a_scan_that_was_left_is_ended(tmp_path: Path) -> None:
    for number in range(20):
        run, scenes = f"run-{number}", [f"scene-{i}" for i in range(10)]
        ledger = Ledger(str(tmp_path), "nightly")
        ledger.begin_run(run, "2026-01-01T00:00:00+00:00")
        for scene in scenes:
            ledger.finish(found(scene), done(scene), run)
        at_once(lambda _, run=run: Ledger(str(tmp_path), "nightly").end_run(run))
        assert ledger.open_runs() == []
        assert ledger.records(run) == []


def test_a_map_is_written_as_ome_zarr(tmp_path: Path) -> None:
    labels = np.random.default_rng(5).integers(0, 3, (9, 8, 7)).astype(np.uint8)
    geometry, path = volume_geometry(labels.shape, np.eye(4)), tmp_path / "labels.ome.zarr"
    classes = [Class.model_validate(c) for c in CLASSES]

    def meanwhile(box: Box) -> np.ndarray:
        """The other run is there first, between this one's begin and its end."""
        if not path.exists():
            write_ome_zarr(lambda b: labels[b.slices], geometry, classes, None, path)
        return labels[box.slices]

    write_ome_zarr(meanwhile, geometry, classes, None, path)
    assert np.array_equal(zarr.open_group(str(path), mode="r")["0"][:], labels)
    assert list(tmp_path.iterdir()) == [path]


def test_bids_files_are_linked(world: World, tmp_path: Path) -> None:
    names = [f"sub-{number:02d}_T1w.nii.gz" for number in range(6)]
    for name in names:
        write_volume(tmp_path / name, np.full((9, 8, 7), 100, np.int16))
    scenes = [str(tmp_path / name) for name in names]
    outputs = {"formats": ["bids"]}
    run, record = finish(world.job(tmp_path / "out", card="nearest-volume", scenes=scenes, outputs=outputs))
    folder = Path(run.location)
    for _ in range(10):
        shutil.rmtree(folder / "derivatives")
        at_once(lambda _: write_bids(run.location, folder, record, None))
        assert check_manifest(run.location) == []
    assert not [path for path in folder.rglob(".*") if path.is_file()]


@pytest.mark.parametrize("at", ["manifest.json", "run.json"])
def test_tables_page_and_manifest_are_of_one_run(
    world: World, tmp_path: Path, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run of the request writes page and manifest just before this one's file gets its name."""
    run, record = finish(world.job(tmp_path / "out"))
    other, replace = dataclasses.replace(record, notes=("a longer page",)), os.replace

    def meanwhile(source: str, target: str) -> None:
        if Path(target).name == at:
            monkeypatch.setattr(os, "replace", replace)
            write_run(run, other)
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_run(run, record)
    assert os.replace is replace
    assert check_manifest(run.location) == []


def test_whole_runs_end_with_a_folder_that_is_as_its_manifest_says(world: World, tmp_path: Path) -> None:
    layer = write_polygons(tmp_path / "regions.geojson", polygon("a", (5, 40), (5.5, 60)))
    formats = {"formats": ["cog", "ome-zarr"]}
    for number in range(5):
        job = world.job(tmp_path / f"out{number}", regions={"path": str(layer)}, outputs=formats)
        runs = at_once(lambda _, job=job: finish(job))
        assert all(record.done for _, record in runs)
        assert {line for run, _ in runs for line in check_manifest(run.location)} == set()
    files = list(tmp_path.rglob("labels.tif*"))
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~UMASK}
