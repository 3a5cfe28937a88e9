"""Tables of the page: a data frame becomes cells to read and sort, and numbers are explained by formulas."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache
from typing import Any

import pandas as pd

from segpipe.tables import units
from segpipe.tables.frames import SIZE_COLUMNS, Column, describe_column, dictionary
from segpipe.tables.record import ClassInfo


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One number, explained."""

    id: str
    """Anchor on the page: ``def-<id>``."""
    name: str
    formula: str = ""
    """In plain text; empty where there is none."""
    meaning: str
    undefined: str = ""
    """When it is not defined, and what is shown then."""
    metrics: str = ""
    """Pattern of the summary's ``metric`` that it explains, matched at any place."""

    @property
    def text(self) -> str:
        """All of it in one line."""
        return " ".join(filter(None, (f"{self.formula}.", self.meaning, self.undefined)))


@cache
def definitions() -> dict[str, Definition]:
    """Return all definitions by id, in the order of the page."""
    return {id: Definition(id=id, **entry) for id, entry in dictionary()["definitions"].items()}


def of_metric(name: str) -> Definition | None:
    """Return what explains a metric of the summary."""
    return next((d for d in definitions().values() if d.metrics and re.search(d.metrics, name)), None)


def needed(ids: Collection[str], metrics: Collection[str]) -> list[Definition]:
    """Return the definitions with these ids or of these metrics of the summary, in their order."""
    return [
        item
        for item in definitions().values()
        if item.id in ids or (item.metrics and any(re.search(item.metrics, m) for m in metrics))
    ]


ROWS = 2000
"""Rows shown; browsers sort and search these at once. The rest is in the CSV."""
_TONES = {"failed": "warn", "no_data": "warn", "yes": "yes", "no": "muted"}


@dataclass(frozen=True)
class PageCell:
    """One cell as the template shows it."""

    text: str
    sort: str = ""
    """What the script sorts by, when it is not the text; empty for NaN (always last)."""
    color: str = ""
    tone: str = ""
    """``num``, ``warn``, ``muted`` or nothing."""


MISSING = PageCell("—", tone="num muted")
"""A number that is not there."""


@dataclass(frozen=True)
class Head:
    """One column's header."""

    label: str
    _: KW_ONLY
    unit: str = ""
    numeric: bool = False
    meaning: str = ""
    definition: str = ""
    """Id of what explains it at length; empty: nothing does."""


@dataclass(frozen=True, kw_only=True)
class PageTable:
    """A table ready to be shown."""

    id: str
    title: str
    file: str
    """The CSV that holds all of it, from the run's folder."""
    heads: tuple[Head, ...]
    rows: tuple[tuple[PageCell, ...], ...]
    total: int
    """Rows there are; those left out are in the CSV."""
    note: str = ""
    """How the rows are ordered, where not as in the CSV."""


def page_table(
    id: str, title: str, frame: pd.DataFrame, classes: Sequence[ClassInfo], limit: int = ROWS, note: str = ""
) -> PageTable:
    """Return the first ``limit`` rows of a frame. Columns of sizes that hold nothing at all are left out."""
    shown, colors = frame.head(limit), {c.name: c for c in classes}
    heads, columns = [], []
    for column in (_describe(id, str(name), frame) for name in frame.columns):
        if column.kind == "size" and frame[column.name].isna().all():
            continue
        head, draw = _column(column, frame, colors)
        heads.append(head)
        columns.append([draw(v) for v in shown[column.name].tolist()])
    rows = tuple(zip(*columns, strict=True)) if columns else ()
    total = len(frame)
    return PageTable(
        id=id, title=title, file=f"{id}.csv", heads=tuple(heads), rows=rows, total=total, note=note
    )


def _describe(table: str, name: str, frame: pd.DataFrame) -> Column:
    """Return the dictionary's entry; a column without one is shown by its own name and type."""
    known = describe_column(name, table)
    if known is not None:
        return known
    numeric = pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name])
    label, kind = name.replace("_", " "), "real" if numeric else "text"
    return Column(name=name, label=label, kind=kind, dtype=str(frame[name].dtype))


def _column(
    column: Column, frame: pd.DataFrame, classes: Mapping[str, ClassInfo]
) -> tuple[Head, Callable[[Any], PageCell]]:
    """Return the header, and what draws a value of the column."""
    meaning = column.meaning or (definitions()[column.definition].text if column.definition else "")

    head = Head(column.label, meaning=meaning, definition=column.definition)
    if column.kind == "size":
        unit = units.size_unit(SIZE_COLUMNS[column.unit], frame[column.name].dropna().tolist())
        head = replace(head, unit=unit.symbol, numeric=True)
        return head, lambda v: number_cell(v, lambda x: units.size(x, unit))
    if column.kind in _NUMBERS:
        form = _NUMBERS[column.kind]
        head = replace(head, unit="%" if column.kind == "percent" else "", numeric=True)
        return head, lambda v: number_cell(v, form)
    if column.kind == "class":
        return head, lambda v: _class(v, classes)
    return head, _state if column.kind == "state" else _plain


_NUMBERS: dict[str, Callable[[float], str]] = {
    "whole": lambda v: units.number(v, 0),
    "number": lambda v: units.number(v, 0 if v == int(v) else 1),
    "ratio": lambda v: units.number(v, 3),
    "real": lambda v: units.number(v, units.decimals(v)),
    "percent": lambda v: units.percent(v).removesuffix(" %"),
}


def number_cell(value: Any, form: Callable[[float], str]) -> PageCell:
    """Return the cell of a number, sorted by its value; of one that is missing a dash."""
    if _missing(value):
        return MISSING
    try:
        as_float = float(value)
    except (TypeError, ValueError):
        return _plain(value)
    return PageCell(form(as_float), repr(as_float), tone="num") if math.isfinite(as_float) else MISSING


def _class(value: Any, classes: Mapping[str, ClassInfo]) -> PageCell:
    name = "" if _missing(value) else str(value)
    known = classes.get(name)
    return PageCell(name, color=known.color if known else "")


def _state(value: Any) -> PageCell:
    text = "—" if _missing(value) else str(value)
    shown = {"True": "yes", "False": "no"}.get(text, text)
    return PageCell(shown, tone=_TONES.get(shown, ""))


def _plain(value: Any) -> PageCell:
    return PageCell("" if _missing(value) else str(value))


def _missing(value: Any) -> bool:
    return value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value))
