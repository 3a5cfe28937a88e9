"""The steps of a scene that is asked for objects, as tasks. No image arithmetic here."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from segpipe.config.job import Job
from segpipe.export.run_folder import Run
from segpipe.export.scene import done_record, export_scene
from segpipe.inference.settings import Settings
from segpipe.pipeline.measure import check_measure, measure_scene
from segpipe.pipeline.model_scene import Scene, create_stages
from segpipe.pipeline.progress import Done, together
from segpipe.prompts.build_objects import build_objects
from segpipe.prompts.collect_prompts import collect_prompts
from segpipe.prompts.grounding.detect_scene import DetectorScene, detect_windows
from segpipe.prompts.prompt_scene import PromptScene, prepare_prompts
from segpipe.prompts.segment_windows import Round, create_mask_stages, next_round, segment_windows
from segpipe.prompts.volumes.segment_volume import segment_volume
from segpipe.sources import SceneRef
from segpipe.tables.record import SceneRecord
from segpipe.tiling.pyramid import Window
from tasks.scenes import BACKOFF, RETRIES
from tasks.told import passing_fault, told

ONE_STEP: dict[str, Any] = {
    "retries": RETRIES,
    "retry_delay_seconds": BACKOFF,
    "retry_condition_fn": passing_fault,
    "cache_policy": NO_CACHE,
}


@task(name="plan prompts", task_run_name="plan {ref.name}", **ONE_STEP)
@told
def plan_prompts(job: Job, ref: SceneRef, settings: Settings) -> PromptScene:
    """Open, check and key a scene, regions and reference too; make the stages of what finds phrases."""
    scene = prepare_prompts(job, ref, settings)
    check_measure(scene)
    if isinstance(scene.grounder, DetectorScene):
        scene.grounder.create()
    elif isinstance(scene.grounder, Scene):
        create_stages(scene.grounder)
    return scene


@task(name="detect batch", task_run_name="look for phrases in {scene.ref.name}, {part}", **ONE_STEP)
@told
def detect_batch(scene: DetectorScene, windows: Sequence[Window], part: str, stop: str) -> int:
    """Look for the phrases in a batch of windows."""
    return detect_windows(scene, windows, stop)


@task(name="collect_prompts prompts", task_run_name="collect_prompts prompts of {scene.ref.name}", **ONE_STEP)
@told
def collect_scene_prompts(scene: PromptScene, found: Sequence[Any]) -> int:
    """Read files, ground phrases, number everything; how many objects are asked for.

    Args:
        found: what the grounder's batches did: it is waited for.
    """
    asked = collect_prompts(scene)
    create_mask_stages(scene)
    return len(asked)


@task(name="plan round", task_run_name="plan windows of {scene.ref.name}", **ONE_STEP)
@told
def plan_round(scene: PromptScene, number: int) -> Round | None:
    """Which windows are asked next; None: all is answered."""
    return next_round(scene, number)


@task(
    name="answer batch",
    task_run_name="answer {scene.ref.name}, {part}",
    retry_condition_fn=passing_fault,
    cache_policy=NO_CACHE,
)
@told
def segment_batch(scene: PromptScene, number: int, windows: Sequence[Window], part: str, stop: str) -> Done:
    """Encode a batch of windows where that is needed, and ask them."""
    return segment_windows(scene, number, windows, stop, task_run.get_run_count() or 1)


@task(name="answer volume", task_run_name="answer {scene.ref.name}", **ONE_STEP)
@told
def propagate_volume(scene: PromptScene, part: str, stop: str) -> Done:
    """Follow every object through a volume, slice by slice."""
    return segment_volume(scene, stop)


@task(name="finish prompts", task_run_name="finish {scene.ref.name}", **ONE_STEP)
@told
def finish_prompts(scene: PromptScene, run: Run, answered: Sequence[Done], stop: str) -> SceneRecord:
    """Merge and paint the objects of a scene that is answered; measure and export them."""
    steps = {"answer": together(answered, 0), "objects": build_objects(scene)}
    measured, steps["measure"] = measure_scene(scene, stop)
    begun = time.perf_counter()
    files = export_scene(scene, measured, run)
    steps["export"] = Done(1, 0, time.perf_counter() - begun, {})
    return done_record(scene, measured, files, steps)
