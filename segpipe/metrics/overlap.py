"""Overlap of prediction and reference, from tp, fp and fn, and means that say what they leave out.

Only elements with a valid pixel and a reference are compared. A ratio whose denominator is zero is
not defined: NaN with a reason, never 0 or 1. Sums are of whole numbers and means by exact
summation, so neither depends on the order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.metrics.tally import Tally

ABSENT_IN_BOTH = "absent in both"
NOT_PREDICTED = "not predicted"
NOT_IN_REFERENCE = "not in the reference"
NOTHING_ELSE = "nothing else in the reference"

_EXACT = 1 << 53
"""Whole numbers up to here are float64 numbers."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Elements of classes, in 1/65536: arrays of one shape, a class each.

    int64 (or Python integers where sums could pass 2**63), or float64 of whole numbers (resamples).
    """

    tp: np.ndarray
    """Predicted as the class, and it is."""
    fp: np.ndarray
    """Predicted as the class, and it is another."""
    fn: np.ndarray
    """It is the class, and predicted as another."""

    def __getitem__(self, index: Any) -> Counts:
        """The counts there, of any numpy index."""
        return Counts(self.tp[index], self.fp[index], self.fn[index])

    @property
    def predicted(self) -> np.ndarray:
        """tp + fp."""
        return np.asarray(self.tp + self.fp)

    @property
    def actual(self) -> np.ndarray:
        """tp + fn."""
        return np.asarray(self.tp + self.fn)

    @property
    def missed(self) -> np.ndarray:
        """The reference has it, the prediction has none of it: IoU and Dice are 0."""
        return np.asarray((self.actual > 0) & (self.predicted == 0))

    @property
    def hallucinated(self) -> np.ndarray:
        """The prediction has it, the reference has none of it: IoU and Dice are 0."""
        return np.asarray((self.predicted > 0) & (self.actual == 0))

    @property
    def undefined(self) -> np.ndarray:
        """Neither has it: IoU, Dice, precision and recall are not defined."""
        return np.asarray((self.predicted == 0) & (self.actual == 0))

    @property
    def iou(self) -> np.ndarray:
        """tp / (tp + fp + fn)."""
        return ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def dice(self) -> np.ndarray:
        """2·tp / (2·tp + fp + fn)."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def precision(self) -> np.ndarray:
        """tp / (tp + fp)."""
        return ratio(self.tp, self.predicted)

    @property
    def recall(self) -> np.ndarray:
        """tp / (tp + fn)."""
        return ratio(self.tp, self.actual)


@dataclass(frozen=True, eq=False)
class ClassCounts:
    """Counts by group and class value, of every value that prediction or reference has there."""

    group: np.ndarray
    """Of each row, ascending: index of a region, of a region of a scene, or of a resample."""
    value: np.ndarray
    """Class value; no (group, value) twice."""
    counts: Counts
    groups: int
    """How many groups there are; one may have no rows."""


@dataclass(frozen=True, eq=False)
class RegionCounts(ClassCounts):
    """The counts of one scene: a group is a region. Rows by region, then value."""

    predicted_size: np.ndarray
    """Size of the class in the prediction, over compared elements, in the tally's unit; int64."""
    reference_size: np.ndarray
    """The same in the reference."""

    @property
    def tn(self) -> np.ndarray:
        """Compared elements of the region that are the class in neither, in 1/65536."""
        counts = self.counts
        compared = totals(self.group, counts.actual, self.groups)
        return np.asarray(compared[self.group] - counts.tp - counts.fp - counts.fn)

    @property
    def specificity(self) -> np.ndarray:
        """tn / (tn + fp)."""
        return ratio(self.tn, self.tn + self.counts.fp)

    @property
    def size_ratio(self) -> np.ndarray:
        """Predicted size / reference size."""
        return ratio(self.predicted_size, self.reference_size)

    def __getitem__(self, key: tuple[int, int]) -> Counts:
        """The counts of a region and class value (0-d); zeros where the value does not occur."""
        row = np.flatnonzero((self.group == key[0]) & (self.value == key[1]))
        return self.counts[row[0]] if len(row) else Counts(*np.zeros(3, dtype=np.int64))


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """``part / whole``, correctly rounded; NaN over zero. The arrays have one shape."""
    part, whole = np.asarray(part), np.asarray(whole)
    result = np.full(whole.shape, np.nan)
    some = whole != 0
    if part.dtype.kind == "f":
        large = np.zeros(whole.shape, dtype=bool)
    else:  # float64 cannot hold them: Python divides whole numbers exactly
        large = some & ((part > _EXACT) | (whole > _EXACT))
    plain = some & ~large
    result[plain] = part[plain].astype(np.float64) / whole[plain].astype(np.float64)
    if large.any():
        result[large] = [p / w for p, w in zip(part[large].tolist(), whole[large].tolist(), strict=True)]
    return result


