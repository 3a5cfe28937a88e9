"""Masks that overlap painted as ids of a scene, block by block; what is known of each object.

**Who is in front.** The object whose whole mask has fewer elements, so that an islet is not lost in its lake;
of masks as large as each other the one with the higher score, then the one that is listed first. The masks
and scores alone decide, so ids cannot depend on blocks or on their order. An object of which nothing is to
be seen has no id and is listed as hidden. What an object loses to others is lost in the label map only: the
size of its whole mask is kept.
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
from segpipe.objects.merge import SceneObjects
from segpipe.prompts.masks.patches import Patch, check_patches, patch_box, patch_cover, tiles
from segpipe.sources.base import LabelReader


@dataclass(frozen=True, eq=False)
class Masks:
    """The masks of a scene's objects; an object's *place* is its position."""

    shape: tuple[int, ...]
    """Of the scene, (y, x) or (z, y, x)."""
    patches: tuple[tuple[Patch, ...], ...]
    """Of each object, as in `segpipe.prompts.masks.merge_masks.Found`."""

    def __post_init__(self) -> None:
        for patches in self.patches:
            check_patches(patches)

    def __len__(self) -> int:
        return len(self.patches)

    def near(self, box: Box) -> Iterator[tuple[int, Patch, Box]]:
        """Patches that reach into a box: the place of the object, the patch, what it shares with the box."""
        owner, among, start, stop, tree = self._index
        found = np.sort(tree.query(_flat(np.array([box.start]), np.array([box.stop]))[0]))
        low, high = np.maximum(start[found], box.start), np.minimum(stop[found], box.stop)
        some = (low < high).all(axis=1)
        columns = (owner[found], among[found], low, high)
        for place, number, a, b in zip(*(column[some].tolist() for column in columns), strict=True):
            yield place, self.patches[place][number], Box(tuple(a), tuple(b))

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, shapely.STRtree]:
        """Of each patch the object's place, its number among the object's, its box; a tree of the boxes."""
        boxes = [patch_box(patch, self.shape) for patches in self.patches for patch in patches]
        start = np.array([b.start for b in boxes], np.int64).reshape(-1, len(self.shape))
        stop = np.array([b.stop for b in boxes], np.int64).reshape(-1, len(self.shape))
        rows = [(place, k) for place, patches in enumerate(self.patches) for k in range(len(patches))]
        owner, among = np.array(rows, np.int64).reshape(-1, 2).T
        return owner, among, start, stop, shapely.STRtree(_flat(start, stop))


def _flat(start: np.ndarray, stop: np.ndarray) -> np.ndarray:
    """Boxes (n, axes) in the scene's last two axes, as (n,) polygons."""
    return np.asarray(shapely.box(start[:, -1], start[:, -2], stop[:, -1], stop[:, -2]))


@dataclass(frozen=True, eq=False)
class Extents:
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
    def empty(cls, count: int, shape: Sequence[int]) -> Extents:
        """Of objects without elements: what `add` starts from."""
        return cls(
            np.zeros(count, np.int64),
            np.full(count, Box.whole(shape).size),
            np.tile(np.array(shape, np.int64), (count, 1)),
            np.zeros((count, len(shape)), np.int64),
        )

    def add(self, codes: np.ndarray, box: Box, shape: Sequence[int], offset: int = 0) -> None:
        """Add the elements of a box, in place; the same bits in any order of boxes that share none.

        Args:
            codes: whole numbers of the box's shape: 0 none, k the object at place ``offset`` + k − 1.
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


def measure_masks(masks: Masks) -> Extents:
    """Of each object's whole mask, whatever is in front of it."""
    found = Extents.empty(len(masks), masks.shape)
    for place, patches in enumerate(masks.patches):
        for patch in patches:
            for tile in tiles(patch_box(patch, masks.shape)):
                found.add(patch_cover(patch, tile).view(np.uint8), tile, masks.shape, place)
    return found


def paint(box: Box, masks: Masks, rank: np.ndarray) -> np.ndarray:
    """Which object is in front at each element of a box, int32: 0 none, k the one at place k − 1.

    Args:
        box: of the scene.
        masks: of the scene.
        rank: (n,) of each object: the smallest is in front; none twice; −1: the object is not painted.
    """
    out = np.zeros(box.shape, np.int32)
    painted = [item for item in masks.near(box) if rank[item[0]] >= 0]
    for place, patch, part in sorted(painted, key=lambda item: -int(rank[item[0]])):  # from back to front
        out[part.within(box)][patch_cover(patch, part)] = place + 1
    return out


@dataclass(frozen=True, eq=False)
class Painted:
    """The objects of a scene as its label map shows them."""

    objects: SceneObjects
    """What is to be seen of each object, ids 1…n by the first such element."""
    place: np.ndarray
    """(n,) place of each of these among the masks."""
    whole: Extents
    """Of all objects' whole masks, by place."""
    hidden: np.ndarray
    """Places, ascending, of objects of which nothing is to be seen."""
    small: np.ndarray
    """Places, ascending, of objects whose whole masks have too few elements, which are not painted."""
    _front: Callable[[Box], np.ndarray] = field(repr=False)

    def ids(self, box: Box) -> np.ndarray:
        """Ids over any box, uint32; 0 no object."""
        final = np.zeros(len(self.whole.elements) + 1, np.uint32)
        final[self.place + 1] = self.objects.ids
        return np.asarray(final[self._front(box)])


def paint_scene(
    blocks: Iterable[Box],
    masks: Masks,
    classes: np.ndarray,
    scores: np.ndarray,
    *,
    minimum: int = 1,
    valid: LabelReader | None = None,
) -> Painted:
    """Find out what is to be seen of each object (see the module), so that ids can be painted.

    In memory are the masks, and a few numbers an element of one block.

    Args:
        blocks: that partition the scene, in any order.
        masks: of the scene.
        classes: (n,) class value of each object, int64.
        scores: (n,) float64, such as the grounder's score × predicted IoU; NaN: none, the lowest.
        minimum: the fewest elements of a whole mask that is painted; an empty one never is.
        valid: reads which elements of a box have data; others are no object to be seen. None: all have.
    """
    whole = measure_masks(masks)
    small = whole.elements < max(1, minimum)
    order = np.lexsort((np.arange(len(masks)), -np.nan_to_num(scores, nan=-np.inf), whole.elements))
    order = order[~small[order]]
    rank = np.full(len(masks), -1)
    rank[order] = np.arange(len(order))

    def front(box: Box) -> np.ndarray:
        codes = paint(box, masks, rank)
        return codes if valid is None else np.where(valid(box), codes, 0)

    seen = Extents.empty(len(masks), masks.shape)
    for block in blocks:
        seen.add(front(block), block, masks.shape)
    place = np.flatnonzero(seen.elements)
    place = place[np.argsort(seen.first[place])]
    columns = (seen.elements, seen.first, seen.start, seen.stop, seen.touches_edge(masks.shape))
    objects = SceneObjects(classes[place], scores[place], *(column[place] for column in columns))
    hidden = np.flatnonzero((seen.elements == 0) & ~small)
    return Painted(objects, place, whole, hidden, np.flatnonzero(small), front)
