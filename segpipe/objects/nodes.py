"""Nodes, the objects of windows that own elements of their window's cell, and the edges between them.

Edges tell which objects of neighbouring windows are one object, by what both windows see.

Two windows A and B are neighbours if their cells touch, at a corner too. Both see

    R = (A's window ∩ B's cell) ∪ (B's window ∩ A's cell),

an element of R under an id of A and an id of B: its own window's, from the scene's raw ids, and the
other's, from that one's overhang. Objects a of A and b of B are one if their class is the same, and a
thing's; if both are nodes; and if, counted in R, |a ∩ b| / |a ∪ b| > 1/2. Then b is the only such
object of B: |a ∩ b| > |a ∪ b| / 2 ≥ |a| / 2, and objects of one window have no element in common, so two of
them cannot both hold more than half of a. The same holds for a.

Each window counts its half of R as a joint histogram of ids, also where one of the two is 0: so
halves add, and the area of an object in R is a margin of the sum.

With a halo of 0 windows do not see into each other, and an object ends where its cell ends; only a
window that was shifted at the scene's end still overlaps the one before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import ClassVar

import numpy as np
from scipy.ndimage import find_objects

from segpipe.geometry.box import Box
from segpipe.metrics.tally import SumTable, compact
from segpipe.objects.window import WindowObjects, WindowTable
from segpipe.tiling.windows import Index, Lattice

SCORE_BITS = 24
"""Scores are whole numbers of 2**-24: exact for float32 of at least 0.5, and 2**39 elements can be summed."""
NO_SCORE = -1
"""Fixed-point score where the model gives none."""


def window_number(lattice: Lattice, index: Index) -> int:
    """Position of a window among all, in C order."""
    number = 0
    for axis, i in zip(lattice.axes, index, strict=True):
        number = number * len(axis.origins) + i
    return number


def cells(lattice: Lattice, box: Box) -> Iterator[tuple[Index, Box]]:
    """Windows that answer for elements of a box, C order, each with the part of its cell in the box."""
    for index in lattice.windows(box, "trim"):
        yield index, lattice.owned(index).intersect(box)


@dataclass(frozen=True, eq=False)
class Nodes:
    """Objects of windows by (window, local id): sorted, none twice; all int64.

    Of a part of the scene (`box_nodes`) or of the whole of it (`add_nodes`).
    """

    window: np.ndarray
    """(n,) `window_number`."""
    local: np.ndarray
    """(n,) id in the window, above 0."""
    classes: np.ndarray
    """(n,) class value."""
    score: np.ndarray
    """(n,) in 2**-`SCORE_BITS`, or `NO_SCORE`."""
    elements: np.ndarray
    """(n,) elements in the window's cell, above 0."""
    first: np.ndarray
    """(n,) smallest element, as a position in the scene in C order."""
    start: np.ndarray
    """(n, axes) first corner of the bounding box of these elements."""
    stop: np.ndarray
    """(n, axes) one past its last corner."""

    def __len__(self) -> int:
        return len(self.window)

    def find(self, window: np.ndarray, local: np.ndarray) -> np.ndarray:
        """Place of each (window, local id) among the nodes; −1 where that is no node."""
        base = int(self.local.max(initial=0)) + 1
        keys = self.window * base + self.local
        wanted = np.where((local > 0) & (local < base), window * base + local, -1)
        place = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
        return np.where(keys[place] == wanted, place, -1) if len(keys) else np.full(wanted.shape, -1)


