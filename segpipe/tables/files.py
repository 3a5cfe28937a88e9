"""Data frames as CSV and Parquet files."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.store.atomic import write_atomic


def csv_bytes(table: pd.DataFrame) -> bytes:
    """CSV: UTF-8, line feeds, floats in the fewest digits that read back the same.

    Text beyond ASCII is announced by a byte order mark: without it Excel shows other letters.
    """
    text = table.to_csv(index=False, lineterminator="\n")
    return text.encode("utf-8" if text.isascii() else "utf-8-sig")


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
