"""The changes from one run's tables to another's, as data frames.

Rows are matched by scene, region and class, by name. A row that one run lacks stays, with a state that
says so: a change is only ever told where both runs have measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from segpipe.metrics.overlap import ABSENT_IN_BOTH, Counts
from segpipe.regions.base import SCENE
from segpipe.tables.frames import FAILED, MEASURED, NO_DATA, NO_REFERENCE, SIZE_COLUMNS
from segpipe.tables.record import RunRecord, SceneRecord

KEY = ["scene", "region", "class"]
SIDES = ("before", "after")
BOTH = "both"
"""State of a row that both runs have measured; every other state says what is missing where."""
NO_SCENE, NO_REGION, NO_CLASS = "no_scene", "no_region", "no_class"
"""States of a side that has no such row: the run lacks the scene or the class, the scene the region."""
_COUNTS = ("tp", "fp", "fn")
_RATIOS = ("iou", "dice")
_WORDS = {
    FAILED: "the scene failed",
    NO_DATA: "no valid element in the region",
    NO_SCENE: "the run has no such scene",
    NO_REGION: "the scene has no such region",
    NO_CLASS: "the run has no such class",
}


@dataclass(frozen=True, eq=False)
class RunSide:
    """One of the two runs."""

    location: str
    """Folder or URL of the run."""
    record: RunRecord
    rows: pd.DataFrame
    """Regions and metrics side by side, by `KEY`."""

    @property
    def name(self) -> str:
        """Of the run's folder."""
        return self.location.rsplit("/", 1)[-1]

    @property
    def scenes(self) -> dict[str, SceneRecord]:
        return {scene.name: scene for scene in self.record.scenes}

    @property
    def failed(self) -> set[str]:
        return {scene.name for scene in self.record.failed}

    @property
    def open_classes(self) -> bool:
        """Whether the classes are the values found, so that one that is not found is a measured 0."""
        return self.record.model is None and not self.record.job.get("classes")


def side_by_side(regions: pd.DataFrame, metrics: pd.DataFrame | None) -> pd.DataFrame:
    """Sizes and overlap by `KEY`, in the order of the tables; ``why`` says why there is no IoU."""
    sizes = [c for c in SIZE_COLUMNS.values() if c in regions]
    left = _keyed(regions)[["count", *sizes, "seen", "state"]]
    if metrics is None:
        empty = dict.fromkeys((*_COUNTS, *_RATIOS), np.nan)
        return left.assign(**empty, why=NO_REFERENCE)
    right = _keyed(metrics)
    absent = right["tp"].notna() & (right[[*_COUNTS]].sum(axis=1) == 0)
    right["why"] = right["reason"].mask(absent, ABSENT_IN_BOTH)
    index = left.index.union(right.index, sort=False)  # a value that only the reference has
    rows = left.reindex(index).join(right.reindex(index)[[*_COUNTS, *_RATIOS, "why"]])
    rows["state"] = rows["state"].fillna(right["state"])
    return rows


def _keyed(table: pd.DataFrame) -> pd.DataFrame:
    """By `KEY`; two classes of one name are told apart by their values."""
    shared = table.groupby("class")["value"].transform("nunique") > 1
    names = table["class"].mask(shared, table["class"] + " [" + table["value"].astype("str") + "]")
    return table.assign(**{"class": names}).set_index(KEY)


def compare_tables(before: RunSide, after: RunSide) -> pd.DataFrame:
    """A row per scene × region × class of either run, in the order of the first.

    Columns: ``state``, `BOTH` or what is missing where; ``state_before``, ``state_after``; of count,
    size, IoU and Dice each ``*_before``, ``*_after``, and ``*_change``, after − before;
    ``relative_change`` of the size, change / before; ``seen``, tp, fp and fn of both sides;
    ``reason``, why a change is empty.
    """
    rows = [_told(side, other) for side, other in ((before, after), (after, before))]
    index = rows[0].index.union(rows[1].index, sort=False)
    first, second = (_on(index, side, own) for side, own in zip((before, after), rows, strict=True))
    table = pd.DataFrame(index=index)
    table["state"] = _states(first["state"], second["state"])
    table["state_before"], table["state_after"] = first["state"], second["state"]
    sizes = [c for c in SIZE_COLUMNS.values() if c in first or c in second]
    for name in ("count", *sizes, "relative_change", "seen", *_COUNTS, *_RATIOS):
        if name == "relative_change":
            table[name] = _relative(table, sizes)
            continue
        for side, values in zip(SIDES, (first, second), strict=True):
            table[f"{name}_{side}"] = values.get(name, np.nan)
        if name in ("count", *sizes, *_RATIOS):
            table[f"{name}_change"] = table[f"{name}_after"] - table[f"{name}_before"]
    table["reason"] = _reasons(table, sizes, first["why"], second["why"])
    return table.reset_index()


