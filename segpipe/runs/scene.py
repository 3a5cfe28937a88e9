"""A scene from the plan to the files, in one call or in the three that large scenes are done by."""

from __future__ import annotations

import time

from segpipe.config.job import Job
from segpipe.export.scene import (done_record, drop_unkept, export_scene)
from segpipe.pipeline.given_scene import prepare_labelled
from segpipe.pipeline.scene import MeasurableScene
from segpipe.pipeline.measure import (check_measure, measure_scene)
from segpipe.pipeline.progress import (Done, Pace, together)
from segpipe.tables.record import SceneRecord
from segpipe.export.run_folder import Run
from segpipe.pipeline.model_scene import (Scene, create_stages, pending_blocks, prepare_scene)
from segpipe.inference.settings import Settings
from segpipe.sources import SceneRef
from segpipe.pipeline.predict import (finish_labels, predict_blocks)


def begin_scene(job: Job, ref: SceneRef, settings: Settings) -> MeasurableScene:
    """Open, check and plan a scene, regions and reference too; make the stages of a model.

    Raises:
        SceneError, RequestError.
    """
    if job.labels:
        given = prepare_labelled(job, ref)
        check_measure(given)
        return given
    scene = prepare_scene(job, ref, settings)
    check_measure(scene)
    return create_stages(scene)


def complete_scene(scene: MeasurableScene, run: Run, predicted: Done, stop: str) -> SceneRecord:
    """Clean up, measure and export a scene whose blocks are all predicted, or whose labels are given.

    Raises:
        SceneError, StoppedError.
    """
    steps: dict[str, Done] = {}
    if isinstance(scene, Scene):
        steps = {"predict": predicted, "clean-up": finish_labels(scene)}
    measured, steps["measure"] = measure_scene(scene, stop)
    begun = time.perf_counter()
    files = export_scene(scene, measured, run)
    steps["export"] = Done(1, 0, time.perf_counter() - begun, {})
    record = done_record(scene, measured, files, steps)
    if isinstance(scene, Scene):
        drop_unkept(scene)
    return record


def whole_scene(
    job: Job, ref: SceneRef, settings: Settings, run: Run, stop: str, pace: Pace, most: float
) -> SceneRecord | None:
    """Do a scene if it is small.

    Args:
        pace: of blocks so far; this scene's are noted.
        most: seconds that its blocks may take; None is answered for larger ones, of which only the
            plan is made.

    Raises:
        SceneError, RequestError, StoppedError, DeviceMemoryError.
    """
    scene = begin_scene(job, ref, settings)
    predicted = Done(0, 0, 0.0, {})
    if isinstance(scene, Scene):
        todo = pending_blocks(scene)
        if pace.of(scene, len(todo)) > most:
            return None
        parts = [predict_blocks(scene, todo, stop)] if todo else []
        for part in parts:
            pace.note(part)
        predicted = together(parts, scene.plan.blocks.count - len(todo))
    return complete_scene(scene, run, predicted, stop)
