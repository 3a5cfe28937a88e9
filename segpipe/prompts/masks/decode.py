"""Decode the prompts of one window to masks, and take one of the candidates of each.

Prompts come as positions on the scene's plane, in array order, and go to the segmenter as x, y of the window.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import shapely

from segpipe.config.prompts import Choice
from segpipe.geometry.box import Box
from segpipe.prompts.masks.nms import box_iou
from segpipe.prompts.masks.patches import Patch, crop
from segpipe.prompts.prompt_set import PromptSet, check_one_box, outline_cover
from segpipe.prompts.segmenters.base import Embedding, Prompt, Segmenter, mask_logits, stability_score
from segpipe.tiling.pyramid import Pyramid, Window

TOLERANCE = 1e-6
"""Elements of a window by which rounding may put a prompt outside."""


@dataclass(frozen=True, eq=False, kw_only=True)
class CandidateStats:
    """Scores, sizes and bounding boxes of k masks of one window."""

    iou: np.ndarray
    """(k,) float64: predicted by the model."""
    stability: np.ndarray
    """(k,) float64: `stability_score`; NaN where even the lower threshold leaves no element."""
    elements: np.ndarray
    """(k,) int64: of the window."""
    start: np.ndarray
    """(k, 2) float64: y, x at which the bounding box begins, an outer edge of its first element, as boxes of
    prompts have it; NaN of an empty mask."""
    stop: np.ndarray
    """(k, 2) float64: where it ends."""


def measure(logits: np.ndarray, iou: np.ndarray) -> CandidateStats:
    """Score and measure masks.

    Args:
        logits: (k, y, x): above 0 is the object. −inf where there can be none.
        iou: (k,) as the model predicted it.
    """
    masks = logits > 0
    start, stop = np.full((2, len(masks), 2), np.nan)
    for axis in (0, 1):
        lines = np.asarray(masks.any(axis=2 - axis))
        some = lines.any(axis=-1)
        start[some, axis] = lines[some].argmax(axis=-1) - 0.5
        stop[some, axis] = lines.shape[-1] - lines[some, ::-1].argmax(axis=-1) - 0.5
    elements = np.count_nonzero(masks, axis=(-2, -1)).astype(np.int64)
    return CandidateStats(
        iou=np.asarray(iou, np.float64), stability=stability_score(logits), elements=elements, start=start,
        stop=stop,
    )  # fmt: skip


def choose_candidate(choice: Choice, stats: CandidateStats, box: np.ndarray | None = None) -> tuple[int, str]:
    """Return the candidate that is taken, and why in words. Of equals it is the first.

    Args:
        choice: the rule.
        stats: of the candidates, in the model's order.
        box: (2, 2) start and stop of the prompt's box, y, x of the window; None: the prompt has none.
    """
    some = np.flatnonzero(stats.elements)
    if not len(some):
        return int(stats.iou.argmax()), f"no element in any of {len(stats.iou)}"
    index, reason = _choose(choice, stats, some, box)
    of = f"{len(some)}" if len(some) == len(stats.iou) else f"{len(some)} that are not empty"
    return index, f"{reason}, of {of}"


def _choose(
    choice: Choice, stats: CandidateStats, some: np.ndarray, box: np.ndarray | None
) -> tuple[int, str]:
    """The same of those numbered ``some``."""
    if choice is Choice.box and box is not None:
        agreement = box_iou(stats.start[some], stats.stop[some], *box)
        best = int(agreement.argmax())
        return int(some[best]), f"box agrees best, IoU {agreement[best]:.2f}"
    if choice in (Choice.score, Choice.box):
        best = int(some[stats.iou[some].argmax()])
        missing = "no box to agree with: " if choice is Choice.box else ""
        return best, f"{missing}highest predicted IoU"
    elements = stats.elements[some]
    at = {Choice.small: 0, Choice.medium: (len(some) - 1) // 2, Choice.large: -1}[choice]
    index = int(some[(elements == np.sort(elements)[at]).argmax()])
    return index, f"{choice.value} by elements"


@dataclass(frozen=True, eq=False, kw_only=True)
class ObjectMask:
    """The mask of one object in one window."""

    object: int
    patch: Patch | None
    """None: the mask is empty."""
    candidate: int
    """Which of the candidates was taken, in the model's order."""
    stats: CandidateStats
    """Of every candidate."""
    reason: str
    """How the mask was chosen, and what of the prompt was left out."""
    cut: bool
    """The mask reaches the window's border inside the scene: there may be more of it beyond."""

    @property
    def iou(self) -> float:
        """The IoU that the model predicts of the mask."""
        return float(self.stats.iou[self.candidate])

    @property
    def stability(self) -> float:
        """`segpipe.prompts.segmenters.base.stability_score` of the mask."""
        return float(self.stats.stability[self.candidate])


