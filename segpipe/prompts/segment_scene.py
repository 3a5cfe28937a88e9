"""Segment a scene whose prompts are collected: window by window, or through a volume slice by slice.

Each step can be run again: windows that are not in the store yet are encoded, their prompts decoded. In a
volume a model with a memory of frames follows an object by it; for others the mask on one slice is the prompt
on the next. Every slice's embedding is kept like any other; a volume is one task.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from segpipe.config.job import parse_memory
from segpipe.errors import SceneError
from segpipe.inference.queues import Prefetch
from segpipe.inference.settings import Settings
from segpipe.models.registry import device_of
from segpipe.models.weights import weights_fingerprint
from segpipe.pipeline.model_scene import Scene, pending_blocks
from segpipe.pipeline.predict import predict_blocks
from segpipe.pipeline.progress import Done, together
from segpipe.prompts.collect_prompts import collect_prompts
from segpipe.prompts.grounding.detect_scene import detect_windows
from segpipe.prompts.masks.automatic import (
    GridMasks,
    GridPoints,
    GridTally,
    grid_prompts,
    segment_grid,
)
from segpipe.prompts.masks.decode import ObjectMask, decode_window
from segpipe.prompts.masks.embeddings import check_budget, read_box, window_id
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.masks.window_masks import CANDIDATES, WindowMasks
from segpipe.prompts.prompt_scene import PromptScene
from segpipe.prompts.prompt_set import PromptSet
from segpipe.prompts.segmenters.base import Embedding, Segmenter
from segpipe.prompts.segmenters.registry import load_segmenter
from segpipe.prompts.volumes.propagate import SliceMask, Stop, Tracker, propagate
from segpipe.prompts.volumes.propagate_memory import VideoNetwork, VideoTracker, has_memory
from segpipe.prompts.volumes.propagate_prompts import Linker
from segpipe.store.stop import StopToken
from segpipe.tiling.pyramid import Window
from segpipe.tiling.windows import Blocks

AHEAD = 2
"""Windows read before the one that is encoded."""
DECODED = 16
"""Prompts of a kind in one pass of a GPU's decoder; fewer are padded: a batch's shape is part of its bits."""
RECENT = 4
"""Embeddings of a volume that are kept at hand, for objects that ask for the same one after another. With
more windows on a slice, some that are needed again count twice."""

_segmenters: dict[tuple[str, str, str, str, int, int], Segmenter] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Round:
    """Windows that are segmented together; what does not fit its window comes again in the next round."""

    number: int
    """0 is the first."""
    windows: tuple[Window, ...]
    """Those without masks yet."""
    total: int
    """With those that have theirs."""


def segmenter_of(scene: PromptScene) -> Segmenter:
    """The scene's promptable model; the same object for the same request in one process."""
    card, settings = scene.card, scene.settings
    at_once = _at_once(settings)
    key = (
        card.prediction_fingerprint(), weights_fingerprint(card), settings.device, settings.precision,
        settings.threads, at_once,
    )  # fmt: skip
    with _lock:
        if key not in _segmenters:
            _segmenters[key] = load_segmenter(
                card, device_of(settings.device), settings.threads, settings.precision, at_once
            )
        return _segmenters[key]


def _at_once(settings: Settings) -> int:
    """Prompts in one pass of the decoder.

    On a CPU one: a pass takes as long as its prompts, most windows have few, and the memory of one
    result is used again for the next.
    """
    return DECODED if settings.device.startswith("cuda") else 1


def create_mask_stages(scene: PromptScene) -> None:
    """Make the stages of embeddings and masks where they are absent."""
    info = {"scene": scene.ref.name, "identity": scene.pixels.identity}
    scene.embeddings.create(info)
    scene.masks.create(None, Blocks((1,), (1,), (0,)), [], info)
    scene.masks.scrub()


