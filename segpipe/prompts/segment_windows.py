"""Windows are encoded where nobody did before, and asked: what the tasks wrap, each to be run again."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from segpipe.config.job import parse_memory
from segpipe.errors import SceneError
from segpipe.inference.queues import Prefetch
from segpipe.inference.settings import Settings
from segpipe.models.registry import device_of
from segpipe.models.weights import weights_fingerprint
from segpipe.pipeline.progress import Done
from segpipe.prompts.inputs.prompts import Prompts
from segpipe.prompts.masks.automatic import (
    COLUMNS,
    Automatic,
    Grid,
    Masks,
    Tally,
    automatic_window,
    grid_prompts,
)
from segpipe.prompts.masks.decode import answer_window
from segpipe.prompts.masks.embedding_cache import check_budget, window_id
from segpipe.prompts.masks.mask_table import Answered, answered, together
from segpipe.prompts.masks.patches import dump_patches, load_patches
from segpipe.prompts.masks.read_planes import read_window
from segpipe.prompts.prompt_scene import PromptScene
from segpipe.prompts.prompt_set import Asked, take
from segpipe.prompts.segmenters.base import Embedding, Segmenter
from segpipe.prompts.segmenters.registry import load_segmenter
from segpipe.store.stops import StopToken
from segpipe.tiling.blocks import Blocks
from segpipe.tiling.pyramid import Window

AHEAD = 2
"""Windows read before the one that is encoded."""
DECODED = 16
"""Prompts of a kind in one pass of a GPU's decoder; fewer are padded: a batch's shape is part of its bits."""

_segmenters: dict[tuple[str, str, str, str, int, int], Segmenter] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Round:
    """Windows that are asked together; what does not fit its window is asked again in the next round."""

    number: int
    """0 is the first."""
    windows: tuple[Window, ...]
    """Those without an answer yet."""
    total: int
    """With those that have one."""


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

    On a CPU one: a pass takes as long as its prompts, most windows are asked for few, and the memory of one
    answer is used again for the next.
    """
    return DECODED if settings.device.startswith("cuda") else 1


def create_answers(scene: PromptScene) -> None:
    """Make the stages of embeddings and answers where they are absent."""
    info = {"scene": scene.ref.name, "identity": scene.pixels.identity}
    scene.embeddings.create(info)
    scene.answers.create(None, Blocks((1,), (1,), (0,)), [], info)


def next_round(scene: PromptScene, number: int) -> Round | None:
    """The windows of a round, by the answers of those before; None: nothing is left to ask.

    In the first one an object takes the finest window that holds it with its margin, and a grid its own
    windows; in each later one come the objects whose masks reached their window's border, one level coarser.

    Raises:
        SceneError: embeddings would take more than the budget.
    """
    asked = scene.asked
    windows = set(_by_window(scene, asked, number))
    if number == 0 and scene.options.everything:
        windows |= {w for grid in _grids(scene) for w in grid.windows}
    if not windows:
        return None
    budget = parse_memory(scene.options.cache)
    check_budget(len(windows), scene.embeddings.window_bytes, budget)
    done = scene.answers.done()
    left = tuple(w for w in sorted(windows) if _name(number, w) not in done)
    return Round(number, left, len(windows))


def _name(number: int, window: Window) -> str:
    return f"{number}.{window_id(window)}"


def _by_window(scene: PromptScene, asked: Asked, number: int) -> dict[Window, np.ndarray]:
    """The objects (ascending) that each window is asked for in a round."""
    prompts = asked.prompts
    least = np.zeros(len(prompts), np.int64)
    chosen = np.ones(len(prompts), bool)
    for before in range(number):
        cut = np.zeros(len(prompts), bool)
        for window in _needed(scene, prompts, least, chosen):
            part = Answered.load(scene.answers.read_part(_name(before, window)))
            again = part.number[part.cut & (part.level < scene.pyramid.levels - 1)]
            at = np.searchsorted(prompts.objects, again)
            cut[at] = True
            least[at] = window.level + 1
        chosen = cut
    return {w: prompts.objects[rows] for w, rows in _needed(scene, prompts, least, chosen).items()}


def _needed(
    scene: PromptScene, prompts: Prompts, least: np.ndarray, chosen: np.ndarray
) -> dict[Window, np.ndarray]:
    """Places of the chosen objects by the window they take, each no finer than its ``least``."""
    extents = prompts.extents()
    found: dict[Window, list[int]] = {}
    for level in np.unique(least[chosen]).tolist():
        rows = np.flatnonzero(chosen & (least == level))
        windows, which = scene.pyramid.needed(extents.start[rows], extents.stop[rows], level)
        for row, k in zip(rows.tolist(), which.tolist(), strict=True):
            found.setdefault(windows[k], []).append(row)
    return {w: np.array(sorted(rows)) for w, rows in sorted(found.items())}


def automatic_of(scene: PromptScene) -> Automatic:
    """The grid's thresholds."""
    grid = scene.options.grid
    smallest = scene.job.measure.smallest
    return Automatic(grid.points, grid.iou, grid.stability, grid.overlap, grid.levels - 1, smallest)


def _grids(scene: PromptScene) -> list[Grid]:
    settings = automatic_of(scene)
    return [grid_prompts(scene.pyramid, settings, level) for level in settings.levels(scene.pyramid)]


