"""Which windows of a scene are encoded: a pyramid of lattices in which every object has one window.

On level l windows have an edge of E = W·2^l elements, are resampled to the W elements that the encoder
takes (each the mean of 2^l × 2^l elements), and begin at multiples of E/2, so that neighbours share a
half. An object takes the finest level on which one window holds its box with a margin, and on it the
window whose centre is nearest to the box's. This depends on the box and on the scene's shape alone, so no
object is cut, none is answered by two windows, and no window that no object takes is ever encoded. With
its margin at most half a window long, an object is held wherever it lies.

Windows begin at the scene's first element or after it. The last one along an axis may hang over the
scene's trailing edge, by less than half its own edge unless it is the only one. What is beyond the scene
is padding and not valid: zeros put there after normalisation, at the right and the bottom as SAM's own
preprocessing has it; a mean over elements of which some are beyond is over the others. The margin is
asked for inside the scene only: beyond it there is nothing to see. The coarsest level is the first whose
single window holds the whole scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.tiling.windows import Index


@dataclass(frozen=True, order=True)
class Window:
    """One window of a pyramid."""

    level: int
    """0 is the finest."""
    index: Index
    """Position in the level's lattice, array order."""


@dataclass(frozen=True)
class Pyramid:
    """The windows that a scene, or a plane of a volume, may have."""

    shape: tuple[int, ...]
    """Elements of the scene, array order."""
    window: int
    """W: elements that the encoder takes along each axis."""
    margin: float
    """Asked for on every side of an object, as a share of its box's longest edge; 0 or more."""

    def __post_init__(self) -> None:
        if self.window < 2 or self.window % 2:
            raise RequestError(f"window: found {self.window}; valid: an even number of elements, 2 or more")
        if not 0 <= self.margin < np.inf:
            raise RequestError(f"margin: found {self.margin}; valid: a share of an object's size, 0 or more")
        if min(self.shape) < 1:
            raise ValueError(f"a scene of shape {self.shape} has no elements")

    @cached_property
    def levels(self) -> int:
        """How many there are: the last one's window holds the whole scene."""
        return max(0, (-(-max(self.shape) // self.window) - 1).bit_length()) + 1

    def edge(self, level: int) -> int:
        """Elements of the scene along each axis of a window."""
        return self.window << level

    def counts(self, level: int) -> tuple[int, ...]:
        """Windows along each axis: as many as reach the scene's end."""
        edge = self.edge(level)
        return tuple(-(-max(0, n - edge) // (edge // 2)) + 1 for n in self.shape)

    def box(self, window: Window) -> Box:
        """The elements that a window sees; it may hang over the scene's trailing edge."""
        edge = self.edge(window.level)
        return Box.at([i * (edge // 2) for i in window.index], (edge,) * len(self.shape))

    def windows_of(
        self, start: np.ndarray, stop: np.ndarray, least: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The level (n,) and the lattice position (n, axes) of the window that each box takes, int64.

        Args:
            start: (n, axes) positions of the boxes' first corners (`segpipe.prompts.prompt_set`).
            stop: (n, axes) of the opposite ones; no box may lie wholly outside the scene, and what is
                outside is not looked at. A point is a box of no size.
            least: the finest level that may be taken, for an object that proved larger than it was said
                to be; never above the coarsest.

        Raises:
            ValueError: a box has its corners the wrong way round, or lies outside the scene.
        """
        size = np.array(self.shape, np.float64)
        low, high = np.asarray(start, np.float64) + 0.5, np.asarray(stop, np.float64) + 0.5  # from the corner
        wrong = ~((low <= high) & (low <= size) & (high >= 0)).all(axis=1)
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise ValueError(f"box {at}, from {start[at]} to {stop[at]}, is not in a scene of {self.shape}")
        low, high = np.clip(low, 0, size), np.clip(high, 0, size)
        reach = self.margin * (high - low).max(axis=1, keepdims=True)
        first, last = np.maximum(low - reach, 0), np.minimum(high + reach, size)
        centre = (low + high) / 2
        levels = np.full(len(low), -1, np.int64)
        indices = np.zeros(low.shape, np.int64)
        for level in range(min(least, self.levels - 1), self.levels):
            edge = self.edge(level)
            step = edge // 2
            begin = np.maximum(np.ceil((last - edge) / step), 0)
            end = np.minimum(np.floor(first / step), np.array(self.counts(level)) - 1)
            held = (levels < 0) & (begin <= end).all(axis=1)
            nearest = np.ceil((centre - step) / step - 0.5)  # half way between two: the smaller one
            levels[held] = level
            indices[held] = np.clip(nearest, begin, end)[held].astype(np.int64)
        return levels, indices

    def window_of(self, start: Sequence[float], stop: Sequence[float], least: int = 0) -> Window:
        """The window that one box takes; see `windows_of`."""
        level, index = self.windows_of(np.array([start]), np.array([stop]), least)
        return Window(int(level[0]), tuple(index[0].tolist()))

    def needed(
        self, start: np.ndarray, stop: np.ndarray, least: int = 0
    ) -> tuple[tuple[Window, ...], np.ndarray]:
        """The windows that boxes take, ascending and none twice, and which of them each box takes (n,).

        Args as for `windows_of`.
        """
        levels, indices = self.windows_of(start, stop, least)
        rows = np.column_stack((levels, indices))
        unique, which = np.unique(rows, axis=0, return_inverse=True)
        windows = tuple(Window(row[0], tuple(row[1:])) for row in unique.tolist())
        return windows, which.reshape(-1)

    def to_window(self, positions: np.ndarray, window: Window) -> np.ndarray:
        """Positions in a window (whole numbers at the centres of its W elements) of those on the scene.

        Args:
            positions: (n, axes).
        """
        origin = np.array(self.box(window).start)
        return np.asarray((positions + 0.5 - origin) / (1 << window.level) - 0.5)

    def to_scene(self, positions: np.ndarray, window: Window) -> np.ndarray:
        """The inverse of `to_window`."""
        origin = np.array(self.box(window).start)
        return np.asarray((positions + 0.5) * (1 << window.level) + origin - 0.5)
