"""Scenes with known objects, and models that answer window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import cc3d
import numpy as np
from scipy.ndimage import gaussian_filter

from segpipe.geometry.box import Box
from segpipe.inference.merge import Trim
from segpipe.objects.nodes import add_nodes, add_pairs, box_nodes, window_edges, window_overhang
from segpipe.objects.scene_objects import Lookup, SceneObjects, merge_objects, relabel
from segpipe.objects.window import WindowObjects
from segpipe.tiling.windows import Blocks, Index, Lattice, make_lattice

Answer = Callable[[Index], WindowObjects]


def square_lattice(shape, window, halo, stride=1, fixed=False) -> Lattice:
    """Windows with the same edge and halo along all axes."""
    return make_lattice(shape, [window] * len(shape), [halo] * len(shape), stride, fixed)


@dataclass
class Oracle:
    """A model that knows the truth: each window has its crop of it, under ids of its own."""

    truth: np.ndarray
    """Ids over the scene, (y, x) or (z, y, x)."""
    lattice: Lattice
    classes: dict[int, int] = field(default_factory=dict)
    """Class value by id, 1 where not given."""
    scores: dict[int, float] = field(default_factory=dict)
    """By id, 0.5 where not given."""

    def __call__(self, index: Index) -> WindowObjects:
        window = self.lattice.window(index)
        seen = window.intersect(Box.whole(self.truth.shape))
        crop = np.zeros(window.shape, self.truth.dtype)
        crop[seen.within(window)] = self.truth[seen.slices]
        known = np.unique(crop[crop > 0])
        order = np.random.default_rng(index).permutation(len(known))
        ids = np.zeros(int(crop.max(initial=0)) + 1, np.int32)
        ids[known] = order + 1
        by_local = known[np.argsort(order)].tolist()
        return WindowObjects(
            ids[crop],
            np.array([self.classes.get(i, 1) for i in by_local], np.int64),
            np.array([self.scores.get(i, 0.5) for i in by_local], np.float32),
        )


def scene_ids(
    answer: Answer,
    lattice: Lattice,
    block: Iterable[int] | None = None,
    *,
    shuffle: int | None = None,
    stuff: Iterable[int] = (),
    minimum: int = 1,
) -> tuple[np.ndarray, SceneObjects, Lookup]:
    """Ids and objects of a scene that is computed block by block, as the engine would.

    A window that several blocks need is computed in each of them.
    """
    shape, stuff = lattice.shape, list(stuff)
    blocks = Blocks(shape, tuple(block or shape), (0,) * len(shape))
    raw = np.zeros(shape, np.uint32)
    nodes, overhangs = [], {}
    for index in _mixed(blocks.indices(), shuffle):
        box = blocks.box(index)
        found = {i: answer(i) for i in lattice.windows(box, "trim")}
        merger = Trim(box, lattice, "uint32")
        for i, objects in found.items():
            merger.aggregate(i, objects.ids)
            overhangs[i] = window_overhang(objects, lattice, i, stuff)
        raw[box.slices] = merger.finalize()
        tables = {i: objects.table for i, objects in found.items()}
        nodes.append(box_nodes(raw[box.slices], box, lattice, tables))
    pairs = [window_edges(o, lattice, lambda b: raw[b.slices]) for o in _mixed(overhangs.values(), shuffle)]
    halves = [add_pairs(pairs[: len(pairs) // 3]), *pairs[len(pairs) // 3 :]]
    whole = add_nodes(nodes, len(shape)), add_pairs(_mixed(halves, shuffle))
    objects, lookup = merge_objects(*whole, lattice, stuff=stuff, minimum=minimum)
    final = np.zeros(shape, np.int64)
    for index in _mixed(blocks.indices(), shuffle):
        box = blocks.box(index)
        final[box.slices] = relabel(raw[box.slices], box, lattice, lookup)
    return final, objects, lookup


def _mixed(items: Iterable, shuffle: int | None) -> list:
    items = list(items)
    if shuffle is None:
        return items
    return [items[i] for i in np.random.default_rng(shuffle).permutation(len(items))]


def by_first(ids: np.ndarray) -> np.ndarray:
    """Ids renumbered 1…N by their first element."""
    known, first = np.unique(ids, return_index=True)
    order = np.argsort(np.argsort(first[known > 0])) + 1
    new = np.zeros(len(known), np.int64)
    new[known > 0] = order
    return new[np.searchsorted(known, ids)]


def touching(shape, seed: int, classes: int = 3) -> np.ndarray:
    """Objects that fill most of a scene and touch: components, by corners too, of a random class map."""
    rng = np.random.default_rng(seed)
    fields = gaussian_filter(rng.normal(size=(classes, *shape)), (0, *[1.5] * len(shape)))
    labels = fields.argmax(0).astype(np.uint8)
    return cc3d.connected_components(labels, connectivity=8 if len(shape) == 2 else 26).astype(np.int64)


def classes_of(ids: np.ndarray, count: int = 2) -> dict[int, int]:
    """A class for each id."""
    return {i: 1 + i % count for i in np.unique(ids[ids > 0]).tolist()}


def discs(shape, count: int, seed: int, radius: tuple[int, int] = (2, 6)) -> np.ndarray:
    """Discs, the later ones in front; where one falls apart under others, every piece is an object."""
    rng = np.random.default_rng(seed)
    ids = np.zeros(shape, np.uint32)
    for i in range(1, count + 1):
        r = int(rng.integers(*radius))
        y, x = (int(rng.integers(r, n - r)) for n in shape)
        yy, xx = np.ogrid[-r : r + 1, -r : r + 1]
        ids[y - r : y + r + 1, x - r : x + r + 1][yy**2 + xx**2 <= r * r] = i
    return cc3d.connected_components(ids, connectivity=8).astype(np.int64)
