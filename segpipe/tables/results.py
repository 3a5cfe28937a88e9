"""All tables of a run as one JSON file, for programs that want neither CSV nor Parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd

MOST_ROWS = 20_000
"""A larger table is not repeated here: its Parquet file is smaller and typed."""


def results_json(job: str, run: str, tables: Mapping[str, pd.DataFrame]) -> str:
    """``{"job", "run", "tables": {name: [row, …]}, "left_out": {name: file}}``; what is empty is null."""
    small = {name: table for name, table in tables.items() if len(table) <= MOST_ROWS}
    content = {
        "job": job,
        "run": run,
        "tables": {name: _rows(table) for name, table in small.items()},
        "left_out": {name: f"{name}.parquet" for name in tables if name not in small},
    }
    return json.dumps(content, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    columns = {
        str(name): [None if empty else _plain(v) for v, empty in zip(column, column.isna(), strict=True)]
        for name, column in table.items()
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    """NumPy's scalars as Python's."""
    return value.item() if hasattr(value, "item") else value
