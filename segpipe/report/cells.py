"""Tables of the page: a data frame becomes cells with a text to read and a value to sort by."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from segpipe.report import units
from segpipe.report.record import ClassInfo

ROWS = 2000
"""Rows shown; browsers sort and search these at once. The rest is in the CSV."""


@dataclass(frozen=True)
class Column:
    """What a column is."""

    label: str
    kind: str
    """text, class, number, whole, ratio, percent, size or state."""
    meaning: str


COLUMNS = {
    "scene": Column("Scene", "text", "Name of the scene in this run."),
    "region": Column(
        "Region", "text",
        "Where the number is reported: a polygon of the region layer, a structure of the atlas, or "
        "the whole scene.",
    ),
    "class": Column("Class", "class", "Class of the model card, with its colour in the pictures."),
    "value": Column("Value", "whole", "The class's value in label files."),
    "count": Column(
        "Count", "number",
        "Elements (pixels or voxels) of the class in the region. A pixel cut by a polygon's edge "
        "counts by the fraction of it inside.",
    ),
    "area_m2": Column(
        "Area", "size",
        "On the ground: from the affine on a projected grid, on the ellipsoid, row by row, on "
        "geographic and Web Mercator grids. The CSV holds m².",
    ),
    "volume_mm3": Column(
        "Volume", "size",
        "Voxels times the determinant of the affine on the native grid. The CSV holds mm³.",
    ),
    "area_px": Column(
        "Area", "size", "In pixels, because the scene has no CRS and so no size on the ground."
    ),
    "share": Column("Share", "percent", "Part of the region's seen size that is this class."),
    "state": Column(
        "State", "state",
        "measured: a number, 0 when the class is absent. no_data: no valid pixel in the region. "
        "not_requested: not asked for. failed: the scene failed, so the number is unknown.",
    ),
    "seen": Column(
        "Seen", "percent",
        "Part of the region that has valid pixels: below 100 % the region is cut by the scene's "
        "border or by missing data, and its size is a lower bound.",
    ),
    "touches_edge": Column(
        "Touches edge", "state",
        "Elements of the class lie on the scene's border in this region: the structure may go on "
        "beyond, and its size is a lower bound.",
    ),
    "attempts": Column("Attempts", "whole", "How often the scene's hardest batch was tried; 1: at once."),
    "tp": Column("TP", "number", "True positives: elements of the class in both."),
    "fp": Column("FP", "number", "False positives: predicted, but another class in the reference."),
    "fn": Column("FN", "number", "False negatives: in the reference, but predicted otherwise."),
    "iou": Column(
        "IoU", "ratio",
        "Intersection over union, TP / (TP + FP + FN). Not defined (—) where the class is absent "
        "in both; then the reason says so and no mean counts it as 0 or 1.",
    ),
    "dice": Column(
        "Dice", "ratio", "2·TP / (2·TP + FP + FN). Not defined (—) where IoU is not."
    ),
    "precision": Column(
        "Precision", "ratio", "TP / (TP + FP). Not defined (—) where the class is not predicted."
    ),
    "recall": Column(
        "Recall", "ratio", "TP / (TP + FN). Not defined (—) where the reference lacks the class."
    ),
    "reason": Column("Reason", "text", "Why a ratio is not defined."),
    "metric": Column(
        "Metric",
        "text",
        "A mean of ratios, or (pooled) ratios of summed counts, where large regions weigh more.",
    ),
    "over": Column("Over", "text", "What is averaged or summed, from the inside out."),
    "n_defined": Column("Defined", "whole", "Ratios in the mean."),
    "n_missed": Column(
        "Missed", "whole", "Of these: in the reference, and none of it predicted (counted as 0)."
    ),
    "n_hallucinated": Column(
        "Hallucinated", "whole", "Of these: predicted, and none in the reference (counted as 0)."
    ),
    "n_undefined": Column(
        "Undefined", "whole", "Left out of the mean: absent in both, or nothing to compare."
    ),
    "n_failed": Column("Failed", "whole", "Scenes that failed and are left out."),
}  # fmt: skip
_SUMMARY_VALUE = Column("Value", "ratio", "The metric.")
_TONES = {"failed": "warn", "no_data": "warn", "yes": "yes", "no": "muted"}


@dataclass(frozen=True)
class Cell:
    """One cell as the template shows it."""

    text: str
    sort: str = ""
    """What the script sorts by, when it is not the text; empty for NaN (always last)."""
    color: str = ""
    tone: str = ""
    """``num``, ``warn``, ``muted`` or nothing."""


@dataclass(frozen=True)
class Head:
    """One column's header."""

    label: str
    unit: str
    numeric: bool
    meaning: str


