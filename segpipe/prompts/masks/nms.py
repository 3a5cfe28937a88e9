"""Suppress boxes that overlap better ones (non-maximum suppression), by a tree and never by all pairs.

Boxes are (n, 2) corners of smallest and of largest positions, array order, float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import shapely

from segpipe.prompts.prompt_set import Columns

BLOCK = 32
"""Boxes that are looked up at once; memory holds the pairs of so many with all others."""


@dataclass(frozen=True, eq=False)
class GroupedBoxes(Columns):
    """Boxes, each of a group."""

    start: np.ndarray
    """(n, 2)."""
    stop: np.ndarray
    """(n, 2)."""
    group: np.ndarray
    """(n,) int64: a phrase, or a window."""

    @property
    def area(self) -> np.ndarray:
        """(n,)."""
        return np.asarray((self.stop - self.start).prod(axis=1))

    def shapes(self, span: float) -> np.ndarray:
        """Return them as polygons, groups side by side at a distance of ``span``; 0: where they are."""
        x = self.group * span
        return np.asarray(
            shapely.box(self.start[:, 1] + x, self.start[:, 0], self.stop[:, 1] + x, self.stop[:, 0])
        )


def box_iou(start: np.ndarray, stop: np.ndarray, other: np.ndarray, other_stop: np.ndarray) -> np.ndarray:
    """IoU (…) of boxes with corners (…, 2) and others, broadcast; 0 where neither has an area, or is NaN."""
    shared = np.clip(np.minimum(stop, other_stop) - np.maximum(start, other), 0, None).prod(axis=-1)
    union = (stop - start).prod(axis=-1) + (other_stop - other).prod(axis=-1) - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(union), where=union > 0))


def shared_area(one: GroupedBoxes, two: GroupedBoxes) -> np.ndarray:
    """(n,) area that the boxes of each pair have in common."""
    edges = np.minimum(one.stop, two.stop) - np.maximum(one.start, two.start)
    return np.asarray(np.clip(edges, 0, None).prod(axis=1))


def neighbours(boxes: GroupedBoxes, others: GroupedBoxes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield rows (i of ``boxes``, k of ``others``) of boxes of one group that overlap or touch, part by part.

    They ascend in i, then k; an i is in one part alone.
    """
    if not len(boxes) or not len(others):
        return
    span = _span(boxes, others)
    tree = shapely.STRtree(others.shapes(span))
    shapes = boxes.shapes(span)
    for begin in range(0, len(boxes), BLOCK):
        i, k = tree.query(shapes[begin : begin + BLOCK])
        order = np.lexsort((k, i))
        yield i[order] + begin, k[order]


def suppress(ranked: GroupedBoxes, iou: float, across: bool = False) -> np.ndarray:
    """Suppress greedily: (n,) row of the better box that each box repeats; −1: it is kept.

    Args:
        ranked: from the best down.
        iou: from which two boxes are the same.
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
        same = box_iou(one.start, one.stop, two.start, two.stop) >= iou
        order = np.lexsort((k[same], i[same]))
        i, k = i[same][order], k[same][order]
        better, first = np.unique(i, return_index=True)
        for place, lesser in zip(better.tolist(), np.split(k, first[1:]), strict=False):
            if into[place] < 0:
                into[lesser[into[lesser] < 0]] = place
    return into


def keep_best(
    start: np.ndarray, stop: np.ndarray, limit: float, group: np.ndarray | None = None
) -> np.ndarray:
    """Return the rows, ascending, of the boxes without a better one that is kept and overlaps them more.

    Args:
        start: (n, 2) corners, the best box first.
        stop: (n, 2) opposite corners.
        limit: IoU above which a box is left out; 1: none is.
        group: (n,) boxes of one group do not remove each other; None: there are no groups.
    """
    boxes = GroupedBoxes(start, stop, np.zeros(len(start), np.int64) if group is None else group)
    above = float(np.nextafter(limit, np.inf))  # `suppress` takes its own limit as reached
    return np.flatnonzero(suppress(boxes, above, across=group is not None) < 0)


def _span(one: GroupedBoxes, two: GroupedBoxes) -> float:
    """More than any of the boxes is wide, all taken together."""
    lows = min(float(b.start[:, 1].min()) for b in (one, two))
    highs = max(float(b.stop[:, 1].max()) for b in (one, two))
    return 2 * (highs - lows) + 1
