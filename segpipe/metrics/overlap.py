"""Overlap of prediction and reference, from tp, fp and fn, and means that say what they leave out.

Only elements with a valid pixel and a reference are compared. A ratio whose denominator is zero is
not defined: NaN with a reason, never 0 or 1. Sums are of whole numbers and means by exact
summation, so neither depends on the order.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from segpipe.metrics.tally import Tally

ABSENT_IN_BOTH = "absent in both"
NOT_PREDICTED = "not predicted"
NOT_IN_REFERENCE = "not in the reference"


class Case(str, Enum):
    """What prediction and reference say about one class in one region of one scene."""

    both = "both"
    missed = "missed"
    """The reference has it, the prediction has none of it: IoU and Dice are 0."""
    hallucinated = "hallucinated"
    """The prediction has it, the reference has none of it: IoU and Dice are 0."""
    undefined = "undefined"
    """Neither has it: no ratio is defined."""


@dataclass(frozen=True)
class Counts:
    """Elements of one class, in 1/65536."""

    tp: int = 0
    """Predicted as the class, and it is."""
    fp: int = 0
    """Predicted as the class, and it is another."""
    fn: int = 0
    """It is the class, and predicted as another."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.tp + other.tp, self.fp + other.fp, self.fn + other.fn)

    @property
    def predicted(self) -> int:
        """tp + fp."""
        return self.tp + self.fp

    @property
    def actual(self) -> int:
        """tp + fn."""
        return self.tp + self.fn

    @property
    def case(self) -> Case:
        """Who has the class."""
        if self.predicted and self.actual:
            return Case.both
        if self.actual:
            return Case.missed
        return Case.hallucinated if self.predicted else Case.undefined

    @property
    def iou(self) -> float:
        """tp / (tp + fp + fn)."""
        return ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def dice(self) -> float:
        """2·tp / (2·tp + fp + fn)."""
        return ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """tp / (tp + fp)."""
        return ratio(self.tp, self.predicted)

    @property
    def recall(self) -> float:
        """tp / (tp + fn)."""
        return ratio(self.tp, self.actual)

    @property
    def reason(self) -> str:
        """Why a ratio is NaN; empty when all are defined."""
        return {
            Case.both: "",
            Case.missed: f"precision: {NOT_PREDICTED}",
            Case.hallucinated: f"recall: {NOT_IN_REFERENCE}",
            Case.undefined: ABSENT_IN_BOTH,
        }[self.case]


def ratio(part: int, whole: int) -> float:
    """``part / whole``, correctly rounded; NaN over zero."""
    return part / whole if whole else math.nan


def class_counts(tally: Tally) -> dict[tuple[int, int], Counts]:
    """Counts by (region, class value), of every value that prediction or reference has there."""
    tp: dict[tuple[int, int], int] = defaultdict(int)
    fp: dict[tuple[int, int], int] = defaultdict(int)
    fn: dict[tuple[int, int], int] = defaultdict(int)
    for region, label, truth, cover, _, _ in tally.rows():
        if label < 0 or truth < 0:
            continue
        if label == truth:
            tp[region, label] += cover
        else:
            fp[region, label] += cover
            fn[region, truth] += cover
    return {k: Counts(tp[k], fp[k], fn[k]) for k in sorted({*tp, *fp, *fn})}


def accuracy(counts: Iterable[Counts]) -> float:
    """Share of the compared elements that are right, from the counts of all values."""
    counts = list(counts)
    return ratio(sum(c.tp for c in counts), sum(c.actual for c in counts))


def mean(values: Iterable[float]) -> float:
    """Mean of the values that are defined; NaN when none is."""
    defined = [v for v in values if not math.isnan(v)]
    return math.fsum(defined) / len(defined) if defined else math.nan


@dataclass(frozen=True)
class CaseCounts:
    """How many of the averaged cells are what."""

    defined: int
    """Have the ratio, `missed` and `hallucinated` (at 0) among them."""
    missed: int
    hallucinated: int
    undefined: int

    @classmethod
    def of(cls, counts: Iterable[Counts]) -> CaseCounts:
        """Count the cases of IoU and Dice."""
        cases = [c.case for c in counts]
        undefined = cases.count(Case.undefined)
        return cls(
            len(cases) - undefined,
            cases.count(Case.missed),
            cases.count(Case.hallucinated),
            undefined,
        )
