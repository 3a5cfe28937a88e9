"""Split the prompts of a volume by slice, and place masks on the windows of a slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.prompts.masks.patches import Patch, patch_cover
from segpipe.prompts.prompt_set import PromptSet
from segpipe.tiling.pyramid import Pyramid, Window


@dataclass(frozen=True, eq=False, kw_only=True)
class SlicePrompt:
    """The prompts of one object on one slice, in positions (y, x) of the plane."""

    object: int
    index: int
    points: np.ndarray
    """(p, 2) float64."""
    positive: np.ndarray
    """(p,) bool."""
    box: np.ndarray | None
    """(2, 2) float64: its two corners."""

    @property
    def extent(self) -> np.ndarray:
        """(2, 2): the corners of the envelope of everything positive."""
        inside = self.points[self.positive]
        every = inside if self.box is None else np.concatenate((inside, self.box))
        return np.stack((every.min(axis=0), every.max(axis=0)))


@dataclass(frozen=True, eq=False, kw_only=True)
class ObjectPrompts:
    """All prompts of one object."""

    object: int
    prompted: tuple[SlicePrompt, ...]
    """Slices with something positive, ascending; at least one."""
    hints: Mapping[int, np.ndarray]
    """By slice: (p, 2) places that are not of the object, on slices that are not prompted."""
    first: int
    last: int
    """Slices between which it lies: its thick boxes', else the volume's first and last."""


def prompts_by_slice(prompts: PromptSet, axis: int, shape: Sequence[int]) -> list[ObjectPrompts]:
    """Split prompts of a volume by its slices across an axis.

    A box that is flat along the axis is on that slice. A thick one is on the slice nearest to its middle that
    has a positive point of the object, else on the middle one (of two as near the lower one), and the object
    goes on no farther than its boxes and points. A slice with negative points alone is no prompted one: they
    are heeded when the object is followed there.

    Raises:
        RequestError: a box is flat along another axis, or an object has two boxes on one slice.
    """
    depth, plane = shape[axis], [i for i in range(3) if i != axis]
    points, boxes = prompts.points, prompts.boxes
    flat = (boxes.start == boxes.stop)[:, plane].any(axis=1)
    if flat.any():
        raise RequestError(
            f"prompts: object {int(boxes.objects[flat][0])} has a box on a slice across another axis than "
            f"{axis}; valid: boxes on slices of the plane that is segmented"
        )
    at = _element(points.position[:, axis], depth)
    result = []
    for number in prompts.objects.tolist():
        mine = np.flatnonzero(points.objects == number)
        # in an order of their own, however they were given
        mine = mine[np.lexsort((*points.position[mine].T, ~points.positive[mine]))]
        own = np.flatnonzero(boxes.objects == number)
        corners = np.stack((boxes.start[own], boxes.stop[own]), axis=1)
        placed_on, (first, last) = _on_slices(corners[:, :, axis], at[mine[points.positive[mine]]], depth)
        if repeated := [i for i in placed_on if placed_on.count(i) > 1]:
            raise RequestError(
                f"prompts: object {number} has {len(repeated)} boxes on slice {repeated[0]}; "
                "valid: one a slice"
            )
        slices = []
        for index in sorted({*at[mine].tolist(), *placed_on}):
            here = mine[at[mine] == index]
            box = corners[placed_on.index(index)][:, plane] if index in placed_on else None
            position, positive = points.position[here][:, plane], points.positive[here]
            prompt = SlicePrompt(object=number, index=index, points=position, positive=positive, box=box)
            slices.append(prompt)
        prompted = tuple(s for s in slices if s.box is not None or s.positive.any())
        hints = {s.index: s.points for s in slices if s.box is None and not s.positive.any()}
        result.append(ObjectPrompts(object=number, prompted=prompted, hints=hints, first=first, last=last))
    return result


def _on_slices(ends: np.ndarray, points: np.ndarray, depth: int) -> tuple[list[int], tuple[int, int]]:
    """The slice that each box of an object is on, and the first and last slice that the object may have.

    Args:
        ends: (n, 2) positions along the axis at which its boxes start and stop.
        points: (p,) slices of its positive points.
        depth: slices of the volume.
    """
    first = _element(ends[:, 0], depth)
    last = np.clip(np.ceil(ends[:, 1] + 0.5).astype(np.int64) - 1, first, depth - 1)
    on = []
    for a, b in zip(first.tolist(), last.tolist(), strict=True):
        within = [i for i in points.tolist() if a <= i <= b] or [(a + b) // 2]
        on.append(min(within, key=lambda i: (abs(2 * i - a - b), i)))
    thick = ends[:, 1] > ends[:, 0]
    if not thick.any():
        return on, (0, depth - 1)
    every = [*first[thick].tolist(), *last[thick].tolist(), *on, *points.tolist()]
    return on, (min(every), max(every))


def _element(position: np.ndarray, depth: int) -> np.ndarray:
    """The slice that holds each position along the axis."""
    return np.asarray(np.clip(np.floor(position + 0.5), 0, depth - 1).astype(np.int64))


def holds(pyramid: Pyramid, window: Window, box: np.ndarray) -> bool:
    """Whether a window sees a box, (2, 2) positions inside the scene."""
    seen = pyramid.box(window)
    return bool((box[0] >= np.array(seen.start) - 0.5).all() and (box[1] <= np.array(seen.stop) - 0.5).all())


def mask_box(patch: Patch, shape: Sequence[int], grow: float = 0.0) -> np.ndarray:
    """Corners (2, 2), y and x, of a mask's bounding box, in positions, inside the scene.

    Args:
        patch: of a mask.
        shape: (y, x) of the plane.
        grow: on every side, as a share of the edge along that axis.
    """
    mask = patch.logits > 0
    ends = np.stack([np.flatnonzero(mask.any(axis=1 - axis))[[0, -1]] for axis in (0, 1)], axis=1)
    corners = (ends + np.array([[0], [1]])) * patch.scale + np.array(patch.origin) - 0.5
    more = grow * (corners[1] - corners[0])
    last = np.array(shape) - 0.5
    return np.stack((np.maximum(corners[0] - more, -0.5), np.minimum(corners[1] + more, last)))


def placed(patch: Patch, window: Window, pyramid: Pyramid) -> np.ndarray:
    """A mask on the lattice of a window: (y, x) bool.

    On another level than its own a cell is object where the last of the four elements around its centre is.
    """
    scale, box = 1 << window.level, pyramid.box(window)
    # Windows of a level begin half a window apart, so its cells are one lattice: cell i is elements i·scale….
    first = np.array(box.start) // scale
    start = np.maximum(np.array(patch.origin) // scale, first)
    stop = np.minimum(-(-np.array(patch.extent.stop) // scale), first + pyramid.window)
    result = np.zeros((pyramid.window, pyramid.window), bool)
    if (start >= stop).any():
        return result
    if patch.scale == scale:
        cells = Patch(1, tuple(n // scale for n in patch.origin), patch.logits)  # type: ignore[arg-type]
        found = patch_cover(cells, Box(tuple(start.tolist()), tuple(stop.tolist())))
    else:
        native = Box(tuple((start * scale).tolist()), tuple((stop * scale).tolist()))
        flat = Patch(patch.scale, patch.origin, patch.logits)
        found = patch_cover(flat, native)[scale // 2 :: scale, scale // 2 :: scale]
    result[start[0] - first[0] : stop[0] - first[0], start[1] - first[1] : stop[1] - first[1]] = found
    return result


def overlaps(patch: Patch, masks: np.ndarray, window: Window, pyramid: Pyramid) -> np.ndarray:
    """IoU (k,) of a mask with others of a window, (k, y, x) bool; 0 where both are empty."""
    before = placed(patch, window, pyramid)
    both = np.count_nonzero(masks & before, axis=(1, 2))
    either = np.count_nonzero(masks | before, axis=(1, 2))
    return np.asarray(both / np.maximum(either, 1))


def deepest_point(patch: Patch) -> np.ndarray:
    """(y, x) position of the cell of a mask that is farthest from all others; the first of several."""
    depth = distance_transform_edt(np.pad(patch.logits > 0, 1))
    place = np.array(np.unravel_index(int(depth.argmax()), depth.shape)) - 1
    return np.asarray((place + 0.5) * patch.scale + np.array(patch.origin) - 0.5)
