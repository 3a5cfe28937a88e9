"""A run: its folder, what happened to each scene, and the report made of it.

``<out>/<job>/<run>/`` is a view of the stages in the store: it can be made again from them. The
run's name is the time it began and a fingerprint of everything it depends on, so the same request
finds its own folder again, and a finished one is not done twice.
"""

from __future__ import annotations

import io
from datetime import datetime
from pathlib import Path

import obstore
import pandas as pd

from segpipe.config.job import Job
from segpipe.errors import DamagedError, RequestError
from segpipe.export.run_folder import RunFolder, is_whole, now
from segpipe.report.run_page import page_paths
from segpipe.store.location import is_url, join, open_store, read_object, store_named, store_reason
from segpipe.tables.record import RunRecord, load_record
from segpipe.tables.table_files import PARQUET_ERRORS


def open_run(job: Job, mark: str) -> tuple[RunFolder, RunRecord | None]:
    """The run of this fingerprint: a new one, or the folder of the same request before.

    Returns:
        The run, and its record where it has ended and its files are still there.

    Raises:
        SegpipeError: the store fails.
    """
    with store_named(job.outputs.dir):
        return _opened(job, mark)


def _opened(job: Job, mark: str) -> tuple[RunFolder, RunRecord | None]:
    store = open_store(join(job.outputs.dir, job.name))
    found = obstore.list_with_delimiter(store)["common_prefixes"]
    for folder in sorted(found, reverse=True):
        name = folder.rstrip("/")
        if name.endswith(f"-{mark}"):
            try:
                record = _read_record(store, name)
            except RequestError:  # damaged: it is written again
                record = None
            started = record.started if record else now()
            if record is not None and not is_whole(join(job.outputs.dir, job.name, name), _files(record)):
                record = None
            return RunFolder(job.outputs.dir, job.name, name, started), record
    started = now()
    stamp = datetime.fromisoformat(started).strftime("%Y%m%d-%H%M%S")
    return RunFolder(job.outputs.dir, job.name, f"{stamp}-{mark}", started), None


def _read_record(store: obstore.store.ObjectStore, name: str) -> RunRecord | None:
    data = read_object(store, f"{name}/run.json")
    return None if data is None else load_record(data)


def _files(record: RunRecord) -> set[str]:
    """Files that a finished run has."""
    files = {*page_paths(record), "results.json", "regions.csv", "regions.parquet"}
    return files | {file for scene in record.mapped for file in scene.files.values()}


def read_tables(run: RunFolder) -> tuple[pd.DataFrame, pd.DataFrame | None, pd.DataFrame | None]:
    """Regions, metrics and summary of a finished run; the latter two None without a reference."""
    regions = read_table(run, "regions")
    if regions is None:
        raise DamagedError(f"{run.location}: no regions.parquet here; `segpipe report` writes it again")
    return regions, read_table(run, "metrics"), read_table(run, "summary")


def read_table(run: RunFolder, name: str) -> pd.DataFrame | None:
    """A table of a finished run, by the name of its file; None where the run has none.

    Raises:
        DamagedError: it cannot be read.
    """
    data = read_object(open_store(run.location), f"{name}.parquet")
    try:
        return None if data is None else pd.read_parquet(io.BytesIO(data))
    except PARQUET_ERRORS as error:
        raise DamagedError(
            f"{join(run.location, name)}.parquet: cannot be read: {store_reason(error)}; `segpipe report` "
            "writes the run's tables again"
        ) from error


def load_run(location: str) -> tuple[RunFolder, RunRecord]:
    """A run by its folder or URL, with its record.

    Raises:
        RequestError: no run lies there.
    """
    base = location.rstrip("/")
    out, job, name = base.rsplit("/", 2) if base.count("/") >= 2 else ("", "", base)
    record = None
    if is_url(base) or Path(base).is_dir():
        record = _read_record(open_store(join(out, job) if job else str(Path(base).parent)), name)
    if record is None:
        raise RequestError(f"{location}: no run here (no run.json); give a folder <out>/<job>/<run>")
    if not job:
        folder = Path(base).absolute()
        out, job = str(folder.parent.parent), folder.parent.name
    return RunFolder(out, job, name, record.started), record
