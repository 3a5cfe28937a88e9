"""The end of a run: tables, page, and what the Prefect UI shows of them."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from segpipe.config import Job
from segpipe.report.markdown import run_markdown
from segpipe.report.record import RunRecord, SceneRecord
from segpipe.run import Run, finish_run, read_tables
from segpipe.scene import Settings
from tasks.told import told

TABLE_ROWS = 200
"""Rows of the region table shown in the UI; the CSV has all."""


@task(name="write report", cache_policy=NO_CACHE)
@told
def write_report(run: Run, job: Job, settings: Settings, scenes: Sequence[SceneRecord]) -> RunRecord:
    """Write tables, ``run.json`` and ``report.html``; publish the summary as artifacts."""
    record = finish_run(run, job, settings, scenes)
    regions, metrics, summary = read_tables(run)
    key = run.job.lower().replace("_", "-").replace(".", "-")
    create_markdown_artifact(run_markdown(record, regions, metrics, summary, run.report), key=f"{key}-report")
    rows = regions.head(TABLE_ROWS).astype(object).where(regions.notna(), None)
    create_table_artifact(rows.to_dict("records"), key=f"{key}-regions")
    return record
