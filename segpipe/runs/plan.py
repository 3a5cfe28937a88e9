"""Say what a job would take, scene by scene, without doing it: windows, blocks, memory, disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from segpipe.config.card import Card
from segpipe.config.job import Job
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
            yield _plan(resolved, ref)
        except SegpipeError as error:
            yield ScenePlan(ref.name, " ".join(str(error).split()), failed=True)


def _plan(resolved: ResolvedJob, ref: SceneRef) -> ScenePlan:
    job, card = resolved.job, resolved.card
    if card is None:
        return ScenePlan(ref.name, _labels_line(job, ref))
    if card.answers_prompts:
        from segpipe.prompts.collect_prompts import prompt_line  # loads torch

        return ScenePlan(ref.name, prompt_line(job, ref, resolved.settings))
    return _windows(resolved, card, ref)


def _labels_line(job: Job, ref: SceneRef) -> str:
    scene = prepare_labelled(job, ref)
    tiles = sum(1 for _ in measure_tiles(scene.geometry))
    image = " and the image" if job.measure.intensity else ""
    return f"{tiles:,} tiles to measure of {scene.labels}{image}"


def _windows(resolved: ResolvedJob, card: Card, ref: SceneRef) -> ScenePlan:
    s = dry_plan(resolved.job, card, ref, resolved.settings).summary()
    text = (
        f"{s['blocks']:,} blocks of {s['block']}, {s['windows']:,} windows of {s['window']}, "
        f"{s['forward_passes']:,} passes (redundancy {s['redundancy']:.3f}), "
        f"memory {byte_size(s['memory_bytes'])}, store up to {byte_size(s['disk_bytes'])}"
    )
    return ScenePlan(ref.name, text, numbers=s)
