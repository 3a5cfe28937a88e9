"""Sizes and pooled overlap per class, summed over the rows of a table: the page's bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from segpipe.regions.base import SCENE
from segpipe.tables import units
from segpipe.tables.record import ClassInfo

LISTED = 12
"""Classes shown at once; with more, the largest come first and the rest is folded away."""


@dataclass(frozen=True)
class Bar:
    """One class: its size, its share, and how well it was found."""

    name: str
    color: str
    background: bool
    size: str
    """In the unit of `Bars`; ``—`` where nothing was measured."""
    share: str
    length: float
    """Of the bar, 0 to 100; the largest class that is not background has 100."""
    iou: str
    dice: str


@dataclass(frozen=True)
class Bars:
    """All classes of a scene or of the run."""

    quantity: str
    """``area`` or ``volume``."""
    unit: str
    bars: tuple[Bar, ...]
    compared: bool
    """Whether IoU and Dice are given: pooled, from summed tp, fp and fn."""
    scenes: int
    """Scenes summed over."""


def class_bars(
    regions: pd.DataFrame, metrics: pd.DataFrame | None, classes: Sequence[ClassInfo]
) -> tuple[Bars, ...]:
    """One `Bars` per kind of size in the rows (a run may hold rasters and volumes)."""
    result = []
    for column in units.SIZES:
        if column in regions and regions[column].notna().any():
            rows = regions[regions[column].notna() & (regions["region"] == SCENE)]
            result.append(_bars(column, rows, metrics, classes))
    return tuple(result)


def _bars(
    column: str, rows: pd.DataFrame, metrics: pd.DataFrame | None, classes: Sequence[ClassInfo]
) -> Bars:
    sums = {str(k): float(v) for k, v in rows.groupby("class", sort=False)[column].sum().items()}
    everything = math.fsum(sums.values())
    front = [sums.get(c.name, 0.0) for c in classes if not c.background]
    largest = max(front, default=0.0)
    unit = units.size_unit(column, front)
    pooled = _pooled(metrics, rows)
    bars = []
    strangers = [ClassInfo(-1, n, "#808080") for n in sums if n not in {c.name for c in classes}]
    for item in (*classes, *strangers):  # a label that is no class's is shown, never dropped
        value = sums.get(item.name)
        iou, dice = pooled.get(item.name, (math.nan, math.nan))
        length = 100 * (value or 0.0) / largest if largest else 0.0
        bars.append(
            Bar(
                item.name,
                item.color,
                item.background,
                "—" if value is None else units.size(value, unit),
                "—" if value is None or not everything else units.percent(value / everything),
                round(min(100.0, length), 2),
                units.number(iou, 3),
                units.number(dice, 3),
            )
        )
    if len(bars) > LISTED:
        bars.sort(key=lambda b: (b.background, -sums.get(b.name, 0.0)))
    count = rows["scene"].nunique()
    return Bars(units.SIZES[column], unit.symbol, tuple(bars), bool(pooled), count)


def _pooled(metrics: pd.DataFrame | None, rows: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """IoU and Dice per class from summed counts, over the scenes of ``rows``."""
    if metrics is None or metrics.empty or not {"tp", "fp", "fn"} <= set(metrics.columns):
        return {}
    wanted = metrics["scene"].isin(rows["scene"].unique()) & (metrics["region"] == SCENE)
    kept = metrics[wanted].dropna(subset=["tp", "fp", "fn"])
    sums = kept.groupby("class", sort=False)[["tp", "fp", "fn"]].sum()
    result = {}
    for name, tp, fp, fn in sums.itertuples():
        union = tp + fp + fn
        result[str(name)] = (
            tp / union if union else math.nan,
            2 * tp / (2 * tp + fp + fn) if union else math.nan,
        )
    return result
