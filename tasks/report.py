"""The end of a run: tables, page, and what the Prefect UI shows of them."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from urllib.parse import quote

import pandas as pd
from PIL import Image
from prefect import task
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from segpipe.export.run_folder import RunFolder
from segpipe.pictures.archive import load_previews
from segpipe.redact import clean
from segpipe.report.markdown import plain_text, run_markdown
from segpipe.runs.check import ResolvedJob
from segpipe.runs.find_run import read_tables
from segpipe.runs.finish import finish_run
from segpipe.store.location import is_url, join
from segpipe.store.stage import Stage
from segpipe.tables.record import RunRecord, SceneRecord
from segpipe_tasks.told import told

PICTURES = 12
"""Scenes shown in the UI by their thumbnail, 10 to 20 KB each; the report has all."""
ABREAST = 3
"""Pictures in a row."""
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
def write_report(run: RunFolder, resolved: ResolvedJob, scenes: Sequence[SceneRecord]) -> RunRecord:
    """Write tables, ``run.json`` and ``report.html``; publish summary and regions as artifacts."""
    record = finish_run(run, resolved, scenes)
    regions, metrics, summary = read_tables(run)
    text = (
        run_markdown(record, regions, metrics, summary, run.report)
        + _pictures(run, record.mapped)
        + _files(run, record)
    )
    told = f"of {run.job}, run {run.name}"
    create_markdown_artifact(text, key=artifact_key(run.job, "report"), description=f"Results {told}")
    if is_url(run.report):
        create_link_artifact(
            run.report, "report.html", key=artifact_key(run.job, "link"), description=f"Page {told}"
        )
    more = f", the first {TABLE_ROWS} of {len(regions)} rows" if len(regions) > TABLE_ROWS else ""
    create_table_artifact(
        _shown(regions), key=artifact_key(run.job, "regions"), description=f"Regions {told}{more}"
    )
    return record


def artifact_key(job: str, what: str) -> str:
    """``landcover-report``: the key under which the UI keeps the versions of a job's artifacts."""
    name = re.sub(r"[^a-z0-9]+", "-", job.lower()).strip("-")
    return f"{name}-{what}"


def _pictures(run: RunFolder, scenes: Sequence[SceneRecord]) -> str:
    """Thumbnails side by side, embedded: the UI's reader has no access to the run's folder."""
    found = []
    for scene in scenes[:PICTURES]:
        previews = Stage(run.out, scene.keys["measure"]).read_bytes(scene.keys["previews"])
        if previews is not None:
            picture = f"![{plain_text(scene.name)}]({_data_uri(load_previews(previews).thumbnail)})"
            found.append((plain_text(scene.name), picture))
    lines = ["", "## Labels over image", ""] if found else []
    for first in range(0, len(found), ABREAST):
        names, pictures = zip(*found[first : first + ABREAST], strict=True)
        lines += [f"| {' | '.join(row)} |" for row in (names, ["---"] * len(names), pictures)] + [""]
    if len(scenes) > PICTURES:
        lines += [f"and {len(scenes) - PICTURES} more scenes in the report", ""]
    return "\n".join(lines)


def _files(run: RunFolder, record: RunRecord) -> str:
    """Where the files are: links where they have a URL, else paths."""
    rows = [("report", run.report)]
    rows += [(name, join(run.location, name)) for name in ("regions.csv", "results.json", "run.json")]
    for scene in record.mapped[:PICTURES]:
        for kind, path in scene.files.items():
            rows.append((f"{plain_text(scene.name)}: {plain_text(kind)}", join(run.location, path)))
    lines = ["", "## Files", "", "| File | Where |", "| --- | --- |"]
    lines += [f"| {name} | {_place(location)} |" for name, location in rows]
    return "\n".join([*lines, ""])


def _place(location: str) -> str:
    """A link, or a path as it is."""
    if is_url(location):
        return f"[{plain_text(location)}]({quote(location, safe=':/?=&%')})"
    return f"`{' '.join(clean(location).replace('`', '').replace('|', chr(92) + '|').split())}`"


def _data_uri(picture: bytes) -> str:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _shown(regions: pd.DataFrame) -> dict[str, list[object]]:
    """The region table as the UI takes it: rounded, and None where a number is absent."""
    kept = {name: decimals for name, decimals in TABLE_COLUMNS.items() if name in regions}
    table = regions[[*kept]].head(TABLE_ROWS).round(kept).astype(object)
    return {name: table[name].where(table[name].notna(), None).to_list() for name in kept}
