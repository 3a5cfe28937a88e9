"""The rows of the summary: what each is of, its numbers, and what entered it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from segpipe.metrics.agreement import balanced_accuracy, cohen_kappa, frequency_weighted_iou, pixel_accuracy
from segpipe.metrics.bootstrap import Statistic
from segpipe.metrics.overlap import CaseCounts, ClassCounts, Counts, grouped_mean, totals
from segpipe.regions.base import FULL, SCENE
from segpipe.tables.frames import ClassLike, fixed_counts

REGIONS = "regions"
"""Scope of the numbers over the regions in the scenes; `SCENE`: over whole scenes."""
_AGREEMENT: dict[str, Statistic] = {
    "pixel accuracy": pixel_accuracy,
    "balanced accuracy": balanced_accuracy,
    "Cohen's kappa": cohen_kappa,
    "frequency-weighted IoU": frequency_weighted_iou,
}


@dataclass(frozen=True, eq=False)
class Scope:
    """The cells (scene × region × class) of whole scenes, or of the regions in them."""

    region: str
    """`SCENE` or `REGIONS`."""
    cells: ClassCounts
    """A group is a region of a scene."""
    scene: np.ndarray
    """Of each group: index of the scene, ascending."""
    scenes: tuple[str, ...]
    """Names, sorted: nothing depends on the order of the rows."""
    pooled: ClassCounts
    """The counts of each value, summed over regions and scenes: one group."""

    @classmethod
    def of(cls, rows: pd.DataFrame, region: str) -> Scope:
        """These rows of a metric table."""
        scenes, scene = np.unique(rows["scene"].to_numpy(dtype=object), return_inverse=True)
        part, parts = pd.factorize(rows["region"])
        pairs, group = np.unique(scene * max(len(parts), 1) + part, return_inverse=True)
        order = np.argsort(group, kind="stable")
        value = rows["value"].to_numpy(dtype=np.int64)[order]
        cells = ClassCounts(group[order], value, fixed_counts(rows)[order], len(pairs))
        pooled = merged(cells, np.zeros(len(pairs), dtype=np.int64), 1)
        return cls(region, cells, pairs // max(len(parts), 1), tuple(scenes.tolist()), pooled)

    @property
    def compared(self) -> np.ndarray:
        """Of each group: whether anything was compared; bool."""
        return totals(self.cells.group, self.cells.counts.actual, self.cells.groups) > 0


def merged(cells: ClassCounts, into: np.ndarray, groups: int) -> ClassCounts:
    """Counts with groups put together.

    Args:
        cells: the counts.
        into: for each group where it goes, -1: nowhere.
        groups: how many there are then.
    """
    kept = into[cells.group] >= 0
    values, code = np.unique(cells.value[kept], return_inverse=True)
    many = max(len(values), 1)
    found, place = np.unique(into[cells.group[kept]] * many + code, return_inverse=True)
    counts = cells.counts[kept]
    sums = (totals(place, v, len(found)) for v in (counts.tp, counts.fp, counts.fn))
    return ClassCounts(found // many, values[found % many], Counts(*sums), groups)


@dataclass(frozen=True, eq=False)
class Line(ABC):
    """One row of the summary."""

    metric: str
    over: str
    """What is averaged, from the inside out, or summed."""
    pooled: bool
    """Whether it is of sums, and not a mean of the regions' and scenes' numbers."""
    name: str = field(default="", kw_only=True)
    """Of the class, where it is about one."""

    @abstractmethod
    def numbers(self, cells: ClassCounts) -> np.ndarray:
        """Of each group the number; float64, NaN where undefined."""

    @abstractmethod
    def cases(self, scope: Scope) -> CaseCounts:
        """What entered it."""

    def of_sums(self, scope: Scope) -> Line:
        """The line that makes the same number of sums over parts of a scene."""
        return self

    def sources(self, clusters: ClassCounts) -> int:
        """How many clusters have a part in the number of their sum."""
        return int((~np.isnan(self.numbers(clusters))).sum())


@dataclass(frozen=True, eq=False)
class ClassLine(Line):
    """A mean over classes, or one class."""

    score: str
    """``iou`` or ``dice``."""
    values: np.ndarray
    """Of the classes."""
    least: int = 0
    """A class enters where the reference has this much of it, in 1/65536."""

    def _chosen(self, cells: ClassCounts) -> np.ndarray:
        one = len(self.values) == 1
        wanted = cells.value == self.values[0] if one else np.isin(cells.value, self.values)
        return wanted & (cells.counts.actual >= self.least)

    def numbers(self, cells: ClassCounts) -> np.ndarray:
        chosen = self._chosen(cells)
        return grouped_mean(getattr(cells.counts[chosen], self.score), cells.group[chosen], cells.groups)

    def cases(self, scope: Scope) -> CaseCounts:
        cells = scope.pooled if self.pooled else scope.cells
        found = CaseCounts.of(cells.counts[self._chosen(cells)])
        if not self.pooled:
            return found
        return CaseCounts(found.defined, found.missed, found.hallucinated, len(self.values) - found.defined)

    def of_sums(self, scope: Scope) -> Line:
        if not self.least:
            return self
        values = np.unique(scope.cells.value[self._chosen(scope.cells)])
        return ClassLine(self.metric, self.over, self.pooled, self.score, values)


@dataclass(frozen=True, eq=False)
class AgreementLine(Line):
    """A number over all values at once; regions of scenes enter it, not classes."""

    statistic: Statistic

    def numbers(self, cells: ClassCounts) -> np.ndarray:
        return self.statistic(cells)

    def cases(self, scope: Scope) -> CaseCounts:
        if not self.pooled:
            defined = int((~np.isnan(self.numbers(scope.cells))).sum())
        elif np.isnan(self.numbers(scope.pooled)[0]):
            defined = 0
        else:
            defined = int(scope.compared.sum())
        return CaseCounts(defined, 0, 0, scope.cells.groups - defined)

    def sources(self, clusters: ClassCounts) -> int:
        """All: a kappa may be defined of the sum and of no cluster."""
        return clusters.groups


def summary_lines(
    region: str, classes: Sequence[ClassLike], min_reference: int
) -> Iterator[ClassLine | AgreementLine]:
    """The rows over whole scenes, or over the regions in them, in order."""
    front = [c for c in classes if not c.background]
    left_out = [c.name for c in classes if c.background]
    of = f"classes (without {', '.join(left_out)})" if left_out else "classes"
    only = "scenes" if region == SCENE else "regions, then scenes"
    then, sums = f"then {only}", f"sums over {only}"
    every = np.array([c.value for c in front], dtype=np.int64)
    scores = (("mIoU", "iou"), ("mean Dice", "dice"))
    for name, score in scores:
        yield ClassLine(name, f"{of}, {then}", False, score, every)
    for name, score in scores:
        yield ClassLine(f"pooled {name}", f"{of}, of {sums}", True, score, every)
    yield AgreementLine("pixel accuracy", f"all compared elements of all {only}", True, pixel_accuracy)
    many = f"{of} with at least {min_reference} reference elements in it, {then}"
    title = f"mIoU of classes with reference ≥ {min_reference}"
    yield ClassLine(title, many, False, "iou", every, least=min_reference * FULL)
    for name, statistic in _AGREEMENT.items():
        yield AgreementLine(f"mean {name}", f"all values compared, {then}", False, statistic)
        if statistic is not pixel_accuracy:  # pooled above
            yield AgreementLine(f"pooled {name}", f"all values compared, of {sums}", True, statistic)
    for c in front:
        own = np.array([c.value], dtype=np.int64)
        for score_name, score in (("IoU", "iou"), ("Dice", "dice")):
            yield ClassLine(f"mean {score_name}", only, False, score, own, name=c.name)
            yield ClassLine(f"pooled {score_name}", sums, True, score, own, name=c.name)
