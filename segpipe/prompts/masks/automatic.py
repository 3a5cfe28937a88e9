"""Masks without a prompt: SAM's automatic mask generator over scenes of any size.

Kirillov et al., Segment Anything, ICCV 2023, appendix B: a grid of points, three masks a point, those of low
predicted IoU or stability left out, duplicates removed by greedy non-maximum suppression of their bounding
boxes, first within a crop by predicted IoU, then among crops, smaller ones first.

What differs here: crops are the windows of a pyramid, layers its levels from the finest up. One grid of
points lies over the whole level, and a point is asked in the window whose centre is nearest. A mask that
reaches its window's border inside the scene is left out (in SAM: comes within 20 elements of it). Among
windows of a level, duplicates are ranked by predicted IoU (in SAM: by the order of crops), so that no order
of windows changes the masks. In a window, corners of boxes are centres of elements, as SAM has them; among
windows, whose elements differ in size, they are outer edges, and masks of one window are not compared
again. SAM's removal of small holes and islands is not done.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property

import numpy as np
import shapely

from segpipe.errors import RequestError
from segpipe.prompts.masks.candidates import Measured, box_iou, measure
from segpipe.prompts.masks.decode import View, view_of
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt, Segmenter
from segpipe.tiling.pyramid import Pyramid, Window


@dataclass(frozen=True)
class Automatic:
    """How masks are made and which are kept."""

    points_per_side: int = 32
    """Of a window."""
    pred_iou: float = 0.88
    """Masks are kept whose predicted IoU is above this; 0: all."""
    stability: float = 0.95
    """And whose stability is above this; 0: all."""
    nms: float = 0.7
    """IoU of bounding boxes above which two masks are one; 1: none are."""
    crop_layers: int = 0
    """Coarser levels of the pyramid that are asked beside the finest."""
    smallest: int = 0
    """Fewest elements of the scene that a mask may have."""

    def __post_init__(self) -> None:
        for name, least, most in (
            ("points_per_side", 1, None),
            ("pred_iou", 0, 1),
            ("stability", 0, 1),
            ("nms", 0, 1),
            ("crop_layers", 0, None),
            ("smallest", 0, None),
        ):
            found = getattr(self, name)
            if not (least <= found and (most is None or found <= most)):
                valid = f"{least} to {most}" if most else f"{least} or more"
                raise RequestError(f"automatic.{name}: found {found}; valid: {valid}")

    def levels(self, pyramid: Pyramid) -> range:
        """The levels that are asked."""
        return range(min(1 + self.crop_layers, pyramid.levels))


@dataclass(frozen=True, eq=False)
class Grid:
    """The points of one level, row by row, and the window in which each is asked."""

    level: int
    position: np.ndarray
    """(n, 2) float64, on the plane."""
    windows: tuple[Window, ...]
    """Those with points, ascending."""
    which: np.ndarray
    """(n,) int64: number of the window."""

    def numbers(self, window: Window) -> np.ndarray:
        """Numbers of a window's points, ascending; none of a window without points."""
        k = self._places.get(window, len(self.windows))
        first, last = np.searchsorted(self.which, (k, k + 1), sorter=self._order)
        return np.asarray(self._order[first:last])

    @cached_property
    def _places(self) -> dict[Window, int]:
        return {window: k for k, window in enumerate(self.windows)}

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.which, kind="stable")


def grid_prompts(pyramid: Pyramid, settings: Automatic, level: int) -> Grid:
    """One grid of points over the plane, as SAM lays it over a single window.

    Neighbours are W/k·2^level elements apart, with k points a side; in a window they have x = (i + ½)·W/k.
    Where not even one fits along an axis, there is one in the middle.

    Raises:
        RequestError: there are more points than elements along a window's side.
    """
    if settings.points_per_side > pyramid.window:
        raise RequestError(
            f"automatic.points_per_side: found {settings.points_per_side}; valid: up to {pyramid.window}"
        )
    spacing = pyramid.window / settings.points_per_side
    axes = []
    for size in pyramid.shape:
        end = size / (1 << level)  # in elements of a window
        local = (np.arange(int(end / spacing) + 1) + 0.5) * spacing
        local = local[local <= end - 0.5]
        axes.append((local + 0.5) * (1 << level) - 0.5 if len(local) else np.array([(size - 1) / 2]))
    position = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    windows, which = pyramid.needed(position, position, level)
    return Grid(level, position, windows, which)


