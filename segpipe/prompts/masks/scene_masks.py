"""Merge the masks of a scene that show the same object, and rasterise them as ids, block by block.

**Which are the same.** Two objects are one where the IoU of their masks, counted exactly on the scene's
elements, is at least a threshold. As in non-maximum suppression it is decided greedily from the best rank
down: an object is merged into the first kept one, by rank, that it is one with, and what is merged merges
nothing further. So the rule is not transitive (a chain of likenesses does not become one object), and
neither windows nor the order of masks change it. What a person gave (drawn prompts, labels of a previous
run) is never merged away. By rank: drawn, labels, then all others; among these the higher score of the
grounder (none is the lowest), then the higher predicted IoU, then the smaller number.

**Which is in front.** The object whose whole mask has fewer elements, so that an islet is not lost in its
lake; of masks as large as each other the one with the higher score, then the one that is listed first. The
masks and scores alone decide, so ids cannot depend on blocks or on their order. An object of which nothing
is to be seen has no id and is listed as hidden. What an object loses to others is lost in the label map
only: the size of its whole mask is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import shapely
from scipy.ndimage import find_objects

from segpipe.geometry.box import Box
from segpipe.metrics.tally import compact
from segpipe.objects.scene_objects import SceneObjects
from segpipe.prompts.masks.patches import (
    Patch,
    check_patches,
    object_box,
    object_cover,
    patch_box,
    patch_cover,
    tiles,
)
from segpipe.prompts.masks.window_masks import WindowMasks
from segpipe.prompts.prompt_set import PromptSource
from segpipe.sources.base import LabelReader

MERGE_IOU = 0.7
"""IoU at which two masks are one object: what SAM's generator of automatic masks takes for boxes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class SceneMasks(WindowMasks):
    """The masks of all objects of a scene, from prompts and of a grid, in one numbering."""

    value: np.ndarray
    """(n,) int64: class value of the object's phrase."""
    source: np.ndarray
    """(n,) int64: `PromptSource`."""
    score: np.ndarray
    """(n,) float64: the grounder's; NaN: none."""

    def __post_init__(self) -> None:
        if len(np.unique(self.number)) < len(self.number):
            raise ValueError(f"objects {self.number.tolist()}: a number twice")
        for patches in self.patches:
            check_patches(patches)

    @property
    def confidence(self) -> np.ndarray:
        """(n,) the grounder's score, where there is one, times the predicted IoU; 0…1."""
        iou = np.clip(self.iou, 0, 1)  # a network may predict more
        return np.asarray(np.where(np.isnan(self.score), 1.0, self.score) * iou)

    def ranked(self) -> np.ndarray:
        """(n,) rows from the best rank down (see the module)."""
        given = np.minimum(self.source, PromptSource.TEXT)
        best = (-np.nan_to_num(column, nan=-np.inf) for column in (self.iou, self.score))
        return np.lexsort((self.number, *best, given))


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskMerge:
    """Which of a scene's masks remain, and what the others were merged into."""

    kept: np.ndarray
    """(k,) rows of the objects that remain, ascending."""
    also: tuple[tuple[int, ...], ...]
    """Of each of these: the other classes of objects merged into it, ascending."""
    merged: np.ndarray
    """(m,) number of each object that is none of its own, ascending."""
    into: np.ndarray
    """(m,) number of the object that it was merged into."""
    iou: np.ndarray
    """(m,) float64: IoU of their masks."""


