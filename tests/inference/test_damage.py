"""Damaged stores: what is missing, short, swapped or changed is computed again or named, never believed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from finished import finish
from world import World, polygon, write_polygons

from segpipe.errors import DamagedError
from segpipe.store.stage import Stage
from segpipe.tiling.windows import Blocks

ARTEFACTS = {
    "labels": "predict-*/*/labels/c/*/*",
    "ingested pixels": "ingest-*/*/image/c/*/*/*",
    "ingested validity": "ingest-*/*/valid/c/*/*",
    "receipts of blocks": "predict-*/receipts-*.json",
    "tallies": "measure-*/receipts-*.json",
    "facts of measuring": "measure-*/info.json",
    "pictures": "measure-*/previews*",
    "records of stages": "*/stage.json",
}


def flip(path: Path, other: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def truncate(path: Path, other: Path, draw: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw.randrange(len(data))])


def delete(path: Path, other: Path, draw: random.Random) -> None:
    path.unlink()


def empty(path: Path, other: Path, draw: random.Random) -> None:
    path.write_bytes(b"")


def swap(path: Path, other: Path, draw: random.Random) -> None:
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGES: list[Callable[[Path, Path, random.Random], None]] = [flip, truncate, delete, empty, swap]


def result(run: Path) -> tuple[np.ndarray, list[str]]:
    """Label map and table of areas, without the column of the run's name."""
    with rasterio.open(run / "scenes" / "scene1" / "labels.tif") as file:
        labels = file.read(1)
    return labels, [line.partition(",")[2] for line in (run / "regions.csv").read_text().splitlines()]


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("artefact", ARTEFACTS)
def test_damage_is_mended_or_named(
    world: World, tmp_path: Path, artefact: str, damage: Callable[[Path, Path, random.Random], None]
) -> None:
    layer = write_polygons(tmp_path / "regions.geojson", polygon("a", (5, 40), (5.5, 60)))
    job = world.job(
        tmp_path / "out",
        regions={"path": str(layer)},
        tiling={"block": "24", "store": "zarr"},
        outputs={"keep": ["image", "labels"]},
    )
    run, record = finish(job)
    assert record.done
    expected = result(Path(run.location))
    store = Path(tmp_path / "out" / ".store")
    draw = random.Random(f"{artefact} {damage.__name__}")
    for _ in range(2):
        shutil.rmtree(tmp_path / "out" / record.job_name)
        found = sorted(path for path in store.glob(ARTEFACTS[artefact]) if path.is_file())
        assert found
        path, other = draw.sample(found * 2, 2) if len(found) == 1 else draw.sample(found, 2)
        damage(path, other, draw)
        run, again = finish(job)
        if again.failed:  # said, and mended by the next run
            [scene] = again.failed
            assert "run the job again" in scene.error, scene.error
            run, again = finish(job)
        assert again.done, again.failed
        np.testing.assert_array_equal(result(Path(run.location))[0], expected[0])
        assert result(Path(run.location))[1] == expected[1]


@pytest.mark.parametrize("damage", DAMAGES[:4])
@pytest.mark.parametrize("created", [True, False], ids=["with a record", "receipts alone"])
def test_what_a_stage_without_arrays_lost_is_to_be_made_again(
    tmp_path: Path, created: bool, damage: Callable[[Path, Path, random.Random], None]
) -> None:
    """Masks, boxes and tallies: parts and receipts that are not compacted yet."""
    stage = Stage(str(tmp_path), "masks-1")
    if created:
        stage.create(None, Blocks((1,), (1,), (0,)), [], {})
    for name in ("a", "b", "c"):
        stage.commit(name, {"n": 1}, stage.write_part(name, name.encode() * 100) if created else {})
    lost = [next(tmp_path.rglob("a.json"))]
    if created:
        lost.append(next(tmp_path.rglob("parts-*/b")))
    for path in lost:
        damage(path, path, random.Random(damage.__name__))
    again = Stage(str(tmp_path), "masks-1")
    named = {"b"} if created else set()
    named |= set() if damage is delete else {"a"}  # a receipt that is gone has no name left
    assert set(again.scrub()) == named
    assert again.done() == ({"c"} if created else {"b", "c"})
    if created:
        assert again.read_part("c") == b"c" * 100
        with pytest.raises(DamagedError):
            again.read_part("b")
