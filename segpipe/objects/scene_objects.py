"""Nodes joined to the objects of a scene, and their ids."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segpipe.geometry.box import Box
from segpipe.objects.nodes import NO_SCORE, SCORE_BITS, Nodes, PairCounts, cells, matches, window_number
from segpipe.tiling.windows import Lattice


@dataclass(frozen=True, eq=False)
class SceneObjects:
    """The objects of a scene; the k-th has id k + 1."""

    classes: np.ndarray
    """(n,) class value, int64."""
    scores: np.ndarray
    """(n,) float64: mean of its nodes' scores, weighted by their elements; NaN where a node has none."""
    elements: np.ndarray
    """(n,) int64."""
    first: np.ndarray
    """(n,) smallest element, as a position in the scene in C order; ascending, int64."""
    start: np.ndarray
    """(n, axes) first corner of the bounding box, int64."""
    stop: np.ndarray
    """(n, axes) one past its last corner, int64."""
    touches_edge: np.ndarray
    """(n,) whether it has an element at the scene's border."""

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def ids(self) -> np.ndarray:
        """1…n, int64."""
        return np.arange(1, len(self) + 1)

    def take(self, places: np.ndarray) -> SceneObjects:
        """Those at these places, or of a mask; a table of their own, so without the others' ids."""
        return SceneObjects(*(column[places] for column in vars(self).values()))

    def box(self, place: int) -> Box:
        """Bounding box of the object at this place."""
        return Box(tuple(self.start[place].tolist()), tuple(self.stop[place].tolist()))


@dataclass(frozen=True, eq=False)
class Lookup:
    """From (window, local id) to the scene's id: by ascending window, then local id."""

    window: np.ndarray
    """`window_number`, int64."""
    local: np.ndarray
    """int64."""
    final: np.ndarray
    """Id in the scene, 0 where the object was too small; int64."""

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """Of arrays of ids: uint32 as long as that can hold them."""
        return np.dtype(np.uint32 if self.final.max(initial=0) < 2**32 else np.uint64)


def merge_objects(
    nodes: Nodes, pairs: PairCounts, lattice: Lattice, *, stuff: Collection[int] = (), minimum: int = 1
) -> tuple[SceneObjects, Lookup]:
    """The objects of a scene: nodes joined by edges, and all nodes of a class of stuff.

    Joining is transitive: two objects of one window are one if each is the same as one of a neighbour.
    Objects with fewer elements than ``minimum`` are dropped, the others numbered by their first element.

    Args:
        nodes: of the whole scene (`add_nodes`).
        pairs: of the whole scene (`add_pairs`).
    """
    ends = np.concatenate([matches(pairs, nodes, stuff), _chains(nodes.classes, stuff)])
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(nodes),) * 2)
    count, member = connected_components(graph, directed=False) if len(nodes) else (0, nodes.local)
    found = _components(nodes, member, count, lattice.shape)
    order = np.argsort(found.first)
    order = order[found.elements[order] >= minimum]
    final = np.zeros(count, np.int64)
    final[order] = np.arange(1, len(order) + 1)
    return found.take(order), Lookup(nodes.window, nodes.local, final[member])


def relabel(raw: np.ndarray, box: Box, lattice: Lattice, lookup: Lookup) -> np.ndarray:
    """The scene's ids over any box, of `Lookup.dtype`.

    Args:
        raw: local ids over the box, (y, x) or (z, y, x), each of the window that owns the element.
        lookup: of the scene (`merge_objects`).
    """
    out = np.zeros(box.shape, lookup.dtype)
    for index, part in cells(lattice, box):
        number = window_number(lattice, index)
        rows = slice(*np.searchsorted(lookup.window, [number, number + 1]))
        ids = raw[part.within(box)]
        final = np.zeros(int(ids.max(initial=0)) + 1, lookup.dtype)
        known = np.zeros(len(final), bool)
        known[0] = True
        local = lookup.local[rows]
        inside = local < len(final)
        final[local[inside]], known[local[inside]] = lookup.final[rows][inside], True
        if not known.all() and not known[ids].all():
            raise ValueError(f"window {index}: an id that is no node; the raw ids are not those merged")
        out[part.within(box)] = final[ids]
    return out


def _components(nodes: Nodes, member: np.ndarray, count: int, shape: tuple[int, ...]) -> SceneObjects:
    """What is known of each of ``count`` components; ``member`` says for each node which is its."""
    most = np.iinfo(np.int64).max
    start = np.full((count, len(shape)), most)
    stop = np.zeros((count, len(shape)), np.int64)
    first = np.full(count, most)
    np.minimum.at(start, member, nodes.start)
    np.maximum.at(stop, member, nodes.stop)
    np.minimum.at(first, member, nodes.first)
    classes = np.zeros(count, np.int64)
    classes[member] = nodes.classes  # all of a component have the same
    elements = _sums(member, nodes.elements, count)
    scores = _sums(member, nodes.elements * nodes.score, count) / elements / 2**SCORE_BITS
    scores[member[nodes.score == NO_SCORE]] = np.nan
    edge = (start == 0).any(1) | (stop == np.array(shape)).any(1)
    return SceneObjects(classes, scores, elements, first, start, stop, edge)


def _chains(classes: np.ndarray, stuff: Collection[int]) -> np.ndarray:
    """(n, 2) pairs of nodes that join all nodes of each class of stuff."""
    chains = [np.zeros((0, 2), np.int64)]
    for value in stuff:
        same = np.flatnonzero(classes == value)
        chains.append(np.stack([same[:-1], same[1:]], -1))
    return np.concatenate(chains)


def _sums(member: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    """Sum of whole numbers by component, exact; int64."""
    sums = np.zeros(count, np.int64)
    np.add.at(sums, member, values)
    return sums
