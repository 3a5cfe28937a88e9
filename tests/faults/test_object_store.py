"""Runs on an object store that fails: the same bits as on one that does not, or a refusal; never others."""

from __future__ import annotations

import io
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import pytest
import rasterio
from faults.faulty_store import KINDS, FaultyStore
from finished import finish
from obstore.store import from_url
from world import World, polygon, write_polygons

from segpipe.errors import SegpipeError
from tests.services.loopback import store_variables

TRIES = 4
"""Runs of a job on the failing store, before one on the same that does not fail any more."""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyStore]:
    """The store, which this process's environment leads to; it fails within ``failing.failing(…)``."""
    with (
        FaultyStore(tmp_path_factory.mktemp("store") / "log") as store,
        pytest.MonkeyPatch.context() as patch,
    ):
        for key, value in store_variables(store.url).items():
            patch.setenv(key, value)
        for bucket in ("lake", "runs"):
            urllib.request.urlopen(urllib.request.Request(f"{store.url}/{bucket}", method="PUT"), timeout=30)
        yield store


def result(folder: str) -> tuple[np.ndarray, list[str]]:
    """Label map and table of areas of a run, without the column of the run's name."""
    if "://" in folder:
        read = lambda name: bytes(obstore.get(from_url(folder), name).bytes())  # noqa: E731
    else:
        read = lambda name: (Path(folder) / name).read_bytes()  # noqa: E731
    with rasterio.open(io.BytesIO(read("scenes/scene1/labels.tif"))) as file:
        labels = file.read(1)
    return labels, [line.partition(",")[2] for line in read("regions.csv").decode().splitlines()]


def job(world: World, tmp_path: Path, scene: str, out: str) -> Path:
    layer = write_polygons(tmp_path / "regions.geojson", polygon("a", (5, 40), (5.5, 60)))
    return world.job(
        tmp_path / "job",
        scenes=[scene],
        regions={"path": str(layer)},
        tiling={"block": "24", "store": "zarr"},
        outputs={"dir": out, "keep": ["image", "labels"]},
    )


@pytest.fixture(scope="module")
def expected(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[np.ndarray, list[str]]:
    """On a local disk."""
    folder = tmp_path_factory.mktemp("local")
    run, record = finish(job(world, folder, str(world / "scene1.tif"), str(folder / "out")))
    assert record.done
    return result(run.location)


def assert_same_or_refused(
    failing: FaultyStore,
    world: World,
    tmp_path: Path,
    expected: tuple[np.ndarray, list[str]],
    kinds: tuple[str, ...],
    rate: float,
    scene: str,
) -> None:
    """Every run that says it is done has the expected bits, and the last one says so."""
    out = f"s3://runs/{tmp_path.name}"
    request = job(world, tmp_path, scene, out)
    done, refusals = 0, []
    with failing.failing(kinds, rate, tmp_path.name) as counted:
        for _ in range(TRIES):
            try:
                run, record = finish(request)
            except SegpipeError as error:
                refusals.append(str(error))
                continue
            if not record.done:
                refusals += [failed.error for failed in record.failed]
                continue
            done += 1
            break
    assert counted["requests"] > 20 or refusals
    assert sum(counted[kind] for kind in kinds), counted
    for text in refusals:
        assert any(named in text for named in ("s3://", "scene1", "stored stage ")), text
        assert "segpipe-loopback-secret" not in text and len(text.splitlines()) == 1, text
    if done:
        got = result(run.location)
        np.testing.assert_array_equal(got[0], expected[0])
        assert got[1] == expected[1]
    run, record = finish(request)  # on what the failures left, without any more of them
    if not record.done:  # damaged: said, and mended by the next run
        run, record = finish(request)
    assert record.done, record.failed
    got = result(run.location)
    np.testing.assert_array_equal(got[0], expected[0])
    assert got[1] == expected[1]


def test_a_run_on_a_store_that_fails_in_every_way(
    failing: FaultyStore, world: World, tmp_path: Path, expected: tuple[np.ndarray, list[str]]
) -> None:
    assert_same_or_refused(failing, world, tmp_path, expected, KINDS, 0.08, str(world / "scene1.tif"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_a_failing_store_is_right_or_refused(
    failing: FaultyStore, world: World, tmp_path: Path, expected: tuple[np.ndarray, list[str]], kind: str
) -> None:
    assert_same_or_refused(failing, world, tmp_path, expected, (kind,), 0.04, str(world / "scene1.tif"))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(20))
def test_scenes_on_such_a_store_too(
    failing: FaultyStore, world: World, tmp_path: Path, expected: tuple[np.ndarray, list[str]], number: int
) -> None:
    """GDAL waits seconds between its tries, so these are minutes."""
    folder = f"s3://lake/{tmp_path.name}"
    obstore.put(from_url(folder), "scene1.tif", (world / "scene1.tif").read_bytes())
    rate = 0.02 + number % 5 * 0.02
    assert_same_or_refused(failing, world, tmp_path, expected, KINDS, rate, f"{folder}/scene1.tif")
