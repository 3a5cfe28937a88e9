"""Find the components of a label map, read strip by strip: their boxes, and a position deep inside each.

The answer does not depend on how the map is cut. In memory are one strip of about four million elements (at
least one row or slice), the table of components and, for a place inside, one component of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import cc3d
import numpy as np
from scipy.ndimage import distance_transform_edt, find_objects
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segpipe.geometry.box import Box
from segpipe.metrics.tally import compact
from segpipe.sources.base import LabelReader

STRIP = 1 << 22
"""Elements of a strip, and of the part of a component in which the deepest element is looked for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Components:
    """Components in the order of their first elements; all int64."""

    value: np.ndarray
    """(n,) the label."""
    elements: np.ndarray
    """(n,) how many."""
    first: np.ndarray
    """(n,) smallest element, as a position in C order."""
    start: np.ndarray
    """(n, axes) bounding box."""
    stop: np.ndarray
    """(n, axes) one past its last corner."""
    numbers: tuple[np.ndarray, ...]
    """For each strip: the component, from 1, of each of its pieces, and 0 for what is none."""

    def __len__(self) -> int:
        return len(self.value)

    def box(self, item: int) -> Box:
        """Bounding box of a component."""
        return Box(tuple(self.start[item].tolist()), tuple(self.stop[item].tolist()))


def find_components(read: LabelReader, shape: Sequence[int], ids: bool, strip: int = STRIP) -> Components:
    """The components of the labels above 0.

    Args:
        read: labels of a box, whole numbers.
        shape: of the map, (y, x) or (z, y, x).
        ids: elements of one label are one object wherever they lie; else those that touch, also at
            corners (8 or 26 neighbours), are one.
        strip: elements read at once; the answer does not depend on it.
    """
    rows, pairs, counts, values = [], [], [], []
    before: tuple[np.ndarray, np.ndarray] | None = None
    known = 0
    for box in strips(shape, strip):
        labels = _labels(read, box)
        pieces = _pieces(labels, ids)
        table = _table(pieces, labels, box, shape)
        if not ids and before is not None:
            pairs.append(_touching(before, (labels[0], _shifted(pieces[0], known))))
        before = labels[-1], _shifted(pieces[-1], known)
        known += len(table)
        rows.append(table)
        counts.append(len(table))
        values.append(table[:, 0])
    table = np.concatenate(rows)
    groups = np.unique(table[:, 0], return_inverse=True)[1] if ids else _joined(pairs, known)
    return _merged(table, groups.reshape(-1), counts, len(shape))


def component_strips(
    read: LabelReader, shape: Sequence[int], ids: bool, found: Components, strip: int = STRIP
) -> Iterator[tuple[Box, np.ndarray]]:
    """The same strips again, each element with the number of its component from 1; 0 none.

    Args as for `find_components`; ``strip`` as it was there.
    """
    for box, numbers in zip(strips(shape, strip), found.numbers, strict=True):
        yield box, numbers[_pieces(_labels(read, box), ids)]


def component_means(
    read: LabelReader, scores: Callable[[Box], np.ndarray], shape: Sequence[int], found: Components
) -> np.ndarray:
    """(n,) mean score of the elements of each component.

    Args:
        read: as for `find_components`, without ids.
        scores: of the elements of a box; NaN counts as 0.
        shape: of the map.
        found: the components.
    """
    total = np.zeros(len(found) + 1)
    for box, number in component_strips(read, shape, False, found):
        total += np.bincount(number.ravel(), np.nan_to_num(scores(box)).ravel(), len(total))
    return np.asarray(total[1:] / found.elements)


def deepest(
    read: LabelReader, found: Components, item: int, ids: bool, spacing: Sequence[float], shape: Sequence[int]
) -> tuple[int, ...]:
    """The element of a component that is farthest from everything else; the first of several.

    Of a component whose box has more than `STRIP` elements, only a part around its first element is
    looked at, so that the answer is inside but may not be the deepest.

    Args:
        read: as for `find_components`.
        found: the components.
        item: which.
        ids: as it was for them.
        spacing: size of an element along each axis, in any unit.
        shape: of the map; what is beyond it is not of the component.
    """
    first = [int(i) for i in np.unravel_index(int(found.first[item]), tuple(shape))]
    box = _part(found.box(item), first)
    labels = read(box)
    inside = labels == found.value[item]
    if not ids:
        pieces = cc3d.connected_components(inside, connectivity=_neighbours(inside.ndim))
        inside = pieces == pieces[tuple(f - a for f, a in zip(first, box.start, strict=True))]
    depth = distance_transform_edt(np.pad(inside, 1), sampling=tuple(spacing))
    place = np.unravel_index(int(depth.argmax()), depth.shape)
    return tuple(int(i) - 1 + a for i, a in zip(place, box.start, strict=True))


