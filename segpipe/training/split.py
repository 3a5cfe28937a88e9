"""What is learned from and what the model is judged by: whole scenes, or squares of a scene.

Neighbouring pixels resemble each other, so a random split by pixel flatters (Roberts et al. 2017,
Ecography 40:913). Squares are kept apart with a buffer around them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from segpipe.config.recipe import Split, SplitBy
from segpipe.errors import RequestError
from segpipe.geometry.box import Box


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
        return self._judged.get(name, [])

    @cached_property
    def _judged(self) -> dict[str, list[Box]]:
        """For each scene that has any, the boxes by which the model is judged."""
        found: dict[str, list[Box]] = defaultdict(list)
        if self.apart is None:
            return found
        if self.split.by is SplitBy.scene:
            parts = self.parts(len(self.names))
            apart = [name for name, part in zip(self.names, parts, strict=True) if part == self.apart]
            return {name: [Box.whole(self.shapes[name])] for name in apart}
        blocks, edge = self.blocks(), self.split.block
        for (name, place), part in zip(blocks, self.parts(len(blocks)), strict=True):
            if part == self.apart:
                box = Box.at([i * edge for i in place], [edge] * len(place))
                found[name].append(box.intersect(Box.whole(self.shapes[name])))
        return found

    @cached_property
    def _corners(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Starts and stops of the same boxes, (box, axis): a raster may have many."""
        return {
            name: (np.array([b.start for b in boxes]), np.array([b.stop for b in boxes]))
            for name, boxes in self._judged.items()
        }

    def learns(self, name: str) -> bool:
        """Whether the model may learn from some of a scene."""
        return self.split.by is SplitBy.block or not self.judged(name)

    def is_judged(self, name: str, box: Box) -> np.ndarray:
        """Where in a box of a scene the model is judged: bool, (…)."""
        return self._near(name, box, 0)

    def is_learned(self, name: str, box: Box) -> np.ndarray:
        """Where in a box the model may learn: outside what is judged and the buffer around it."""
        return ~self._near(name, box, self._buffer)

    def learned_at(self, name: str, positions: np.ndarray) -> np.ndarray:
        """Those of some elements (n, axis) from which the model may learn."""
        keep = np.ones(len(positions), dtype=bool)
        for judged in self.judged(name):
            low, high = np.array(judged.start) - self._buffer, np.array(judged.stop) + self._buffer
            keep &= ~((positions >= low) & (positions < high)).all(axis=1)
        return np.asarray(positions[keep])

    @property
    def _buffer(self) -> int:
        return 0 if self.split.by is SplitBy.scene else self.split.buffer

    def _near(self, name: str, box: Box, reach: int) -> np.ndarray:
        """Where in a box an element is judged, or one within ``reach`` along every axis: bool, (…)."""
        found = np.zeros(box.shape, dtype=bool)
        if name not in self._corners:
            return found
        starts, stops = self._corners[name]
        starts, stops = np.maximum(starts - reach, box.start), np.minimum(stops + reach, box.stop)
        meets = (starts < stops).all(axis=1)
        for start, stop in zip(starts[meets].tolist(), stops[meets].tolist(), strict=True):
            found[Box(tuple(start), tuple(stop)).within(box)] = True
        return found