def merge_masks(
    masks: SceneMasks, shape: Sequence[int], merge_iou: float = MERGE_IOU, unnamed: int = -1
) -> MaskMerge:
    """Merge masks that show the same object (see the module); return which remain, and what of the others.

    In memory are the pairs of objects whose boxes overlap, and one tile of masks.

    Args:
        masks: of all objects of the scene.
        shape: of the scene, (y, x) or (z, y, x).
        merge_iou: the least IoU of two masks that are one, above 0.
        unnamed: value of the class of objects without a phrase, which is no other class of an object.
    """
    if not 0 < merge_iou <= 1:
        raise ValueError(f"same: found {merge_iou}; valid: above 0, at most 1")
    counts = _MaskCounts(masks, shape)
    order = masks.ranked()
    rank = np.empty(len(masks), np.int64)
    rank[order] = np.arange(len(masks))
    better, worse = _overlapping(counts.start, counts.stop, rank)
    first = np.searchsorted(rank[worse], np.arange(len(masks) + 1))
    into = np.full(len(masks), -1)
    share = np.full(len(masks), np.nan)
    for place in order[masks.source[order] >= PromptSource.TEXT].tolist():
        pairs = slice(first[rank[place]], first[rank[place] + 1])
        for other in better[pairs].tolist():
            iou = counts.iou(place, other, merge_iou) if into[other] < 0 else 0.0
            if iou >= merge_iou:
                into[place], share[place] = other, iou
                break
    return _merge_of(masks, into, share, unnamed)


def _merge_of(masks: SceneMasks, into: np.ndarray, share: np.ndarray, unnamed: int) -> MaskMerge:
    """Args: of each object the row of the one that it was merged into or −1, and their IoU."""
    also: dict[int, set[int]] = {}
    lost = np.flatnonzero(into >= 0)
    for row, winner in zip(lost.tolist(), into[lost].tolist(), strict=True):
        also.setdefault(winner, set()).add(int(masks.value[row]))
    kept = np.flatnonzero(into < 0)
    values = [also.get(row, set()) - {int(masks.value[row]), unnamed} for row in kept.tolist()]
    lost = lost[np.argsort(masks.number[lost])]
    return MaskMerge(
        kept=kept, also=tuple(tuple(sorted(v)) for v in values), merged=masks.number[lost],
        into=masks.number[into[lost]], iou=share[lost],
    )  # fmt: skip


