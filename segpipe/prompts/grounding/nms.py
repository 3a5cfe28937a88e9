"""Which of many boxes overlap, and which are the same: found by a tree, never by all pairs at once.

Boxes are (n, 2) corners of smallest and of largest positions, array order, float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import shapely

BLOCK = 32
"""Boxes that are asked about at once; memory holds the pairs of so many with all others."""


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes, each of a group."""

    start: np.ndarray
    """(n, 2)."""
    stop: np.ndarray
    """(n, 2)."""
    group: np.ndarray
    """(n,) int64: here the phrase."""

    def __len__(self) -> int:
        return len(self.group)

    @property
    def area(self) -> np.ndarray:
        """(n,)."""
        return np.asarray((self.stop - self.start).prod(axis=1))

    def take(self, places: np.ndarray) -> Boxes:
        """Those at these places, or of a mask."""
        return Boxes(self.start[places], self.stop[places], self.group[places])

    def shapes(self, span: float) -> np.ndarray:
        """As polygons, groups side by side at a distance of ``span``; 0: where they are."""
        x = self.group * span
        return np.asarray(
            shapely.box(self.start[:, 1] + x, self.start[:, 0], self.stop[:, 1] + x, self.stop[:, 0])
        )


def common(one: Boxes, two: Boxes) -> np.ndarray:
    """(n,) area that the boxes of each pair have in common."""
    edges = np.minimum(one.stop, two.stop) - np.maximum(one.start, two.start)
    return np.asarray(np.clip(edges, 0, None).prod(axis=1))


def box_iou(one: Boxes, two: Boxes) -> np.ndarray:
    """(n,) IoU of the boxes of each pair; 0 where neither has an area."""
    both = common(one, two)
    union = one.area + two.area - both
    return np.asarray(np.divide(both, union, out=np.zeros_like(both), where=union > 0))


def neighbours(asked: Boxes, others: Boxes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Places (i of ``asked``, k of ``others``) of boxes of one group that overlap or touch, part by part.

    They ascend in i, then k; an i is in one part alone.
    """
    if not len(asked) or not len(others):
        return
    span = _span(asked, others)
    tree = shapely.STRtree(others.shapes(span))
    shapes = asked.shapes(span)
    for begin in range(0, len(asked), BLOCK):
        i, k = tree.query(shapes[begin : begin + BLOCK])
        order = np.lexsort((k, i))
        yield i[order] + begin, k[order]


def suppress(ranked: Boxes, iou: float, nested: float = np.inf, across: bool = False) -> np.ndarray:
    """Greedy non-maximum suppression: (n,) the place of the box that each is the same as; −1: it is kept.

    Args:
        ranked: from the best down.
        iou: from which two boxes are the same.
        nested: share of the smaller one inside the other from which they are, too; above 1: never.
        across: boxes of different groups are compared, and those of one group are not.
    """
    into = np.full(len(ranked), -1, np.int64)
    if not len(ranked):
        return into
    shapes = ranked.shapes(0.0 if across else _span(ranked, ranked))
    tree = shapely.STRtree(shapes)
    for begin in range(0, len(ranked), BLOCK):
        block = np.arange(begin, min(begin + BLOCK, len(ranked)))
        alive = block[into[block] < 0]
        i, k = tree.query(shapes[alive])
        i = alive[i]
        later = (k > i) & (into[k] < 0) & ((ranked.group[i] != ranked.group[k]) == across)
        i, k = i[later], k[later]
        one, two = ranked.take(i), ranked.take(k)
        smaller = np.minimum(one.area, two.area)
        same = (box_iou(one, two) >= iou) | ((common(one, two) >= nested * smaller) & (smaller > 0))
        order = np.lexsort((k[same], i[same]))
        i, k = i[same][order], k[same][order]
        better, first = np.unique(i, return_index=True)
        for place, lesser in zip(better.tolist(), np.split(k, first[1:]), strict=False):
            if into[place] < 0:
                into[lesser[into[lesser] < 0]] = place
    return into


def _span(one: Boxes, two: Boxes) -> float:
    """More than any of the boxes is wide, all taken together."""
    lows = min(float(b.start[:, 1].min()) for b in (one, two))
    highs = max(float(b.stop[:, 1].max()) for b in (one, two))
    return 2 * (highs - lows) + 1
