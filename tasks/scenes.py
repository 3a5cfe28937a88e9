"""The steps of one scene as tasks. No image arithmetic here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from prefect.tasks import exponential_backoff

from segpipe.errors import DeviceMemoryError, LeaseLostError, SegpipeError, StoppedError
from segpipe.export.run_folder import RunFolder
from segpipe.export.scene_files import failed_record
from segpipe.lake.ledger import Receipts
from segpipe.pipeline.model_scene import Scene
from segpipe.pipeline.predict import predict_blocks
from segpipe.pipeline.progress import Done, Pace, together
from segpipe.pipeline.scene import MeasurableScene
from segpipe.runs.check import ResolvedJob
from segpipe.runs.steps import begin_scene, complete_scene, run_small_scene
from segpipe.sources import SceneRef
from segpipe.store.stop import StopToken
from segpipe.tables.record import SceneRecord
from segpipe.tiling.windows import Index
from segpipe_tasks.told import PASSING, passing_fault, told

RETRIES = 2
"""Of planning and finishing; a batch has the job's, see `predict_batch_retried`."""
BACKOFF = exponential_backoff(backoff_factor=2)
"""2, 4, 8 … seconds."""
LARGE = 0.25
"""A scene that may take more than this share of a batch has task runs of its own."""


@task(
    name="plan scene",
    task_run_name="plan {ref.name}",
    retries=RETRIES,
    retry_delay_seconds=BACKOFF,
    retry_condition_fn=passing_fault,
    cache_policy=NO_CACHE,
)
@told
def plan_scene(resolved: ResolvedJob, ref: SceneRef, run: RunFolder) -> MeasurableScene:
    """Open, check and plan a scene, regions and reference too; make the stages of a model."""
    return begin_scene(resolved, ref, run)


@task(
    name="predict batch",
    task_run_name="predict {scene.ref.name}, {part}",
    retry_condition_fn=passing_fault,
    cache_policy=NO_CACHE,
)
@told
def predict_batch(scene: Scene, blocks: Sequence[Index], part: str, stop: StopToken) -> Done:
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
    scene: MeasurableScene, run: RunFolder, computed: Sequence[Done], reused: int, stop: StopToken
) -> SceneRecord:
    """Finish the labels of a scene, measure and export it."""
    return complete_scene(scene, run, together(computed, reused), stop)


@task(name="do scenes", task_run_name="{first} and {more} more", cache_policy=NO_CACHE)
@told
def do_scenes(
    resolved: ResolvedJob,
    refs: Iterable[SceneRef],
    run: RunFolder,
    stop: StopToken,
    receipts: Receipts | None,
    first: str,
    more: int,
) -> list[SceneRecord | None]:
    """Do small scenes from the plan to the files, one after the other; None: one to be done by itself.

    That is a large one, one that met a fault which may pass, or one that did not fit the device.

    Args:
        receipts: of a scan, written as scenes are done.
        first: name of the first, and `more`: how many others, both for the task run's name.
    """
    pace, most = Pace(), LARGE * 60 * resolved.job.compute.batch_minutes
    records: list[SceneRecord | None] = []
    for ref in refs:
        try:
            record = receipts.of(ref.name) if receipts else None  # Dask sent a lost worker's pack again
            if record is None:
                if receipts:
                    receipts.begin(ref.name)
                record = run_small_scene(resolved, ref, run, stop, pace, most)
                if receipts and record and record.state == "done":
                    receipts.finish(record)
            records.append(record)
        except LeaseLostError as error:  # of this scene alone; a run that is lost ends with the next one
            records.append(failed_record(ref, str(error)))
        except StoppedError:
            raise
        except (*PASSING, DeviceMemoryError):
            records.append(None)
        except SegpipeError as error:
            records.append(failed_record(ref, str(error)))
    return records