def next_round(scene: PromptScene, number: int) -> Round | None:
    """Return the windows of a round, by the masks of those before; None: nothing is left to segment.

    In the first one an object takes the finest window that holds it with its margin, and a grid its own
    windows; in each later one come the objects whose masks reached their window's border, one level coarser.

    Raises:
        SceneError: embeddings would take more than the budget.
    """
    windows = set(_by_window(scene, scene.prompt_set, number))
    if number == 0 and scene.options.everything:
        windows |= {w for grid in _grids(scene) for w in grid.windows}
    if not windows:
        return None
    budget = parse_memory(scene.options.cache)
    check_budget(len(windows), scene.embeddings.window_bytes, budget)
    done = scene.masks.done()
    left = tuple(w for w in sorted(windows) if _name(number, w) not in done)
    return Round(number, left, len(windows))


def _name(number: int, window: Window) -> str:
    return f"{number}.{window_id(window)}"


def _by_window(scene: PromptScene, prompts: PromptSet, number: int) -> dict[Window, np.ndarray]:
    """Return the objects (ascending) that each window has in a round."""
    min_level = np.zeros(len(prompts), np.int64)
    chosen = np.ones(len(prompts), bool)
    for before in range(number):
        cut = np.zeros(len(prompts), bool)
        for window in _needed(scene, prompts, min_level, chosen):
            part = WindowMasks.load(scene.masks.read_part(_name(before, window)))
            again = part.number[part.cut & (part.level < scene.pyramid.levels - 1)]
            at = np.searchsorted(prompts.objects, again)
            cut[at] = True
            min_level[at] = window.level + 1
        chosen = cut
    return {w: prompts.objects[rows] for w, rows in _needed(scene, prompts, min_level, chosen).items()}


def _needed(
    scene: PromptScene, prompts: PromptSet, min_level: np.ndarray, chosen: np.ndarray
) -> dict[Window, np.ndarray]:
    """Return rows of the chosen objects by the window they take, each no finer than its ``min_level``."""
    extents = prompts.extents()
    found: dict[Window, list[int]] = {}
    for level in np.unique(min_level[chosen]).tolist():
        rows = np.flatnonzero(chosen & (min_level == level))
        windows, which = scene.pyramid.needed(extents.start[rows], extents.stop[rows], level)
        for row, k in zip(rows.tolist(), which.tolist(), strict=True):
            found.setdefault(windows[k], []).append(row)
    return {w: np.array(sorted(rows)) for w, rows in sorted(found.items())}


def _grids(scene: PromptScene) -> list[GridPoints]:
    """The points of the grid on each of its levels."""
    grid, pyramid = scene.options.grid, scene.pyramid
    return [grid_prompts(pyramid, grid.points, k) for k in range(min(grid.levels, pyramid.levels))]


def segment_windows(
    scene: PromptScene,
    number: int,
    windows: Sequence[Window],
    stop: StopToken | None = None,
    attempt: int = 1,
) -> Done:
    """Encode some windows of a round where their embeddings are not kept, decode them, and commit the masks.

    Raises:
        StoppedError: a stop was requested; what is done stays.
        SceneError, DeviceMemoryError.
    """
    begun = time.perf_counter()
    done = scene.masks.done() if attempt > 1 else set()
    todo = [w for w in windows if _name(number, w) not in done]
    prompts = scene.prompt_set
    objects = _by_window(scene, prompts, number)
    segmenter, at_once = segmenter_of(scene), _at_once(scene.settings)
    grids = _grids(scene) if number == 0 and scene.options.everything else []
    encoded = 0
    for window, embedding, valid, new in embedded(scene, segmenter, [(w, 0) for w in todo], stop):
        encoded += new
        mine = prompts.of_objects(objects.get(window, np.zeros(0, np.int64)))
        masks = decode_window(
            segmenter, embedding, window, scene.pyramid, mine, scene.options.choice, at_once, valid=valid
        )
        found = WindowMasks.of_window(masks, window.level)
        files = scene.masks.write_part(_name(number, window), found.dump())
        for points in grids:
            if window in points.windows:
                of_grid, tally = segment_grid(
                    segmenter, embedding, window, scene.pyramid, points, scene.options.grid,
                    scene.job.measure.smallest, at_once, valid,
                )  # fmt: skip
                files |= scene.masks.write_part(f"grid.{window_id(window)}", of_grid.dump(tally))
        receipt = {"objects": len(masks), "encoded": int(new), "attempts": attempt}
        scene.masks.commit(_name(number, window), receipt, files)
    seconds = time.perf_counter() - begun
    return Done(len(todo), len(windows) - len(todo), seconds, {"encoder passes": float(encoded)})