def box_nodes(raw: np.ndarray, box: Box, lattice: Lattice, tables: Mapping[Index, WindowTable]) -> Nodes:
    """Nodes with elements in a box, as far as they are in it.

    Args:
        raw: local ids over the box, (y, x) or (z, y, x), each of the window that owns the element.
        tables: classes and scores of every window that owns an object in the box.
    """
    ndim = box.ndim
    rows: list[np.ndarray] = [np.zeros((0, 6 + 2 * ndim), np.int64)]
    for index, part in cells(lattice, box):
        ids = raw[part.within(box)]
        local, first, elements = np.unique(ids, return_index=True, return_counts=True)
        some = local > 0
        if not some.any():
            continue
        local, first, elements = local[some].astype(np.int64), first[some], elements[some]
        classes, scores = tables[index]
        corners = np.array([[(s.start, s.stop) for s in bounds] for bounds in find_objects(ids) if bounds])
        at = np.stack(np.unravel_index(first, part.shape), -1) + part.start
        columns = [
            np.full(len(local), window_number(lattice, index)),
            local,
            classes[local - 1],
            _fixed(scores[local - 1]),
            elements,
            at @ _strides(lattice.shape),
        ]
        corners = corners + np.array(part.start)[:, None]
        rows.append(np.column_stack([*columns, corners[..., 0], corners[..., 1]]).astype(np.int64))
    return _nodes(np.concatenate(rows), ndim)


def add_nodes(parts: Iterable[Nodes], ndim: int) -> Nodes:
    """The nodes of all parts of a scene: the same bits in any order and grouping.

    Args:
        parts: of boxes that partition the scene.
        ndim: axes of the scene.
    """
    nothing = np.zeros((0, 6 + 2 * ndim), np.int64)
    rows = (np.column_stack([getattr(part, f.name) for f in fields(part)]) for part in parts)
    return _nodes(np.concatenate([nothing, *rows]), ndim)


def _nodes(rows: np.ndarray, ndim: int) -> Nodes:
    """Nodes from rows (n, 6 + 2·axes) in the order of the fields; those of one node are put together."""
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    begin = np.flatnonzero(np.r_[True, (np.diff(rows[:, :2], axis=0) != 0).any(1)][: len(rows)])
    out = rows[begin]
    group = np.repeat(np.arange(len(begin)), np.diff(np.r_[begin, len(rows)]))
    if (rows[:, 2:4] != out[group, 2:4]).any():
        raise ValueError("a window's object has two classes or scores: the window was not computed alike")
    if len(out):
        out[:, 4] = np.add.reduceat(rows[:, 4], begin)
        out[:, 5 : 6 + ndim] = np.minimum.reduceat(rows[:, 5 : 6 + ndim], begin)
        out[:, 6 + ndim :] = np.maximum.reduceat(rows[:, 6 + ndim :], begin)
    columns = [*out[:, :6].T, out[:, 6 : 6 + ndim], out[:, 6 + ndim :]]
    return Nodes(*columns)


def _fixed(scores: np.ndarray) -> np.ndarray:
    """Scores as whole numbers, `NO_SCORE` for NaN; int64."""
    whole = np.rint(np.nan_to_num(scores.astype(np.float64)) * 2**SCORE_BITS).astype(np.int64)
    return np.where(np.isnan(scores), NO_SCORE, whole)


def _strides(shape: tuple[int, ...]) -> np.ndarray:
    """Elements from one to the next along each axis of an array in C order."""
    return np.array([math.prod(shape[axis + 1 :]) for axis in range(len(shape))], np.int64)


@dataclass(frozen=True, eq=False)
class Overhang:
    """What one window says of its neighbours' cells."""

    index: Index
    ids: np.ndarray
    """(n,) uint32 local ids over `overhang_boxes`, box after box, each in C order."""


@dataclass(frozen=True, eq=False)
class PairCounts(SumTable):
    """Elements that two neighbouring windows both see, by the ids they give: sorted, none twice, int64.

    ``low`` is the window with the smaller number. One of the two ids may be 0: no object.
    """

    KEYS: ClassVar[int] = 4
    low: np.ndarray
    """`window_number` of the first window."""
    high: np.ndarray
    """`window_number` of the second."""
    low_id: np.ndarray
    """Local id in the first window."""
    high_id: np.ndarray
    """Local id in the second."""
    count: np.ndarray
    """Elements."""


def overhang_boxes(lattice: Lattice, index: Index) -> list[tuple[Index, Box]]:
    """A window's neighbours, C order, each with the part of its cell that the window sees."""
    near = [
        range(max(0, i - 1), min(len(a.cuts) - 1, i + 2)) for a, i in zip(lattice.axes, index, strict=True)
    ]
    window = lattice.window(index)
    seen = ((other, window.intersect(lattice.owned(other))) for other in product(*near) if other != index)
    return [(other, box) for other, box in seen if box.size]


