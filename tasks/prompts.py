"""The steps of a scene that is asked for objects, as tasks. No image arithmetic here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from segpipe.pipeline.progress import Done
from segpipe.prompts.collect_prompts import collect_prompts
from segpipe.prompts.grounding.detect_scene import DetectorScene, detect_windows
from segpipe.prompts.prompt_scene import PromptScene
from segpipe.prompts.segment_scene import (
    Round,
    create_mask_stages,
    next_round,
    segment_volume,
    segment_windows,
)
from segpipe.store.stop import StopToken
from segpipe.tiling.pyramid import Window
from segpipe_tasks.scenes import BACKOFF, RETRIES
from segpipe_tasks.told import passing_fault, told

ONE_STEP: dict[str, Any] = {
    "retries": RETRIES,
    "retry_delay_seconds": BACKOFF,
    "retry_condition_fn": passing_fault,
    "cache_policy": NO_CACHE,
}


@task(name="detect batch", task_run_name="look for phrases in {scene.ref.name}, {part}", **ONE_STEP)
@told
def detect_batch(scene: DetectorScene, windows: Sequence[Window], part: str, stop: StopToken) -> int:
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
def segment_batch(
    scene: PromptScene, number: int, windows: Sequence[Window], part: str, stop: StopToken
) -> Done:
    """Encode a batch of windows where that is needed, and ask them."""
    return segment_windows(scene, number, windows, stop, task_run.get_run_count() or 1)


@task(name="answer volume", task_run_name="answer {scene.ref.name}", **ONE_STEP)
@told
def propagate_volume(scene: PromptScene, part: str, stop: StopToken) -> Done:
    """Follow every object through a volume, slice by slice."""
    return segment_volume(scene, stop)