def _told(side: RunSide, other: RunSide) -> pd.DataFrame:
    """The rows, without those of failed scenes whose regions the other run knows better."""
    known = set(other.scenes) - other.failed
    scene = side.rows.index.get_level_values("scene")
    return side.rows[~scene.isin(side.failed & known)]


def _on(index: pd.Index[Any], side: RunSide, rows: pd.DataFrame) -> pd.DataFrame:
    """The side's rows on the index of both, with a state also where it has none."""
    found = rows.reindex(index)
    scene, region = index.get_level_values("scene"), _regions(index)
    here = region.isin(_regions(rows.index))
    cases = [scene.isin(side.failed), ~scene.isin(list(side.scenes)), ~here]
    gone = pd.Series(np.select(cases, [FAILED, NO_SCENE, NO_REGION], NO_CLASS), index, dtype="str")
    found["state"] = found["state"].fillna(gone)
    if side.open_classes:
        near = rows.groupby(level=KEY[:2], sort=False).first().reindex(region).set_axis(index)
        empty = found["count"].isna() & (near["state"] == MEASURED)
        for name in ("count", *(c for c in SIZE_COLUMNS.values() if c in rows)):
            found[name] = found[name].mask(empty & near[name].notna(), 0.0)
        found["seen"] = found["seen"].mask(empty, near["seen"])
        found["state"] = found["state"].mask(empty, MEASURED)
    return found


def _regions(index: pd.Index[Any]) -> pd.Index[Any]:
    """Scene and region of each row."""
    assert isinstance(index, pd.MultiIndex)
    return index.droplevel("class")


def _states(before: pd.Series, after: pd.Series) -> pd.Series:
    """One state of the two."""
    absent = (NO_SCENE, NO_REGION, NO_CLASS)
    cases = {
        "failed_both": (before == FAILED) & (after == FAILED),
        "failed_before": before == FAILED,
        "failed_after": after == FAILED,
        "only_before": after.isin(absent),
        "only_after": before.isin(absent),
        BOTH: (before == MEASURED) & (after == MEASURED),
    }
    return pd.Series(np.select(list(cases.values()), list(cases), NO_DATA), before.index, dtype="str")


def _relative(table: pd.DataFrame, sizes: Sequence[str]) -> pd.Series:
    """Change of the size that both sides have / before; NaN where before is 0."""
    result = pd.Series(np.nan, table.index)
    for size in sizes:
        before = table[f"{size}_before"]
        result = result.fillna(table[f"{size}_change"] / before.where(before > 0))
    return result


def _reasons(table: pd.DataFrame, sizes: Sequence[str], *why: pd.Series) -> pd.Series:
    """Why a change is empty, in words."""
    both = table["state"] == BOTH
    change = table[[f"{size}_change" for size in sizes]].notna().any(axis=1)
    parts: list[tuple[pd.Series, Any]] = []
    for side in SIDES:
        words = f"{side}: " + table[f"state_{side}"].map(_WORDS)
        parts.append((~both & (table[f"state_{side}"] != MEASURED), words))
    no_size = table[["count_before", "count_after"]].isna().any(axis=1)
    parts.append((both & no_size, "the value is no class of the model"))
    parts.append((both & ~change & ~no_size, "sizes have no common unit"))
    parts.append((both & change & table["relative_change"].isna(), "relative change: 0 before"))
    for side, text in zip(SIDES, why, strict=True):
        parts.append((both & table[f"iou_{side}"].isna(), f"IoU {side}: " + text.fillna(NO_REFERENCE)))
    result = pd.Series("", table.index, dtype="str")
    for where, words in parts:
        result = result.mask(where, result + np.where(result == "", "", "; ") + words)
    return result


def class_totals(rows: pd.DataFrame) -> pd.DataFrame:
    """`Comparison.totals` of the rows: sums over the whole scenes that both runs have measured."""
    whole = rows[(rows["region"] == SCENE) & (rows["state"] == BOTH)]
    counts = [f"{name}_{side}" for side in SIDES for name in _COUNTS]
    tables = []
    for size in (c for c in SIZE_COLUMNS.values() if f"{c}_change" in rows):
        kept = whole[whole[f"{size}_change"].notna()]
        if kept.empty:
            continue
        groups = kept.groupby("class", sort=False)
        total = groups.agg(
            scenes=("scene", "nunique"), before=(f"{size}_before", "sum"), after=(f"{size}_after", "sum")
        )
        total["change"] = total["after"] - total["before"]
        total["relative"] = total["change"] / total["before"].where(total["before"] > 0)
        pooled = kept.dropna(subset=counts).groupby("class")[counts].sum().reindex(total.index)
        for side in SIDES:
            own = Counts(*(pooled[f"{name}_{side}"].to_numpy() for name in _COUNTS))
            total[f"iou_{side}"], total[f"dice_{side}"] = own.iou, own.dice
        for name in _RATIOS:
            total[f"{name}_change"] = total[f"{name}_after"] - total[f"{name}_before"]
        tables.append(total.reset_index().assign(size=size))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["size", "class"])
