"""Two runs side by side in a screenful of Markdown, for the artifact that Prefect shows."""

from __future__ import annotations

import math

from segpipe.report.comparison.page import Comparison, headline, percent, signed, unit_of
from segpipe.report.markdown import markdown_table, plain_text
from segpipe.tables import units

CHANGES = 30
"""Rows of each table, the biggest changes first; ``compare.csv`` has all."""
WARNINGS = 20
DIFFERENCES = 20


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
        lines += _totals(found, size) + _changes(found, size)
    rows = [
        [plain_text(d.key), plain_text(d.before), plain_text(d.after)]
        for d in found.differences[:DIFFERENCES]
    ]
    if rows:
        lines += ["## Set otherwise", "", *markdown_table(["Key", "Before", "After"], rows, (0, 1, 2))]
    lines += [f"- {plain_text(note)}" for note in found.notes]
    return "\n".join([*lines, "", f"Page: {_link(found.page)}", ""])


def _totals(found: Comparison, size: str) -> list[str]:
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


def _changes(found: Comparison, size: str) -> list[str]:
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
