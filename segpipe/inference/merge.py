"""From overlapping windows to one answer per element: aggregate window by window, then finalize.

`trim` takes each element from one window and needs no accumulator; `gaussian` is a weighted mean
with float32 sums, added in the lattice's order so that no partition changes a bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import numpy as np

from segpipe.geometry.box import Box
from segpipe.tiling.windows import Index, Lattice

GAUSSIAN_SIGMA = 0.125
"""Standard deviation of the window's weight as a share of its edge (nnU-Net's value)."""
GAUSSIAN_FLOOR = 1e-8
"""Least weight, relative to the centre's.

About nnU-Net's, the smallest non-zero value of its map: 6e-9 in the float16 of its predictions. A greater
one, such as MONAI's 1e-3, lets a window's border, which saw the least of what surrounds it, count for more
than the bell says. Scores lose nothing by it: all terms are positive, so the mean's relative error is a few
roundings of float32 at any weight, a lone window's in a corner included.
"""


class Merger(ABC):
    """Windows of one region of the model grid, merged."""

    def __init__(self, region: Box, lattice: Lattice) -> None:
        self.region = region
        self.lattice = lattice

    @abstractmethod
    def aggregate(self, index: Index, values: np.ndarray) -> None:
        """Add what one window answered; windows come in the lattice's order."""

    @abstractmethod
    def finalize(self) -> np.ndarray:
        """The merged region."""


class TrimLabels(Merger):
    """Each element's channel number from the window that owns it."""

    def __init__(self, region: Box, lattice: Lattice, dtype: str) -> None:
        super().__init__(region, lattice)
        self._out = np.zeros(region.shape, dtype)

    def aggregate(self, index: Index, values: np.ndarray) -> None:
        """Args: values: channel numbers over the window's shape."""
        window = self.lattice.window(index)
        part = self.lattice.owned(index).intersect(self.region)
        self._out[part.within(self.region)] = values[part.within(window)]

    def finalize(self) -> np.ndarray:
        """Channel numbers over the region; 0 where no window answered."""
        return self._out


class TrimScores(Merger):
    """Each element's scores from the window that owns it."""

    def __init__(self, region: Box, lattice: Lattice, classes: int) -> None:
        super().__init__(region, lattice)
        self._out = np.zeros((classes, *region.shape), np.float32)

    def aggregate(self, index: Index, values: np.ndarray) -> None:
        """Args: values: (k, …) scores over the window's shape."""
        window = self.lattice.window(index)
        part = self.lattice.owned(index).intersect(self.region)
        self._out[(slice(None), *part.within(self.region))] = values[(slice(None), *part.within(window))]

    def finalize(self) -> np.ndarray:
        """(k, …) scores over the region."""
        return self._out


class GaussianScores(Merger):
    """Weighted mean of the scores of all windows that cover an element."""

    def __init__(self, region: Box, lattice: Lattice, classes: int) -> None:
        super().__init__(region, lattice)
        self._sum = np.zeros((classes, *region.shape), np.float32)
        self._weight = np.zeros(region.shape, np.float32)

    def aggregate(self, index: Index, values: np.ndarray) -> None:
        """Args: values: (k, …) scores over the window's shape."""
        window = self.lattice.window(index)
        part = window.intersect(self.region)
        weight = gaussian_weight(self.lattice.window_shape)[part.within(window)]
        here = part.within(self.region)
        self._sum[(slice(None), *here)] += values[(slice(None), *part.within(window))] * weight
        self._weight[here] += weight

    def finalize(self) -> np.ndarray:
        """(k, …) mean scores; 0 where no window answered."""
        covered = self._weight > 0
        np.divide(self._sum, self._weight, out=self._sum, where=covered)
        return self._sum


@lru_cache(maxsize=8)
def gaussian_weight(shape: tuple[int, ...]) -> np.ndarray:
    """Separable Gaussian over a window, 1 at its centre, never below `GAUSSIAN_FLOOR`; float32."""
    weight = np.ones(shape)
    for axis, n in enumerate(shape):
        at = (np.arange(n) - (n - 1) / 2) / (GAUSSIAN_SIGMA * n)
        line = np.exp(-0.5 * at**2)
        weight *= line.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return np.asarray(np.maximum(weight / weight.max(), GAUSSIAN_FLOOR), np.float32)
