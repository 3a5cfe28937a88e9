"""Run one scene: begin, compute, complete. What kind of scene it is, is decided once, when it begins."""

from __future__ import annotations

import time
from collections.abc import Callable

from segpipe.export.run_folder import RunFolder
from segpipe.export.scene import done_record, drop_unkept, export_scene
from segpipe.pipeline.given_scene import prepare_labelled
from segpipe.pipeline.measure import check_measure, measure_scene
from segpipe.pipeline.model_scene import Scene, create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.pipeline.progress import Done, Pace, together
from segpipe.pipeline.scene import MeasurableScene
from segpipe.runs.check import ResolvedJob
from segpipe.sources import SceneRef
from segpipe.store.stage import StopToken
from segpipe.tables.record import SceneRecord

Progress = Callable[[int, int], None]
"""Told the blocks (or windows) of the scene that are done, and how many there are."""


def begin_scene(resolved: ResolvedJob, ref: SceneRef) -> MeasurableScene:
    """Open, check and plan a scene, regions and reference too; make the stages of its model.

    Raises:
        SceneError, RequestError.
    """
    job, card = resolved.job, resolved.card
    if card is None:
        given = prepare_labelled(job, ref)
        check_measure(given)
        return given
    if card.answers_prompts:
        from segpipe.prompts.prompt_scene import create_grounder, prepare_prompts  # loads torch

        prompted = prepare_prompts(job, ref, resolved.settings)
        check_measure(prompted)
        return create_grounder(prompted)
    scene = prepare_scene(job, card, ref, resolved.settings)
    check_measure(scene)
    return create_stages(scene)


def compute_scene(
    scene: MeasurableScene, stop: StopToken | None = None, progress: Progress = lambda done, total: None
) -> Done:
    """Compute what a scene lacks before its labels are finished, in this process; given labels lack nothing.

    Raises:
        SceneError, StoppedError, DeviceMemoryError.
    """
    if isinstance(scene, Scene):
        todo, total = pending_blocks(scene), scene.plan.blocks.count
        reused = total - len(todo)
        parts = []
        if todo:
            parts.append(predict_blocks(scene, todo, stop, progress=lambda n: progress(reused + n, total)))
        return together(parts, reused)
    if scene.prompted:
        from segpipe.prompts.prompt_scene import PromptScene  # loads torch
        from segpipe.prompts.segment_scene import answer_scene

        assert isinstance(scene, PromptScene)
        return answer_scene(scene, stop, progress)
    return Done(0, 0, 0.0, {})


def complete_scene(
    scene: MeasurableScene, run: RunFolder, computed: Done, stop: StopToken | None = None
) -> SceneRecord:
    """Finish the labels of a scene whose blocks or prompts are all computed; measure and export it.

    Raises:
        SceneError, StoppedError.
    """
    steps: dict[str, Done] = {}
    if isinstance(scene, Scene):
        steps = {"predict": computed, "clean-up": finish_labels(scene)}
    elif scene.prompted:
        from segpipe.prompts.build_objects import build_objects  # loads torch
        from segpipe.prompts.prompt_scene import PromptScene

        assert isinstance(scene, PromptScene)
        steps = {"answer": computed, "objects": build_objects(scene)}
    measured, steps["measure"] = measure_scene(scene, stop)
    begun = time.perf_counter()
    files = export_scene(scene, measured, run)
    steps["export"] = Done(1, 0, time.perf_counter() - begun, {})
    record = done_record(scene, measured, files, steps)
    if isinstance(scene, Scene):
        drop_unkept(scene)
    return record


def run_small_scene(
    resolved: ResolvedJob,
    ref: SceneRef,
    run: RunFolder,
    stop: StopToken | None,
    pace: Pace,
    most: float,
) -> SceneRecord | None:
    """Run a scene from the plan to its files if it is small; else make only its plan and return None.

    Args:
        resolved: the job.
        ref: the scene.
        run: where its files go.
        stop: looked at before every block.
        pace: throughput of blocks so far; this scene's are noted.
        most: seconds that its blocks may take.

    Raises:
        SceneError, RequestError, StoppedError, DeviceMemoryError.
    """
    scene = begin_scene(resolved, ref)
    if isinstance(scene, Scene) and pace.of(scene, len(pending_blocks(scene))) > most:
        return None
    computed = compute_scene(scene, stop)
    pace.note(computed)
    return complete_scene(scene, run, computed, stop)
