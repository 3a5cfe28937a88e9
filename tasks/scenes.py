"""The steps of one scene as tasks. No image arithmetic here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from prefect.tasks import exponential_backoff

from segpipe.config import Job
from segpipe.deliver import attempts_of, done_record, drop_unkept, export_scene
from segpipe.measure import check_measure, measure_scene
from segpipe.plan import Index
from segpipe.report.record import SceneRecord
from segpipe.run import Run
from segpipe.scene import Scene, Settings, create_stages, prepare_scene
from segpipe.sources import SceneRef
from segpipe.steps import Done, finish_labels, predict_blocks
from tasks.told import passing_fault, told

SAY_EVERY = 5.0
"""Seconds between two lines of progress."""

_retried = {"retry_delay_seconds": exponential_backoff(2), "retry_condition_fn": passing_fault}


@task(name="plan scene", task_run_name="plan {ref.name}", retries=2, cache_policy=NO_CACHE, **_retried)
@told
def plan_scene(job: Job, ref: SceneRef, settings: Settings) -> Scene:
    """Open, check and plan a scene, regions and reference too; make its stages."""
    scene = prepare_scene(job, ref, settings)
    check_measure(scene)
    return create_stages(scene)


@task(name="predict batch", task_run_name="predict {scene.ref.name}", cache_policy=NO_CACHE, **_retried)
@told
def predict_batch(scene: Scene, blocks: Sequence[Index], run_id: str) -> Done:
    """Compute a batch of blocks: read, forward, stitch, write."""
    logger = get_run_logger()
    last = time.monotonic()

    def progress(finished: int) -> None:
        nonlocal last
        if time.monotonic() - last >= SAY_EVERY:
            last = time.monotonic()
            logger.info("%s: %d of %d blocks of this batch", scene.ref.name, finished, len(blocks))

    return predict_blocks(scene, blocks, run_id, task_run.get_run_count() or 1, progress)


@task(
    name="finish scene", task_run_name="finish {scene.ref.name}", retries=2, cache_policy=NO_CACHE, **_retried
)
@told
def finish_scene(scene: Scene, run: Run, predicted: Mapping[str, Done], run_id: str) -> SceneRecord:
    """Clean up, measure and export a scene whose blocks are all predicted."""
    steps = dict(predicted)
    steps["clean-up"] = finish_labels(scene)
    measured, steps["measure"] = measure_scene(scene, run_id)
    begun = time.perf_counter()
    files = export_scene(scene, measured, run)
    steps["export"] = Done(1, 0, time.perf_counter() - begun, {})
    record = done_record(scene, measured, files, steps, attempts_of(scene))
    drop_unkept(scene)
    return record
