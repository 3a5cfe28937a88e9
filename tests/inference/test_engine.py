"""The engine's edges: faults, stops, NaN, batches, streaming, boxes of a first model, and its memory."""

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
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from segpipe.blocks import SceneBlocks
from segpipe.boxes import Box
from segpipe.config import Job
from segpipe.errors import SceneError, StoppedError
from segpipe.geometry import volume_geometry
from segpipe.grid import GridMap, model_grid
from segpipe.inference.engine import DeviceMemoryError
from segpipe.inference.roi import _native_box
from segpipe.lattice import make_lattice
from segpipe.memory import IN_FLIGHT, Workload
from segpipe.models.card import RegionOfInterest
from segpipe.plan import Plan, block_id, make_plan
from segpipe.scene import Scene, pending_blocks
from segpipe.sources import SceneRef
from segpipe.steps import predict_blocks
from segpipe.store import request_stop
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
    with SceneBlocks.of(scene) as real:
        watched = Watched(real)
        # asked before each block is read: what the store itself says is committed then
        compute(scene, network, watched, lambda: bool(committed.append(len(scene.predict.done()))))
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

    with SceneBlocks.of(scene) as real:
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

    with SceneBlocks.of(scene) as real:
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
    with SceneBlocks.of(scene) as real:
        # a slow store: at the stop, writes are still waiting
        watched = Watched(real, {"finish": lambda: time.sleep(0.02)})
        error = ends_with(lambda: compute(scene, network, watched, lambda: next(asked) >= stop))
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
            request_stop(scene.predict.out, "run-1")

    with pytest.raises(StoppedError, match="run it again to resume"):
        predict_blocks(scene, blocks, "run-1", progress=progress)
    assert threads() == []
    done = len(scene.predict.done())
    assert 2 <= done <= 2 + 8
    assert predict(scene).computed == COUNT - done
    other = prepared(job_of(lab, ref, "other"), ref)
    predict(other)
    np.testing.assert_array_equal(labels_of(scene), labels_of(other))
    np.testing.assert_array_equal(scores_of(scene), scores_of(other))


# -- the box of a first model ---------------------------------------------------------------------


def roi(margin: float = 0.1, projection: float = 0.02) -> RegionOfInterest:
    return RegionOfInterest(card="first.yaml", margin=margin, projection=projection)


def small_grid(native: tuple[int, ...], mask: tuple[int, ...], orientation: str) -> GridMap:
    """A scene of this shape sampled onto the mask's."""
    return model_grid(volume_geometry(native, np.eye(4)), orientation=orientation, shape=mask)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """A filled box in a small grid, perhaps with holes."""
    shape = tuple(draw(st.integers(1, 9)) for _ in range(3))
    lows = [draw(st.integers(0, n - 1)) for n in shape]
    highs = [draw(st.integers(a + 1, n)) for a, n in zip(lows, shape, strict=True)]
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(lows, highs, strict=True))] = True
    return mask


