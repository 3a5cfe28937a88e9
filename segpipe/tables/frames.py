"""What all tables share: the data dictionary, the states of rows, and typed data frames.

``columns.yaml`` beside this file names every table, every column and every formula. The tables take the order
and types of their columns from it, the page its headers and definitions, a run its ``columns.json``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pandas as pd
import yaml

from segpipe.config.card import Class
from segpipe.metrics.overlap import Counts
from segpipe.regions.base import FULL
from segpipe.tables.record import ClassInfo

MEASURED = "measured"
NO_DATA = "no_data"
FAILED = "failed"
NOT_REQUESTED_STATE = "not_requested"

NOT_A_CLASS = "no class of the model"
NOTHING_COMPARED = "no element with both a valid pixel and a reference"
NO_REFERENCE = "no reference"

SIZE_COLUMNS = {"m2": "area_m2", "mm3": "volume_mm3", "px": "area_px"}
_DTYPES = {"text": "str", "class": "str", "state": "str", "whole": "Int64"}
"""Of a column by its kind, where it names none; all others are float64."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a table, as the data dictionary describes it."""

    name: str
    label: str
    """Header on the page."""
    kind: str
    """text, class, number, whole, ratio, real, percent, size or state: how the page shows it."""
    dtype: str
    """Of the data frame: str, boolean, Int64 or float64."""
    unit: str = ""
    """``m2``, ``elements``, ``1``; empty: it has none."""
    meaning: str = ""
    """One sentence; empty: the definition says it."""
    definition: str = ""
    """Id of the formula that explains it at length; empty: there is none."""


@cache
def dictionary() -> dict[str, Any]:
    """Return the data dictionary: ``tables``, ``columns`` and ``definitions``."""
    text = Path(__file__).with_name("columns.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first needs libyaml, and takes a tenth
    found: dict[str, Any] = yaml.load(text, loader)
    return found


@cache
def describe_column(name: str, table: str = "") -> Column | None:
    """Return the dictionary's entry of a column; None where it has none.

    Args:
        name: of the column.
        table: its file's name; some columns have another meaning in one table.
    """
    entry = dictionary()["columns"].get(name, {})
    entry = entry | dictionary()["tables"].get(table, {}).get("differs", {}).get(name, {})
    if not entry:
        return None
    return Column(name=name, **{"dtype": _DTYPES.get(entry["kind"], "float64"), **entry})


def table_columns(table: str, units: Collection[str] = tuple(SIZE_COLUMNS)) -> list[Column]:
    """Return the columns of a table in order.

    Args:
        table: its file's name without the ending.
        units: columns of sizes in other units are left out.
    """
    found = (describe_column(name, table) for name in dictionary()["tables"][table]["columns"])
    return [c for c in found if c is not None and (c.kind != "size" or c.unit in units)]


def column_types(table: str, units: Collection[str] = tuple(SIZE_COLUMNS)) -> dict[str, str]:
    """Return name to dtype of `table_columns`."""
    return {c.name: c.dtype for c in table_columns(table, units)}


def table_of_rows(rows: Iterable[Mapping[str, Any]], types: Mapping[str, str]) -> pd.DataFrame:
    """Return rows as a data frame with these columns and types; a missing text is empty, not NaN."""
    table = pd.DataFrame(list(rows), columns=list(types))
    texts = [name for name, dtype in types.items() if dtype == "str"]
    table[texts] = table[texts].fillna("")
    return table.astype(dict(types))


ClassLike = Class | ClassInfo
"""What the tables need of a class, both have: value, name, and whether it is background."""


@dataclass(frozen=True)
class SceneValue(Generic[T]):
    """What measuring left of one scene, for a table of its own."""

    scene: str
    value: T | None = None
    """None: the scene failed, or there is no reference."""
    reason: str = ""
    """Why there is none, in one line."""
    failed: bool = False

    @property
    def state(self) -> str:
        """Of the scene's rows where there is no value."""
        return FAILED if self.failed else NOT_REQUESTED_STATE


@dataclass(frozen=True, eq=False)
class Piece:
    """Some rows of a table."""

    length: int
    columns: Mapping[str, Any]
    """All of the table's: arrays of that length, or one value for all rows."""


def table_of_pieces(pieces: Sequence[Piece], types: Mapping[str, str]) -> pd.DataFrame:
    """Return a data frame with these columns and types, also without rows.

    Raises:
        ValueError: a piece lacks one of the columns, or has another.
    """
    for piece in pieces:
        if other := sorted(set(types) ^ set(piece.columns)):
            raise ValueError(f"columns of the dictionary that rows lack, or of rows that it lacks: {other}")
    data = {}
    for name, dtype in types.items():
        parts = [_filled(piece.columns[name], piece.length, dtype) for piece in pieces]
        data[name] = pd.Series(np.concatenate(parts) if parts else [], dtype=dtype)
    return pd.DataFrame(data)


def _filled(value: Any, length: int, dtype: str) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    return np.full(length, value, dtype=object if dtype == "str" else None)


def text_of(words: Sequence[str], index: np.ndarray) -> np.ndarray:
    """The words at these places, as an object array."""
    return np.asarray(np.array([*words, ""], dtype=object)[index])


def fixed_counts(metrics: pd.DataFrame) -> Counts:
    """Counts of a metric table as whole 1/65536 again, which is what they were; where empty, 0."""
    columns = (metrics[name].to_numpy(dtype=np.float64) for name in ("tp", "fp", "fn"))
    return Counts(*(np.rint(np.nan_to_num(values) * FULL).astype(np.int64) for values in columns))
