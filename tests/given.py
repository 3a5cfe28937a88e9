"""Jobs that measure label maps as they are given, run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from segpipe.config.job import Job
from segpipe.export.run_folder import Run
from segpipe.export.scene import done_record, export_scene
from segpipe.pipeline.given_scene import prepare_labelled
from segpipe.pipeline.measure import measure_scene
from segpipe.runs.check import check_request
from segpipe.runs.finish import finish_run


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def run_all(job: Job) -> tuple[Path, list[str]]:
    """A job's steps in this process, as the tasks call them: the run's folder and notes of its scenes."""
    request = check_request(job)
    run = Run(job.outputs.dir, job.name, f"run-{request.mark}", "2024-05-06T07:08:09+00:00")
    records = []
    for ref in request.scenes:
        scene = prepare_labelled(job, ref)
        measured, done = measure_scene(scene, "test")
        files = export_scene(scene, measured, run)
        records.append(done_record(scene, measured, files, {"measure": done}))
    finish_run(run, job, request.settings, records)
    return Path(run.location), [note for r in records for note in r.notes]


def job_of(out: Path, scene: Path, labels: Path | str, **fields: Any) -> Job:
    data = {"name": "given", "scenes": [str(scene)], "labels": str(labels), "outputs": {"dir": str(out)}}
    return Job.model_validate({**data, **fields})
