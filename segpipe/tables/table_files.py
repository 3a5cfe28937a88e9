"""Data frames as files: CSV, Parquet, JSON, and the dictionary of their columns."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.config.cells import escape_cell
from segpipe.redact import clean
from segpipe.store.location import write_atomic
from segpipe.tables.frames import describe_column, dictionary

PARQUET_ERRORS = (pa.ArrowException, OSError, ValueError, KeyError, TypeError)
"""What pandas and pyarrow raise at Parquet files that are damaged, or whose metadata are."""
MOST_ROWS = 20_000
"""A larger table is not repeated in JSON: its Parquet file is smaller and typed."""


def csv_bytes(table: pd.DataFrame) -> bytes:
    """CSV: UTF-8, line feeds, floats in the fewest digits that read back the same.

    Text beyond ASCII is announced by a byte order mark: without it Excel shows other letters. Text that a
    spreadsheet would calculate has an apostrophe in front (`segpipe.config.cells`), and control characters
    are told (``\\x1b``); numbers stay numbers.
    """
    shown = table.rename(columns=_cell)
    for place, dtype in enumerate(table.dtypes):
        if not pd.api.types.is_numeric_dtype(dtype):
            shown.isetitem(place, [*map(_cell, table.iloc[:, place])])
    text = shown.to_csv(index=False, lineterminator="\n")
    return text.encode("utf-8" if text.isascii() else "utf-8-sig")


def _cell(value: object) -> object:
    return escape_cell(clean(value)) if isinstance(value, str) else value


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """The same as Parquet, with the columns' types."""
    target = io.BytesIO()
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    pq.write_table(arrow, target, compression="zstd")
    return target.getvalue()


def write_table(table: pd.DataFrame, path_stem: str | Path) -> tuple[Path, Path]:
    """Write ``<stem>.csv`` and ``<stem>.parquet``, each all or nothing.

    The same table gives the same bytes.
    """
    csv, parquet = Path(f"{path_stem}.csv"), Path(f"{path_stem}.parquet")
    csv.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(csv, csv_bytes(table))
    write_atomic(parquet, parquet_bytes(table))
    return csv, parquet


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


def columns_json(tables: Mapping[str, pd.DataFrame]) -> str:
    """Return the data dictionary of a run's tables as JSON: each column's type, unit and definition.

    ``{"tables": {name: {"about", "columns": [{"name", "dtype", "unit", …}]}}, "definitions": {id: {…}}}``.
    """
    found: dict[str, Any] = {}
    for name, table in tables.items():
        columns = [c for c in (describe_column(str(column), name) for column in table) if c is not None]
        about = dictionary()["tables"][name]["about"]
        found[name] = {"about": about, "columns": [asdict(c) for c in columns]}
    named = {c["definition"] for table in found.values() for c in table["columns"]}
    definitions = {key: value for key, value in dictionary()["definitions"].items() if key in named}
    return json.dumps({"tables": found, "definitions": definitions}, ensure_ascii=False, indent=1) + "\n"