@settings(max_examples=200, deadline=None)
@given(
    mask=masks(),
    native=st.tuples(*[st.integers(1, 20)] * 3),
    order=st.permutations("RAS"),
    flips=st.tuples(*[st.booleans()] * 3),
    margin=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_a_native_box_is_never_empty_and_lies_in_the_scene(
    mask: np.ndarray, native: tuple[int, ...], order: list[str], flips: tuple[bool, ...], margin: float
) -> None:
    opposite = {"R": "L", "A": "P", "S": "I"}
    codes = "".join(opposite[c] if f else c for c, f in zip(order, flips, strict=True))
    grid = small_grid(native, mask.shape, codes)
    box = _native_box(mask, grid, roi(margin, projection=0.0))
    assert box.size > 0
    assert Box.whole(native).contains(box)
    for axis, along in enumerate(grid.axes):
        planes = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high, count, length = planes[0], planes[-1] + 1, mask.shape[axis], native[along]
        if grid.flips[axis]:
            low, high = count - high, count - low
        start, stop = box.start[along], box.stop[along]
        wide = (high - low) * length / count * margin
        # within rounding of the mask's extent with its margin, wherever that leaves anything
        if (start, stop) != (0, length):
            assert abs(start - max(0, low * length / count - wide)) <= 1.5
            assert abs(stop - min(length, high * length / count + wide)) <= 1.5


@settings(max_examples=100, deadline=None)
@given(mask=masks(), native=st.tuples(*[st.integers(1, 20)] * 3), axis=st.integers(0, 2))
def test_a_mirrored_axis_gives_the_mirrored_box(mask: np.ndarray, native: tuple[int, ...], axis: int) -> None:
    letters = ["S", "A", "R"]
    straight = small_grid(native, mask.shape, "".join(letters))
    letters[axis] = {"S": "I", "A": "P", "R": "L"}[letters[axis]]
    mirrored = small_grid(native, mask.shape, "".join(letters))
    assert straight.axes == mirrored.axes == (0, 1, 2)
    assert [a != b for a, b in zip(straight.flips, mirrored.flips, strict=True)] == [
        a == axis for a in range(3)
    ]
    box = _native_box(mask, straight, roi(projection=0.0))
    other = _native_box(mask, mirrored, roi(projection=0.0))
    for along, length in enumerate(native):
        start, stop = box.start[along], box.stop[along]
        if along == axis:
            start, stop = length - stop, length - start
        assert (other.start[along], other.stop[along]) == (start, stop)


def test_boxes_by_hand() -> None:
    mask = np.zeros((8, 8, 8), bool)
    mask[2:4, 3:5, 6:8] = True
    same = small_grid((8, 8, 8), (8, 8, 8), "SAR")
    assert _native_box(mask, same, roi(margin=0)) == Box((2, 3, 6), (4, 5, 8))
    # margins of one extent a side: 2-4 → 0-6, 3-5 → 1-7, 6-8 → 4-10, cut at the scene's end
    assert _native_box(mask, same, roi(margin=1)) == Box((0, 1, 4), (6, 7, 8))
    twice = small_grid((16, 8, 8), (8, 8, 8), "SAR")
    assert _native_box(mask, twice, roi(margin=0)) == Box((4, 3, 6), (8, 5, 8))
    # one slice, and an axis of two: nothing is left of a quarter of an element, so all of it is taken
    thin = small_grid((1, 2, 8), (8, 8, 8), "SAR")
    box = _native_box(mask, thin, roi(margin=0))
    assert (box.start[0], box.stop[0]) == (0, 1)
    assert (box.start[1], box.stop[1]) == (0, 2)
    assert (box.start[2], box.stop[2]) == (6, 8)
    with pytest.raises(SceneError, match="too little foreground"):
        _native_box(mask, same, roi(projection=0.5))


# -- memory ---------------------------------------------------------------------------------------


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Small plans over volumes: crops, flips, resampled, sampled onto a shape, or none of these."""
    native = tuple(draw(st.integers(1, 40)) for _ in range(3))
    crop = None
    if draw(st.booleans()):
        lows = [draw(st.integers(0, n - 1)) for n in native]
        highs = [draw(st.integers(a + 1, n)) for a, n in zip(lows, native, strict=True)]
        crop = Box(tuple(lows), tuple(highs))
    grid = model_grid(
        volume_geometry(native, np.diag([1.0, 1.5, 2.0, 1.0])),
        orientation=draw(st.sampled_from([None, "RAS", "LPS", "SRA"])),
        crop=crop,
        **draw(  # type: ignore[arg-type]
            st.sampled_from([{}, {"spacing": [1.3, 2.6, 0.9]}, {"spacing": [4, 4, 4]}, {"shape": [7, 12, 9]}])
        ),
    )
    stride = draw(st.sampled_from([1, 2, 4]))
    window = stride * draw(st.integers(3, 6))
    halo = stride * draw(st.integers(0, 1))
    keep_scores = draw(st.booleans())
    load = Workload(
        image_channels=2,
        image_itemsize=2,
        channels=2,
        classes=3,
        label_itemsize=1,
        batch=1,
        keep_scores=keep_scores,
    )
    plan = make_plan(
        grid,
        make_lattice(grid.shape, [window] * 3, [halo] * 3, stride),
        load,
        blend=draw(st.sampled_from(["trim", "gaussian"])),
        block=[draw(st.integers(3, 25)) for _ in range(3)],
        memory=2**50,
    )
    assume(plan.blocks.count <= 1000)
    return plan


@settings(max_examples=60, deadline=None)
@given(plans())
def test_predicted_memory_holds_for_every_block(plan: Plan) -> None:
    """Against the largest read and the largest model region of all blocks, one after another."""
    per_element = 2 * 2 + 1 + 2 * 8  # as stored, validity, float32 before and after a step
    read = max(plan.read_box(i).size for i in plan.blocks.indices())
    assert plan.memory.read >= IN_FLIGHT * read * per_element
    model = max(plan.grid.model_box(plan.blocks.box(i)).size for i in plan.blocks.indices())
    block = max(plan.blocks.box(i).size for i in plan.blocks.indices())
    direct = plan.grid.identity and plan.blend == "trim"
    merged = model * (1 if direct else 4 * (3 + 1))  # labels, or scores and weights
    scores = 3 * 4 * block if plan.workload.keep_scores and not (plan.grid.identity and not direct) else 0
    assert plan.memory.scores >= IN_FLIGHT * (merged + block + scores)
