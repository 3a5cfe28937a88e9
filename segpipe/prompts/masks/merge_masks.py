"""Objects of a scene from the answers of its windows: those that are one are merged, and it is told.

Two objects are one where the IoU of their masks, counted exactly on the scene's elements, is at least a
threshold. As in non-maximum suppression it is decided greedily from the best rank down: an object is merged
into the first kept one, by rank, that it is one with, and what is merged merges nothing further. So the rule
is not transitive (a chain of likenesses does not become one object), and neither windows nor the order of
answers change it. What a person gave (drawn prompts, an earlier run's labels) is never merged away.

By rank: drawn, earlier, then all others; among these the higher score of the grounder (none is the lowest),
then the higher predicted IoU, then the smaller number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import shapely

from segpipe.geometry.box import Box
from segpipe.prompts.masks.patches import Patch, check_patches, object_box, object_cover, tiles

SAME = 0.7
"""IoU at which two masks are one object: what SAM's generator of automatic masks takes for boxes."""


class Source(IntEnum):
    """Where an object's prompt came from."""

    DRAWN = 0
    """Points, boxes and outlines of a person."""
    EARLIER = 1
    """Labels of an earlier run."""
    TEXT = 2
    """A phrase, through a grounder."""
    AUTOMATIC = 3
    """The grid of points."""


@dataclass(frozen=True, eq=False)
class Found:
    """Objects of a scene, each with its mask; an object's *place* is its position in these columns."""

    number: np.ndarray
    """(n,) int64, none twice."""
    phrase: np.ndarray
    """(n,) int64: index of the phrase; −1: none."""
    source: np.ndarray
    """(n,) int64: `Source`."""
    score: np.ndarray
    """(n,) float64: the grounder's; NaN: none."""
    iou: np.ndarray
    """(n,) float64: IoU with the object that the segmenter predicts of its mask; NaN: none."""
    patches: tuple[tuple[Patch, ...], ...]
    """Of each object: none where its mask is empty, one of a raster's, one a slice of a volume's."""

    def __post_init__(self) -> None:
        lengths = {len(column) for column in vars(self).values()}
        if len(lengths) > 1 or len(np.unique(self.number)) < len(self.number):
            raise ValueError(f"columns of {sorted(lengths)} objects, or a number twice")
        for patches in self.patches:
            check_patches(patches)

    def __len__(self) -> int:
        return len(self.number)

    def ranked(self) -> np.ndarray:
        """(n,) places from the best rank down (see the module)."""
        given = np.minimum(self.source, Source.TEXT)
        best = (-np.nan_to_num(column, nan=-np.inf) for column in (self.iou, self.score))
        return np.lexsort((self.number, *best, given))


@dataclass(frozen=True, eq=False)
class Joined:
    """What merging left of `Found`."""

    kept: np.ndarray
    """(k,) places of the objects that remain, ascending."""
    also: tuple[tuple[int, ...], ...]
    """Of each of these: the other phrases that were found to mean it, ascending."""
    merged: np.ndarray
    """(m,) number of each object that is none of its own, ascending."""
    into: np.ndarray
    """(m,) number of the object that it was merged into."""
    iou: np.ndarray
    """(m,) float64: IoU of their masks."""


def join_found(found: Found, shape: Sequence[int], same: float = SAME) -> Joined:
    """Merge the objects that are one (see the module).

    In memory are the pairs of objects whose boxes overlap, and one tile of masks.

    Args:
        found: all objects of the scene.
        shape: of the scene, (y, x) or (z, y, x).
        same: the least IoU of two masks that are one, above 0.
    """
    if not 0 < same <= 1:
        raise ValueError(f"same: found {same}; valid: above 0, at most 1")
    masks = _Masks(found, shape)
    order = found.ranked()
    rank = np.empty(len(found), np.int64)
    rank[order] = np.arange(len(found))
    better, worse = _candidates(masks.start, masks.stop, rank)
    first = np.searchsorted(rank[worse], np.arange(len(found) + 1))
    into = np.full(len(found), -1)
    share = np.full(len(found), np.nan)
    for place in order[found.source[order] >= Source.TEXT].tolist():
        pairs = slice(first[rank[place]], first[rank[place] + 1])
        for other in better[pairs].tolist():
            iou = masks.iou(place, other, same) if into[other] < 0 else 0.0
            if iou >= same:
                into[place], share[place] = other, iou
                break
    return _joined(found, into, share)


def _joined(found: Found, into: np.ndarray, share: np.ndarray) -> Joined:
    """Args: of each object the place of the one that it was merged into or −1, and their IoU."""
    also: dict[int, set[int]] = {}
    lost = np.flatnonzero(into >= 0)
    for place, winner in zip(lost.tolist(), into[lost].tolist(), strict=True):
        also.setdefault(winner, set()).add(int(found.phrase[place]))
    kept = np.flatnonzero(into < 0)
    phrases = [also.get(p, set()) - {int(found.phrase[p]), -1} for p in kept.tolist()]
    lost = lost[np.argsort(found.number[lost])]
    return Joined(
        kept,
        tuple(tuple(sorted(p)) for p in phrases),
        found.number[lost],
        found.number[into[lost]],
        share[lost],
    )


def _candidates(start: np.ndarray, stop: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


class _Masks:
    """Counts of masks' elements, each counted once."""

    def __init__(self, found: Found, shape: Sequence[int]) -> None:
        self._patches = found.patches
        self._boxes = [object_box(patches, shape) for patches in found.patches]
        self._elements: dict[int, int] = {}
        self.start = np.array([b.start for b in self._boxes], np.int64).reshape(-1, len(shape))
        self.stop = np.array([b.stop for b in self._boxes], np.int64).reshape(-1, len(shape))

    def iou(self, first: int, second: int, least: float) -> float:
        """IoU of two objects; 0 where the sizes of boxes and masks alone say that it is below ``least``."""
        common = self._boxes[first].intersect(self._boxes[second])
        sizes = self._count(first), self._count(second)
        most = min(common.size, *sizes)
        if not most or most / (sum(sizes) - most) < least:
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
