"""Nodes: the objects of windows that own elements of their window's cell, and what is known of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields

import numpy as np
from scipy.ndimage import find_objects

from segpipe.geometry.box import Box
from segpipe.objects.window import WindowTable
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
