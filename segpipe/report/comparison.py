"""Two runs compared: as data, as a page, as Markdown and in a few lines of text.

The page is one file that loads nothing (`segpipe.report.templates`); the same input gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from segpipe.report.cells import ROWS, Head, PageCell, PageTable, number_cell
from segpipe.report.markdown import markdown_table, plain_text
from segpipe.report.run_changes import BOTH
from segpipe.report.templates import render
from segpipe.tables import units
from segpipe.tables.record import RunRecord

CLASSES = 30
"""Classes in the lines for a terminal; the page has all."""
CHANGES = 30
"""Rows of each table, the biggest changes first; ``compare.csv`` has all."""
WARNINGS = 20
DIFFERENCES = 20
_RATIOS = {"iou": "IoU", "dice": "Dice"}


@dataclass(frozen=True)
class Difference:
    """One thing that is not the same in the two runs."""

    key: str
    """Where it stands: ``model.fingerprint``, ``job.tiling.blend``, ``version of torch``."""
    before: str
    after: str


@dataclass(frozen=True, eq=False, kw_only=True)
class Comparison:
    """What changed from one run to another."""

    before: RunRecord
    after: RunRecord
    places: tuple[str, str]
    """Folders or URLs of the two runs."""
    rows: pd.DataFrame
    """A row per scene × region × class of either run: the table of ``compare.csv``."""
    totals: pd.DataFrame
    """By kind of size and class, over the whole scenes that both runs have measured: ``size`` (name
    of the size's column), ``class``, ``scenes``, ``before``, ``after``, ``change``, ``relative``, and
    pooled ``iou_before`` … ``dice_change``."""
    differences: tuple[Difference, ...]
    warnings: tuple[str, ...]
    """Why this is not like with like, a line each; empty: nothing was found."""
    notes: tuple[str, ...]
    location: str
    """Folder or URL of the files that tell it."""

    @property
    def page(self) -> str:
        """Where the page is."""
        return f"{self.location}/compare.html"

    @property
    def compared(self) -> pd.DataFrame:
        """The rows that both runs have measured."""
        return self.rows[self.rows["state"] == BOTH]

    @property
    def changed(self) -> pd.DataFrame:
        """Of those: where a size, IoU or Dice differs."""
        rows = self.compared
        changes = rows.filter(regex="_change$")
        return rows[(changes.notna() & (changes != 0)).any(axis=1)]

    @property
    def sizes(self) -> list[str]:
        """Columns of size that either run has."""
        return [c for c in units.SIZES if f"{c}_change" in self.rows]


# ------------------------------------------------------------------ text


def headline(found: Comparison) -> list[str]:
    """The comparison in a few lines of plain text, for a terminal; the last one is the page's place."""
    lines = [f"{found.before.run_id} → {found.after.run_id}: {_counts(found)}"]
    for size in found.sizes:
        totals = found.totals[found.totals["size"] == size]
        unit = unit_of(size, totals)
        for row in totals.head(CLASSES).to_dict("records"):
            before, after = (units.size(row[side], unit) for side in ("before", "after"))
            line = f"  {row['class']:<16} {before:>10} → {after:>10} {unit.symbol}"
            line += (
                f"  {signed(row['change'] * unit.factor, unit.decimals):>9}  {percent(row['relative']):>8}"
            )
            for ratio, label in _RATIOS.items():
                if math.isfinite(row[f"{ratio}_change"]):
                    sides = " → ".join(units.number(row[f"{ratio}_{s}"], 3) for s in ("before", "after"))
                    line += f"  {label} {sides} ({signed(row[f'{ratio}_change'], 3)})"
            lines.append(line)
        if len(totals) > CLASSES:
            lines.append(f"  and {len(totals) - CLASSES} more classes")
    return [*lines, f"comparison: {found.page}"]


def _counts(found: Comparison) -> str:
    compared = found.compared
    scenes, rows = compared["scene"].nunique(), len(compared)
    text = (
        f"{scenes:,} {'scene' if scenes == 1 else 'scenes'}, "
        f"{rows:,} {'row' if rows == 1 else 'rows'} compared, {len(found.changed):,} changed"
    )
    left = len(found.rows) - rows
    return text + (f", {left:,} not comparable" if left else "")


def unit_of(size: str, table: pd.DataFrame, before: str = "before", after: str = "after") -> units.Unit:
    """One unit for both sides, so that they can be compared at a glance."""
    return units.size_unit(size, [*table[before].dropna(), *table[after].dropna()])


def signed(value: float, places: int) -> str:
    """A change with its sign; one that would be rounded to nothing keeps two digits."""
    if not math.isfinite(value):
        return "—"
    if value == 0:
        return "0"
    text = f"{value:+,.{places}f}"
    return text if text.strip("+-0.,") else f"{value:+.2g}"


def percent(value: float) -> str:
    """A relative change with its sign."""
    return f"{signed(100 * value, 1)} %" if math.isfinite(value) else "—"


# ------------------------------------------------------------------ Markdown


def compare_markdown(found: Comparison) -> str:
    """Headline, why it may not be like with like, biggest changes, what was set otherwise, the page's place.

    Args:
        found: the comparison; its ``page`` is shown as a link where it is a web address, else as text.
    """
    first, *_ = headline(found)
    lines = [f"# {plain_text(found.before.job_name)}: what changed", "", f"**{plain_text(first)}**", ""]
    lines += [f"- ⚠ {plain_text(warning)}" for warning in found.warnings[:WARNINGS]]
    if len(found.warnings) > WARNINGS:
        lines.append(f"- and {len(found.warnings) - WARNINGS} more warnings, listed in the page")
    lines += [""] if found.warnings else []
    for size in found.sizes:
        lines += _total_lines(found, size) + _change_lines(found, size)
    rows = [
        [plain_text(d.key), plain_text(d.before), plain_text(d.after)]
        for d in found.differences[:DIFFERENCES]
    ]
    if rows:
        lines += ["## Set otherwise", "", *markdown_table(["Key", "Before", "After"], rows, (0, 1, 2))]
    lines += [f"- {plain_text(note)}" for note in found.notes]
    return "\n".join([*lines, "", f"Page: {_link(found.page)}", ""])


def _total_lines(found: Comparison, size: str) -> list[str]:
    """The classes over the whole scenes of both runs."""
    totals = found.totals[found.totals["size"] == size]
    unit = unit_of(size, totals)
    rows = [
        [
            plain_text(row["class"]),
            *(units.size(row[side], unit) for side in ("before", "after")),
            signed(row["change"] * unit.factor, unit.decimals),
            percent(row["relative"]),
            *(units.number(row[f"iou_{side}"], 3) for side in ("before", "after")),
        ]
        for row in totals.head(CHANGES).to_dict("records")
    ]
    heads = ["Class", f"Before ({unit.symbol})", f"After ({unit.symbol})", "Change", "Relative"]
    heads += ["IoU before", "IoU after"]
    if totals[["iou_before", "iou_after"]].isna().all(axis=None):
        heads, rows = heads[:-2], [row[:-2] for row in rows]
    return [f"## {units.SIZES[size].capitalize()} by class", "", *markdown_table(heads, rows)] if rows else []


def _change_lines(found: Comparison, size: str) -> list[str]:
    """The scenes' regions that changed most; nothing where none did."""
    changed = found.changed
    change = changed[f"{size}_change"]
    rows = changed[change.notna() & (change != 0)]
    if rows.empty:
        return []
    order = rows[f"{size}_change"].abs().sort_values(ascending=False, kind="stable").index
    unit = unit_of(size, rows, f"{size}_before", f"{size}_after")
    cells = [
        [
            *(plain_text(row[name]) for name in ("scene", "region", "class")),
            *(units.size(row[f"{size}_{side}"], unit) for side in ("before", "after")),
            signed(row[f"{size}_change"] * unit.factor, unit.decimals),
            percent(row["relative_change"]),
            signed(row["iou_change"], 3) if math.isfinite(row["iou_change"]) else "—",
        ]
        for row in rows.loc[order].head(CHANGES).to_dict("records")
    ]
    heads = ["Scene", "Region", "Class", f"Before ({unit.symbol})", f"After ({unit.symbol})"]
    heads += [f"Change ({unit.symbol})", "Relative", "IoU change"]
    lines = [
        f"## {units.SIZES[size].capitalize()} that changed most",
        "",
        *markdown_table(heads, cells, (0, 1, 2)),
    ]
    more = len(rows) - len(cells)
    return [*lines, f"and {more:,} more rows in compare.csv", ""] if more else lines


def _link(page: str) -> str:
    """A link where a browser can follow it; a bucket or folder is shown as text."""
    return f"[{plain_text(page)}]({page})" if page.startswith(("http://", "https://")) else f"`{page}`"


# ------------------------------------------------------------------ page


@dataclass(frozen=True, kw_only=True)
class _Totals:
    """The classes' totals of one kind of size."""

    quantity: str
    unit: str
    compared: bool
    """Whether IoU and Dice are given."""
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]
    """Class, its colour, and the cells."""
    scenes: int


