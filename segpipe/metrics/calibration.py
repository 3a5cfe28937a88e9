"""Whether a model is as sure as it is right: counts by confidence, and what follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 15
"""Of equal width, as Guo et al. 2017 (arXiv:1706.04599) have it; a bin holds its lower end."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Additive counts over elements with a valid pixel and a reference: whole numbers, no order."""

    count: np.ndarray
    """Elements in each bin (BINS,), int64 as all of them."""
    confidence: np.ndarray
    """Sum of their confidence, in 1/65535."""
    right: np.ndarray
    """How many of them are right."""

    @classmethod
    def empty(cls) -> Calibration:
        """Of nothing."""
        return cls(*(np.zeros(BINS, np.int64) for _ in range(3)))

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(
            self.count + other.count, self.confidence + other.confidence, self.right + other.right
        )

    @property
    def error(self) -> float:
        """Expected calibration error: Σ count/total · |accuracy − mean confidence|; NaN of nothing."""
        total = int(self.count.sum())
        gaps = np.abs(self.right - self.confidence / LEVELS)
        return math.fsum(gaps) / total if total else math.nan

    def to_json(self) -> list[Any]:
        """A JSON list, exact."""
        return [self.count.tolist(), self.confidence.tolist(), self.right.tolist()]

    @classmethod
    def from_json(cls, data: list[Any]) -> Calibration:
        """The inverse of `to_json`."""
        return cls(*(np.array(column, dtype=np.int64) for column in data))


def calibrate(
    confidence: np.ndarray, labels: np.ndarray, nodata: int | None, reference: np.ndarray
) -> Calibration:
    """The counts of one tile.

    Args:
        confidence: share of the best class, uint16 in 1/65535.
        labels: predicted class values of the same shape.
        nodata: value of ``labels`` without a valid pixel; None: none.
        reference: class values; negative ones are not compared.
    """
    compared = reference >= 0
    if nodata is not None:
        compared &= labels != nodata
    sure = confidence[compared].astype(np.int64)
    right = labels[compared] == reference[compared]
    place = np.minimum(sure * BINS // LEVELS, BINS - 1)
    sums = np.rint(np.bincount(place, weights=sure, minlength=BINS)).astype(np.int64)  # below 2**38: exact
    return Calibration(np.bincount(place, minlength=BINS), sums, np.bincount(place[right], minlength=BINS))


CHANNELS = ("entropy", "margin", "confidence", "disagreement")
"""Of the stored map, in this order; the last only where there is more than one answer."""


LEVELS = 65535
"""Shares are stored as whole numbers of 1/65535."""