def totals(group: np.ndarray, values: np.ndarray, groups: int) -> np.ndarray:
    """Sums by group, (groups,). Whole numbers are added exactly, as Python's where int64 ends."""
    whole = values.dtype.kind != "f"
    overflows = whole and np.bincount(group, np.abs(values), groups).max(initial=0) >= 1 << 62
    result = np.zeros(groups, dtype=object if overflows else values.dtype)
    np.add.at(result, group, values)
    return result


def is_compared(tally: Tally) -> np.ndarray:
    """Which rows are of elements with a valid pixel and a reference; bool, (row,)."""
    return np.asarray((tally.label >= 0) & (tally.reference >= 0))


def class_counts(tally: Tally) -> RegionCounts:
    """The counts of a tally by region and class value."""
    kept = is_compared(tally)
    region, cover, size = tally.region[kept], tally.cover[kept], tally.size[kept]
    label, truth = tally.label[kept], tally.reference[kept]
    right, none = label == truth, np.zeros_like(cover)
    # Every row speaks once of its predicted class and once of its reference class.
    columns = np.stack(
        [
            np.r_[np.where(right, cover, 0), none],
            np.r_[np.where(right, 0, cover), none],
            np.r_[none, np.where(right, 0, cover)],
            np.r_[size, none],
            np.r_[none, size],
        ]
    )
    group, value, sums = sum_rows(np.r_[region, region], np.r_[label, truth], columns)
    tp, fp, fn, predicted, reference = sums
    groups = int(tally.region.max(initial=-1)) + 1
    return RegionCounts(group, value, Counts(tp, fp, fn), groups, predicted, reference)


