"""Say what a job would take, scene by scene, without doing it: windows, blocks, memory, disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from segpipe.config.job import SceneKind
from segpipe.errors import SegpipeError
from segpipe.metrics.tally import measure_tiles
from segpipe.pipeline.given_scene import prepare_labelled
from segpipe.pipeline.model_scene import dry_plan
from segpipe.runs.check import ResolvedJob
from segpipe.sources import SceneRef
from segpipe.tables.units import byte_size


@dataclass(frozen=True)
class ScenePlan:
    """What one scene would take."""

    scene: str
    text: str
    """In a line; of a scene that cannot be planned, why."""
    failed: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    """Blocks, windows, passes, memory and disk in bytes, as `segpipe.tiling.plan.Plan.summary`; empty where
    no windows are planned."""


def plan_scenes(resolved: ResolvedJob) -> Iterator[ScenePlan]:
    """The plan of each scene of a job, as it is made; nothing is written."""
    for ref in resolved.scenes:
        try:
            yield PLANS[resolved.job.kind](resolved, ref)
        except SegpipeError as error:
            yield ScenePlan(ref.name, " ".join(str(error).split()), failed=True)


def _given(resolved: ResolvedJob, ref: SceneRef) -> ScenePlan:
    scene = prepare_labelled(resolved.job, ref)
    tiles = sum(1 for _ in measure_tiles(scene.geometry))
    image = " and the image" if scene.job.measure.intensity else ""
    return ScenePlan(ref.name, f"{tiles:,} tiles to measure of {scene.labels}{image}")


def _predicted(resolved: ResolvedJob, ref: SceneRef) -> ScenePlan:
    assert resolved.card is not None
    s = dry_plan(resolved.job, resolved.card, ref, resolved.settings).summary()
    text = (
        f"{s['blocks']:,} blocks of {s['block']}, {s['windows']:,} windows of {s['window']}, "
        f"{s['forward_passes']:,} passes (redundancy {s['redundancy']:.3f}), "
        f"memory {byte_size(s['memory_bytes'])}, store up to {byte_size(s['disk_bytes'])}"
    )
    return ScenePlan(ref.name, text, numbers=s)


def _prompted(resolved: ResolvedJob, ref: SceneRef) -> ScenePlan:
    from segpipe.prompts.collect_prompts import prompt_line  # loads torch

    return ScenePlan(ref.name, prompt_line(resolved.job, ref, resolved.settings))


PLANS: Mapping[SceneKind, Callable[[ResolvedJob, SceneRef], ScenePlan]] = {
    "given": _given,
    "predicted": _predicted,
    "prompted": _prompted,
}
