"""Generate masks without a prompt: SAM's automatic mask generator over scenes of any size.

Kirillov et al., Segment Anything, ICCV 2023, appendix B: a grid of points, three masks a point, those of low
predicted IoU or stability left out, duplicates removed by greedy non-maximum suppression of their bounding
boxes, first within a crop by predicted IoU, then among crops, smaller ones first.

What differs here: crops are the windows of a pyramid, layers its levels from the finest up. One grid of
points lies over the whole level, and a point is decoded in the window whose centre is nearest. A mask that
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
from operator import add

import numpy as np

from segpipe.config.prompts import PointGrid
from segpipe.errors import RequestError
from segpipe.prompts.masks.decode import CandidateStats, WindowView, measure, view_of
from segpipe.prompts.masks.nms import keep_best
from segpipe.prompts.masks.patches import Patch, dump_patches, load_patches
from segpipe.prompts.prompt_set import Columns, dump_arrays, load_arrays
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt, Segmenter
from segpipe.tiling.pyramid import Pyramid, Window


@dataclass(frozen=True, eq=False)
class GridPoints:
    """The points of one level, row by row, and the window of each."""

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


def grid_prompts(pyramid: Pyramid, side: int, level: int) -> GridPoints:
    """One grid of points over the plane, as SAM lays it over a single window.

    Neighbours are W/k·2^level elements apart, with k points a ``side``; in a window they have
    x = (i + ½)·W/k. Where not even one fits along an axis, there is one in the middle.

    Raises:
        RequestError: there are more points than elements along a window's side.
    """
    if side > pyramid.window:
        raise RequestError(f"prompts.grid.points: found {side}; valid: up to {pyramid.window}")
    spacing = pyramid.window / side
    axes = []
    for size in pyramid.shape:
        end = size / (1 << level)  # in elements of a window
        local = (np.arange(int(end / spacing) + 1) + 0.5) * spacing
        local = local[local <= end - 0.5]
        axes.append((local + 0.5) * (1 << level) - 0.5 if len(local) else np.array([(size - 1) / 2]))
    position = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)
    windows, which = pyramid.needed(position, position, level)
    return GridPoints(level, position, windows, which)


@dataclass(frozen=True)
class GridTally:
    """What became of every candidate; each is counted once, where it failed first. Stored in this order."""

    no_data: int = 0
    """Points where there is none: they are not decoded."""
    points: int = 0
    """Points that are decoded."""
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

    def __add__(self, other: GridTally) -> GridTally:
        return GridTally(*map(add, astuple(self), astuple(other)))

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


@dataclass(frozen=True, eq=False, kw_only=True)
class GridMasks(Columns):
    """The masks of a grid's points and their scores, stored in this order; positions on the plane."""

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

    def dump(self, tally: GridTally) -> bytes:
        """Return the masks of one window and their tally, exact, as one blob."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        patches = dump_patches(arrays.pop("patches"))
        return dump_arrays(tally=np.array(astuple(tally), np.int64), patches=patches, **arrays)

    @classmethod
    def load(cls, data: bytes) -> tuple[GridMasks, GridTally]:
        """Return the inverse of `dump`."""
        arrays = load_arrays(data)
        tally, patches = arrays.pop("tally"), load_patches(arrays.pop("patches").tobytes())
        return cls(**arrays, patches=patches), GridTally(*tally.tolist())


def join_grid_masks(parts: Sequence[GridMasks]) -> GridMasks:
    """Return all masks, ordered by level, point and candidate, in whatever order the parts come."""
    none, pairs, floats = np.empty(0, np.int64), np.empty((0, 2)), np.empty(0)
    empty = GridMasks(
        level=none, window=np.empty((0, 2), np.int64), number=none, candidate=none, point=pairs, start=pairs,
        stop=pairs, iou=floats, stability=floats, elements=none, patches=(),
    )  # fmt: skip
    joined = GridMasks.concatenate([empty, *parts])
    return joined.take(np.lexsort((joined.candidate, joined.number, joined.level)))


def segment_grid(
    segmenter: Segmenter, embedding: Embedding, window: Window, pyramid: Pyramid, points: GridPoints,
    grid: PointGrid, smallest: int = 0, at_once: int = 64, valid: np.ndarray | None = None,
) -> tuple[GridMasks, GridTally]:  # fmt: skip
    """The masks of one window's points, without duplicates among them, and what became of the others.

    Points where there is no data are left out, and masks of fewer than ``smallest`` elements of the scene.
    Args as for `segpipe.prompts.masks.decode.decode_window`.
    """
    view = view_of(window, pyramid, valid)
    numbers = points.numbers(window)
    local = pyramid.to_window(points.position[numbers], window)
    seen = view.valid[tuple(np.clip(np.floor(local + 0.5).astype(np.int64), 0, pyramid.window - 1).T)]
    numbers, local = numbers[seen], local[seen]
    label = np.ones(1, np.int64)
    parts, tally = [], GridTally(no_data=int((~seen).sum()))
    for first in range(0, len(numbers), at_once):
        here = slice(first, first + at_once)
        prompts = [Prompt(xy[None].astype(np.float32), label) for xy in local[here, ::-1]]
        found = segmenter.decode(embedding, prompts)
        masks, counted = _filtered(found, points, numbers[here], view, grid, smallest)
        parts.append(masks)
        tally += counted
    masks = join_grid_masks(parts)
    order = np.lexsort((masks.candidate, masks.number, -masks.iou))
    half = view.scale / 2  # corners are centres of elements, as in SAM
    left = keep_best(masks.start[order] + half, masks.stop[order] - half, grid.overlap)
    gone = len(masks) - len(left)
    return masks.take(np.sort(order[left])), tally + GridTally(same=gone, kept=-gone)


def _filtered(
    found: Candidates,
    points: GridPoints,
    numbers: np.ndarray,
    view: WindowView,
    grid: PointGrid,
    smallest: int,
) -> tuple[GridMasks, GridTally]:
    """The candidates of some points that pass every threshold."""
    good = (found.iou > grid.iou) | (grid.iou == 0)
    tally = GridTally(points=len(numbers), candidates=good.size, low_iou=int((~good).sum()))
    parts = []
    for row in np.flatnonzero(good.any(axis=1)).tolist():
        which = np.flatnonzero(good[row])
        logits = found.logits[row, which]
        seen = view.only(logits)
        stats = measure(seen, found.iou[row, which])
        kept, counted = _passing(stats, view, view.cut(seen > 0), grid, smallest)
        tally += counted
        n, number = len(kept), numbers[row]
        patches = tuple(p for i in kept if (p := view.patch(logits[i], None)) is not None)
        masks = GridMasks(
            level=np.full(n, points.level),
            window=np.tile(np.array(points.windows[points.which[number]].index), (n, 1)),
            number=np.full(n, number), candidate=which[kept], point=np.tile(points.position[number], (n, 1)),
            start=_on_plane(stats.start[kept], view), stop=_on_plane(stats.stop[kept], view),
            iou=stats.iou[kept], stability=stats.stability[kept],
            elements=stats.elements[kept] * view.scale**2, patches=patches,
        )  # fmt: skip
        parts.append(masks)
    return join_grid_masks(parts), tally


def _passing(
    stats: CandidateStats, view: WindowView, cut: np.ndarray, grid: PointGrid, smallest: int
) -> tuple[np.ndarray, GridTally]:
    """Numbers of the masks that pass the thresholds of their shape, and what became of the others."""
    left = np.ones(len(cut), bool)
    counts = {}
    for name, fails in (
        ("empty", stats.elements == 0),
        ("unstable", ~((stats.stability > grid.stability) | (grid.stability == 0))),
        ("cut", cut),
        ("small", stats.elements * view.scale**2 < smallest),
    ):
        counts[name] = int((left & fails).sum())
        left &= ~fails
    return np.flatnonzero(left), GridTally(**counts, kept=int(left.sum()))


def _on_plane(edges: np.ndarray, view: WindowView) -> np.ndarray:
    """Positions on the plane of those in the window."""
    return np.asarray((edges + 0.5) * view.scale + np.array(view.box.start) - 0.5)


def merge_grid_masks(
    parts: Iterable[tuple[GridMasks, GridTally]], overlap: float
) -> tuple[GridMasks, GridTally]:
    """The masks of all windows and levels without duplicates, and the whole tally.

    Of masks of different windows whose boxes have an IoU above ``overlap``, the finer level's is kept, then
    that of higher predicted IoU, then of the first point and candidate. The result is ordered by level, point
    and candidate; neither that of the parts nor their number changes anything.
    """
    found = list(parts)
    masks = join_grid_masks([m for m, _ in found])
    tally = sum((t for _, t in found), GridTally())
    windows = np.column_stack((masks.level, masks.window))
    _, group = np.unique(windows, axis=0, return_inverse=True)
    order = np.lexsort((masks.candidate, masks.number, -masks.iou, masks.level))
    left = keep_best(masks.start[order], masks.stop[order], overlap, group.reshape(-1)[order])
    gone = len(masks) - len(left)
    return masks.take(np.sort(order[left])), tally + GridTally(same_elsewhere=gone, kept=-gone)
