"""The tables of regions, metrics, agreement and confusion, as data frames.

Counts are in elements of the scene, areas and volumes in SI. A number that is not there is empty,
and `state` says why; 0 is only ever a measured 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from segpipe.metrics import overlap
from segpipe.metrics.tally import NODATA, NOT_REQUESTED, SizeScale, Tally
from segpipe.regions.base import FULL
from segpipe.tables.frames import (
    FAILED,
    MEASURED,
    NO_DATA,
    NO_REFERENCE,
    NOT_A_CLASS,
    NOT_REQUESTED_STATE,
    NOTHING_COMPARED,
    SIZE_COLUMNS,
    ClassLike,
    Piece,
    column_types,
    fixed_counts,
    table_columns,
    table_of_pieces,
    text_of,
)

if TYPE_CHECKING:
    from segpipe.pipeline.measure import Measured

_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True)
class SceneTallies:
    """What measuring left of one scene."""

    scene: str
    _: KW_ONLY
    regions: tuple[str, ...]
    """Names, by index; of a failed scene as far as they are known."""
    tally: Tally | None = None
    """Sum over the scene's tiles; None: the scene failed."""
    scale: SizeScale | None = None
    """Of the scene; None with ``tally`` None."""
    outside: tuple[int, ...] = ()
    """Fixed-point cover of each region beyond the scene; left out: none."""
    reason: str = ""
    """Why it failed, in one line."""

    @classmethod
    def of(cls, scene: str, measured: Measured) -> SceneTallies:
        """Return the tallies of a measured scene."""
        return cls(
            scene, regions=measured.regions, tally=measured.tally,
            scale=SizeScale.from_dict(measured.scale), outside=measured.outside,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _SceneGroups:
    """The regions of all scenes one after the other, *groups*, so that a table is made at once."""

    results: Sequence[SceneTallies]
    scene: np.ndarray
    """Of each group: index of its scene."""
    regions: list[str]
    """Of each group: the region's name."""
    tally: Tally
    """Of all scenes, its region a group."""

    @classmethod
    def of(cls, results: Iterable[SceneTallies]) -> _SceneGroups:
        """The groups in the order given; a failed scene has at least one, without a name."""
        results = list(results)
        names = [r.regions if r.tally is not None else r.regions or ("",) for r in results]
        number = np.array([len(n) for n in names], dtype=np.int64)
        first = np.cumsum(number) - number
        tallies = [(r.tally, begin) for r, begin in zip(results, first, strict=True) if r.tally is not None]
        region = [tally.region + begin for tally, begin in tallies]
        others = {
            name: np.concatenate([getattr(tally, name) for tally, _ in tallies] or [_NONE])
            for name in ("label", "reference", "cover", "size", "edge")
        }
        tally = Tally(region=np.concatenate(region or [_NONE]), **others)
        scene = np.repeat(np.arange(len(results)), number)
        return cls(results, scene, [name for part in names for name in part], tally)

    @property
    def units(self) -> list[str]:
        """Units of size that scenes have, in the columns' order."""
        found = {r.scale.unit for r in self.results if r.scale is not None}
        return [unit for unit in SIZE_COLUMNS if unit in found]

    @property
    def failed(self) -> np.ndarray:
        """Of each group: whether its scene failed."""
        return np.asarray(np.array([r.tally is None for r in self.results], dtype=bool)[self.scene])

    @property
    def asked(self) -> np.ndarray:
        """Of each group: whether its scene was to be compared with a reference."""
        without = self.scene[self.tally.region[self.tally.reference == NOT_REQUESTED]]
        return ~np.isin(self.scene, without)

    def sizes(self, group: np.ndarray, units: np.ndarray, unit: str) -> np.ndarray:
        """`SizeScale.size` of each row; NaN where its scene has another unit."""
        scales = [r.scale if r.scale and r.scale.unit == unit else None for r in self.results]
        steps = np.array([1 << scale.bits if scale else 1 for scale in scales])[self.scene]
        largest = np.array([scale.largest if scale else np.nan for scale in scales])[self.scene]
        return np.asarray(units / steps[group] * largest[group])

    def head(self, group: np.ndarray) -> dict[str, np.ndarray]:
        """Scene and region of rows."""
        scenes = text_of([r.scene for r in self.results], self.scene[group])
        return {"scene": scenes, "region": text_of(self.regions, group)}


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a table: in each group the classes, then other values that occur there."""

    group: np.ndarray
    value: np.ndarray
    place: np.ndarray
    """Where the sums of group and value are; -1: nothing was counted."""
    names: np.ndarray
    """Of the class, or the value as text."""
    stranger: np.ndarray
    """Whether the value is no class of the model."""

    @classmethod
    def of(cls, groups: int, classes: Sequence[ClassLike], group: np.ndarray, value: np.ndarray) -> _Rows:
        """Rows for sums by (group, value), which are sorted so; negative values get none."""
        known = {c.value: c.name for c in classes}
        own = np.fromiter(known, dtype=np.int64, count=len(known))
        values = np.union1d(own, value)
        strange = np.flatnonzero((value >= 0) & ~np.isin(value, own))
        rows = np.r_[np.repeat(np.arange(groups), len(own)), group[strange]]
        each = np.r_[np.tile(own, groups), value[strange]]
        order = np.argsort(rows, kind="stable")
        rows, each, stranger = rows[order], each[order], order >= groups * len(own)
        rank = np.asarray(np.searchsorted(values, each))
        there = group * len(values) + np.searchsorted(values, value)
        key = rows * len(values) + rank
        place = np.searchsorted(there, key)
        found = np.append(there, -1)[place] == key
        names = text_of([known.get(v, str(v)) for v in values.tolist()], rank)
        return cls(rows, each, np.where(found, place, -1), names, stranger)

    def take(self, sums: np.ndarray) -> np.ndarray:
        """A column of sums for the rows; 0 where nothing was counted."""
        return np.asarray(np.append(sums, np.zeros(1, dtype=sums.dtype))[self.place])

    def head(self, batch: _SceneGroups) -> dict[str, np.ndarray]:
        """The columns that say what the rows are of."""
        return {**batch.head(self.group), "class": self.names, "value": self.value}


def region_table(results: Iterable[SceneTallies], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Return area or volume by scene, region and class, in the order given.

    Every class has a row in every region. ``count`` is in elements, a share of those on a polygon's edge.
    """
    batch = _SceneGroups.of(results)
    types = column_types("regions", batch.units)
    del types["objects"]  # `with_counts` adds them, where a model finds objects
    group, label, (cover, size, edge) = _by_label(batch.tally)
    groups, failed = len(batch.scene), batch.failed
    rows = _Rows.of(groups, classes, group, label)
    valid = label != NODATA
    covered = overlap.totals(group, np.where(valid, cover, 0), groups)
    seen_size = overlap.totals(group, np.where(valid, size, 0), groups)
    whole = overlap.totals(group, cover, groups) + _outside(batch)
    seen = np.where(failed, np.nan, np.nan_to_num(overlap.ratio(covered, whole)))
    measured = (covered > 0)[rows.group]
    states = np.where(failed, 0, np.where(covered > 0, 1, 2))[rows.group]
    numbers = {
        "count": rows.take(cover) / FULL,
        **{SIZE_COLUMNS[unit]: batch.sizes(rows.group, rows.take(size), unit) for unit in batch.units},
        "share": overlap.ratio(rows.take(size), seen_size[rows.group]),
        "touches_edge": rows.take(edge) > 0,
    }
    columns = {name: np.where(measured, values, np.nan) for name, values in numbers.items()}
    columns |= {"state": text_of((FAILED, MEASURED, NO_DATA), states), "seen": seen[rows.group]}
    return table_of_pieces([Piece(len(rows.group), {**rows.head(batch), **columns})], types)


def _outside(batch: _SceneGroups) -> np.ndarray:
    """Of each group its fixed-point cover beyond the scene."""
    result = np.zeros(len(batch.scene), dtype=np.int64)
    first = np.searchsorted(batch.scene, np.arange(len(batch.results)))
    for scene, begin in zip(batch.results, first.tolist(), strict=True):
        if scene.tally is not None and scene.outside:
            result[begin : begin + len(scene.regions)] = scene.outside
    return result


def _by_label(tally: Tally) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Region, label and sums (cover, size, edge) over all reference classes, by region, then label."""
    sums = np.stack([tally.cover, tally.size, tally.edge])
    region, label = tally.region, tally.label
    if not len(tally):
        return region, label, sums
    first = np.flatnonzero(np.r_[True, (region[1:] != region[:-1]) | (label[1:] != label[:-1])])
    return region[first], label[first], np.add.reduceat(sums, first, axis=1)


def metric_table(results: Iterable[SceneTallies], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Overlap with the reference by scene, region and class, in the order given.

    ``tp``, ``fp``, ``fn`` and ``tn`` are elements with a valid pixel and a reference; over the same
    elements are the sizes ``predicted_*`` and ``reference_*`` (in m2, mm3 or px, whichever the
    scenes have), ``difference_*``, predicted - reference, and ``size_ratio``, predicted / reference.
    So ``predicted_*`` is less than the region table's size where the reference says nothing. A ratio
    over zero is empty, and ``reason`` says why. A value that the reference has and the model has not
    gets a row too: it counts as wrong in what is over all classes at once (`agreement_table`), and
    not in any mean of IoU or Dice.
    """
    batch = _SceneGroups.of(results)
    found = overlap.class_counts(batch.tally)
    groups = len(batch.scene)
    rows = _Rows.of(groups, classes, found.group, found.value)
    compared = np.bincount(found.group, minlength=groups) > 0
    case = np.select([batch.failed, compared, batch.asked], [0, 1, 2], 3)[rows.group]
    full = overlap.RegionCounts(
        rows.group,
        rows.value,
        overlap.Counts(*(rows.take(v) for v in (found.counts.tp, found.counts.fp, found.counts.fn))),
        groups,
        rows.take(found.predicted_size),
        rows.take(found.reference_size),
    )
    failures = text_of([r.reason for r in batch.results], batch.scene[rows.group])
    why = np.where(case == 0, failures, text_of(("", "", NOTHING_COMPARED, NO_REFERENCE), case))
    columns = {name: np.where(case == 1, v, np.nan) for name, v in _overlap(batch, full).items()}
    columns["reason"] = np.where(case == 1, overlap.reasons(full, rows.stranger, NOT_A_CLASS), why)
    columns["state"] = text_of((FAILED, MEASURED, NO_DATA, NOT_REQUESTED_STATE), case)
    return table_of_pieces(
        [Piece(len(rows.group), {**rows.head(batch), **columns})], column_types("metrics", batch.units)
    )


def _overlap(batch: _SceneGroups, rows: overlap.RegionCounts) -> dict[str, np.ndarray]:
    """The numbers of the metric table's rows."""
    counts = rows.counts
    numbers = {name: getattr(counts, name) / FULL for name in ("tp", "fp", "fn")}
    numbers["tn"] = rows.tn / FULL
    for name in (c.name for c in table_columns("metrics") if c.kind == "ratio"):
        numbers[name] = getattr(counts if hasattr(counts, name) else rows, name)
    sizes = {
        "predicted": rows.predicted_size,
        "reference": rows.reference_size,
        "difference": rows.predicted_size - rows.reference_size,
    }
    for unit in batch.units:
        numbers |= {f"{what}_{unit}": batch.sizes(rows.group, size, unit) for what, size in sizes.items()}
    return numbers


def agreement_table(metrics: pd.DataFrame) -> pd.DataFrame:
    """Return agreement over all classes by scene and region, of a metric table.

    The four numbers are over every value that prediction or reference has there, background and values that
    are no class of the model among them; ``classes`` are these values' names.
    """
    group = metrics.groupby(["scene", "region"], sort=False).ngroup().to_numpy(dtype=np.int64)
    order = np.argsort(group, kind="stable")
    rows, group = metrics.iloc[order], group[order]
    heads = rows.iloc[np.flatnonzero(np.diff(group, prepend=-1))]
    counts, groups = fixed_counts(rows), len(heads)
    cells = overlap.ClassCounts(group, rows["value"].to_numpy(dtype=np.int64), counts, groups)
    compared = overlap.totals(group, counts.actual, groups)
    kappa = overlap.cohen_kappa(cells)
    why = np.where(np.isnan(kappa), overlap.ONE_CLASS, "").astype(object)
    names, n_classes = _names(rows, group, ~counts.undefined, groups)
    columns = {name: heads[name].to_numpy() for name in ("scene", "region", "state")}
    columns |= {
        "count": np.where(heads["tp"].notna(), compared / FULL, np.nan),
        "pixel_accuracy": overlap.pixel_accuracy(cells),
        "balanced_accuracy": overlap.balanced_accuracy(cells),
        "kappa": kappa,
        "frequency_weighted_iou": overlap.frequency_weighted_iou(cells),
        "classes": names,
        "n_classes": n_classes,
        "n_reference_classes": np.bincount(group[counts.actual > 0], minlength=groups),
        "reason": np.where(compared > 0, why, heads["reason"].to_numpy(dtype=object)),
    }
    return table_of_pieces([Piece(groups, columns)], column_types("agreement"))


def _names(
    rows: pd.DataFrame, group: np.ndarray, present: np.ndarray, groups: int
) -> tuple[np.ndarray, np.ndarray]:
    """Of each group the classes that are present, as one text, and how many they are."""
    words = rows["class"].to_numpy(dtype=object)[present].tolist()
    number = np.bincount(group[present], minlength=groups)
    stop = np.cumsum(number)
    spans = zip((stop - number).tolist(), stop.tolist(), strict=True)
    return np.array([", ".join(words[begin:end]) for begin, end in spans], dtype=object), number


def confusion_table(results: Iterable[SceneTallies], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """The confusion matrices as one long table: scene × region × reference class × predicted class.

    Only pairs that occur have a row: in a region that has any, a pair without one is a measured 0;
    one that has none was not compared, and the metric table says why. ``count`` is in elements with
    a valid pixel and a reference, their size in ``area_m2``, ``volume_mm3`` or ``area_px``.
    """
    batch = _SceneGroups.of(results)
    tally, known = batch.tally, {c.value: c.name for c in classes}
    kept = np.flatnonzero(overlap.is_compared(tally))
    order = kept[np.lexsort((tally.label[kept], tally.reference[kept], tally.region[kept]))]
    group = tally.region[order]
    columns = batch.head(group)
    for what, values in (("reference", tally.reference[order]), ("predicted", tally.label[order])):
        distinct, code = np.unique(values, return_inverse=True)
        columns[what] = text_of([known.get(v, str(v)) for v in distinct.tolist()], code)
        columns[f"{what}_value"] = values
    columns["count"] = tally.cover[order] / FULL
    columns |= {SIZE_COLUMNS[unit]: batch.sizes(group, tally.size[order], unit) for unit in batch.units}
    return table_of_pieces([Piece(len(order), columns)], column_types("confusion", batch.units))
