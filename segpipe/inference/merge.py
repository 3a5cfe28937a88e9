"""From overlapping windows to one answer per element: aggregate window by window, then finalize.

`trim` takes each element from one window and needs no accumulator; `gaussian` is a weighted mean
with float32 sums, added in the lattice's order so that no partition changes a bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from segpipe.geometry.box import Box
from segpipe.geometry.grid_map import onto_native
from segpipe.inference.uncertainty import Uncertainty
from segpipe.tiling.plan import Plan
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


class Trim(Merger):
    """Each element's channel number, or its scores, from the window that owns it."""

    def __init__(self, region: Box, lattice: Lattice, dtype: str, classes: int | None = None) -> None:
        """Begin with zeros: (k, …) scores of so many classes; None: channel numbers."""
        super().__init__(region, lattice)
        self._out = np.zeros(region.shape if classes is None else (classes, *region.shape), dtype)

    def aggregate(self, index: Index, values: np.ndarray) -> None:
        """Args: values: channel numbers over the window's shape, or (k, …) scores."""
        window = self.lattice.window(index)
        part = self.lattice.owned(index).intersect(self.region)
        here: tuple[Any, ...] = (..., *part.within(self.region))
        there: tuple[Any, ...] = (..., *part.within(window))
        self._out[here] = values[there]

    def finalize(self) -> np.ndarray:
        """Channel numbers or scores over the region; 0 where no window answered."""
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


@dataclass(frozen=True)
class NativeAnswer:
    """A block's answer, native grid; 0 outside the region of interest."""

    channel: np.ndarray
    """The first channel of the highest score: uint8, or int32 for more than 256 classes."""
    scores: np.ndarray | None
    """(k, …) float32."""
    uncertainty: np.ndarray | None
    """(channel, …) uint16; see `segpipe.inference.uncertainty`."""


def native_answer(merged: np.ndarray, classes: int, plan: Plan, box: Box, nearest: bool) -> NativeAnswer:
    """Resample scores where the grids differ, keeping one plane beside the best so far.

    Args:
        merged: (k, …) scores over the block's region of the model grid; one channel more where
            elements have several answers: the mean of their entropies.
        classes: k.
        plan: of the scene; says what is wanted beside the class.
        box: the block, native grid.
        nearest: how to resample; else linear.
    """
    load, identity = plan.workload, plan.grid.identity
    inside = box.intersect(plan.grid.crop)
    here = inside.within(box)
    region = plan.grid.model_box(box)
    channel = np.zeros(box.shape, np.uint8 if classes <= 256 else np.int32)
    keep = np.zeros((classes, *box.shape), np.float32) if load.keep_scores else None
    spread = np.zeros((load.uncertainty, *box.shape), np.uint16) if load.uncertainty else None
    if inside.size == 0:
        return NativeAnswer(channel, keep, spread)

    def plane(number: int) -> np.ndarray:
        part = merged[number : number + 1]
        if not identity:
            part = onto_native(part, region, plan.grid, inside, nearest=nearest)
        found: np.ndarray = part[0]
        return found

    doubt = Uncertainty(inside.shape, classes) if spread is not None else None
    best = plane(0).copy()
    for number in range(classes):
        scores = plane(number) if number else best
        if keep is not None:
            keep[number][here] = scores
        if doubt is not None:
            doubt.add(scores)
        if number:
            better = scores > best
            channel[here][better] = number
            np.copyto(best, scores, where=better)
    if spread is not None and doubt is not None:
        expected = plane(classes) if len(merged) > classes else None
        spread[(slice(None), *here)] = doubt.finish(expected)
    return NativeAnswer(channel, keep, spread)
