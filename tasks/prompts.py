"""The steps of a scene that is asked for objects, as tasks. No image arithmetic here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from segpipe.pipeline.progress import Done
from segpipe.prompts.collect_prompts import settle
from segpipe.prompts.grounding.detect_scene import Detecting, detect_windows
from segpipe.prompts.prompt_scene import PromptScene
from segpipe.prompts.segment_windows import Round, answer_windows, create_answers, next_round
from segpipe.prompts.volumes.segment_volume import answer_volume
from segpipe.store.stops import StopToken
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
def detect_batch(scene: Detecting, windows: Sequence[Window], part: str, stop: StopToken) -> int:
    """Look for the phrases in a batch of windows."""
    return detect_windows(scene, windows, stop)


@task(name="settle prompts", task_run_name="settle prompts of {scene.ref.name}", **ONE_STEP)
@told
def settle_prompts(scene: PromptScene, found: Sequence[Any]) -> int:
    """Read files, ground phrases, number everything; how many objects are asked for.

    Args:
        found: what the grounder's batches did: it is waited for.
    """
    asked = settle(scene)
    create_answers(scene)
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
def answer_batch(
    scene: PromptScene, number: int, windows: Sequence[Window], part: str, stop: StopToken
) -> Done:
    """Encode a batch of windows where that is needed, and ask them."""
    return answer_windows(scene, number, windows, stop, task_run.get_run_count() or 1)


@task(name="answer volume", task_run_name="answer {scene.ref.name}", **ONE_STEP)
@told
def answer_solid(scene: PromptScene, part: str, stop: StopToken) -> Done:
    """Follow every object through a volume, slice by slice."""
    return answer_volume(scene, stop)
