"""Say what a job would take, scene by scene, without doing it: windows, blocks, memory, disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from obstore.exceptions import BaseError as StorageError

from segpipe.config.job import Job, SceneKind
from segpipe.errors import RequestError, SegpipeError
from segpipe.metrics.tally import measure_tiles
from segpipe.pipeline.given_scene import prepare_labelled
from segpipe.pipeline.measure import check_measure
from segpipe.pipeline.model_scene import dry_plan
from segpipe.pipeline.scene import open_scene
from segpipe.sources import SceneRef
from segpipe.store.location import free_bytes
from segpipe.tables.units import byte_size
from segpipe.tiling.plan import Plan

if TYPE_CHECKING:
    from segpipe.runs.check import ResolvedJob


@dataclass(frozen=True)
class ScenePlan:
    """What one scene would take."""

    scene: str
    text: str
    """In a line; of a scene that cannot be planned, why."""
    failed: bool = False
    numbers: dict[str, Any] = field(default_factory=dict)
    """Blocks, windows, passes, memory and disk in bytes, as `segpipe.tiling.plan.Plan.summary`, and the run
    folder's as ``run_bytes``; empty where no windows are planned."""


def plan_scenes(resolved: ResolvedJob) -> Iterator[ScenePlan]:
    """The plan of each scene of a job, as it is made; nothing is written."""
    for ref in resolved.scenes:
        try:
            yield PLANS[resolved.job.kind](resolved, ref)
        except SegpipeError as error:
            yield ScenePlan(ref.name, " ".join(str(error).split()), failed=True)
        except (OSError, MemoryError, StorageError) as error:
            yield ScenePlan(ref.name, f"{type(error).__name__}: {error}", failed=True)


def check_scenes(resolved: ResolvedJob) -> None:
    """Hold a request against its scenes until one suits it; a scene that does not suit it fails alone.

    Raises:
        RequestError: no scene that can be opened suits the request: what is wrong is wrong with the request.
    """
    told = []
    for ref in resolved.scenes:
        try:
            PLANS[resolved.job.kind](resolved, ref)
        except SegpipeError as error:
            if _opens(resolved.job, ref):
                told.append(f"{ref.name}: {error}")
        except (OSError, MemoryError, StorageError):  # may do better another time
            return
        else:
            return
    if told:
        raise RequestError(told[0])


def _opens(job: Job, ref: SceneRef) -> bool:
    """Whether a scene itself can be read, as far as its header tells."""
    try:
        open_scene(job, ref).close()
    except SegpipeError:
        return False
    return True


def forecast(resolved: ResolvedJob, plans: Sequence[ScenePlan]) -> tuple[str, bool]:
    """What a run takes of its disk in a line, at most, and whether that surely fits; empty: nobody knows.

    Args:
        resolved: the job.
        plans: of its scenes.
    """
    out = resolved.job.outputs.dir
    numbers = [plan.numbers for plan in plans if plan.numbers]
    if not numbers:
        return "", True
    store, files = (sum(n[name] for n in numbers) for name in ("disk_bytes", "run_bytes"))
    free = free_bytes(out)
    room = "" if free is None else f"; {byte_size(free)} are free"
    line = f"disk: at most {byte_size(store)} in the store and {byte_size(files)} of files in {out}{room}"
    return line, free is None or store + files <= free


def _given(resolved: ResolvedJob, ref: SceneRef) -> ScenePlan:
    scene = check_measure(prepare_labelled(resolved.job, ref))
    tiles = sum(1 for _ in measure_tiles(scene.geometry))
    image = " and the image" if scene.job.measure.intensity else ""
    return ScenePlan(ref.name, f"{tiles:,} tiles to measure of {scene.labels}{image}")


def _predicted(resolved: ResolvedJob, ref: SceneRef) -> ScenePlan:
    assert resolved.card is not None
    plan = dry_plan(resolved.job, resolved.card, ref, resolved.settings)
    s = {**plan.summary(), "run_bytes": _run_bytes(plan, resolved.job)}
    text = (
        f"{s['blocks']:,} blocks of {s['block']}, {s['windows']:,} windows of {s['window']}, "
        f"{s['forward_passes']:,} passes (redundancy {s['redundancy']:.3f}), "
        f"memory {byte_size(s['memory_bytes'])}, store up to {byte_size(s['disk_bytes'])}, "
        f"files up to {byte_size(s['run_bytes'])}"
    )
    return ScenePlan(ref.name, text, numbers=s)


TILE = 512
"""Edge of the tiles that files are written in: a small raster takes a whole one."""
PAGES = 2**20
"""Bytes of a scene's pages, pictures and tables, about."""


def _run_bytes(plan: Plan, job: Job) -> int:
    """Upper bound of a scene's files while they are written: a draft, the file, a third for its overviews."""
    load, shape = plan.workload, plan.blocks.shape
    padded = math.prod(-(-n // TILE) * TILE if len(shape) == 2 else n for n in shape)
    formats = len(job.outputs.formats)
    per_element = load.label_itemsize * formats + 4.0 * (load.classes * load.keep_scores + load.uncertainty)
    return int(padded * per_element * (1 + 4 / 3)) + PAGES * bool(formats)


def _prompted(resolved: ResolvedJob, ref: SceneRef) -> ScenePlan:
    from segpipe.prompts.collect_prompts import prompt_line  # loads torch
    from segpipe.prompts.prompt_scene import prepare_prompts

    scene = check_measure(prepare_prompts(resolved.job, ref, resolved.settings))
    return ScenePlan(ref.name, prompt_line(scene))


PLANS: Mapping[SceneKind, Callable[[ResolvedJob, SceneRef], ScenePlan]] = {
    "given": _given,
    "predicted": _predicted,
    "prompted": _prompted,
}