def embedded(
    scene: PromptScene, segmenter: Segmenter, windows: Sequence[tuple[Window, int]], stop: StopToken | None
) -> Iterator[tuple[Window, Embedding, np.ndarray, bool]]:
    """Yield each window of a slice with its embedding (float16), what has data, and whether it is new.

    Pixels are read ahead while the device computes. A pass has the planned number of windows; a short one
    repeats its last, because a batch's shape is part of its bits.
    """
    cache, batch = scene.embeddings, scene.settings.batch
    kept = cache.stage.done()
    with scene.open_image() as store:
        normaliser, planes, pyramid = scene.normaliser, scene.planes, scene.pyramid

        def pixels(window: Window, index: int) -> tuple[np.ndarray, np.ndarray]:
            return read_box(store, normaliser, planes, pyramid.box(window), 1 << window.level, index)

        known = [p for p in windows if window_id(*p) in kept]
        for window, index in known:
            _check_stop(stop)
            yield window, *cache.read(window, index), False
        new = [p for p in windows if window_id(*p) not in kept]
        with Prefetch(((p, pixels(*p)) for p in new), max(AHEAD, batch)) as ahead:
            waiting: list[tuple[tuple[Window, int], tuple[np.ndarray, np.ndarray]]] = []
            for number, item in enumerate(ahead, start=1):
                waiting.append(item)
                if len(waiting) < batch and number < len(new):
                    continue
                _check_stop(stop)
                shown = [p for _, (p, _) in waiting]
                shown += shown[-1:] * (batch - len(shown))
                found = segmenter.encode_batch(np.stack(shown))
                for (where, (_, valid)), embedding in zip(waiting, found, strict=False):
                    half = embedding.half()
                    cache.write(*where, half, valid)
                    yield where[0], half, valid, True
                waiting = []


def _check_stop(stop: StopToken | None) -> None:
    if stop is not None:
        stop.check()


def load_window_masks(scene: PromptScene) -> WindowMasks:
    """Return the masks of a raster's prompts, of each object the coarsest window's.

    Raises:
        SceneError: windows have no masks.
    """
    parts: list[WindowMasks] = []
    number = 0
    while (here := next_round(scene, number)) is not None:
        if here.windows:
            raise SceneError(f"{len(here.windows)} windows have no answer; run the job again")
        objects = _by_window(scene, scene.prompt_set, number)
        parts += [WindowMasks.load(scene.masks.read_part(_name(number, w))) for w in objects]
        number += 1
    return WindowMasks.merge(parts or [WindowMasks.of_window([], 0)])


def read_grid_masks(scene: PromptScene) -> list[tuple[GridMasks, GridTally]]:
    """Return the masks of the grid in each window."""
    if not scene.options.everything:
        return []
    windows = sorted({w for grid in _grids(scene) for w in grid.windows})
    return [GridMasks.load(scene.masks.read_part(f"grid.{window_id(w)}")) for w in windows]


VOLUME = "volume"
"""Name of the part that holds a volume's masks."""

_networks: dict[tuple[str, str, str, int], VideoNetwork] = {}


