"""What was asked of a prompted run: the table of scenes and phrases, and the page's summary of it.

A phrase is the name of a class, so sizes and numbers of objects are those of the region table. Every phrase
that was asked for has its row, found or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from segpipe.report.cells import MISSING, Head, PageCell, number_cell
from segpipe.tables import units
from segpipe.tables.record import ClassInfo, SceneRecord
from segpipe.tables.run_tables import FOUND, GIVEN, PHRASE_COUNTS, SCENE_FAILED


def describe_outcome(row: Mapping[Any, Any]) -> str:
    """What became of a phrase in a scene, in one line: the note, or the numbers."""
    outcome = str(row["outcome"])
    if outcome == SCENE_FAILED:
        return f"unknown: the scene failed ({row['note'] or 'no reason recorded'})"
    found, below, small, merged = (0 if pd.isna(row[c]) else int(row[c]) for c in PHRASE_COUNTS)
    parts = [str(row["note"]) or _outcome_words(row, found, below, small)]
    if merged and "merged" not in parts[0]:
        parts.append(f"{merged:,} merged into other objects")
    if found and not pd.isna(row["objects"]) and row["objects"] == 0:
        parts.append("none of them is left in the map")
    return "; ".join(parts)


def _outcome_words(row: Mapping[Any, Any], found: int, below: int, small: int) -> str:
    outcome, means = str(row["outcome"]), str(row["means"])
    near = "" if pd.isna(row["similarity"]) else f" with {float(row['similarity']):.2f}"
    lost = [f"{n:,} {why}" for n, why in ((below, "below the threshold"), (small, "too small")) if n]
    if lost and not pd.isna(row["best"]):
        lost[-1] += f", the best score is {float(row['best']):.2f}"
    if outcome == FOUND:
        return ", ".join([f"{found:,} found", *lost])
    if outcome == GIVEN:
        return "not asked for in words: the objects come from prompts"
    if outcome == "below threshold":
        return f"not found: {', '.join(lost) or 'no score reaches the threshold'}"
    if outcome == "not found":
        return "not found" + (f", though it means {means}{near}" if means else "")
    return f"{outcome}" + (f"; nearest is {means}{near}" if means else "")


@dataclass(frozen=True, kw_only=True)
class PhraseRow:
    """A phrase in the page's summary."""

    phrase: str
    color: str
    """Of its class."""
    outcome: str
    good: bool
    """Whether it was found in any scene."""
    cells: tuple[PageCell, ...]
    """Under `PhraseView.heads`."""
    note: str


@dataclass(frozen=True)
class PhraseView:
    """What was asked, as the page shows it."""

    finding: str
    """In a sentence; empty: nothing was asked in words."""
    heads: tuple[Head, ...]
    rows: tuple[PhraseRow, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]
    """What became of prompts of files, by scene."""


def phrase_view(
    table: pd.DataFrame,
    instances: pd.DataFrame | None,
    scenes: Sequence[SceneRecord],
    classes: Sequence[ClassInfo],
) -> PhraseView | None:
    """The summary over scenes; None where nothing was asked.

    Args:
        table: of `phrase_table`, the rows of these scenes.
        instances: their objects, for mean scores; left out: those of the table, of one scene.
        scenes: of the record.
        classes: of the run.
    """
    lines = tuple((s.name, s.prompts) for s in scenes if s.prompts)
    if table.empty and not lines:
        return None
    sizes = [c for c in units.SIZES if c in table and table[c].notna().any()]
    groups = [(str(p), rows) for p, rows in table.groupby("phrase", sort=False)]
    shown = {c: units.size_unit(c, [rows[c].sum() for _, rows in groups]) for c in sizes}
    heads = [Head("Found", numeric=True), Head("Objects", numeric=True)]
    heads += [
        Head(units.SIZES[c].capitalize(), unit=u.symbol, numeric=True, definition="size")
        for c, u in shown.items()
    ]
    heads.append(Head("Mean score", numeric=True))
    colors = {c.name: c.color for c in classes}
    result = []
    for phrase, rows in groups:
        cells = [_sum(rows[name], partial(units.number, places=0)) for name in ("found", "objects")]
        cells += [_sum(rows[c], partial(units.size, unit=u)) for c, u in shown.items()]
        cells.append(_score(rows, instances, phrase))
        outcome, note = _over(rows)
        good = bool(rows["outcome"].isin((FOUND, GIVEN)).any())
        result.append(
            PhraseRow(
                phrase=phrase,
                color=colors.get(phrase, ""),
                outcome=outcome,
                good=good,
                cells=tuple(cells),
                note=note,
            )
        )
    return PhraseView(phrases_sentence(table), tuple(heads), tuple(result), lines)