def window_overhang(
    objects: WindowObjects, lattice: Lattice, index: Index, stuff: Collection[int] = ()
) -> Overhang:
    """What a window says of its neighbours' cells, without stuff: that needs no edges.

    Elements without a valid pixel must have id 0 already, as they have in the raw ids.
    """
    keep = np.r_[0, np.where(np.isin(objects.classes, [*stuff]), 0, np.arange(1, len(objects.classes) + 1))]
    window = lattice.window(index)
    parts = [objects.ids[box.within(window)].ravel() for _, box in overhang_boxes(lattice, index)]
    ids = np.concatenate([np.zeros(0, np.int32), *parts])
    return Overhang(index, keep.astype(np.uint32)[ids])


def window_edges(overhang: Overhang, lattice: Lattice, read: Callable[[Box], np.ndarray]) -> PairCounts:
    """A window's half of the counts with each of its neighbours.

    Args:
        read: raw local ids of a box of the scene; called with each of `overhang_boxes`.
    """
    boxes = overhang_boxes(lattice, overhang.index)
    sizes = [box.size for _, box in boxes]
    raw = np.concatenate([np.zeros(0, np.int64), *(read(box).ravel() for _, box in boxes)]).astype(np.int64)
    mine = overhang.ids.astype(np.int64)
    if mine.shape != raw.shape:
        raise ValueError(f"an overhang of {len(mine)} elements; this window's has {len(raw)}")
    side = np.repeat(np.arange(len(boxes)), sizes)
    some = (mine > 0) | (raw > 0)
    base = int(max(mine.max(initial=0), raw.max(initial=0))) + 1
    codes, place = compact(((side * base + mine) * base + raw)[some])
    count = np.bincount(place, minlength=len(codes))
    numbers = np.array([window_number(lattice, other) for other, _ in boxes], np.int64)
    own, other = np.full(len(codes), window_number(lattice, overhang.index)), numbers[codes // base**2]
    own_id, other_id = codes // base % base, codes % base
    swap = own > other
    return PairCounts.from_columns(
        low=np.where(swap, other, own), high=np.where(swap, own, other),
        low_id=np.where(swap, other_id, own_id), high_id=np.where(swap, own_id, other_id), count=count,
    )  # fmt: skip


add_pairs = PairCounts.sum
"""The sum of counts, each window's half once."""


def matches(pairs: PairCounts, nodes: Nodes, stuff: Collection[int] = ()) -> np.ndarray:
    """(n, 2) places of nodes that are one object.

    Args:
        pairs: of the whole scene (`add_pairs`).
        nodes: of the whole scene.
        stuff: classes that need no edges.
    """
    area_low = _margin(pairs, pairs.low_id)
    area_high = _margin(pairs, pairs.high_id)
    both = (pairs.low_id > 0) & (pairs.high_id > 0)
    close = both & (3 * pairs.count > area_low + area_high)  # 2 i > a + b − i
    ends = np.stack(
        [
            nodes.find(pairs.low[close], pairs.low_id[close]),
            nodes.find(pairs.high[close], pairs.high_id[close]),
        ],
        -1,
    )
    ends = ends[(ends >= 0).all(1)]
    classes = nodes.classes[ends]
    same = (classes[:, 0] == classes[:, 1]) & ~np.isin(classes[:, 0], [*stuff])
    return np.asarray(ends[same])


def _margin(pairs: PairCounts, ids: np.ndarray) -> np.ndarray:
    """Of each row: elements in R of its object ``ids`` (of one of its windows), whatever the other says."""
    if not len(pairs):
        return pairs.count
    order = np.lexsort((ids, pairs.high, pairs.low))
    keys = np.stack([pairs.low, pairs.high, ids])[:, order]
    begin = np.flatnonzero(np.r_[True, (np.diff(keys) != 0).any(0)])
    area = np.empty_like(pairs.count)
    area[order] = np.repeat(np.add.reduceat(pairs.count[order], begin), np.diff(np.r_[begin, len(pairs)]))
    return area
