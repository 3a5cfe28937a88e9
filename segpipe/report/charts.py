"""The page's bars and matrix: sizes and pooled overlap per class, and the confusion of classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from segpipe.metrics.overlap import Counts
from segpipe.regions.base import SCENE
from segpipe.tables import units
from segpipe.tables.record import ClassInfo

LISTED = 12
"""Classes with a bar shown at once; with more, the largest come first and the rest is folded away."""
MATRIX_CLASSES = 16
"""Classes with a row in the matrix; with more, those with most elements, and one row for the rest."""
OTHERS = "all others"
DARK = 69
"""Percentage from which a cell is so dark that its text is white, not black (contrast 4.5 at least)."""


@dataclass(frozen=True, kw_only=True)
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


@dataclass(frozen=True, kw_only=True)
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
    total = math.fsum(sums.values())
    front = [sums.get(c.name, 0.0) for c in classes if not c.background]
    largest, unit = max(front, default=0.0), units.size_unit(column, front)
    pooled = _pooled(metrics, rows)
    strangers = [ClassInfo(-1, n, "#808080") for n in sums if n not in {c.name for c in classes}]
    bars = []
    for item in (*classes, *strangers):  # a label that is no class's is shown, never dropped
        value = sums.get(item.name)
        iou, dice = (units.number(v, 3) for v in pooled.get(item.name, (math.nan, math.nan)))
        length = 100 * (value or 0.0) / largest if largest else 0.0
        bars.append(
            Bar(
                name=item.name, color=item.color, background=item.background,
                size="—" if value is None else units.size(value, unit),
                share="—" if value is None or not total else units.percent(value / total),
                length=round(min(100.0, length), 2), iou=iou, dice=dice,
            )
        )  # fmt: skip
    if len(bars) > LISTED:
        bars.sort(key=lambda b: (b.background, -sums.get(b.name, 0.0)))
    return Bars(
        quantity=units.SIZES[column], unit=unit.symbol, bars=tuple(bars), compared=bool(pooled),
        scenes=rows["scene"].nunique(),
    )  # fmt: skip


def _pooled(metrics: pd.DataFrame | None, rows: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Return IoU and Dice per class from summed counts, over the scenes of ``rows``."""
    columns = ["tp", "fp", "fn"]
    if metrics is None or metrics.empty or not {*columns} <= set(metrics.columns):
        return {}
    wanted = metrics["scene"].isin(rows["scene"].unique()) & (metrics["region"] == SCENE)
    sums = metrics[wanted].dropna(subset=columns).groupby("class", sort=False)[columns].sum()
    counts = Counts(*(sums[name].to_numpy() for name in columns))
    return dict(zip(map(str, sums.index), zip(counts.iou, counts.dice, strict=True), strict=True))


# ------------------------------------------------------------------ confusion


@dataclass(frozen=True, kw_only=True)
class MatrixCell:
    """One cell: how many of the row's elements went to the column."""

    text: str
    """Percentage of the row, or ``—``."""
    count: str
    """Elements."""
    strength: int
    """The percentage as a whole number, for the shade."""
    dark: bool
    """Whether that shade needs white text."""
    right: bool
    """On the diagonal."""


@dataclass(frozen=True)
class MatrixRow:
    """A class of the reference."""

    name: str
    color: str
    count: str
    """Elements in the reference."""
    cells: tuple[MatrixCell, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows are the reference, columns the prediction, in the same order."""

    rows: tuple[MatrixRow, ...]
    scenes: int
    """Scenes summed over."""
    folded: int
    """Classes that are in the last row and column together."""


def confusion_matrix(confusion: pd.DataFrame | None, classes: Sequence[ClassInfo]) -> Matrix | None:
    """The matrix of the scenes in a confusion table; None where nothing was compared.

    Args:
        confusion: scene × region × reference × predicted, with ``count``.
        classes: in the order of rows; other values follow.
    """
    whole = None if confusion is None else confusion[confusion["region"] == SCENE]
    if whole is None or whole.empty:
        return None
    present = set(whole["reference"]) | set(whole["predicted"])
    names = [c.name for c in classes if c.name in present]
    names += sorted(present - set(names))
    sums = whole.pivot_table("count", "reference", "predicted", aggfunc="sum", fill_value=0.0)
    counts = sums.reindex(index=names, columns=names, fill_value=0.0).to_numpy()
    folded = 0
    if len(names) > MATRIX_CLASSES:
        order = np.argsort(-(counts.sum(axis=0) + counts.sum(axis=1)), kind="stable")
        kept = np.sort(order[: MATRIX_CLASSES - 1])
        folded = len(names) - len(kept)
        into = np.full(len(names), len(kept))
        into[kept] = np.arange(len(kept))
        smaller = np.zeros((MATRIX_CLASSES, MATRIX_CLASSES))
        np.add.at(smaller, (into[:, None], into[None, :]), counts)
        names, counts = [*(names[i] for i in kept), OTHERS], smaller
    colors = {c.name: c.color for c in classes}
    rows = tuple(_row(name, colors.get(name, ""), counts[i], i) for i, name in enumerate(names))
    return Matrix(rows, int(whole["scene"].nunique()), folded)


def _row(name: str, color: str, counts: np.ndarray, own: int) -> MatrixRow:
    total = float(counts.sum())
    cells = []
    for column, count in enumerate(counts.tolist()):
        share = count / total if total else math.nan
        text, strength = units.percent(share).removesuffix(" %"), round(100 * share) if total else 0
        cells.append(
            MatrixCell(
                text=text, count=units.number(count, 0), strength=strength, dark=strength >= DARK,
                right=column == own,
            )
        )  # fmt: skip
    return MatrixRow(name, color, units.number(total, 0), tuple(cells))