@dataclass(frozen=True)
class Tally:
    """What became of every candidate; each is counted once, where it failed first."""

    no_data: int = 0
    """Points where there is none: they are not asked."""
    points: int = 0
    """Points asked."""
    candidates: int = 0
    low_iou: int = 0
    """Predicted IoU too low."""
    empty: int = 0
    unstable: int = 0
    cut: int = 0
    """Reach their window's border inside the scene; a coarser level may hold them."""
    small: int = 0
    same: int = 0
    """Duplicates in their window."""
    same_elsewhere: int = 0
    """Duplicates of a mask of another window or level."""
    kept: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def lines(self) -> tuple[str, ...]:
        """The tally in words, one line a fact."""
        said = [f"{self.kept} masks from {self.points} points, of {self.candidates} candidates"]
        if self.no_data:
            said.append(f"{self.no_data} points not asked: no data")
        for count, what in (
            (self.low_iou, "predicted IoU too low"),
            (self.empty, "empty"),
            (self.unstable, "not stable"),
            (self.cut, "cut by the border of their window"),
            (self.small, "too small"),
            (self.same, "the same as another of their window"),
            (self.same_elsewhere, "the same as another of the scene"),
        ):
            if count:
                said.append(f"{count} left out: {what}")
        return tuple(said)


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks and what is known of each; positions on the plane."""

    level: np.ndarray
    """(n,) int64."""
    window: np.ndarray
    """(n, 2) int64: position of the window in its level's lattice."""
    number: np.ndarray
    """(n,) int64: of the point in its level's grid."""
    candidate: np.ndarray
    """(n,) int64: which of the point's masks, in the model's order."""
    point: np.ndarray
    """(n, 2) float64."""
    start: np.ndarray
    """(n, 2) float64: where the bounding box begins, on outer edges of elements of the window."""
    stop: np.ndarray
    """(n, 2) float64: where it ends; a window may hang over the plane."""
    iou: np.ndarray
    """(n,) float64: predicted by the model."""
    stability: np.ndarray
    """(n,) float64: `segpipe.prompts.segmenters.base.stability_score`."""
    elements: np.ndarray
    """(n,) int64: of the scene, as many as the elements of the window stand for."""
    patches: tuple[Patch, ...]

    def __len__(self) -> int:
        return len(self.patches)

    def take(self, numbers: np.ndarray) -> Masks:
        """Some of them."""
        arrays = {name: getattr(self, name)[numbers] for name in COLUMNS}
        return Masks(**arrays, patches=tuple(self.patches[i] for i in numbers.tolist()))


COLUMNS = tuple(f.name for f in fields(Masks) if f.name != "patches")
"""The arrays of `Masks`."""


def join_masks(parts: Sequence[Masks]) -> Masks:
    """All masks, ordered by level, point and candidate, in whatever order the parts come."""
    several = [_no_masks(), *parts]
    columns = {name: np.concatenate([getattr(p, name) for p in several]) for name in COLUMNS}
    joined = Masks(**columns, patches=tuple(patch for p in several for patch in p.patches))
    return joined.take(np.lexsort((joined.candidate, joined.number, joined.level)))


def _no_masks() -> Masks:
    none, pairs, floats = np.empty(0, np.int64), np.empty((0, 2)), np.empty(0)
    window = np.empty((0, 2), np.int64)
    return Masks(none, window, none, none, pairs, pairs, pairs, floats, floats, none, ())


def automatic_window(
    segmenter: Segmenter,
    embedding: Embedding,
    window: Window,
    pyramid: Pyramid,
    grid: Grid,
    settings: Automatic,
    at_once: int = 64,
    plane: tuple[int, int] | None = None,
    valid: np.ndarray | None = None,
) -> tuple[Masks, Tally]:
    """The masks of one window's points, without duplicates among them, and what became of the others.

    Points where there is no data are not asked. Args as for `segpipe.prompts.masks.decode.answer_window`.
    """
    view = view_of(window, pyramid, valid)
    numbers = grid.numbers(window)
    local = pyramid.to_window(grid.position[numbers], window)
    seen = view.valid[tuple(np.clip(np.floor(local + 0.5).astype(np.int64), 0, pyramid.window - 1).T)]
    numbers, local = numbers[seen], local[seen]
    label = np.ones(1, np.int64)
    parts, tally = [], Tally(no_data=int((~seen).sum()))
    for first in range(0, len(numbers), at_once):
        here = slice(first, first + at_once)
        prompts = [Prompt(xy[None].astype(np.float32), label) for xy in local[here, ::-1]]
        found = segmenter.decode(embedding, prompts)
        masks, counted = _filtered(found, grid, numbers[here], view, settings, plane)
        parts.append(masks)
        tally += counted
    masks = join_masks(parts)
    order = np.lexsort((masks.candidate, masks.number, -masks.iou))
    half = view.scale / 2  # corners are centres of elements, as in SAM
    left = suppress(masks.start[order] + half, masks.stop[order] - half, settings.nms)
    gone = len(masks) - len(left)
    return masks.take(np.sort(order[left])), tally + Tally(same=gone, kept=-gone)