def strips(shape: Sequence[int], strip: int = STRIP) -> list[Box]:
    """Boxes of whole rows (or slices) that partition a map."""
    rows = max(1, strip // math.prod(shape[1:]))
    rest, ends = (0,) * (len(shape) - 1), tuple(shape[1:])
    return [Box((a, *rest), (min(a + rows, shape[0]), *ends)) for a in range(0, shape[0], rows)]


def _labels(read: LabelReader, box: Box) -> np.ndarray:
    labels = np.asarray(read(box))
    return np.where(labels > 0, labels, 0)


def _neighbours(ndim: int) -> Literal[8, 26]:
    return 8 if ndim == 2 else 26


def _pieces(labels: np.ndarray, ids: bool) -> np.ndarray:
    """Pieces of one strip, from 1; 0 where the label is 0."""
    if ids:
        known, code = compact(labels)
        return np.asarray(code + (known[0] != 0), np.int64)
    return np.asarray(cc3d.connected_components(labels, connectivity=_neighbours(labels.ndim)), np.int64)


def _shifted(pieces: np.ndarray, known: int) -> np.ndarray:
    """Pieces from 1 as places in the table of all strips; −1 none."""
    return np.where(pieces > 0, pieces + (known - 1), -1)


def _table(pieces: np.ndarray, labels: np.ndarray, box: Box, shape: Sequence[int]) -> np.ndarray:
    """A row a piece: value, elements, first, start, stop."""
    flat = pieces.reshape(-1)
    there = np.flatnonzero(flat)[::-1]
    elements = np.bincount(flat)[1:]
    first = np.zeros(len(elements) + 1, np.int64)
    first[flat[there]] = there  # from the last to the first, which stays
    first = first[1:]
    value = labels.reshape(-1)[first]
    corners = [
        [*(s.start for s in part), *(s.stop for s in part)]
        for part in find_objects(pieces, len(elements))
        if part is not None
    ]
    bounds = np.array(corners, np.int64).reshape(len(elements), 2 * len(shape))
    bounds[:, [0, len(shape)]] += box.start[0]
    offset = box.start[0] * math.prod(shape[1:])
    return np.column_stack((value, elements, first + offset, bounds)).astype(np.int64)


def _touching(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Pairs (n, 2) of pieces of one label that are neighbours across two adjoining rows or slices.

    Args:
        before: labels and pieces of the last row of a strip.
        after: of the first row of the next one.
    """
    found = []
    for shift in product((-1, 0, 1), repeat=before[0].ndim):
        here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, before[0].shape, strict=True))
        there = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(shift, before[0].shape, strict=True))
        same = (before[0][here] == after[0][there]) & (before[0][here] > 0)
        found.append(np.column_stack((before[1][here][same], after[1][there][same])))
    return np.unique(np.concatenate(found), axis=0)


def _joined(pairs: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The group of each of ``count`` pieces of which these pairs are one."""
    one, two = np.concatenate([np.zeros((0, 2), np.int64), *pairs]).T
    graph = coo_array((np.ones(len(one), bool), (one, two)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1])


def _merged(table: np.ndarray, groups: np.ndarray, counts: Sequence[int], axes: int) -> Components:
    """Rows of pieces as rows of components, and the numbers of these."""
    total = int(groups.max(initial=-1)) + 1
    first = np.full(total, np.iinfo(np.int64).max)
    np.minimum.at(first, groups, table[:, 2])
    order = np.argsort(first)
    rank = np.empty(total, np.int64)
    rank[order] = np.arange(total)
    item = rank[groups]
    value, elements = np.zeros(total, np.int64), np.zeros(total, np.int64)
    value[item] = table[:, 0]
    np.add.at(elements, item, table[:, 1])
    start = np.full((total, axes), np.iinfo(np.int64).max)
    stop = np.zeros((total, axes), np.int64)
    np.minimum.at(start, item, table[:, 3 : 3 + axes])
    np.maximum.at(stop, item, table[:, 3 + axes :])
    ends = np.cumsum(counts)
    numbers = tuple(np.r_[0, item[end - n : end] + 1] for n, end in zip(counts, ends, strict=True))
    return Components(
        value=value, elements=elements, first=first[order], start=start, stop=stop, numbers=numbers
    )


def _part(box: Box, first: Sequence[int]) -> Box:
    """A box, or a part of it around an element on its first face that is no larger than `STRIP`."""
    if box.size <= STRIP:
        return box
    edge = int(STRIP ** (1 / box.ndim))
    start = [
        min(max(f - edge // 2, a), max(a, b - edge))
        for f, a, b in zip(first, box.start, box.stop, strict=True)
    ]
    return Box.at(start, [edge] * box.ndim).intersect(box)
