"""Jobs that measure label maps as they are given, run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

import segpipe
from segpipe.config.job import Job


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def run_all(job: Job) -> tuple[Path, list[str]]:
    """Run a job in this process; the run's folder and the notes of its scenes, none of which may fail."""
    ended = segpipe.run(job)
    for error in ended.failed.values():
        raise segpipe.SceneError(error)
    return Path(ended.path), [note for scene in ended.record.done for note in scene.notes]


def job_of(out: Path, scene: Path, labels: Path | str, **fields: Any) -> Job:
    data = {"name": "given", "scenes": [str(scene)], "labels": str(labels), "outputs": {"dir": str(out)}}
    return Job.model_validate({**data, **fields})
