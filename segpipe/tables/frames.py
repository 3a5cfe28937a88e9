"""What all tables share: their states and columns, and data frames made of whole columns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import pandas as pd

from segpipe.metrics.overlap import Counts
from segpipe.regions.base import FULL

MEASURED = "measured"
NO_DATA = "no_data"
FAILED = "failed"
NOT_REQUESTED_STATE = "not_requested"

NOT_A_CLASS = "no class of the model"
NOTHING_COMPARED = "no element with both a valid pixel and a reference"
NO_REFERENCE = "no reference"

SIZE_COLUMNS = {"m2": "area_m2", "mm3": "volume_mm3", "px": "area_px"}


class ClassLike(Protocol):
    """What the tables need of a class: a card's `Class` has it."""

    @property
    def value(self) -> int:
        """Value in label maps."""
        ...

    @property
    def name(self) -> str:
        """What people read."""
        ...

    @property
    def background(self) -> bool:
        """Left out of means."""
        ...


T = TypeVar("T")


@dataclass(frozen=True)
class Found(Generic[T]):
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
    """Arrays of that length, or one value for all rows; a column that is left out is empty."""


def frame(pieces: Sequence[Piece], columns: Mapping[str, str]) -> pd.DataFrame:
    """A data frame with these columns and types, also without rows."""
    data = {}
    for name, dtype in columns.items():
        empty = "" if dtype == "str" else math.nan
        parts = [_filled(piece.columns.get(name, empty), piece.length, dtype) for piece in pieces]
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
