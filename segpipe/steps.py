"""The steps of a scene, one function each: what the tasks wrap. Every one can be run again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from segpipe.blocks import SceneBlocks
from segpipe.boxes import Box
from segpipe.errors import SceneError
from segpipe.lattice import Index
from segpipe.scene import Scene, check_blocks, check_worker, is_predicted, labels_stage, pending_blocks
from segpipe.stops import stop_requested
from segpipe.store import ArraySpec

if TYPE_CHECKING:
    from segpipe.models.base import ObjectModel, SegmentationModel

SECONDS_PER_MPX = 2.0
"""A first guess for sizing batches of blocks, before anything was measured."""


@dataclass(frozen=True)
class Done:
    """What a step did."""

    computed: int
    """Blocks computed now."""
    reused: int
    """Blocks that were there already."""
    seconds: float
    timings: dict[str, float]
    elements: int = 0
    """Of the blocks computed, of the native grid."""


@dataclass
class Pace:
    """How long blocks take: a first guess, then what was measured."""

    seconds: float = 0.0
    elements: int = 0

    def note(self, done: Done) -> None:
        """A batch of blocks is done."""
        if done.elements:
            self.seconds += done.seconds
            self.elements += done.elements

    def of(self, scene: Scene, blocks: int) -> float:
        """Seconds that some blocks of a scene may take."""
        elements = math.prod(scene.plan.blocks.block)
        if self.elements:
            return blocks * elements * self.seconds / self.elements
        return blocks * max(0.5, elements / 1e6 * SECONDS_PER_MPX)


def batches_of(
    scene: Scene, blocks: Sequence[Index], minutes: float, workers: int, pace: Pace
) -> list[list[Index]]:
    """Blocks grouped into batches of about this many minutes, each a run of neighbours.

    At least one for each worker, so that a scene of few minutes is not one worker's alone.
    """
    seconds = pace.of(scene, 1)
    size = max(1, min(int(minutes * 60 / seconds), -(-len(blocks) // workers)))
    return [list(blocks[i : i + size]) for i in range(0, len(blocks), size)]


def together(parts: Sequence[Done], reused: int) -> Done:
    """What all batches of a scene did."""
    names = sorted({name for part in parts for name in part.timings})
    return Done(
        computed=sum(part.computed for part in parts),
        reused=reused + sum(part.reused for part in parts),
        seconds=sum(part.seconds for part in parts),
        timings={name: sum(part.timings.get(name, 0.0) for part in parts) for name in names},
    )


def predict_blocks(
    scene: Scene,
    blocks: Sequence[Index],
    run: str,
    attempt: int = 1,
) -> Done:
    """Compute and commit the labels of some blocks: of those without a receipt.

    Receipts are looked at when it begins and again before each block: Dask sends a lost worker's batch to
    another one as if it were new, and a flow that was killed may have left tasks at work.

    Args:
        run: name under which a stop may be requested; asked before every block.
        attempt: recorded in the receipts.

    Raises:
        StoppedError, SceneError, DeviceMemoryError.
    """
    from segpipe.inference.engine import Engine
    from segpipe.inference.labels import nodata_value
    from segpipe.inference.normalise import Normaliser, Statistics
    from segpipe.models.registry import load_model, load_object_model

    begun = time.perf_counter()
    check_worker(scene)
    check_blocks(scene)
    pending = set(pending_blocks(scene))
    todo = [i for i in blocks if i in pending]
    if not todo:
        return Done(0, len(blocks), time.perf_counter() - begun, {})
    computed = len(todo)

    def is_done(index: Index) -> bool:
        nonlocal computed
        found = is_predicted(scene, index)
        computed -= found
        return found

    card, settings = scene.card, scene.settings
    model: SegmentationModel | ObjectModel
    if card.output.kind == "semantic":
        model = load_model(
            card, settings.device, settings.threads, settings.precision, compile=settings.compile
        )
    else:
        model = load_object_model(card, settings.device, settings.threads, settings.precision)
    normaliser = Normaliser(card, scene.scaling, Statistics(scene.statistics))
    with SceneBlocks.of(scene, attempt) as store:
        engine = Engine(scene.plan, card, normaliser, model, store, nodata_value(card), settings.tta)
        timings = engine.run(todo, lambda: stop_requested(scene.job.outputs.dir, run), is_done)
    seconds, elements = time.perf_counter() - begun, computed * math.prod(scene.plan.blocks.block)
    return Done(computed, len(blocks) - computed, seconds, vars(timings).copy(), elements)


def finish_labels(scene: Scene) -> Done:
    """The card's clean-up, or the joining of objects, over a finished scene; compacts the receipts.

    Raises:
        SceneError: predictions are missing or were dropped, or the card's clean-up is no longer the planned.
    """
    from segpipe.inference.cleanup import clean_labels
    from segpipe.inference.labels import label_dtype
    from segpipe.objects import join_objects

    begun = time.perf_counter()
    scene.predict.check()
    if labels_stage(scene.job, scene.card, scene.predict) != scene.labels:
        raise SceneError("the card's clean-up changed since the scene was planned; run the job again")
    missing = pending_blocks(scene)
    if missing:
        raise SceneError(f"{len(missing)} blocks have no prediction; run the job again")
    scene.predict.compact()
    if not scene.direct and scene.ingest.exists:
        scene.ingest.compact()
    if scene.labels == scene.predict:
        return Done(0, 0, time.perf_counter() - begun, {})
    if "whole" in scene.labels.done():
        return Done(0, 1, time.perf_counter() - begun, {})
    if scene.card.output.kind != "semantic":
        join_objects(scene)
        return Done(1, 0, time.perf_counter() - begun, {})
    clean = ArraySpec("labels", label_dtype(scene.card), scene.nodata, labels=True)
    blocks = scene.labels.create(scene.geometry, scene.plan.blocks, [clean], {})
    labels = np.asarray(scene.predict.array("labels")[...])
    cleaned = clean_labels(labels, scene.card)
    for index in blocks.indices():
        box = blocks.box(index)
        scene.labels.write("labels", box.slices, cleaned[box.slices])
    scene.labels.commit("whole", {})
    return Done(1, 0, time.perf_counter() - begun, {})


def read_labels(scene: Scene) -> Callable[[Box], np.ndarray]:
    """A windowed reader of the finished label map."""
    array = scene.labels.array("labels")
    return lambda box: np.asarray(array[box.slices])