def render_comparison(found: Comparison) -> str:
    """The text of ``compare.html``."""
    legend = [c for record in (found.before, found.after) for c in record.legend]
    colors = {c.name: c.color for c in legend}
    compared = found.compared
    tables = [_changes(found, size, compared, colors) for size in found.sizes]
    return render(
        "comparison.html",
        found=found,
        counts=_counts(found),
        left=len(found.rows) - len(compared),
        totals=[_totals(found, size, colors) for size in found.sizes],
        tables=[t for t in (*tables, _not_compared(found, colors)) if t.rows],
    )


def _totals(found: Comparison, size: str, colors: Mapping[str, str]) -> _Totals:
    table = found.totals[found.totals["size"] == size]
    unit = unit_of(size, table)
    overlap = [r for r in _RATIOS if table[f"{r}_change"].notna().any()]
    rows = []
    for row in table.to_dict("records"):
        cells = [units.size(row["before"], unit), units.size(row["after"], unit)]
        cells += [signed(row["change"] * unit.factor, unit.decimals), percent(row["relative"])]
        for ratio in overlap:
            cells += [units.number(row[f"{ratio}_{side}"], 3) for side in ("before", "after")]
            cells.append(signed(row[f"{ratio}_change"], 3))
        rows.append((row["class"], colors.get(row["class"], ""), tuple(cells)))
    return _Totals(
        quantity=units.SIZES[size], unit=unit.symbol, compared=bool(overlap), rows=tuple(rows),
        scenes=int(table["scenes"].max()),
    )  # fmt: skip


