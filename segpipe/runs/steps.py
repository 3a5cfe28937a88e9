"""Run one scene: begin, compute, complete. What kind of scene it is, is decided once, when it begins."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from segpipe.config.job import SceneKind
from segpipe.export.run_folder import RunFolder
from segpipe.export.scene_files import done_record, drop_unkept, export_scene
from segpipe.pipeline.given_scene import LabelledScene, prepare_labelled
from segpipe.pipeline.measure import measure_scene
from segpipe.pipeline.model_scene import Scene, create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.pipeline.progress import Done, Pace, together
from segpipe.pipeline.scene import MeasurableScene
from segpipe.pipeline.unmeasured import UnmeasuredError, without
from segpipe.runs.check import ResolvedJob
from segpipe.runs.references import note_stages
from segpipe.sources import SceneRef
from segpipe.store.stop import StopToken
from segpipe.tables.record import SceneRecord

if TYPE_CHECKING:
    from segpipe.prompts.prompt_scene import PromptScene

S = TypeVar("S", bound=MeasurableScene)
Progress = Callable[[int, int], None]
"""Told the blocks (or windows) of the scene that are done, and how many there are."""


class SceneSteps(ABC, Generic[S]):
    """The steps from a scene to its labels, which differ by where the labels come from."""

    @abstractmethod
    def begin(self, resolved: ResolvedJob, ref: SceneRef) -> S:
        """Open, check and plan a scene; make the stages of its model."""

    def compute(self, scene: S, stop: StopToken | None, progress: Progress) -> Done:
        """Compute what the scene lacks before its labels are finished; given labels lack nothing."""
        return Done(0, 0, 0.0, {})

    def finish(self, scene: S, computed: Done) -> dict[str, Done]:
        """Finish the labels; the steps up to here."""
        return {}


class _Given(SceneSteps[LabelledScene]):
    def begin(self, resolved: ResolvedJob, ref: SceneRef) -> LabelledScene:
        return prepare_labelled(resolved.job, ref)


class _Predicted(SceneSteps[Scene]):
    def begin(self, resolved: ResolvedJob, ref: SceneRef) -> Scene:
        assert resolved.card is not None
        scene = prepare_scene(resolved.job, resolved.card, ref, resolved.settings)
        return create_stages(scene)

    def compute(self, scene: Scene, stop: StopToken | None, progress: Progress) -> Done:
        todo, total = pending_blocks(scene), scene.plan.blocks.count
        reused = total - len(todo)
        parts = []
        if todo:
            parts.append(predict_blocks(scene, todo, stop, progress=lambda n: progress(reused + n, total)))
        return together(parts, reused)

    def finish(self, scene: Scene, computed: Done) -> dict[str, Done]:
        return {"predict": computed, "clean-up": finish_labels(scene)}


class _Prompted(SceneSteps["PromptScene"]):
    """Imports what it needs where it needs it: other jobs do without the modules of prompts."""

    def begin(self, resolved: ResolvedJob, ref: SceneRef) -> PromptScene:
        from segpipe.prompts.prompt_scene import create_grounder, prepare_prompts

        return create_grounder(prepare_prompts(resolved.job, ref, resolved.settings))

    def compute(self, scene: PromptScene, stop: StopToken | None, progress: Progress) -> Done:
        from segpipe.prompts.segment_scene import answer_scene

        return answer_scene(scene, stop, progress)

    def finish(self, scene: PromptScene, computed: Done) -> dict[str, Done]:
        from segpipe.prompts.build_objects import build_objects

        return {"answer": computed, "objects": build_objects(scene)}


STEPS: Mapping[SceneKind, SceneSteps[Any]] = {
    "given": _Given(),
    "predicted": _Predicted(),
    "prompted": _Prompted(),
}
"""By `Job.kind`."""


def begin_scene(resolved: ResolvedJob, ref: SceneRef, run: RunFolder) -> MeasurableScene:
    """Open, check and plan a scene; make the stages of its model.

    What the run needs of the store is noted: it stays until the run is finished.

    Raises:
        SceneError, RequestError.
    """
    scene: MeasurableScene = STEPS[resolved.job.kind].begin(resolved, ref)
    note_stages(run, scene)
    return scene


def compute_scene(
    scene: MeasurableScene, stop: StopToken | None = None, progress: Progress = lambda done, total: None
) -> Done:
    """Compute what a scene lacks before its labels are finished, in this process; given labels lack nothing.

    Raises:
        SceneError, StoppedError, DeviceMemoryError.
    """
    return STEPS[scene.job.kind].compute(scene, stop, progress)


def complete_scene(
    scene: MeasurableScene, run: RunFolder, computed: Done, stop: StopToken | None = None
) -> SceneRecord:
    """Finish the labels of a scene whose blocks or prompts are all computed; measure and export it.

    What cannot be measured is left out and told in the record; the map is written without it. The scene has
    failed then, and keeps its stages: once the cause is gone it is measured without predicting again.

    Raises:
        SceneError, StoppedError.
    """
    steps = STEPS[scene.job.kind].finish(scene, computed)
    unmeasured: dict[str, str] = {}
    may_pass = True
    while True:
        try:
            measured, steps["measure"] = measure_scene(scene, stop, unmeasured)
            note_stages(run, scene, measured.stage)
            begun = time.perf_counter()
            files = export_scene(scene, measured, run)
            break
        except UnmeasuredError as error:
            if error.part in unmeasured:
                raise
            unmeasured[error.part] = str(error)
            may_pass &= error.may_pass
            scene = without(scene, error.part)
    steps["export"] = Done(1, 0, time.perf_counter() - begun, {})
    record = done_record(scene, measured, files, steps, unmeasured)
    if record.state == "failed":
        return replace(record, may_pass=may_pass and not measured.damaged)
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
    scene = begin_scene(resolved, ref, run)
    if isinstance(scene, Scene) and pace.of(scene, len(pending_blocks(scene))) > most:
        return None
    computed = compute_scene(scene, stop)
    pace.note(computed)
    return complete_scene(scene, run, computed, stop)
