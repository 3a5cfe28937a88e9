"""Runs made by the library alone, and the tables of runs and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from world import World

from segpipe.config.card import read_card
from segpipe.config.job import load_job
from segpipe.errors import SegpipeError
from segpipe.export.scene import done_record, export_scene, failed_record
from segpipe.pipeline.given_scene import prepare_labelled
from segpipe.pipeline.measure import measure_scene
from segpipe.pipeline.model_scene import create_stages, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.runs.check import check_request
from segpipe.runs.finish import finish_run
from segpipe.runs.run import open_run

NAMES = ["ground", "crop", "water"]
SHIFT = 20.0
"""Counts by which the second model's thresholds are higher."""


def run_job(path: Path) -> Path:
    """A run made by the library alone, scene by scene."""
    job = load_job(path)
    request = check_request(job)
    run, _ = open_run(job, request.fingerprint)
    records = []
    for ref in request.scenes:
        try:
            if job.labels:
                scene = prepare_labelled(job, ref)
            else:
                scene = create_stages(prepare_scene(job, read_card(job.model), ref, request.settings))
                predict_blocks(scene, list(scene.plan.blocks.indices()))
                finish_labels(scene)
            measured, done = measure_scene(scene)
            files = export_scene(scene, measured, run)
            records.append(done_record(scene, measured, files, {"measure": done}))
        except SegpipeError as error:
            records.append(failed_record(ref, str(error)))
    finish_run(run, request, records)
    return Path(run.location)


def layers(world: World, **more: Any) -> dict[str, Any]:
    """Job keys of two districts and the reference."""
    return {
        "regions": {"path": str(world / "districts.geojson"), "name": "district"},
        "reference": {"path": str(world / "truth")},
        **more,
    }


def read(folder: Path | str, name: str = "compare") -> pd.DataFrame:
    return pd.read_csv(Path(folder) / f"{name}.csv", keep_default_na=False, na_values=[""])
