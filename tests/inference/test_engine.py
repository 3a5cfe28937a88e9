"""The engine's edges: streaming, faults, NaN, batches, stops."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from segpipe.config.job import Job
from segpipe.errors import DeviceMemoryError, SceneError, StoppedError
from segpipe.geometry.box import Box
from segpipe.pipeline.model_scene import Scene, pending_blocks
from segpipe.pipeline.predict import predict_blocks
from segpipe.sources import SceneRef
from segpipe.store.stop import StopToken
from segpipe.tiling.windows import block_id
from tests.inference.lab import (
    CENTRED,
    Lab,
    Network,
    Watched,
    compute,
    labels_of,
    low_middle_high,
    patches,
    predict,
    prepared,
    scores_of,
)

INPUT = {"bands": ["b0"], "normalisation": CENTRED}
TILING = {"window": 32, "halo": 8, "block": 16}
SHAPE = (72, 72)
COUNT = 16
"""Blocks of a scene of that shape, cut so; each has one window, or up to nine under gaussian."""
AHEAD = 16
"""Most blocks, or batches of one, in the queues between reading and committing; with some slack."""
LIMIT = 5.0
"""Seconds in which a fault must end a run."""


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


def job_of(lab: Lab, ref: SceneRef, out: str = "out", batch: int = 1, **tiling: Any) -> Job:
    """One thread: others may be using the cores."""
    settings = {"batch": batch, "threads": 1}
    card = lab.card(2, input=INPUT)
    return lab.job(ref, card, out, True, tiling={**TILING, **tiling}, compute=settings)


@pytest.fixture
def ref(lab: Lab) -> SceneRef:
    """16 blocks."""
    return lab.raster(patches(SHAPE))


# -- streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("corner", ["first", "last"])
def test_blocks_without_data_do_not_pile_up(lab: Lab, corner: str, batch: int) -> None:
    """Valid pixels in one corner only: the many empty blocks are committed as they are read."""
    values = np.zeros((1, 128, 128), np.uint8)
    part = slice(0, 12) if corner == "first" else slice(116, 128)
    values[0, part, part] = 200
    ref = lab.raster(values, nodata=0)
    scene = prepared(job_of(lab, ref, batch=batch), ref)
    total = len(pending_blocks(scene))
    assert total == 64
    committed: list[int] = []
    network = Network()
    with scene.open_blocks() as real:
        watched = Watched(real)
        # asked before each block is read: what the store itself says is committed then
        compute(scene, network, watched, lambda: committed.append(len(scene.predict.done())))
    assert len(committed) == watched.seen.count("read") == watched.seen.count("finish") == total
    assert watched.ahead <= AHEAD
    assert all(done >= n - AHEAD for n, done in enumerate(committed))
    np.testing.assert_array_equal(labels_of(scene) == 255, values[0] == 0)
    assert set(np.unique(labels_of(scene))) == {200, 255}
    receipts = scene.predict.receipts()
    assert sum(r["valid"] for r in receipts.values()) == 144
    assert sum(r["windows"] for r in receipts.values()) == sum(network.calls)


# -- faults ---------------------------------------------------------------------------------------


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("segpipe-")]


def ends_with(work: Callable[[], object]) -> BaseException | None:
    """What a call raised; it must end within `LIMIT`, and leave no thread behind."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - it is what is looked at
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    began = time.monotonic()
    thread.start()
    thread.join(LIMIT)
    assert not thread.is_alive(), f"still running after {time.monotonic() - began:.1f} s"
    assert threads() == []
    return raised[0] if raised else None


class FaultError(Exception):
    """Something that no code of ours knows."""


