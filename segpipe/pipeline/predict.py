"""The steps of a scene, one function each: what the tasks wrap. Every one can be run again."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import cc3d
import numpy as np
from scipy import ndimage

from segpipe.config.card import Card
from segpipe.errors import SceneError
from segpipe.pipeline.model_scene import Scene, check_blocks, check_worker, is_predicted, pending_blocks
from segpipe.pipeline.progress import Done
from segpipe.store.arrays import ArraySpec
from segpipe.store.receipts import Marks
from segpipe.store.stage import WHOLE
from segpipe.store.stop import StopToken
from segpipe.tiling.windows import Index

if TYPE_CHECKING:
    from segpipe.models.base import ObjectModel, SegmentationModel


def predict_blocks(
    scene: Scene,
    blocks: Sequence[Index],
    stop: StopToken | None = None,
    attempt: int = 1,
    progress: Callable[[int], None] = lambda blocks: None,
) -> Done:
    """Compute and commit the labels of some blocks: of those without a receipt.

    Receipts are looked at when it begins and again before each block: Dask sends a lost worker's batch to
    another one as if it were new, and a flow that was killed may have left tasks at work.

    Args:
        stop: looked at before every block; None: nobody asks for a stop.
        attempt: recorded in the receipts.
        progress: told the number of blocks finished, after each.

    Raises:
        StoppedError, SceneError, DeviceMemoryError.
    """
    from segpipe.inference.engine import Engine
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
    normaliser = Normaliser(card, scene.pixels.scaling, Statistics(scene.statistics))
    with scene.open_blocks(attempt, progress) as store:
        engine = Engine(scene.plan, card, normaliser, model, store, settings.tta)
        timings = engine.run(todo, stop.check if stop else lambda: None, is_done)
    seconds, elements = time.perf_counter() - begun, computed * math.prod(scene.plan.blocks.block)
    return Done(computed, len(blocks) - computed, seconds, vars(timings).copy(), elements)


def finish_labels(scene: Scene) -> Done:
    """The card's clean-up, or the joining of objects, over a finished scene; compacts the receipts.

    Raises:
        SceneError: predictions are missing or were dropped.
    """
    from segpipe.pipeline.join_objects import join_objects

    begun = time.perf_counter()
    scene.predict.check()
    missing = pending_blocks(scene)
    if missing:
        raise SceneError(f"{len(missing)} blocks have no prediction; run the job again")
    scene.predict.compact()
    if not scene.direct and scene.ingest.exists:
        scene.ingest.compact()
    if scene.labels == scene.predict:
        return Done(0, 0, time.perf_counter() - begun, {})
    scene.labels.scrub()
    if WHOLE in scene.labels.done():
        return Done(0, 1, time.perf_counter() - begun, {})
    if scene.card.output.kind != "semantic":
        join_objects(scene)
        return Done(1, 0, time.perf_counter() - begun, {})
    clean = ArraySpec("labels", scene.card.label_dtype, scene.nodata, labels=True)
    info = {"scene": scene.ref.name}
    blocks = scene.labels.create(scene.geometry, scene.plan.blocks, [clean], info, whole=True)
    cleaned = clean_labels(scene.predict.read("labels", scene.geometry.box.slices), scene.card)
    files: Marks = {}
    for index in blocks.indices():
        box = blocks.box(index)
        files |= scene.labels.write("labels", box.slices, cleaned[box.slices])
    scene.labels.commit(WHOLE, {}, files)
    return Done(1, 0, time.perf_counter() - begun, {})


def clean_labels(labels: np.ndarray, card: Card) -> np.ndarray:
    """The label map (y, x) or (z, y, x) after the card's clean-up; nodata is never touched.

    Classes are cleaned in the card's order, each against the background (the card's first class).
    Components are 8- or 26-connected; holes are background not reached from the border by faces.
    """
    out = labels.copy()
    background = card.classes[0].value
    for item in card.classes[1:]:
        mask = out == item.value
        if not mask.any():
            continue
        if card.cleanup.largest_component:
            components = cc3d.connected_components(mask, connectivity=26 if mask.ndim == 3 else 8)
            counts = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"]
            counts[0] = 0
            largest = int(counts.argmax())
            out[mask & (components != largest)] = background
            mask = out == item.value
        if card.cleanup.fill_holes:
            filled = ndimage.binary_fill_holes(mask)
            out[filled & (out == background)] = item.value
    return out