def answer_windows(
    scene: PromptScene,
    number: int,
    windows: Sequence[Window],
    stop: StopToken | None = None,
    attempt: int = 1,
) -> Done:
    """Encode some windows of a round where their embeddings are not kept, ask them, and commit the answers.

    Raises:
        StoppedError: a stop was requested; what is done stays.
        SceneError, DeviceMemoryError.
    """
    begun = time.perf_counter()
    done = scene.answers.done() if attempt > 1 else set()
    todo = [w for w in windows if _name(number, w) not in done]
    asked = scene.asked
    objects = _by_window(scene, asked, number)
    segmenter, settings, at_once = segmenter_of(scene), automatic_of(scene), _at_once(scene.settings)
    grids = _grids(scene) if number == 0 and scene.options.everything else []
    encoded = 0
    for window, embedding, valid, new in embedded(scene, segmenter, [(w, 0) for w in todo], stop):
        encoded += new
        mine = take(asked.prompts, objects.get(window, np.zeros(0, np.int64)))
        answers = answer_window(
            segmenter, embedding, window, scene.pyramid, mine, scene.options.choice, at_once, valid=valid
        )
        scene.answers.write_part(_name(number, window), answered(answers, window.level).dump())
        for grid in grids:
            if window in grid.windows:
                found = automatic_window(
                    segmenter, embedding, window, scene.pyramid, grid, settings, at_once, valid=valid
                )
                scene.answers.write_part(f"grid.{window_id(window)}", dump_masks(*found))
        receipt = {"objects": len(answers), "encoded": int(new), "attempts": attempt}
        scene.answers.commit(_name(number, window), receipt)
    seconds = time.perf_counter() - begun
    return Done(len(todo), len(windows) - len(todo), seconds, {"encoder passes": float(encoded)})


def embedded(
    scene: PromptScene, segmenter: Segmenter, places: Sequence[tuple[Window, int]], stop: StopToken | None
) -> Iterator[tuple[Window, Embedding, np.ndarray, bool]]:
    """The embedding of each window of a slice, as it is kept (float16), what has data, whether it is new.

    Pixels are read ahead while the device computes. A pass has the planned number of windows; a short one
    repeats its last, because a batch's shape is part of its bits.
    """
    cache, batch = scene.embeddings, scene.settings.batch
    kept = cache.stage.done()
    with scene.open_image() as store:
        normaliser = scene.normaliser

        def pixels(window: Window, index: int) -> tuple[np.ndarray, np.ndarray]:
            return read_window(store, normaliser, scene.planes, scene.pyramid, window, index)

        known = [p for p in places if window_id(*p) in kept]
        for window, index in known:
            _go_on(stop)
            yield window, *cache.read(window, index), False
        new = [p for p in places if window_id(*p) not in kept]
        with Prefetch(((p, pixels(*p)) for p in new), max(AHEAD, batch)) as ahead:
            waiting: list[tuple[tuple[Window, int], tuple[np.ndarray, np.ndarray]]] = []
            for number, item in enumerate(ahead, start=1):
                waiting.append(item)
                if len(waiting) < batch and number < len(new):
                    continue
                _go_on(stop)
                shown = [p for _, (p, _) in waiting]
                shown += shown[-1:] * (batch - len(shown))
                found = segmenter.encode_batch(np.stack(shown))
                for (place, (_, valid)), embedding in zip(waiting, found, strict=False):
                    half = embedding.half()
                    cache.write(*place, half, valid)
                    yield place[0], half, valid, True
                waiting = []


def _go_on(stop: StopToken | None) -> None:
    if stop is not None:
        stop.check()


def all_answers(scene: PromptScene) -> Answered:
    """The answers of a raster, of each object the coarsest window's.

    Raises:
        SceneError: windows have no answer.
    """
    parts: list[Answered] = []
    number = 0
    while (here := next_round(scene, number)) is not None:
        if here.windows:
            raise SceneError(f"{len(here.windows)} windows have no answer; run the job again")
        objects = _by_window(scene, scene.asked, number)
        parts += [Answered.load(scene.answers.read_part(_name(number, w))) for w in objects]
        number += 1
    return together(parts or [answered([], 0)])


def grid_masks(scene: PromptScene) -> list[tuple[Masks, Tally]]:
    """What the grid found in each window."""
    if not scene.options.everything:
        return []
    windows = sorted({w for grid in _grids(scene) for w in grid.windows})
    return [load_masks(scene.answers.read_part(f"grid.{window_id(w)}")) for w in windows]


def dump_masks(masks: Masks, tally: Tally) -> bytes:
    """Exact, as one blob."""
    buffer = io.BytesIO()
    np.savez(
        buffer, tally=np.array(astuple(tally), np.int64),
        patches=np.frombuffer(dump_patches(masks.patches), np.uint8),
        **{name: getattr(masks, name) for name in COLUMNS},
    )  # fmt: skip
    return buffer.getvalue()


def load_masks(data: bytes) -> tuple[Masks, Tally]:
    """The inverse of `dump_masks`."""
    with np.load(io.BytesIO(data)) as f:
        masks = Masks(**{name: f[name] for name in COLUMNS}, patches=load_patches(f["patches"].tobytes()))
        return masks, Tally(*f["tally"].tolist())