def _over(rows: pd.DataFrame) -> tuple[str, str]:
    """Outcome and words of a phrase over scenes; words that all scenes share are told once."""
    counts = rows["outcome"].value_counts(sort=False)
    told = {describe_outcome(row) for row in rows.to_dict("records")}
    if len(counts) == 1:
        outcome = str(counts.index[0])
        return outcome, told.pop() if len(told) == 1 else f"{outcome} in all {len(rows):,} scenes"
    found = int(counts.get(FOUND, 0) or counts.get(GIVEN, 0))
    outcome = f"in {found:,} of {len(rows):,}" if found else " / ".join(map(str, counts.index))
    return outcome, "; ".join(f"{name} in {n:,} scene{'' if n == 1 else 's'}" for name, n in counts.items())


def phrases_sentence(table: pd.DataFrame) -> str:
    """How many of the phrases asked for in words were found anywhere, and which were not."""
    asked = table[~table["outcome"].isin((GIVEN, SCENE_FAILED))]
    if asked.empty:
        return ""
    phrases = list(dict.fromkeys(asked["phrase"]))
    hit = set(asked.loc[asked["outcome"] == FOUND, "phrase"])
    text = f"{len(hit):,} of {len(phrases):,} phrase{'' if len(phrases) == 1 else 's'} found"
    missing = [p for p in phrases if p not in hit]
    return f"{text}; not found: {', '.join(missing)}." if missing else f"{text}."


def phrase_captions(table: pd.DataFrame) -> dict[str, str]:
    """``23 objects, 190 ha`` for each phrase of one scene's rows of `phrase_table`."""
    sizes = [c for c in units.SIZES if c in table]
    result = {}
    for row in table.to_dict("records"):
        parts = []
        if not pd.isna(row["objects"]):
            parts.append(f"{row['objects']:,} object{'' if row['objects'] == 1 else 's'}")
        for column in sizes:
            if not math.isnan(row[column]):
                unit = units.size_unit(column, [row[column]])
                parts.append(f"{units.size(row[column], unit)} {unit.symbol}")
        result[str(row["phrase"])] = ", ".join(parts)
    return result


def phrase_rows(table: pd.DataFrame) -> list[tuple[str, str, str, str, str]]:
    """Phrase, outcome, objects, size with its unit, and words, over all scenes: as plain text."""
    view = phrase_view(table, None, (), ())
    if view is None:
        return []
    result = []
    for row in view.rows:
        sizes = zip(view.heads[2:-1], row.cells[2:-1], strict=True)
        size = ", ".join(f"{cell.text} {head.unit}" for head, cell in sizes if cell.sort) or "—"
        result.append((row.phrase, row.outcome, row.cells[1].text, size, row.note))
    return result


def _sum(values: pd.Series, form: Callable[[float], str]) -> PageCell:
    known = values.dropna()
    return MISSING if known.empty else number_cell(float(known.sum()), form)


def _score(rows: pd.DataFrame, instances: pd.DataFrame | None, phrase: str) -> PageCell:
    """Return the mean over the objects of all scenes, not of scenes."""
    scores = rows["mean_score"]
    if instances is not None and {"class", "score"} <= set(instances):
        scores = instances.loc[instances["class"] == phrase, "score"]
    return number_cell(scores.astype(np.float64).mean(), partial(units.number, places=3))