@dataclass(frozen=True, eq=False)
class WindowView:
    """The elements of a window on the plane, and those with data."""

    box: Box
    """(y, x) elements of the plane; may hang over its trailing edge."""
    scale: int
    """Elements of the plane per element of the window."""
    shape: tuple[int, int]
    """Elements of the plane."""
    valid: np.ndarray
    """(y, x) bool of the window's elements: on the plane, and with data."""

    def only(self, logits: np.ndarray) -> np.ndarray:
        """Logits (…, y, x) with −inf where nothing is to be seen."""
        return logits if self.valid.all() else np.where(self.valid, logits, np.float32(-np.inf))

    def cut(self, masks: np.ndarray) -> np.ndarray:
        """Whether masks (k, y, x) reach a border of the window that is not the plane's: (k,) bool."""
        found = np.zeros(len(masks), bool)
        for axis in (0, 1):
            if self.box.start[axis] > 0:
                found |= masks.take(0, axis=axis + 1).any(axis=1)
            if self.box.stop[axis] < self.shape[axis]:
                found |= masks.take(-1, axis=axis + 1).any(axis=1)
        return found

    def patch(self, logits: np.ndarray, plane: tuple[int, int] | None) -> Patch | None:
        """The mask of logits (y, x), cut to the object; None where it is empty.

        An element without data has its own logit, negative, so that the border lies between it and its
        neighbour also where logits are interpolated.
        """
        seen = np.where(self.valid, logits, -np.abs(logits))
        return crop(seen, self.box, self.scale, self.shape, plane)

    def mask(
        self, number: int, logits: np.ndarray, index: int, reason: str, stats: CandidateStats,
        plane: tuple[int, int] | None,
    ) -> ObjectMask:  # fmt: skip
        """Return one of the candidates (k, y, x) of an object as its mask.

        Args:
            number: of the object.
            logits: of all candidates.
            index: of the candidate that is taken.
            reason: why, in words.
            stats: of all candidates.
            plane: of a volume: axis and index of the slice.
        """
        return ObjectMask(
            object=number, patch=self.patch(logits[index], plane), candidate=index, stats=stats,
            reason=reason, cut=bool(self.cut(self.only(logits[index : index + 1]) > 0)[0]),
        )  # fmt: skip