def segment_volume(scene: PromptScene, stop: StopToken | None = None) -> Done:
    """Segment the prompted slices of a volume, follow every object both ways, and commit the masks.

    Raises:
        StoppedError: a stop was requested; the embeddings made so far stay.
    """
    begun = time.perf_counter()
    if VOLUME in scene.masks.done():
        return Done(0, 1, time.perf_counter() - begun, {"encoder passes": 0.0})
    axis, shape, pyramid = scene.planes.axis, scene.geometry.shape, scene.pyramid
    assert axis is not None
    segmenter, prompts = segmenter_of(scene), scene.prompt_set
    passes = 0

    @lru_cache(RECENT)
    def embed(index: int, window: Window) -> Embedding:
        nonlocal passes
        [(_, embedding, _, new)] = embedded(scene, segmenter, [(window, index)], stop)
        passes += new
        return embedding

    if has_memory(scene.card):
        tracker: Tracker = VideoTracker(axis, shape[axis], pyramid, _network(scene), embed)
    else:
        tracker = Linker(axis, pyramid, segmenter, embed, scene.options.choice)
    found = propagate(prompts, axis, shape, pyramid, tracker, scene.options.volume)
    masks = _gathered(found, prompts.objects.tolist())
    files = scene.masks.write_part(VOLUME, masks.dump())
    scene.masks.commit(VOLUME, {"objects": len(masks), "encoded": passes}, files)
    return Done(1, 0, time.perf_counter() - begun, {"encoder passes": float(passes)})


def _network(scene: PromptScene) -> VideoNetwork:
    """The scene's video model; the same object for the same request in one process."""
    card, settings = scene.card, scene.settings
    key = (card.prediction_fingerprint(), weights_fingerprint(card), settings.device, settings.threads)
    if key not in _networks:
        _networks.clear()  # one at a time: they are large
        _networks[key] = VideoNetwork(card, device_of(settings.device), settings.threads)
    return _networks[key]


def _gathered(found: Iterator[SliceMask | Stop], objects: list[int]) -> WindowMasks:
    """Return the masks of each object on all slices, and why its chains ended."""
    sections: dict[int, list[tuple[ObjectMask, Patch]]] = {number: [] for number in objects}
    ends: dict[int, list[str]] = {number: [] for number in objects}
    for item in found:
        if isinstance(item, Stop):
            end = f"{item.how.value} from slice {item.origin} to {item.last}: {item.why.value}"
            ends[item.object].append(end)
        elif item.mask.patch is not None:
            sections[item.mask.object].append((item.mask, item.mask.patch))
    every, n = list(sections.values()), len(objects)
    scales = [max((patch.scale for _, patch in one), default=1) for one in every]
    return WindowMasks(
        number=np.array(objects, np.int64),
        candidate=np.array([one[-1][0].candidate if one else 0 for one in every], np.int64),
        iou=np.array([np.mean([m.iou for m, _ in one]) if one else np.nan for one in every], np.float64),
        stability=np.full(n, np.nan), all_iou=np.full((n, CANDIDATES), np.nan),
        all_stability=np.full((n, CANDIDATES), np.nan), point=np.full((n, 2), np.nan),
        level=np.array([scale.bit_length() - 1 for scale in scales], np.int64),
        cut=np.array([any(m.cut for m, _ in one) for one in every], bool),
        reason=tuple("; ".join(ends[number]) for number in objects),
        patches=tuple(tuple(sorted((p for _, p in one), key=lambda p: p.plane or (0, 0))) for one in every),
    )  # fmt: skip


def answer_scene(
    scene: PromptScene,
    stop: StopToken | None = None,
    progress: Callable[[int, int], None] = lambda n, of: None,
) -> Done:
    """Settle the prompts of a scene and segment them, round by round.

    Args:
        scene: its stages are made.
        stop: looked at before every window.
        progress: told the windows of a round that are done, and how many it has.

    Raises:
        SceneError, StoppedError, DeviceMemoryError.
    """
    grounder = None if scene.collected else scene.grounder
    if isinstance(grounder, Scene):
        predict_blocks(grounder, pending_blocks(grounder), stop)
    elif grounder is not None:
        detect_windows(grounder, grounder.pending(), stop)
    collect_prompts(scene)
    create_mask_stages(scene)
    if scene.planes.axis is not None:
        return segment_volume(scene, stop)
    done: list[Done] = []
    while (here := next_round(scene, len(done))) is not None:
        progress(here.total - len(here.windows), here.total)
        done.append(segment_windows(scene, here.number, here.windows, stop))
        progress(here.total, here.total)
    return together(done, 0)