def _overlapping(start: np.ndarray, stop: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places (better, worse) of the pairs of boxes that share an element, in the order of their ranks.

    Args:
        start: (n, axes) of the boxes.
        stop: the same.
        rank: (n,) 0 is the best.
    """
    boxes = shapely.box(start[:, -1], start[:, -2], stop[:, -1], stop[:, -2])
    worse, better = shapely.STRtree(boxes).query(boxes)
    common = np.minimum(stop[worse], stop[better]) - np.maximum(start[worse], start[better])
    keep = (rank[better] < rank[worse]) & (common > 0).all(axis=1)
    worse, better = worse[keep], better[keep]
    order = np.lexsort((rank[better], rank[worse]))
    return better[order], worse[order]


class _MaskCounts:
    """The elements of masks, each mask counted once."""

    def __init__(self, masks: WindowMasks, shape: Sequence[int]) -> None:
        self._patches = masks.patches
        self._boxes = [object_box(patches, shape) for patches in masks.patches]
        self._elements: dict[int, int] = {}
        self.start = np.array([b.start for b in self._boxes], np.int64).reshape(-1, len(shape))
        self.stop = np.array([b.stop for b in self._boxes], np.int64).reshape(-1, len(shape))

    def iou(self, first: int, second: int, min_iou: float) -> float:
        """IoU of two objects; 0 where the sizes of boxes and masks alone say that it is below ``min_iou``."""
        common = self._boxes[first].intersect(self._boxes[second])
        sizes = self._count(first), self._count(second)
        most = min(common.size, *sizes)
        if not most or most / (sum(sizes) - most) < min_iou:
            return 0.0
        both = sum(
            int(np.count_nonzero(self._cover(first, tile) & self._cover(second, tile)))
            for tile in tiles(common)
        )
        return both / (sum(sizes) - both)

    def _count(self, place: int) -> int:
        if place not in self._elements:
            boxes = tiles(self._boxes[place])
            self._elements[place] = sum(int(np.count_nonzero(self._cover(place, box))) for box in boxes)
        return self._elements[place]

    def _cover(self, place: int, box: Box) -> np.ndarray:
        return object_cover(self._patches[place], box)


@dataclass(frozen=True, eq=False)
class PatchIndex:
    """The patches of a scene's objects, to be looked up by box; an object's *row* is its position."""

    shape: tuple[int, ...]
    """Of the scene, (y, x) or (z, y, x)."""
    patches: tuple[tuple[Patch, ...], ...]
    """Of each object, as in `WindowMasks`."""

    def __post_init__(self) -> None:
        for patches in self.patches:
            check_patches(patches)

    def __len__(self) -> int:
        return len(self.patches)

    def near(self, box: Box) -> Iterator[tuple[int, Patch, Box]]:
        """Patches that reach into a box: the row of the object, the patch, what it shares with the box."""
        owner, among, start, stop, tree = self._index
        found = np.sort(tree.query(_flat(np.array([box.start]), np.array([box.stop]))[0]))
        low, high = np.maximum(start[found], box.start), np.minimum(stop[found], box.stop)
        some = (low < high).all(axis=1)
        columns = (owner[found], among[found], low, high)
        for row, number, a, b in zip(*(column[some].tolist() for column in columns), strict=True):
            yield row, self.patches[row][number], Box(tuple(a), tuple(b))

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, shapely.STRtree]:
        """Of each patch the object's row, its number among the object's, its box; a tree of the boxes."""
        boxes = [patch_box(patch, self.shape) for patches in self.patches for patch in patches]
        start = np.array([b.start for b in boxes], np.int64).reshape(-1, len(self.shape))
        stop = np.array([b.stop for b in boxes], np.int64).reshape(-1, len(self.shape))
        rows = [(row, k) for row, patches in enumerate(self.patches) for k in range(len(patches))]
        owner, among = np.array(rows, np.int64).reshape(-1, 2).T
        return owner, among, start, stop, shapely.STRtree(_flat(start, stop))


def _flat(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Boxes (n, axes) in the scene's last two axes, as (n,) polygons."""
    return np.asarray(shapely.box(start[:, -1], start[:, -2], stop[:, -1], stop[:, -2]))


@dataclass(frozen=True, eq=False)
class MaskExtents:
    """Of each of n objects how many elements, and where; an object without any has ``elements`` 0."""

    elements: np.ndarray
    """(n,) int64."""
    first: np.ndarray
    """(n,) smallest element, as a position in the scene in C order; the scene's size: none."""
    start: np.ndarray
    """(n, axes) first corner of the bounding box; the scene's shape: none."""
    stop: np.ndarray
    """(n, axes) one past its last corner; 0: none."""

    @classmethod
    def empty(cls, count: int, shape: Sequence[int]) -> MaskExtents:
        """Of objects without elements: what `add` starts from."""
        return cls(
            np.zeros(count, np.int64), np.full(count, Box.whole(shape).size),
            np.tile(np.array(shape, np.int64), (count, 1)), np.zeros((count, len(shape)), np.int64),
        )  # fmt: skip

    def add(self, codes: np.ndarray, box: Box, shape: Sequence[int], offset: int = 0) -> None:
        """Add the elements of a box, in place; the same bits in any order of boxes that share none.

        Args:
            codes: whole numbers of the box's shape: 0 none, k the object at row ``offset`` + k − 1.
            box: of the scene.
            shape: of the scene.
        """
        known, code = compact(codes)
        if not len(known) or not known[-1]:
            return
        flat = code.ravel()
        counts = np.bincount(flat)
        first = np.empty(len(known), np.int64)
        first[flat[::-1]] = np.arange(flat.size)[::-1]  # of what is assigned to one place the last remains
        firsts = np.ravel_multi_index(
            tuple(i + a for i, a in zip(np.unravel_index(first, box.shape), box.start, strict=True)), shape
        )
        corners = np.array([[(s.start, s.stop) for s in bounds] for bounds in find_objects(code + 1)])
        corners += np.array(box.start)[:, None]
        some = known > 0
        rows = known[some] - 1 + offset
        self.elements[rows] += counts[some]
        self.first[rows] = np.minimum(self.first[rows], firsts[some])
        self.start[rows] = np.minimum(self.start[rows], corners[some, :, 0])
        self.stop[rows] = np.maximum(self.stop[rows], corners[some, :, 1])

    def touches_edge(self, shape: Sequence[int]) -> np.ndarray:
        """(n,) whether an object has an element at the scene's border."""
        return np.asarray(
            ((self.start == 0) | (self.stop == np.array(shape))).any(axis=1) & (self.elements > 0)
        )


def measure_masks(masks: PatchIndex) -> MaskExtents:
    """Of each object's whole mask, whatever is in front of it."""
    found = MaskExtents.empty(len(masks), masks.shape)
    for row, patches in enumerate(masks.patches):
        for patch in patches:
            for tile in tiles(patch_box(patch, masks.shape)):
                found.add(patch_cover(patch, tile).view(np.uint8), tile, masks.shape, row)
    return found


def rasterise(box: Box, masks: PatchIndex, rank: np.ndarray) -> np.ndarray:
    """Which object is in front at each element of a box, int32: 0 none, k the one at row k − 1.

    Args:
        box: of the scene.
        masks: of the scene.
        rank: (n,) of each object: the smallest is in front; none twice; −1: the object is not rasterised.
    """
    out = np.zeros(box.shape, np.int32)
    parts = [item for item in masks.near(box) if rank[item[0]] >= 0]
    for row, patch, part in sorted(parts, key=lambda item: -int(rank[item[0]])):  # from back to front
        out[part.within(box)][patch_cover(patch, part)] = row + 1
    return out


@dataclass(frozen=True, eq=False, kw_only=True)
class RasterisedMasks:
    """The objects of a scene as its label map shows them."""

    objects: SceneObjects
    """What is to be seen of each object, ids 1…n by the first such element."""
    row: np.ndarray
    """(n,) row of each of these among the masks."""
    whole: MaskExtents
    """Of all objects' whole masks, by row."""
    hidden: np.ndarray
    """Rows, ascending, of objects of which nothing is to be seen."""
    small: np.ndarray
    """Rows, ascending, of objects whose whole masks have too few elements, which are not rasterised."""
    _front: Callable[[Box], np.ndarray] = field(repr=False)

    def ids(self, box: Box) -> np.ndarray:
        """Ids over any box, uint32; 0 no object."""
        final = np.zeros(len(self.whole.elements) + 1, np.uint32)
        final[self.row + 1] = self.objects.ids
        return np.asarray(final[self._front(box)])


def rasterise_scene(
    blocks: Iterable[Box],
    masks: PatchIndex,
    classes: np.ndarray,
    scores: np.ndarray,
    *,
    minimum: int = 1,
    valid: LabelReader | None = None,
) -> RasterisedMasks:
    """Find what is to be seen of each object (see the module), so that ids can be rasterised.

    In memory are the masks, and a few numbers an element of one block.

    Args:
        blocks: that partition the scene, in any order.
        masks: of the scene.
        classes: (n,) class value of each object, int64.
        scores: (n,) float64, such as the grounder's score × predicted IoU; NaN: none, the lowest.
        minimum: the fewest elements of a whole mask that is rasterised; an empty one never is.
        valid: reads which elements of a box have data; others are no object to be seen. None: all have.
    """
    whole = measure_masks(masks)
    small = whole.elements < max(1, minimum)
    order = np.lexsort((np.arange(len(masks)), -np.nan_to_num(scores, nan=-np.inf), whole.elements))
    order = order[~small[order]]
    rank = np.full(len(masks), -1)
    rank[order] = np.arange(len(order))

    def front(box: Box) -> np.ndarray:
        codes = rasterise(box, masks, rank)
        return codes if valid is None else np.where(valid(box), codes, 0)

    seen = MaskExtents.empty(len(masks), masks.shape)
    for block in blocks:
        seen.add(front(block), block, masks.shape)
    row = np.flatnonzero(seen.elements)
    row = row[np.argsort(seen.first[row])]
    objects = SceneObjects(
        classes=classes[row], scores=scores[row], elements=seen.elements[row], first=seen.first[row],
        start=seen.start[row], stop=seen.stop[row], touches_edge=seen.touches_edge(masks.shape)[row],
    )  # fmt: skip
    hidden = np.flatnonzero((seen.elements == 0) & ~small)
    return RasterisedMasks(
        objects=objects, row=row, whole=whole, hidden=hidden, small=np.flatnonzero(small), _front=front
    )