def view_of(window: Window, pyramid: Pyramid, valid: np.ndarray | None = None) -> WindowView:
    """Return which elements of a window are on the plane and have data.

    Args:
        window: of the pyramid.
        pyramid: of a plane.
        valid: (y, x) bool, which of the window's elements have data; None: all on the plane.
    """
    height, width = pyramid.shape
    box, scale = pyramid.box(window), 1 << window.level
    there = np.zeros((pyramid.window, pyramid.window), bool)
    there[: -(-(height - box.start[0]) // scale), : -(-(width - box.start[1]) // scale)] = True
    return WindowView(box, scale, (height, width), there if valid is None else there & valid)


def decode_window(
    segmenter: Segmenter, embedding: Embedding, window: Window, pyramid: Pyramid, prompts: PromptSet,
    choice: Choice, at_once: int = 64, plane: tuple[int, int] | None = None, valid: np.ndarray | None = None,
) -> list[ObjectMask]:  # fmt: skip
    """Decode the objects that take one window, in the order of ``prompts.objects``.

    Neither the other objects nor the order of prompts change a bit of a mask. Points outside the window
    are left out; an object's points beside it may be anywhere.

    Args:
        segmenter: whose window is the pyramid's.
        embedding: of the window, as the segmenter gave it, or halved.
        window: of the pyramid.
        pyramid: of the plane.
        prompts: of these objects alone, positions on the plane (axes y, x).
        choice: which candidate is taken.
        at_once: prompts decoded in one call, 12 bytes each per element of the window.
        plane: of a volume, for the patches.
        valid: (y, x) bool, which of the window's elements have data; no other is ever of a mask.

    Raises:
        RequestError: an object has two boxes.
        ValueError: an object does not lie in the window.
    """
    if segmenter.window != (pyramid.window, pyramid.window):
        raise ValueError(f"a segmenter of {segmenter.window} with a pyramid of {pyramid.window}")
    view = view_of(window, pyramid, valid)
    items = [*_objects(prompts)]
    ready = [_prompt(segmenter, view, pyramid, window, item) for item in items]
    masks: list[ObjectMask] = []
    for first in range(0, len(items), at_once):
        here = slice(first, first + at_once)
        found = segmenter.decode(embedding, ready[here])
        for item, prompt, logits, iou in zip(items[here], ready[here], found.logits, found.iou, strict=True):
            stats = measure(view.only(logits), iou)
            box = None if item.box is None else _box_in_window(item.box, window, pyramid)
            index, reason = choose_candidate(choice, stats, box)
            if left_out := len(item.points) - len(prompt.points_xy):
                points = "point" if left_out == 1 else "points"
                reason += f"; {left_out} {points} outside the window left out"
            masks.append(view.mask(item.number, logits, index, reason, stats, plane))
    return masks


@dataclass(frozen=True, eq=False, kw_only=True)
class _ObjectPrompt:
    """The prompts of one object; positions on the plane."""

    number: int
    extent: np.ndarray
    """(2, 2) start and stop of what is positive."""
    points: np.ndarray
    """(p, 2)."""
    positive: np.ndarray
    """(p,) bool."""
    box: np.ndarray | None
    """(2, 2) start and stop."""
    outline: shapely.Geometry | None


def _objects(prompts: PromptSet) -> Iterator[_ObjectPrompt]:
    """Yield one object after the other; points positive first, then by y and x, however they were given."""
    check_one_box(prompts.boxes, "prompts")
    extents = prompts.extents()
    points, boxes, outlines = prompts.points, prompts.boxes, prompts.outlines
    order = np.lexsort((*points.position.T[::-1], ~points.positive, points.objects))
    first, last = (np.searchsorted(points.objects[order], prompts.objects, side=s) for s in ("left", "right"))
    box_of = dict(zip(boxes.objects.tolist(), np.stack((boxes.start, boxes.stop), axis=1), strict=True))
    drawn: dict[int, list[shapely.Geometry]] = {}
    for number, polygon in zip(outlines.objects.tolist(), outlines.polygons, strict=True):
        drawn.setdefault(number, []).append(polygon)
    for i, number in enumerate(prompts.objects.tolist()):
        mine = order[first[i] : last[i]]
        yield _ObjectPrompt(
            number=number, extent=np.stack((extents.start[i], extents.stop[i])),
            points=points.position[mine], positive=points.positive[mine], box=box_of.get(number),
            outline=shapely.union_all(drawn[number]) if number in drawn else None,
        )  # fmt: skip


def _prompt(
    segmenter: Segmenter, view: WindowView, pyramid: Pyramid, window: Window, item: _ObjectPrompt
) -> Prompt:
    """Return an object's prompts as the segmenter takes them."""
    end, last = pyramid.window - 0.5, np.array(view.shape) - 0.5
    local = pyramid.to_window(np.clip(item.extent, -0.5, last), window)
    if (local < -0.5 - TOLERANCE).any() or (local > end + TOLERANCE).any():
        raise ValueError(f"object {item.number}, {item.extent.tolist()}, does not lie in {view.box}")
    prompt = window_prompt(window, pyramid, item.points, item.positive, item.box)
    if item.outline is None:
        return prompt
    cover = outline_cover(item.outline, view.box, segmenter.window)
    return replace(prompt, mask=mask_logits(cover, segmenter.mask_shape))


def window_prompt(
    window: Window, pyramid: Pyramid, points: np.ndarray, positive: np.ndarray, box: np.ndarray | None
) -> Prompt:
    """Return positions on the plane as a segmenter takes them.

    Points beyond the window are left out: they say nothing about what it sees. A box goes from outer edges to
    the centres of its first and last elements, at least to one element's centre.

    Args:
        window: that sees everything positive.
        pyramid: of the plane.
        points: (p, 2) positions (y, x).
        positive: (p,) bool.
        box: (2, 2), its corners.
    """
    local = pyramid.to_window(points, window)
    inside = ((local >= -0.5) & (local <= pyramid.window - 0.5)).all(axis=1)
    corners = None
    if box is not None:
        seen = _box_in_window(box, window, pyramid)
        middle = seen.mean(axis=0)
        first, last = np.minimum(seen[0] + 0.5, middle), np.maximum(seen[1] - 0.5, middle)
        corners = np.concatenate((first[::-1], last[::-1])).astype(np.float32)
    return Prompt(local[inside, ::-1].astype(np.float32), positive[inside].astype(np.int64), corners)


def _box_in_window(box: np.ndarray, window: Window, pyramid: Pyramid) -> np.ndarray:
    """(2, 2) start and stop, y and x of the window, of the part of a box that the window sees."""
    on_plane = np.clip(box, -0.5, np.array(pyramid.shape) - 0.5)
    return np.asarray(np.clip(pyramid.to_window(on_plane, window), -0.5, pyramid.window - 0.5))
