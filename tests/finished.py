"""Whole runs of models, in this process."""

from __future__ import annotations

from pathlib import Path

from segpipe.config.card import read_card
from segpipe.config.job import load_job
from segpipe.export.run_folder import RunFolder
from segpipe.export.scene import done_record, export_scene
from segpipe.pipeline.measure import measure_scene
from segpipe.pipeline.model_scene import create_stages, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.runs.check import check_request
from segpipe.runs.finish import finish_run
from segpipe.runs.run import open_run
from segpipe.tables.record import RunRecord


def finish(job_file: Path) -> tuple[RunFolder, RunRecord]:
    """Every step of a job as the tasks take it."""
    job = load_job(job_file)
    request = check_request(job)
    run, _ = open_run(job, request.fingerprint)
    records = []
    for ref in request.scenes:
        scene = create_stages(prepare_scene(job, read_card(job.model), ref, request.settings))
        predict_blocks(scene, list(scene.plan.blocks.indices()))
        finish_labels(scene)
        measured, done = measure_scene(scene)
        files = export_scene(scene, measured, run)
        records.append(done_record(scene, measured, files, {"measure": done}))
    return run, finish_run(run, request, records)