def _changes(found: Comparison, size: str, compared: pd.DataFrame, colors: Mapping[str, str]) -> PageTable:
    """The rows of one kind of size, biggest change first."""
    rows = compared[compared[f"{size}_change"].notna()]
    order = rows[f"{size}_change"].abs().sort_values(ascending=False, kind="stable").index
    unit = unit_of(size, rows, f"{size}_before", f"{size}_after")
    quantity = units.SIZES[size].capitalize()
    columns = _names()
    for side, meaning in (("before", "In the first run."), ("after", "In the second run.")):
        head = Head(f"{quantity} {side}", unit=unit.symbol, numeric=True, meaning=meaning)
        columns.append((f"{size}_{side}", head, lambda v: units.size(v, unit)))
    head = Head(
        "Change",
        unit=unit.symbol,
        numeric=True,
        meaning="After − before. The rows are in the order of its magnitude.",
    )
    columns.append((f"{size}_change", head, lambda v: signed(v * unit.factor, unit.decimals)))
    head = Head(
        "Relative", unit="%", numeric=True, meaning="Change / before; not defined (—) where before is 0."
    )
    columns.append(("relative_change", head, lambda v: signed(100 * v, 1)))
    columns += _overlap_columns(rows)
    return _table(f"changes-{size}", f"{quantity} by region", rows.loc[order], columns, colors)


Spec = tuple[str, Head, Callable[[Any], str]]
"""A column of the table, its header, and what writes a number of it."""


def _names() -> list[Spec]:
    return [
        ("scene", Head("Scene", meaning="Name of the scene in both runs."), str),
        ("region", Head("Region", meaning="Polygon, structure of an atlas, or the whole scene."), str),
        ("class", Head("Class", meaning="Classes of the two runs are matched by their names."), str),
    ]


def _overlap_columns(rows: pd.DataFrame) -> list[Spec]:
    columns: list[Spec] = []
    for ratio, label in _RATIOS.items():
        if rows[[f"{ratio}_before", f"{ratio}_after"]].isna().all(axis=None):
            continue
        for side in ("before", "after"):
            head = Head(f"{label} {side}", numeric=True, meaning=f"{label} with the reference of that run.")
            columns.append((f"{ratio}_{side}", head, lambda v: units.number(v, 3)))
        head = Head(
            f"{label} change",
            numeric=True,
            meaning="After − before; not defined (—) where one of them is not.",
        )
        columns.append((f"{ratio}_change", head, lambda v: signed(v, 3)))
    return columns


def _not_compared(found: Comparison, colors: Mapping[str, str]) -> PageTable:
    """The rows of which a run lacks its side, and those whose sizes have no common unit."""
    lacking = found.rows["state"] != BOTH
    without = found.rows[[f"{size}_change" for size in found.sizes]].isna().all(axis=1)
    columns = _names()
    for name, label, meaning in (
        ("state", "State", "What is missing on which side."),
        ("reason", "Reason", "Why there is no change to tell."),
    ):
        columns.append((name, Head(label, meaning=meaning), str))
    return _table("not-comparable", "Not comparable", found.rows[lacking | without], columns, colors)


def _table(
    id: str, title: str, rows: pd.DataFrame, columns: Sequence[Spec], colors: Mapping[str, str]
) -> PageTable:
    shown = rows.head(ROWS)
    cells = [
        [_cell(value, head, form, colors if name == "class" else {}) for value in shown[name].tolist()]
        for name, head, form in columns
    ]
    heads = tuple(head for _, head, _ in columns)
    return PageTable(
        id=id, title=title, file="compare.csv", heads=heads, rows=tuple(zip(*cells, strict=True)),
        total=len(rows),
    )  # fmt: skip


def _cell(value: Any, head: Head, form: Callable[[Any], str], colors: Mapping[str, str]) -> PageCell:
    if not head.numeric:
        return PageCell(str(value), color=colors.get(value, ""))
    return number_cell(value, form)
