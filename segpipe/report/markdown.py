"""The run in a screenful of Markdown, for the artifact that Prefect shows beside it."""

from __future__ import annotations

import math
import re

import pandas as pd

from segpipe.redact import clean
from segpipe.regions.base import SCENE
from segpipe.report.charts import class_bars
from segpipe.report.phrase_view import phrase_rows, phrases_sentence
from segpipe.tables import units
from segpipe.tables.record import RunRecord
from segpipe.tables.run_tables import phrase_table

HEADLINES = ("mIoU", "mean Dice", "pixel accuracy")
"""Metrics told first, of those over all classes; the summary table has every one."""
FAILURES = 20
CLASSES = 30
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~!])")


def run_markdown(
    record: RunRecord,
    regions: pd.DataFrame,
    metrics: pd.DataFrame | None = None,
    summary: pd.DataFrame | None = None,
    report: str = "report.html",
) -> str:
    """Headline, failures with reasons, what was asked, means, and size per class.

    Args:
        record: of the run.
        regions: the region table.
        metrics: the metric table, or None.
        summary: the means, or None.
        report: path or URL of the page, shown as text.
    """
    done, failed = len(record.done), len(record.failed)
    took = units.duration(units.between(record.started, record.finished))
    state = (
        f"**{failed} of {done + failed} scenes failed**"
        if failed
        else f"**{done} scene{'' if done == 1 else 's'} done**"
    )
    lines = [
        f"# {plain_text(record.job_name)}",
        "",
        f"{state} · run {plain_text(record.run_id)} · {took}",
        "",
    ]
    for scene in record.failed[:FAILURES]:
        lines.append(f"- **{plain_text(scene.name)}**: {plain_text(scene.error or 'no reason recorded')}")
    if failed > FAILURES:
        lines.append(f"- and {failed - FAILURES} more, listed in the report")
    if failed:
        lines.append("")
    lines += _asked(record, regions) + _means(summary)
    for group in class_bars(regions, metrics, record.legend):
        heads = ["Class", f"{group.quantity.capitalize()} ({group.unit})", "Share"]
        heads += ["IoU (pooled)", "Dice (pooled)"] if group.compared else []
        rows = [
            [plain_text(b.name), b.size, b.share, *([b.iou, b.dice] if group.compared else [])]
            for b in group.bars[:CLASSES]
        ]
        lines += markdown_table(heads, rows)
        if len(group.bars) > CLASSES:
            lines += [f"and {len(group.bars) - CLASSES} more classes", ""]
    lines += [f"- {plain_text(note)}" for note in record.notes]
    lines += ["", f"Report: `{report.replace('`', '')}`", ""]
    return "\n".join(lines)


def _asked(record: RunRecord, regions: pd.DataFrame) -> list[str]:
    """Every phrase of a prompted run, those that were not found too."""
    table = phrase_table(record, regions)
    rows = [[plain_text(cell) for cell in row] for row in phrase_rows(table)]
    if not rows:
        return []
    said, heads = phrases_sentence(table), ["Phrase", "Outcome", "Objects", "Size", "In words"]
    return [*([plain_text(said), ""] if said else []), *markdown_table(heads, rows, (0, 1, 4))]


def _over_scenes(summary: pd.DataFrame) -> pd.DataFrame:
    """The means over all classes of whole scenes."""
    return summary[(summary["class"].fillna("") == "") & (summary["region"] == SCENE)]


def _means(summary: pd.DataFrame | None) -> list[str]:
    """The means over all classes; those of single classes are in the report."""
    if summary is None or summary.empty:
        return []
    rows = []
    for row in _over_scenes(summary).to_dict("records"):
        defined = row.get("n_defined")
        rows.append(
            [
                plain_text(str(row.get("metric", ""))),
                units.number(float(row.get("value", math.nan)), 3),
                units.interval(row),
                "" if defined is None or pd.isna(defined) else f"{int(defined):,}",
                plain_text(str(row.get("over", ""))),
            ]
        )
    return markdown_table(["Metric", "Value", "95 % interval", "Defined", "Over"], rows)


def markdown_table(heads: list[str], rows: list[list[str]], words: tuple[int, ...] = (0,)) -> list[str]:
    """``words``: columns that begin at the left."""
    rule = ["---" if i in words else "---:" for i in range(len(heads))]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows)] + [""]


def plain_text(text: str) -> str:
    """One line of plain text: nothing in it is read as Markdown or HTML, and no pipe ends a cell."""
    return _SPECIAL.sub(r"\\\1", clean(" ".join(text.split())))


def headline(
    record: RunRecord,
    regions: pd.DataFrame,
    metrics: pd.DataFrame | None = None,
    summary: pd.DataFrame | None = None,
) -> list[str]:
    """The run in a few lines of plain text, for a terminal: what was asked, sizes per class, main means."""
    lines = [f"{record.job_name}: {len(record.done)} of {len(record.scenes)} scenes done"]
    for phrase, _, objects, _, note in phrase_rows(phrase_table(record, regions)):
        lines.append(f"  {phrase:<16} {objects:>12} objects  {note}")
    for group in class_bars(regions, metrics, record.legend):
        for bar in group.bars[:CLASSES]:
            scores = f"  IoU {bar.iou}  Dice {bar.dice}" if group.compared else ""
            lines.append(f"  {bar.name:<16} {bar.size:>12} {group.unit}  {bar.share:>7}{scores}")
    if summary is not None:
        for row in _over_scenes(summary).to_dict("records"):
            if row["metric"].startswith(HEADLINES):
                value, between = units.number(float(row["value"]), 3), units.interval(row)
                between = f", 95 % interval {between}" if between else ""
                lines.append(
                    f"  {row['metric']:<16} {value:>12}  {row['over']} (n={row['n_defined']}){between}"
                )
    return lines
