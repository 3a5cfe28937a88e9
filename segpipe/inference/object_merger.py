"""A block's share of what object models say: raw ids, classes, and what merging needs later."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from segpipe.config.card import Card
from segpipe.geometry.box import Box
from segpipe.objects.nodes import Nodes, Overhang, box_nodes, window_overhang
from segpipe.objects.window import WindowObjects, WindowTable
from segpipe.tiling.windows import Index, Lattice


@dataclass(frozen=True, eq=False)
class BlockObjects:
    """The objects of one block, before they are joined with their neighbours'."""

    raw: np.ndarray
    """uint32 over the block: the local id that the element's own window gives it, 0 none."""
    nodes: Nodes
    """Objects of windows that own elements in the block."""
    overhangs: tuple[Overhang, ...]
    """Of the windows whose cell begins in the block."""

    def dump(self) -> bytes:
        """Nodes and overhangs, compressed; the raw ids have an array of their own."""
        columns = {f.name: getattr(self.nodes, f.name) for f in fields(Nodes)}
        ids = [o.ids for o in self.overhangs]
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            **columns,
            windows=np.array([o.index for o in self.overhangs], np.int64),
            sizes=np.array([len(part) for part in ids], np.int64),
            ids=np.concatenate([np.zeros(0, np.uint32), *ids]),
        )
        return buffer.getvalue()


def load_parts(data: bytes) -> tuple[Nodes, list[Overhang]]:
    """The inverse of `BlockObjects.dump`."""
    with np.load(io.BytesIO(data)) as found:
        nodes = Nodes(**{f.name: found[f.name] for f in fields(Nodes)})
        ends = np.cumsum(found["sizes"])[:-1]
        parts = np.split(found["ids"], ends) if len(found["sizes"]) else []
        windows = [tuple(int(i) for i in row) for row in found["windows"]]
        return nodes, [Overhang(index, ids) for index, ids in zip(windows, parts, strict=True)]


def stuff_values(card: Card) -> tuple[int, ...]:
    """Class values that are one segment per scene."""
    if card.output.kind != "panoptic":
        return ()
    return tuple(c.value for c in card.classes if not c.thing and not c.background)


def ground_value(card: Card) -> int:
    """Class value of elements that are no object's: the card's background."""
    return next(c.value for c in card.classes if c.background)


def masked(objects: WindowObjects, valid: np.ndarray) -> WindowObjects:
    """The objects without elements that are not valid."""
    return objects if valid.all() else replace(objects, ids=np.where(valid, objects.ids, 0))


class ObjectMerger:
    """Takes the windows of a block; each element has the id that the window of its cell gives it."""

    def __init__(self, box: Box, lattice: Lattice, card: Card) -> None:
        self._box, self._lattice = box, lattice
        self._stuff = stuff_values(card)
        self._raw = np.zeros(box.shape, np.uint32)
        self._labels = np.full(box.shape, ground_value(card), card.label_dtype)
        self._tables: dict[Index, WindowTable] = {}
        self._overhangs: list[Overhang] = []

    def aggregate(self, index: Index, objects: WindowObjects) -> None:
        """Take one window in; elements that are not valid have id 0 already."""
        owned, window = self._lattice.owned(index), self._lattice.window(index)
        part = owned.intersect(self._box)
        ids = objects.ids[part.within(window)]
        here = part.within(self._box)
        self._raw[here] = ids
        values = np.concatenate([np.zeros(1, np.int64), objects.classes])
        self._labels[here] = np.where(ids > 0, values[ids], self._labels[here])
        self._tables[index] = objects.table
        if self._box.contains(Box.at(owned.start, (1,) * owned.ndim)):
            self._overhangs.append(window_overhang(objects, self._lattice, index, self._stuff))

    def finalize(self) -> tuple[np.ndarray, BlockObjects]:
        """Class values over the block, and its objects."""
        nodes = box_nodes(self._raw, self._box, self._lattice, self._tables_or_empty())
        return self._labels, BlockObjects(self._raw, nodes, tuple(self._overhangs))

    def _tables_or_empty(self) -> dict[Index, WindowTable]:
        """Windows without a valid element were not computed: they own no objects."""
        nothing: Sequence[np.ndarray] = (np.zeros(0, np.int64), np.zeros(0, np.float32))
        skipped = self._lattice.windows(self._box, "trim")
        return {index: self._tables.get(index, (nothing[0], nothing[1])) for index in skipped}
