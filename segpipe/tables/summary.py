"""The summary: means and pooled numbers of a run, with intervals and with what they leave out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from segpipe.errors import RequestError
from segpipe.metrics import overlap
from segpipe.metrics.bootstrap import RESAMPLES, Intervals, Statistic, mean_intervals, pooled_intervals
from segpipe.metrics.tally import Tally
from segpipe.regions.base import FULL, SCENE
from segpipe.tables.frames import (
    FAILED,
    NOT_REQUESTED_STATE,
    ClassLike,
    Piece,
    column_types,
    fixed_counts,
    table_of_pieces,
)

MIN_REFERENCE = 1000
"""Elements of the reference from which a class counts in the summary's mean without rare ones."""

REGIONS = "regions"
"""Scope of the numbers over the regions in the scenes; `SCENE`: over whole scenes."""
_AGREEMENT: dict[str, Statistic] = {
    "pixel accuracy": overlap.pixel_accuracy,
    "balanced accuracy": overlap.balanced_accuracy,
    "Cohen's kappa": overlap.cohen_kappa,
    "frequency-weighted IoU": overlap.frequency_weighted_iou,
}


@dataclass(frozen=True, eq=False)
class Scope:
    """The cells (scene × region × class) of whole scenes, or of the regions in them."""

    region: str
    """`SCENE` or `REGIONS`."""
    cells: overlap.ClassCounts
    """A group is a region of a scene."""
    scene: np.ndarray
    """Of each group: index of the scene, ascending."""
    scenes: tuple[str, ...]
    """Names, sorted: nothing depends on the order of the rows."""
    pooled: overlap.ClassCounts
    """The counts of each value, summed over regions and scenes: one group."""

    @classmethod
    def of(cls, rows: pd.DataFrame, region: str) -> Scope:
        """These rows of a metric table."""
        scenes, scene = np.unique(rows["scene"].to_numpy(dtype=object), return_inverse=True)
        part, parts = pd.factorize(rows["region"])
        pairs, group = np.unique(scene * max(len(parts), 1) + part, return_inverse=True)
        order = np.argsort(group, kind="stable")
        value = rows["value"].to_numpy(dtype=np.int64)[order]
        cells = overlap.ClassCounts(group[order], value, fixed_counts(rows)[order], len(pairs))
        pooled = merge_groups(cells, np.zeros(len(pairs), dtype=np.int64), 1)
        return cls(region, cells, pairs // max(len(parts), 1), tuple(scenes.tolist()), pooled)

    @property
    def compared(self) -> np.ndarray:
        """Of each group: whether anything was compared; bool."""
        return overlap.totals(self.cells.group, self.cells.counts.actual, self.cells.groups) > 0


def merge_groups(cells: overlap.ClassCounts, into: np.ndarray, groups: int) -> overlap.ClassCounts:
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
    sums = (overlap.totals(place, v, len(found)) for v in (counts.tp, counts.fp, counts.fn))
    return overlap.ClassCounts(found // many, values[found % many], overlap.Counts(*sums), groups)


@dataclass(frozen=True, eq=False)
class SummaryRow(ABC):
    """One row of the summary."""

    metric: str
    over: str
    """What is averaged, from the inside out, or summed."""
    pooled: bool
    """Whether it is of sums, and not a mean of the regions' and scenes' numbers."""
    name: str = field(default="", kw_only=True)
    """Of the class, where it is about one."""

    @abstractmethod
    def numbers(self, cells: overlap.ClassCounts) -> np.ndarray:
        """Of each group the number; float64, NaN where undefined."""

    @abstractmethod
    def cases(self, scope: Scope) -> overlap.CaseCounts:
        """What entered it."""

    def of_sums(self, scope: Scope) -> SummaryRow:
        """The line that makes the same number of sums over parts of a scene."""
        return self

    def sources(self, clusters: overlap.ClassCounts) -> int:
        """How many clusters have a part in the number of their sum."""
        return int((~np.isnan(self.numbers(clusters))).sum())


@dataclass(frozen=True, eq=False)
class ClassRow(SummaryRow):
    """A mean over classes, or one class."""

    score: str
    """``iou`` or ``dice``."""
    values: np.ndarray
    """Of the classes."""
    least: int = 0
    """A class enters where the reference has this much of it, in 1/65536."""

    def _chosen(self, cells: overlap.ClassCounts) -> np.ndarray:
        one = len(self.values) == 1
        wanted = cells.value == self.values[0] if one else np.isin(cells.value, self.values)
        return wanted & (cells.counts.actual >= self.least)

    def numbers(self, cells: overlap.ClassCounts) -> np.ndarray:
        chosen = self._chosen(cells)
        return overlap.grouped_mean(
            getattr(cells.counts[chosen], self.score), cells.group[chosen], cells.groups
        )

    def cases(self, scope: Scope) -> overlap.CaseCounts:
        cells = scope.pooled if self.pooled else scope.cells
        found = overlap.CaseCounts.of(cells.counts[self._chosen(cells)])
        if not self.pooled:
            return found
        return overlap.CaseCounts(
            found.defined, found.missed, found.hallucinated, len(self.values) - found.defined
        )

    def of_sums(self, scope: Scope) -> SummaryRow:
        if not self.least:
            return self
        values = np.unique(scope.cells.value[self._chosen(scope.cells)])
        return ClassRow(self.metric, self.over, self.pooled, self.score, values)


@dataclass(frozen=True, eq=False)
class AgreementRow(SummaryRow):
    """A number over all values at once; regions of scenes enter it, not classes."""

    statistic: Statistic

    def numbers(self, cells: overlap.ClassCounts) -> np.ndarray:
        return self.statistic(cells)

    def cases(self, scope: Scope) -> overlap.CaseCounts:
        if not self.pooled:
            defined = int((~np.isnan(self.numbers(scope.cells))).sum())
        elif np.isnan(self.numbers(scope.pooled)[0]):
            defined = 0
        else:
            defined = int(scope.compared.sum())
        return overlap.CaseCounts(defined, 0, 0, scope.cells.groups - defined)

    def sources(self, clusters: overlap.ClassCounts) -> int:
        """All: a kappa may be defined of the sum and of no cluster."""
        return clusters.groups


def summary_rows(
    region: str, classes: Sequence[ClassLike], min_reference: int
) -> Iterator[ClassRow | AgreementRow]:
    """The rows over whole scenes, or over the regions in them, in order."""
    front = [c for c in classes if not c.background]
    left_out = [c.name for c in classes if c.background]
    of = f"classes (without {', '.join(left_out)})" if left_out else "classes"
    only = "scenes" if region == SCENE else "regions, then scenes"
    then, sums = f"then {only}", f"sums over {only}"
    every = np.array([c.value for c in front], dtype=np.int64)
    scores = (("mIoU", "iou"), ("mean Dice", "dice"))
    for name, score in scores:
        yield ClassRow(name, f"{of}, {then}", False, score, every)
    for name, score in scores:
        yield ClassRow(f"pooled {name}", f"{of}, of {sums}", True, score, every)
    yield AgreementRow("pixel accuracy", f"all compared elements of all {only}", True, overlap.pixel_accuracy)
    many = f"{of} with at least {min_reference} reference elements in it, {then}"
    title = f"mIoU of classes with reference ≥ {min_reference}"
    yield ClassRow(title, many, False, "iou", every, least=min_reference * FULL)
    for name, statistic in _AGREEMENT.items():
        yield AgreementRow(f"mean {name}", f"all values compared, {then}", False, statistic)
        if statistic is not overlap.pixel_accuracy:  # pooled above
            yield AgreementRow(f"pooled {name}", f"all values compared, of {sums}", True, statistic)
    for c in front:
        own = np.array([c.value], dtype=np.int64)
        for score_name, score in (("IoU", "iou"), ("Dice", "dice")):
            yield ClassRow(f"mean {score_name}", only, False, score, own, name=c.name)
            yield ClassRow(f"pooled {score_name}", sums, True, score, own, name=c.name)


def summary_table(
    metrics: pd.DataFrame,
    classes: Sequence[ClassLike],
    min_reference: int = MIN_REFERENCE,
    *,
    groups: Mapping[str, str] | None = None,
    grouped_by: str = "groups",
    blocks: Sequence[Tally] = (),
) -> pd.DataFrame:
    """The means of a metric table, with what they average and what they could not.

    Columns: ``metric``; ``class``, empty for numbers over classes; ``over``, what is averaged, from
    the inside out, or summed (pooled); ``region``, ``scene`` (whole scenes) or ``regions`` (every
    region of every scene counts the same); ``value``; ``low`` and ``high``, its 95 % percentile
    bootstrap interval, and ``interval``, how many of what were resampled for it, or why there is
    none; and of the cells (scene × region × class; scene × region for numbers over all values) that
    entered: ``n_defined``, ``n_missed`` and ``n_hallucinated`` (among the defined, at 0),
    ``n_undefined`` (absent in both, or nothing to compare: left out of the mean); ``n_failed``,
    scenes that failed (left out too). Empty when no scene was compared with a reference.

    Args:
        metrics: the metric table.
        classes: of the model.
        min_reference: elements of the reference from which a class is not rare.
        groups: scene to what it belongs to (a patient): these are resampled instead of scenes.
        grouped_by: what the groups are, in the plural.
        blocks: of a single scene, the tallies of spatial blocks that add up to it, in a fixed order:
            these are resampled for the numbers of the whole scene.

    Raises:
        RequestError: a scene has no group.
        ValueError: blocks are given for other than one scene, or do not add up to it.
    """
    asked = metrics[metrics["state"] != NOT_REQUESTED_STATE]
    failed = int(asked.loc[asked["state"] == FAILED, "scene"].nunique())
    kept = asked[asked["state"] != FAILED]
    if not len(kept) and not failed:
        return table_of_pieces([], column_types("summary"))
    whole = kept["region"] == SCENE
    scopes = [Scope.of(kept[whole], SCENE)]
    if not whole.all():
        scopes.append(Scope.of(kept[~whole], REGIONS))
    pieces = []
    for scope in scopes:
        if blocks and scope.region == SCENE:
            clusters = _Clusters.of_blocks(scope, blocks)
        else:
            clusters = _Clusters.of_scenes(scope, groups, grouped_by)
        lines = list(summary_rows(scope.region, classes, min_reference))
        pieces.append(_piece(scope, lines, clusters, failed))
    return table_of_pieces(pieces, column_types("summary"))


def _piece(scope: Scope, lines: Sequence[SummaryRow], clusters: _Clusters, failed: int) -> Piece:
    """The lines as rows."""
    by_scene = np.full((len(scope.scenes), len(lines)), np.nan)
    values = []
    for i, line in enumerate(lines):
        numbers = line.numbers(scope.pooled if line.pooled else scope.cells)
        if not line.pooled:
            by_scene[:, i] = numbers = overlap.grouped_mean(numbers, scope.scene, len(scope.scenes))
        values.append(overlap.mean(numbers.tolist()))
    found, said = clusters.intervals(scope, lines, by_scene)
    cases = [line.cases(scope) for line in lines]
    columns = {
        **{name: [getattr(line, name) for line in lines] for name in ("metric", "over")},
        "class": [line.name for line in lines],
        "interval": said,
        **{
            f"n_{name}": [getattr(case, name) for case in cases]
            for name in ("defined", "missed", "hallucinated", "undefined")
        },
    }
    arrays = {name: np.array(column, dtype=object) for name, column in columns.items()}
    floats = {"value": np.array(values), "low": found.low, "high": found.high}
    return Piece(len(lines), {**arrays, **floats, "region": scope.region, "n_failed": failed})


@dataclass(frozen=True, eq=False)
class _Clusters:
    """What is resampled: scenes, groups of them, or blocks of one, in which something was compared."""

    kind: str
    """In the plural."""
    cells: overlap.ClassCounts
    """A group is a cluster."""
    of_scene: np.ndarray | None
    """Of each scene its cluster, -1 where nothing was compared; None: blocks."""

    @classmethod
    def of_scenes(cls, scope: Scope, groups: Mapping[str, str] | None, grouped_by: str) -> _Clusters:
        """Scenes, or the groups they are in."""
        lacking = [name for name in scope.scenes if groups is not None and name not in groups]
        if lacking:
            raise RequestError(f"{grouped_by}: scene {lacking[0]} is in none; every scene must be in one")
        owners = scope.scenes if groups is None else [groups[name] for name in scope.scenes]
        compared = np.zeros(len(scope.scenes), dtype=bool)
        compared[scope.scene[scope.compared]] = True
        found, index = np.unique(np.array(owners, dtype=object)[compared], return_inverse=True)
        of_scene = np.full(len(compared), -1)
        of_scene[compared] = index
        cells = merge_groups(scope.cells, of_scene[scope.scene], len(found))
        return cls("scenes" if groups is None else grouped_by, cells, of_scene)

    @classmethod
    def of_blocks(cls, scope: Scope, blocks: Sequence[Tally]) -> _Clusters:
        """Spatial blocks of the one scene, which is the first region of their tallies."""
        if len(scope.scenes) != 1:
            raise ValueError(f"blocks are given for {len(scope.scenes)} scenes; they are of one")
        rows = [(block, np.flatnonzero(overlap.is_compared(block) & (block.region == 0))) for block in blocks]
        kept = [(block, here) for block, here in rows if len(here)]
        columns = {
            name: np.concatenate([getattr(block, name)[here] for block, here in kept] or [[]])
            for name in ("label", "reference", "cover", "size", "edge")
        }
        number = np.repeat(np.arange(len(kept)), [len(here) for _, here in kept])
        cells = overlap.class_counts(Tally.from_columns(region=number, **columns))
        if _listed(merge_groups(cells, np.zeros(len(kept), dtype=np.int64), 1)) != _listed(scope.pooled):
            raise ValueError(f"the blocks do not add up to scene {scope.scenes[0]}")
        return cls("blocks", cells, None)

    def intervals(
        self, scope: Scope, lines: Sequence[SummaryRow], by_scene: np.ndarray
    ) -> tuple[Intervals, list[str]]:
        """The lines' intervals, and what was resampled for each.

        Args:
            scope: of the lines.
            lines: of the summary.
            by_scene: each scene's number for each line, float64, (scene, line).
        """
        blocks = self.of_scene is None
        lines = [line.of_sums(scope) for line in lines] if blocks else lines
        summed = np.array([line.pooled or blocks for line in lines])
        of_sums = [line for line, is_sum in zip(lines, summed, strict=True) if is_sum]
        have = [line.sources(self.cells) for line in of_sums]
        found = Intervals.none(len(lines))
        found[summed] = pooled_intervals(self.cells, [line.numbers for line in of_sums], have)
        if self.of_scene is not None:
            seen = self.of_scene >= 0
            values = by_scene[seen][:, ~summed]
            found[~summed] = mean_intervals(values, self.of_scene[seen], self.cells.groups)
        return found, [
            self._said(*n) for n in zip(found.clusters.tolist(), found.undefined.tolist(), strict=True)
        ]

    def _said(self, have: int, undefined: int) -> str:
        if have < 2:
            return f"none: fewer than 2 {self.kind} have it"
        lost = f", undefined in {undefined} of {RESAMPLES} resamples" if undefined else ""
        return f"{self.cells.groups} {self.kind}{lost}"


def _listed(cells: overlap.ClassCounts) -> list[tuple[int, ...]]:
    """Value, tp, fp and fn of each value that occurs."""
    counts, there = cells.counts, ~cells.counts.undefined
    columns = (cells.value, counts.tp, counts.fp, counts.fn)
    return list(zip(*(column[there].tolist() for column in columns), strict=True))
