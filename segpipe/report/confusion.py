"""The confusion matrix of a page: counts of whole scenes, summed, with percentages of the row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from segpipe.regions.base import SCENE
from segpipe.tables import units
from segpipe.tables.record import ClassInfo

LISTED = 16
"""Classes with a row; with more, those with most reference and prediction, and one for the rest."""
OTHERS = "all others"
DARK = 69
"""Percentage from which a cell is so dark that its text is white, not black (contrast 4.5 at least)."""


@dataclass(frozen=True)
class Share:
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
class Row:
    """A class of the reference."""

    name: str
    color: str
    count: str
    """Elements in the reference."""
    cells: tuple[Share, ...]


@dataclass(frozen=True)
class Matrix:
    """Rows are the reference, columns the prediction, in the same order."""

    rows: tuple[Row, ...]
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
    found = set(whole["reference"]) | set(whole["predicted"])
    names = [c.name for c in classes if c.name in found]
    names += sorted(found - set(names))
    place = {name: i for i, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    pairs = (whole["reference"].map(place).to_numpy(), whole["predicted"].map(place).to_numpy())
    np.add.at(counts, pairs, whole["count"].to_numpy())
    folded = 0
    if len(names) > LISTED:
        order = np.argsort(-(counts.sum(axis=0) + counts.sum(axis=1)), kind="stable")
        kept = np.sort(order[: LISTED - 1])
        folded = len(names) - len(kept)
        into = np.full(len(names), len(kept))
        into[kept] = np.arange(len(kept))
        smaller = np.zeros((LISTED, LISTED))
        np.add.at(smaller, (into[:, None], into[None, :]), counts)
        names, counts = [*(names[i] for i in kept), OTHERS], smaller
    colors = {c.name: c.color for c in classes}
    rows = tuple(_row(name, colors.get(name, ""), counts[i], i) for i, name in enumerate(names))
    return Matrix(rows, int(whole["scene"].nunique()), folded)


def _row(name: str, color: str, counts: np.ndarray, own: int) -> Row:
    total = float(counts.sum())
    cells = []
    for column, count in enumerate(counts.tolist()):
        share = count / total if total else math.nan
        text, strength = units.percent(share).removesuffix(" %"), round(100 * share) if total else 0
        cells.append(Share(text, units.number(count, 0), strength, strength >= DARK, column == own))
    return Row(name, color, units.number(total, 0), tuple(cells))
