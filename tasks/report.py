"""The end of a run: tables, page, and what the Prefect UI shows of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import pandas as pd
from PIL import Image
from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from segpipe.config import Job
from segpipe.report.markdown import run_markdown
from segpipe.report.pictures import load_previews
from segpipe.report.record import RunRecord, SceneRecord
from segpipe.run import Run, finish_run, read_tables
from segpipe.settings import Settings
from segpipe.store import Stage
from tasks.told import told

PICTURES = 12
"""Scenes shown in the UI by their thumbnail, 10 to 20 KB each; the report has all."""
TABLE_ROWS = 200
"""Rows of the region table shown in the UI; the CSV has all."""
TABLE_COLUMNS = {
    "scene": 0,
    "region": 0,
    "class": 0,
    "area_m2": 1,
    "volume_mm3": 1,
    "share": 4,
    "seen": 4,
    "state": 0,
}
"""Columns of the region table shown in the UI, and the decimals of their numbers."""


@task(name="write report", task_run_name="write report", cache_policy=NO_CACHE)
@told
def write_report(run: Run, job: Job, settings: Settings, scenes: Sequence[SceneRecord]) -> RunRecord:
    """Write tables, ``run.json`` and ``report.html``; publish summary and regions as artifacts."""
    record = finish_run(run, job, settings, scenes)
    regions, metrics, summary = read_tables(run)
    text = run_markdown(record, regions, metrics, summary, run.report) + _pictures(run, record.done)
    name = run.job.lower().replace("_", "-").replace(".", "-")
    create_markdown_artifact(text, key=f"{name}-report", description=f"Results of {run.job}, run {run.name}")
    more = f", the first {TABLE_ROWS} of {len(regions)} rows" if len(regions) > TABLE_ROWS else ""
    create_table_artifact(
        _shown(regions), key=f"{name}-regions", description=f"Regions of {run.job}, run {run.name}{more}"
    )
    return record


def _pictures(run: Run, scenes: Sequence[SceneRecord]) -> str:
    """Thumbnails as a Markdown table, embedded: the UI's reader has no access to the run's folder."""
    rows = []
    for scene in scenes[:PICTURES]:
        previews = Stage(run.out, scene.keys["measure"]).read_bytes(scene.keys["previews"])
        if previews is not None:
            rows.append(f"| {scene.name} | ![{scene.name}]({_data_uri(load_previews(previews).thumbnail)}) |")
    if not rows:
        return ""
    more = f"\nand {len(scenes) - PICTURES} more scenes in the report\n" if len(scenes) > PICTURES else ""
    return "\n".join(["", "| Scene | Labels over image |", "| --- | --- |", *rows, more])


def _data_uri(picture: bytes) -> str:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _shown(regions: pd.DataFrame) -> dict[str, list[object]]:
    """The region table as the UI takes it: rounded, and None where a number is absent."""
    kept = {name: decimals for name, decimals in TABLE_COLUMNS.items() if name in regions}
    table = regions[[*kept]].head(TABLE_ROWS).round(kept).astype(object)
    return {name: table[name].where(table[name].notna(), None).to_list() for name in kept}
