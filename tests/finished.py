"""Whole runs of models, in this process."""

from __future__ import annotations

from pathlib import Path

from segpipe.api import as_job
from segpipe.export.run_folder import RunFolder
from segpipe.runs.check import check_request
from segpipe.runs.local import run_local
from segpipe.tables.record import RunRecord


def finish(job_file: Path) -> tuple[RunFolder, RunRecord]:
    """A job from its file to its report."""
    return run_local(check_request(as_job(job_file)))