@dataclass(frozen=True)
class Table:
    """A table ready to be shown."""

    id: str
    title: str
    file: str
    """The CSV that holds all of it."""
    heads: tuple[Head, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: int
    """Rows in the CSV."""


def page_table(
    id: str,
    title: str,
    file: str,
    frame: pd.DataFrame,
    classes: Sequence[ClassInfo],
) -> Table:
    """The first `ROWS` rows of a frame. Columns that hold nothing at all are left out."""
    names = [str(c) for c in frame.columns if not (c in units.SIZES and frame[c].isna().all())]
    shown = frame.head(ROWS)
    heads, columns = [], []
    for name in names:
        head, draw = _column(name, frame, {c.name: c for c in classes}, summary=id == "summary")
        heads.append(head)
        columns.append([draw(v) for v in shown[name].tolist()])
    rows = tuple(zip(*columns, strict=True)) if columns else ()
    return Table(id, title, file, tuple(heads), rows, len(frame))


def _column(
    name: str, frame: pd.DataFrame, classes: Mapping[str, ClassInfo], summary: bool
) -> tuple[Head, Callable[[Any], Cell]]:
    """The header, and what draws a value of it."""
    spec = COLUMNS.get(name, Column(name, "text", ""))
    if summary and name == "value":
        spec = _SUMMARY_VALUE
    if spec.kind == "size":
        unit = units.size_unit(name, frame[name].dropna().tolist())
        head = Head(spec.label, unit.symbol, True, spec.meaning)
        return head, lambda v: _numeric(v, lambda x: units.size(x, unit))
    if spec.kind == "class":
        return Head(spec.label, "", False, spec.meaning), lambda v: _class(v, classes)
    if spec.kind in _NUMBERS:
        head = Head(spec.label, "%" if spec.kind == "percent" else "", True, spec.meaning)
        form = _NUMBERS[spec.kind]
        return head, lambda v: _numeric(v, form)
    kind = _state if spec.kind == "state" else _plain
    return Head(spec.label, "", False, spec.meaning), kind


_NUMBERS: dict[str, Callable[[float], str]] = {
    "whole": lambda v: units.number(v, 0),
    "number": lambda v: units.number(v, 0 if v == int(v) else 1),
    "ratio": lambda v: units.number(v, 3),
    "percent": lambda v: units.percent(v).removesuffix(" %"),
}


def _numeric(value: Any, form: Callable[[float], str]) -> Cell:
    if _missing(value):
        return Cell("—", tone="num muted")
    try:
        as_float = float(value)
    except (TypeError, ValueError):
        return _plain(value)
    return Cell(form(as_float), repr(as_float), tone="num")


def _class(value: Any, classes: Mapping[str, ClassInfo]) -> Cell:
    name = "" if _missing(value) else str(value)
    known = classes.get(name)
    return Cell(name, color=known.color if known else "")


def _state(value: Any) -> Cell:
    text = "—" if _missing(value) else str(value)
    shown = {"True": "yes", "False": "no"}.get(text, text)
    return Cell(shown, tone=_TONES.get(shown, ""))


def _plain(value: Any) -> Cell:
    return Cell("" if _missing(value) else str(value))


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
