"""Numbers as people read them: ha, km² and mL from SI, with decimals that fit the column."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any


@dataclass(frozen=True)
class Unit:
    """What a column is shown in."""

    symbol: str
    factor: float
    """Stored value times this is the shown one."""
    decimals: int


SIZES = {"area_m2": "area", "volume_mm3": "volume", "area_px": "area"}
"""Columns that hold a size, and what to call it."""


def size_unit(column: str, values: Iterable[float]) -> Unit:
    """The unit for a whole column, so that its rows can be compared: by its largest value.

    m² below 1 ha, ha below 100 km², then km²; mm³ below 0.1 mL, then mL.
    """
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if column == "area_m2":
        steps = ((1e8, "km²", 1e-6), (1e4, "ha", 1e-4), (0.0, "m²", 1.0))
    elif column == "volume_mm3":
        steps = ((100.0, "mL", 1e-3), (0.0, "mm³", 1.0), (0.0, "mm³", 1.0))
    else:
        steps = ((0.0, "px", 1.0),) * 3
    symbol, factor = next((s, f) for least, s, f in steps if largest >= least)
    scaled = factor < 1  # then a whole unit is much, and the small rows need a decimal
    return Unit(symbol, factor, max(int(scaled), decimals(largest * factor)))


def decimals(largest: float) -> int:
    """Decimals that give a column's largest value four digits, at most three decimals."""
    if not largest or not math.isfinite(largest):
        return 0
    return min(3, max(0, 3 - math.floor(math.log10(abs(largest)))))


def number(value: float, places: int) -> str:
    """With thin groups of thousands; what would round to zero but is not says so."""
    if not math.isfinite(value):
        return "—"
    text = f"{value:,.{places}f}"
    if value and not text.strip("-0.,"):
        return f"<{10**-places:.{places}f}" if value > 0 else text
    return text


def size(value: float, unit: Unit) -> str:
    """A stored size in the shown unit, without its symbol."""
    return number(value * unit.factor, unit.decimals)


def percent(value: float) -> str:
    """A share of 0…1 as a percentage; a small one does not become 0."""
    if not math.isfinite(value):
        return "—"
    if 0 < value < 0.001:
        return "<0.1 %"
    if 0.9995 <= value < 1:
        return ">99.9 %"
    return f"{100 * value:.1f} %"


def interval(row: Mapping[Any, Any]) -> str:
    """``0.452 to 0.474`` of a row with ``low`` and ``high``; empty where it has none."""
    low, high = (float(row.get(key, math.nan)) for key in ("low", "high"))
    return f"{number(low, 3)} to {number(high, 3)}" if math.isfinite(low + high) else ""


def duration(seconds: float) -> str:
    """``2 h 03 min``, ``4 min 05 s``, ``12.3 s``."""
    if not math.isfinite(seconds) or seconds < 0:
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 59.95 else "1 min 00 s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def between(started: str, finished: str) -> float:
    """Seconds between two ISO 8601 times; NaN when one of them is not a time."""
    try:
        return (datetime.fromisoformat(finished) - datetime.fromisoformat(started)).total_seconds()
    except (ValueError, TypeError):
        return math.nan


def moment(text: str) -> str:
    """``2026-03-01 14:05 UTC+00:00`` of an ISO 8601 time; anything else as it is."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = f" {time.tzname()}" if time.tzinfo else ""
    return time.strftime("%Y-%m-%d %H:%M") + zone


def byte_size(value: float) -> str:
    """In binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