@pytest.mark.parametrize(("after", "batch"), [(0, 1), (6, 4), (15, 1)], ids=["first", "midway", "last"])
@pytest.mark.parametrize("where", ["network", "read", "ingest", "finish"])
def test_a_fault_anywhere_ends_the_run_with_itself(
    lab: Lab, ref: SceneRef, where: str, after: int, batch: int
) -> None:
    scene = prepared(job_of(lab, ref, batch=batch), ref)
    assert len(pending_blocks(scene)) == COUNT
    fault = FaultError(where)
    calls = itertools.count()

    def fail() -> None:
        if next(calls) == after:
            raise fault

    def answer(x: torch.Tensor) -> torch.Tensor:
        if where == "network":
            fail()
        return low_middle_high(x)

    with scene.open_blocks() as real:
        watched = Watched(real, {} if where == "network" else {where: fail})
        assert ends_with(lambda: compute(scene, Network(answer), watched)) is fault
    done = scene.predict.done()
    assert len(done) == watched.seen.count("finish") < COUNT
    # what was committed stays, and the next run computes the rest
    assert compute(scene, Network()).timings.passes == COUNT - len(done)
    assert len(scene.predict.done()) == COUNT
    centred = (patches(SHAPE)[0].astype(np.float32) - 128) / 40
    expected = np.where(centred > 0.31, 200, np.where(centred < -0.31, 3, 0))
    np.testing.assert_array_equal(labels_of(scene), expected)


def test_a_slow_store_that_fails_ends_a_run_whose_queues_are_full(lab: Lab, ref: SceneRef) -> None:
    scene = prepared(job_of(lab, ref), ref)
    fault = FaultError("disk full")
    calls = itertools.count()

    def fail() -> None:
        time.sleep(0.15)  # everybody else waits for the writer by now
        if next(calls) == 2:
            raise fault

    with scene.open_blocks() as real:
        watched = Watched(real, {"finish": fail})
        assert ends_with(lambda: compute(scene, Network(), watched)) is fault
    assert len(scene.predict.done()) == 2


@pytest.mark.parametrize("after", [0, 5])
def test_no_device_memory_says_at_which_batch(lab: Lab, ref: SceneRef, after: int) -> None:
    scene = prepared(job_of(lab, ref, batch=4), ref)
    cause = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    calls = itertools.count()

    def answer(x: torch.Tensor) -> torch.Tensor:
        if next(calls) >= after:
            raise cause
        return low_middle_high(x)

    error = ends_with(lambda: compute(scene, Network(answer)))
    assert isinstance(error, DeviceMemoryError)
    assert error.batch == 4
    assert str(error) == "out of device memory with 4 windows in a batch"
    assert error.__cause__ is cause
    assert len(scene.predict.done()) <= after


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("blend", ["trim", "gaussian"])
def test_scores_that_are_no_numbers_are_never_stored(lab: Lab, blend: str, value: float) -> None:
    values = patches(SHAPE)
    assert values.max() < 255
    values[0, 40, 40] = 255  # (255 - 128) / 40 is more than any other pixel has
    ref = lab.raster(values)
    scene = prepared(job_of(lab, ref, blend=blend), ref)
    blocks = pending_blocks(scene)

    def answer(x: torch.Tensor) -> torch.Tensor:
        return low_middle_high(x).where(x < 3.17, torch.tensor(value))

    error = ends_with(lambda: compute(scene, Network(answer)))
    assert isinstance(error, SceneError)
    assert "the model 'pyramid-2d' gave scores that are no numbers" in str(error)
    sees = {
        block_id(b)
        for b in blocks
        for w in scene.plan.windows(b)
        if scene.plan.lattice.window(w).contains(Box((40, 40), (41, 41)))
    }
    assert block_id((2, 2)) in sees
    assert scene.predict.done().isdisjoint(sees)
    before = [b for b in blocks if block_id(b) < min(sees)]
    assert len(scene.predict.done()) <= len(before)
    at = scene.plan.blocks.box((2, 2)).slices
    assert (np.asarray(scene.predict.array("labels")[at]) == 255).all()


# -- batches --------------------------------------------------------------------------------------


def mixing(x: torch.Tensor) -> torch.Tensor:
    """What a window answers depends on its neighbours in the batch."""
    return low_middle_high(x - x.mean(0, keepdim=True) * 0.5)


def products() -> Callable[[torch.Tensor], torch.Tensor]:
    """Matrix products over all pixels of a batch, of a size whose last bits depend on their number."""
    torch.manual_seed(3)
    layers = torch.nn.Sequential(torch.nn.Linear(1, 96), torch.nn.GELU(), torch.nn.Linear(96, 3)).eval()
    return lambda x: layers(x.movedim(1, -1)).movedim(-1, 1) * 40