def sum_rows(
    group: np.ndarray, value: np.ndarray, columns: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of equal (group, value) added up, by group, then value.

    Args:
        group: (row,).
        value: (row,).
        columns: what to add, int64, (column, row).
    """
    order = np.lexsort((value, group))
    group, value = group[order], value[order]
    if not len(group):
        return group, value, columns
    first = np.flatnonzero(np.r_[True, (group[1:] != group[:-1]) | (value[1:] != value[:-1])])
    return group[first], value[first], np.add.reduceat(columns[:, order], first, axis=1)


def reasons(rows: RegionCounts, stranger: np.ndarray, stranger_reason: str) -> np.ndarray:
    """Why a ratio of a row is NaN, in words; empty where all are defined. str objects, (row,).

    Args:
        rows: the counts.
        stranger: rows of a value that is no class of the model, bool, (row,).
        stranger_reason: what is said of those, first.
    """
    counts = rows.counts
    parts = {
        stranger_reason: stranger,
        ABSENT_IN_BOTH: counts.undefined,
        f"precision: {NOT_PREDICTED}": counts.missed,
        f"recall: {NOT_IN_REFERENCE}": counts.hallucinated,
        f"size_ratio: {NOT_IN_REFERENCE}": (rows.reference_size == 0) & ~counts.undefined,
        f"specificity: {NOTHING_ELSE}": rows.tn + counts.fp == 0,
    }
    code = sum((flag.astype(np.int64) << i for i, flag in enumerate(parts.values())), np.int64(0))
    texts = [
        "; ".join(text for i, text in enumerate(parts) if number >> i & 1)
        for number in range(1 << len(parts))
    ]
    words: np.ndarray = np.array(texts, dtype=object)[code]
    return words


def share(part: int, whole: int) -> float:
    """``part / whole`` of Python's integers, rounded once; NaN over zero."""
    return part / whole if whole else math.nan


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are defined, rounded once; NaN when none is."""
    defined = [v for v in values if not math.isnan(v)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def grouped_mean(values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
    """`mean` of each group: float64, (groups,).

    Args:
        values: float64, (row,).
        group: of each value, ascending, (row,).
        groups: how many there are.
    """
    defined = ~np.isnan(values)
    values, group = values[defined], group[defined]
    result = np.full(groups, np.nan)
    number = np.bincount(group, minlength=groups)
    if number.max(initial=0) <= 1:
        result[group] = values
        return result
    stop = np.cumsum(number)
    items = values.tolist()
    for i in np.flatnonzero(number).tolist():
        result[i] = math.fsum(items[stop[i] - number[i] : stop[i]]) / number[i]
    return result


@dataclass(frozen=True)
class CaseCounts:
    """How many of the averaged cells are what."""

    defined: int
    """Have the ratio, `missed` and `hallucinated` (at 0) among them."""
    missed: int
    hallucinated: int
    undefined: int

    @classmethod
    def of(cls, counts: Counts) -> CaseCounts:
        """Count the cases of IoU and Dice."""
        undefined = int(counts.undefined.sum())
        missed, hallucinated = int(counts.missed.sum()), int(counts.hallucinated.sum())
        return cls(counts.tp.size - undefined, missed, hallucinated, undefined)


# ------------------------------------------------------------------ all classes at once
# The numbers below are of one confusion matrix over *all* values of the compared elements: background and
# values that are no class of the model are in it like any other. They follow from its margins and diagonal.

ONE_CLASS = "kappa: one and the same class everywhere"


def pixel_accuracy(cells: ClassCounts) -> np.ndarray:
    """Share of the compared elements that are right: Σ tp / Σ (tp + fn), float64, (groups,).

    NaN where nothing was compared, as in all functions here.
    """
    counts = cells.counts
    right = totals(cells.group, counts.tp, cells.groups)
    return ratio(right, totals(cells.group, counts.actual, cells.groups))


def balanced_accuracy(cells: ClassCounts) -> np.ndarray:
    """Mean recall over the classes that the reference has (Brodersen et al. 2010), (groups,)."""
    return grouped_mean(cells.counts.recall, cells.group, cells.groups)


def cohen_kappa(cells: ClassCounts) -> np.ndarray:
    """Cohen's kappa (1960), (groups,): agreement beyond what the margins alone would give.

    κ = 1 − (1 − p_o) / (1 − p_e), and 1 − p_e = Σ_k predicted_k (n − actual_k) / n², a sum without
    cancellation. NaN where it is 0: both maps are one and the same class.
    """
    group, groups = cells.group, cells.groups
    predicted, actual = (
        np.asarray(v, dtype=np.float64) for v in (cells.counts.predicted, cells.counts.actual)
    )
    n = np.bincount(group, actual, groups)
    wrong = np.bincount(group, np.asarray(cells.counts.fp, dtype=np.float64), groups)
    by_chance = np.bincount(group, predicted * (n[group] - actual), groups)
    return 1 - ratio(n * wrong, by_chance)


def frequency_weighted_iou(cells: ClassCounts) -> np.ndarray:
    """Mean IoU weighted by the classes' share of the reference (Long et al. 2015), (groups,)."""
    group, groups = cells.group, cells.groups
    actual = np.asarray(cells.counts.actual, dtype=np.float64)
    weighted = np.where(actual > 0, actual * cells.counts.iou, 0.0)
    return ratio(np.bincount(group, weighted, groups), np.bincount(group, actual, groups))
