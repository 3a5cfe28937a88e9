"""What is learned from and what the model is judged by: whole scenes, or squares of a scene.

Neighbouring pixels resemble each other, so a random split by pixel flatters (Roberts et al. 2017,
Ecography 40:913). Squares are kept apart with a buffer around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from segpipe.boxes import Box
from segpipe.errors import RequestError
from segpipe.training.recipe import Split, SplitBy


@dataclass(frozen=True)
class Fold:
    """One split of the scenes."""

    split: Split
    names: tuple[str, ...]
    """Of all scenes, sorted."""
    shapes: dict[str, tuple[int, ...]]
    """Of each scene, on the model's grid."""
    apart: int | None
    """The part that is kept apart; None: nothing is."""

    @classmethod
    def of(cls, split: Split, shapes: dict[str, tuple[int, ...]], apart: int | None) -> Fold:
        """A fold of scenes of these shapes, by name.

        Raises:
            RequestError: there are fewer scenes or blocks than folds.
        """
        fold = cls(split, tuple(sorted(shapes)), shapes, apart)
        units = len(fold.names) if split.by is SplitBy.scene else len(fold.blocks())
        if apart is not None and units < split.folds:
            raise RequestError(
                f"split.folds: found {split.folds}; there are {units} {split.by.value}s: valid: 2 to {units}"
                + (", or split.by: block" if split.by is SplitBy.scene else ", or a smaller split.block")
            )
        return fold

    def parts(self, count: int) -> np.ndarray:
        """The part of each of ``count`` units: as equal as can be, in an order drawn by the seed."""
        parts = np.empty(count, dtype=np.int64)
        parts[np.random.default_rng(self.split.seed).permutation(count)] = np.arange(count) % self.split.folds
        return parts

    def blocks(self) -> list[tuple[str, tuple[int, ...]]]:
        """Every block of every scene, by the scene's name and the block's place."""
        found = []
        for name in self.names:
            counts = [-(-n // self.split.block) for n in self.shapes[name]]
            found += [(name, place) for place in product(*map(range, counts))]
        return found

    def judged(self, name: str) -> list[Box]:
        """Boxes of a scene by which the model is judged; they don't overlap."""
        whole = Box.whole(self.shapes[name])
        if self.apart is None:
            return []
        if self.split.by is SplitBy.scene:
            part = self.parts(len(self.names))[self.names.index(name)]
            return [whole] if part == self.apart else []
        blocks = self.blocks()
        edge = self.split.block
        return [
            Box.at([i * edge for i in place], [edge] * len(place)).intersect(whole)
            for (scene, place), part in zip(blocks, self.parts(len(blocks)), strict=True)
            if scene == name and part == self.apart
        ]

    def learns(self, name: str) -> bool:
        """Whether the model may learn from some of a scene."""
        return self.split.by is SplitBy.block or not self.judged(name)

    def is_judged(self, name: str, box: Box) -> np.ndarray:
        """Where in a box of a scene the model is judged: bool, (…)."""
        return _inside(box, self.judged(name))

    def is_learned(self, name: str, box: Box) -> np.ndarray:
        """Where in a box the model may learn: outside what is judged and the buffer around it."""
        buffer = 0 if self.split.by is SplitBy.scene else self.split.buffer
        grown = [
            Box(tuple(a - buffer for a in b.start), tuple(e + buffer for e in b.stop))
            for b in self.judged(name)
        ]
        return ~_inside(box, grown)

    def learned_at(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Those of some elements (n, axis) from which the model may learn."""
        keep = np.ones(len(positions), dtype=bool)
        buffer = 0 if self.split.by is SplitBy.scene else self.split.buffer
        for judged in self.judged(name):
            low, high = np.array(judged.start) - buffer, np.array(judged.stop) + buffer
            keep &= ~((positions >= low) & (positions < high)).all(axis=1)
        return np.asarray(positions[keep])


def _inside(box: Box, boxes: Sequence[Box]) -> np.ndarray:
    found = np.zeros(box.shape, dtype=bool)
    for other in boxes:
        common = box.intersect(other)
        if common.size:
            found[common.within(box)] = True
    return found
