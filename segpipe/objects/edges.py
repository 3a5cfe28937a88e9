"""Which objects of neighbouring windows are one object: told by what both windows see.

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

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np

from segpipe.geometry.box import Box
from segpipe.metrics.tally import SumTable, compact
from segpipe.objects.nodes import Nodes, window_number
from segpipe.objects.window import WindowObjects
from segpipe.tiling.windows import Index, Lattice


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
