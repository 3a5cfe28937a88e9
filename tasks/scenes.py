"""The steps of one scene as tasks. No image arithmetic here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from prefect.tasks import exponential_backoff

from segpipe.config import Job
from segpipe.deliver import attempts_of, done_record, drop_unkept, export_scene
from segpipe.labelled import MeasurableScene, prepare_labelled
from segpipe.lattice import Index
from segpipe.measure import check_measure, measure_scene
from segpipe.report.record import SceneRecord
from segpipe.run import Run
from segpipe.scene import Scene, create_stages, prepare_scene
from segpipe.settings import Settings
from segpipe.sources import SceneRef
from segpipe.steps import Done, finish_labels, predict_blocks, together
from tasks.told import passing_fault, told

RETRIES = 2
"""Of planning and finishing; a batch has the job's, see `predict_batch_retried`."""
BACKOFF = exponential_backoff(backoff_factor=2)
"""2, 4, 8 … seconds."""


@task(
    name="plan scene",
    task_run_name="plan {ref.name}",
    retries=RETRIES,
    retry_delay_seconds=BACKOFF,
    retry_condition_fn=passing_fault,
    cache_policy=NO_CACHE,
)
@told
def plan_scene(job: Job, ref: SceneRef, settings: Settings) -> MeasurableScene:
    """Open, check and plan a scene, regions and reference too; make the stages of a model."""
    if job.labels:
        given = prepare_labelled(job, ref)
        check_measure(given)
        return given
    scene = prepare_scene(job, ref, settings)
    check_measure(scene)
    return create_stages(scene)


@task(
    name="predict batch",
    task_run_name="predict {scene.ref.name}, {part}",
    retry_condition_fn=passing_fault,
    cache_policy=NO_CACHE,
)
@told
def predict_batch(scene: Scene, blocks: Sequence[Index], part: str, stop: str) -> Done:
    """Compute a batch of blocks: read, forward, stitch, write."""
    return predict_blocks(scene, blocks, stop, task_run.get_run_count() or 1)


def retried(step: Task[..., Any], retries: int) -> Task[..., Any]:
    """A task with a job's own number of retries; Prefect works the delays out only when told again."""
    return step.with_options(retries=retries, retry_delay_seconds=BACKOFF)


@task(
    name="finish scene",
    task_run_name="finish {scene.ref.name}",
    retries=RETRIES,
    retry_delay_seconds=BACKOFF,
    retry_condition_fn=passing_fault,
    cache_policy=NO_CACHE,
)
@told
def finish_scene(
    scene: MeasurableScene, run: Run, predicted: Sequence[Done], reused: int, stop: str
) -> SceneRecord:
    """Clean up, measure and export a scene whose blocks are all predicted, or whose labels are given."""
    steps: dict[str, Done] = {}
    if isinstance(scene, Scene):
        steps = {"predict": together(predicted, reused), "clean-up": finish_labels(scene)}
    measured, steps["measure"] = measure_scene(scene, stop)
    begun = time.perf_counter()
    files = export_scene(scene, measured, run)
    steps["export"] = Done(1, 0, time.perf_counter() - begun, {})
    record = done_record(scene, measured, files, steps, attempts_of(scene))
    if isinstance(scene, Scene):
        drop_unkept(scene)
    return record
