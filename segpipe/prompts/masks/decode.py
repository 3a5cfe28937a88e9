"""Answers: the objects that take one window are asked of its embedding, and each gets a mask.

Prompts come as positions on the scene's plane, in array order, and go to the segmenter as x, y of the
window. Of a prompt's candidates one is taken (`prompts.masks.candidates`); the others stay as numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import shapely

from segpipe.config.prompts import Choice
from segpipe.geometry.box import Box
from segpipe.prompts.inputs.prompts import Prompts, check_one_box, outline_cover
from segpipe.prompts.masks.candidates import choose, measure
from segpipe.prompts.masks.patches import Patch, crop
from segpipe.prompts.segmenters.base import Embedding, Prompt, Segmenter, mask_logits
from segpipe.tiling.pyramid import Pyramid, Window

TOLERANCE = 1e-6
"""Elements of a window by which rounding may put a prompt outside."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What a segmenter says of one object. Elements are the window's."""

    object: int
    patch: Patch | None
    """None: the mask is empty."""
    candidate: int
    """Which of k masks was taken, in the model's order."""
    iou: float
    """That the model predicts of the mask taken."""
    stability: float
    """Of the mask taken; NaN: `segpipe.prompts.segmenters.base.stability_score`."""
    all_iou: np.ndarray
    """(k,) float64, of every candidate."""
    all_stability: np.ndarray
    """(k,) float64."""
    all_elements: np.ndarray
    """(k,) int64: an element of level l is 4**l elements of the plane."""
    reason: str
    """How the mask was chosen, and what of the prompt was left out."""
    cut: bool
    """The mask reaches the window's border inside the scene: there may be more of it beyond."""


@dataclass(frozen=True, eq=False)
class View:
    """What of a window is there to be seen."""

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


def view_of(window: Window, pyramid: Pyramid, valid: np.ndarray | None = None) -> View:
    """What of a window is there to be seen.

    Args:
        window: of the pyramid.
        pyramid: of a plane.
        valid: (y, x) bool, which of the window's elements have data; None: all on the plane.
    """
    height, width = pyramid.shape
    box, scale = pyramid.box(window), 1 << window.level
    there = np.zeros((pyramid.window, pyramid.window), bool)
    there[: -(-(height - box.start[0]) // scale), : -(-(width - box.start[1]) // scale)] = True
    return View(box, scale, (height, width), there if valid is None else there & valid)


def answer_window(
    segmenter: Segmenter,
    embedding: Embedding,
    window: Window,
    pyramid: Pyramid,
    prompts: Prompts,
    choice: Choice,
    at_once: int = 64,
    plane: tuple[int, int] | None = None,
    valid: np.ndarray | None = None,
) -> list[Answer]:
    """Masks of the objects that take one window, in the order of ``prompts.objects``.

    Neither the other objects nor the order of prompts change a bit of an answer. Points outside the window
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
    view = view_of(window, pyramid, valid)
    asked = [_asked(segmenter, view, pyramid, window, part) for part in _objects(prompts)]
    answers: list[Answer] = []
    for first in range(0, len(asked), at_once):
        some = asked[first : first + at_once]
        found = segmenter.decode(embedding, [a.prompt for a in some])
        for a, logits, iou in zip(some, found.logits, found.iou, strict=True):
            answers.append(_answer(a, logits, iou, view, choice, plane))
    return answers


@dataclass(frozen=True, eq=False)
class _Asked:
    """One object's prompt in a window."""

    object: int
    prompt: Prompt
    box: np.ndarray | None
    """(2, 2) start and stop of its box, y, x of the window."""
    left_out: int
    """Points outside the window."""


def _answer(
    asked: _Asked,
    logits: np.ndarray,
    iou: np.ndarray,
    view: View,
    choice: Choice,
    plane: tuple[int, int] | None,
) -> Answer:
    """From candidates (k, y, x)."""
    seen = view.only(logits)
    measured = measure(seen, iou)
    index, reason = choose(choice, measured, asked.box)
    if asked.left_out:
        points = "point" if asked.left_out == 1 else "points"
        reason += f"; {asked.left_out} {points} outside the window left out"
    return Answer(
        asked.object,
        view.patch(logits[index], plane),
        index,
        float(measured.iou[index]),
        float(measured.stability[index]),
        measured.iou,
        measured.stability,
        measured.elements,
        reason,
        bool(view.cut(seen[index : index + 1] > 0)[0]),
    )


@dataclass(frozen=True, eq=False)
class _Object:
    """What is said of one object; positions on the plane."""

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


def _objects(prompts: Prompts) -> Iterator[_Object]:
    """One by one; points positive first, then by y and x, however they were given."""
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
        yield _Object(
            number,
            np.stack((extents.start[i], extents.stop[i])),
            points.position[mine],
            points.positive[mine],
            box_of.get(number),
            shapely.union_all(drawn[number]) if number in drawn else None,
        )


def _asked(segmenter: Segmenter, view: View, pyramid: Pyramid, window: Window, said: _Object) -> _Asked:
    """An object's prompts as the segmenter takes them.

    A box goes from outer edges to the centres of its first and last elements, at least one element's centre.
    """
    end, last = np.array(segmenter.window) - 0.5, np.array(view.shape) - 0.5
    if segmenter.window != (pyramid.window, pyramid.window):
        raise ValueError(f"a segmenter of {segmenter.window} with a pyramid of {pyramid.window}")
    placed = pyramid.to_window(np.clip(said.extent, -0.5, last), window)
    if (placed < -0.5 - TOLERANCE).any() or (placed > end + TOLERANCE).any():
        raise ValueError(f"object {said.number}, {said.extent.tolist()}, does not lie in {view.box}")
    local = pyramid.to_window(said.points, window)
    inside = ((local >= -0.5) & (local <= end)).all(axis=1)
    prompt = Prompt(local[inside, ::-1].astype(np.float32), said.positive[inside].astype(np.int64))
    box = None
    if said.box is not None:
        box = np.clip(pyramid.to_window(np.clip(said.box, -0.5, last), window), -0.5, end)
        middle = box.mean(axis=0)
        centres = np.minimum(box[0] + 0.5, middle), np.maximum(box[1] - 0.5, middle)
        prompt = replace(prompt, box_xyxy=np.concatenate([c[::-1] for c in centres]).astype(np.float32))
    if said.outline is not None:
        cover = outline_cover(said.outline, view.box, segmenter.window)
        prompt = replace(prompt, mask=mask_logits(cover, segmenter.mask_shape))
    return _Asked(said.number, prompt, box, int((~inside).sum()))
