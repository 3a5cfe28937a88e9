"""Provide tables of columns: rows are selected and concatenated in all columns alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np


@dataclass(frozen=True, eq=False)
class Columns:
    """A dataclass whose fields hold one item a row: arrays, tuples, or further `Columns`."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def take(self, rows: np.ndarray) -> Self:
        """Return some rows: by number in that order, or where a mask is True.

        A tuple without items is a column that is not known; it stays so.
        """
        return type(self)(**{f.name: _taken(getattr(self, f.name), rows) for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return the rows of all parts, of which there is at least one, one part after the other."""
        return cls(**{f.name: _concatenated([getattr(p, f.name) for p in parts]) for f in fields(cls)})


def _taken(column: Any, rows: np.ndarray) -> Any:
    if isinstance(column, np.ndarray):
        return column[rows]
    if isinstance(column, Columns):
        return column.take(rows)
    return tuple(column[i] for i in np.arange(len(column))[rows].tolist()) if column else ()


def _concatenated(columns: Sequence[Any]) -> Any:
    if isinstance(columns[0], np.ndarray):
        return np.concatenate(columns)
    if isinstance(columns[0], Columns):
        return type(columns[0]).concatenate(columns)
    return tuple(item for column in columns for item in column)