def _filtered(
    found: Candidates,
    grid: Grid,
    numbers: np.ndarray,
    view: View,
    settings: Automatic,
    plane: tuple[int, int] | None,
) -> tuple[Masks, Tally]:
    """The candidates of some points that pass every threshold."""
    good = (found.iou > settings.pred_iou) | (settings.pred_iou == 0)
    tally = Tally(points=len(numbers), candidates=good.size, low_iou=int((~good).sum()))
    parts = []
    for row in np.flatnonzero(good.any(axis=1)).tolist():
        which = np.flatnonzero(good[row])
        logits = found.logits[row, which]
        seen = view.only(logits)
        measured = measure(seen, found.iou[row, which])
        kept, counted = _passing(measured, view, view.cut(seen > 0), settings)
        tally += counted
        n, number = len(kept), numbers[row]
        patches = tuple(p for i in kept if (p := view.patch(logits[i], plane)) is not None)
        parts.append(
            Masks(
                np.full(n, grid.level),
                np.tile(np.array(grid.windows[grid.which[number]].index), (n, 1)),
                np.full(n, number),
                which[kept],
                np.tile(grid.position[number], (n, 1)),
                _on_plane(measured.start[kept], view),
                _on_plane(measured.stop[kept], view),
                measured.iou[kept],
                measured.stability[kept],
                measured.elements[kept] * view.scale**2,
                patches,
            )
        )
    return join_masks(parts), tally


def _passing(
    measured: Measured, view: View, cut: np.ndarray, settings: Automatic
) -> tuple[np.ndarray, Tally]:
    """Numbers of the masks that pass what is asked of their shape, and what became of the others."""
    left = np.ones(len(cut), bool)
    counts = {}
    for name, fails in (
        ("empty", measured.elements == 0),
        ("unstable", ~((measured.stability > settings.stability) | (settings.stability == 0))),
        ("cut", cut),
        ("small", measured.elements * view.scale**2 < settings.smallest),
    ):
        counts[name] = int((left & fails).sum())
        left &= ~fails
    return np.flatnonzero(left), Tally(**counts, kept=int(left.sum()))


def _on_plane(edges: np.ndarray, view: View) -> np.ndarray:
    """Positions on the plane of those in the window."""
    return np.asarray((edges + 0.5) * view.scale + np.array(view.box.start) - 0.5)


def merge_masks(parts: Iterable[tuple[Masks, Tally]], settings: Automatic) -> tuple[Masks, Tally]:
    """The masks of all windows and levels without duplicates, and the whole tally.

    Of masks of different windows whose boxes have an IoU above the limit, the finer level's is kept, then
    that of higher predicted IoU, then of the first point and candidate. The result is ordered by level, point
    and candidate; neither that of the parts nor their number changes anything.
    """
    found = list(parts)
    masks = join_masks([m for m, _ in found])
    tally = sum((t for _, t in found), Tally())
    windows = np.column_stack((masks.level, masks.window))
    _, group = np.unique(windows, axis=0, return_inverse=True)
    order = np.lexsort((masks.candidate, masks.number, -masks.iou, masks.level))
    left = suppress(masks.start[order], masks.stop[order], settings.nms, group.reshape(-1)[order])
    gone = len(masks) - len(left)
    return masks.take(np.sort(order[left])), tally + Tally(same_elsewhere=gone, kept=-gone)


def suppress(
    start: np.ndarray, stop: np.ndarray, limit: float, group: np.ndarray | None = None
) -> np.ndarray:
    """Greedy non-maximum suppression: numbers, ascending, of the boxes that are left.

    A box is left out if it has an IoU above ``limit`` with a better one that is left. Memory is linear.

    Args:
        start: (n, 2) corners, the best box first.
        stop: (n, 2) opposite corners.
        limit: of IoU.
        group: (n,) boxes of one group do not remove each other; None: there are no groups.
    """
    boxes = shapely.box(start[:, 1], start[:, 0], stop[:, 1], stop[:, 0])
    tree = shapely.STRtree(boxes)
    left = np.ones(len(boxes), bool)
    for i in range(len(boxes)):
        if left[i]:
            near = tree.query(boxes[i])
            near = near[near > i]
            same = box_iou(start[i], stop[i], start[near], stop[near]) > limit
            left[near[same if group is None else same & (group[near] != group[i])]] = False
    return np.flatnonzero(left)