@pytest.mark.parametrize("network", [mixing, products()], ids=["mixing", "products"])
@pytest.mark.parametrize("blend", ["trim", "gaussian"])
def test_the_batch_changes_no_bit_on_a_cpu(
    lab: Lab, ref: SceneRef, network: Callable[[torch.Tensor], torch.Tensor], blend: str
) -> None:
    found = []
    for batch in (1, 3, 8):
        scene = prepared(job_of(lab, ref, f"batch-{batch}", batch, blend=blend), ref)
        done = compute(scene, Network(network))
        assert scene.settings.batch == batch
        assert done.timings.passes == scene.plan.window_passes
        found.append((labels_of(scene), scores_of(scene)))
    assert len(np.unique(found[0][0])) >= 2
    assert found[0][1].std() > 0.01
    for labels, scores in found[1:]:
        np.testing.assert_array_equal(labels, found[0][0])
        np.testing.assert_array_equal(scores, found[0][1])


# -- stops ----------------------------------------------------------------------------------------


def shards(scene: Scene, name: str) -> dict[str, bytes]:
    """An array's files, as they lie on disk."""
    stage = Path(scene.predict.out) / ".store" / scene.predict.key / scene.predict.generation.token / name
    return {
        str(p.relative_to(stage)): p.read_bytes()
        for p in sorted(stage.rglob("*"))
        if p.is_file() and p.name != "zarr.json"
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Scene]:
    """The same scene by each blend, never disturbed."""
    lab = Lab(tmp_path_factory.mktemp("alone"))
    ref = lab.raster(patches(SHAPE))
    scenes = {blend: prepared(job_of(lab, ref, blend=blend), ref) for blend in ("trim", "gaussian")}
    for scene in scenes.values():
        compute(scene, Network())
    return scenes


@pytest.mark.parametrize("blend", ["trim", "gaussian"])
@pytest.mark.parametrize("stop", [0, 1, 7, 15])
def test_a_stop_keeps_what_was_finished_and_a_resume_adds_the_rest(
    lab: Lab, ref: SceneRef, alone: dict[str, Scene], stop: int, blend: str
) -> None:
    scene = prepared(job_of(lab, ref, blend=blend), ref)
    blocks = pending_blocks(scene)
    asked = itertools.count()
    network = Network()

    def check_stop() -> None:
        if next(asked) >= stop:
            raise StoppedError("stop")

    with scene.open_blocks() as real:
        # a slow store: at the stop, writes are still waiting
        watched = Watched(real, {"finish": lambda: time.sleep(0.02)})
        error = ends_with(lambda: compute(scene, network, watched, check_stop))
    assert isinstance(error, StoppedError)
    done = scene.predict.done()
    assert next(asked) == stop + 1
    assert watched.seen.count("read") == stop
    # one batch may have been on the device; every other block was finished, and must be there
    windows = 0
    finished = set()
    for block in blocks[:stop]:
        windows += len(scene.plan.windows(block))
        if windows <= len(network.calls) - 1:
            finished.add(block_id(block))
    assert finished <= done <= {block_id(b) for b in blocks[:stop]}
    assert len(finished) >= stop - 2

    resumed = prepared(job_of(lab, ref, blend=blend), ref)
    again = compute(resumed, Network())
    left = sum(len(scene.plan.windows(b)) for b in blocks if block_id(b) not in done)
    assert again.timings.passes == left
    for name in ("labels", "scores"):
        expected = shards(alone[blend], name)
        assert shards(resumed, name) == expected != {}


def test_a_stop_that_was_asked_for_through_the_store(lab: Lab, ref: SceneRef) -> None:
    """The same through the card's own network and the flag that another process would set."""
    scene = prepared(job_of(lab, ref), ref)
    blocks = pending_blocks(scene)

    def progress(n: int) -> None:
        if n == 2:
            StopToken(scene.predict.out, "run-1").request()

    with pytest.raises(StoppedError, match="run it again to resume"):
        predict_blocks(scene, blocks, StopToken(scene.predict.out, "run-1"), progress=progress)
    assert threads() == []
    done = len(scene.predict.done())
    assert 2 <= done <= 2 + 8
    assert predict(scene).computed == COUNT - done
    other = prepared(job_of(lab, ref, "other"), ref)
    predict(other)
    np.testing.assert_array_equal(labels_of(scene), labels_of(other))
    np.testing.assert_array_equal(scores_of(scene), scores_of(other))
