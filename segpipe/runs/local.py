"""Run a job in this process, without Prefect: the same steps, one scene after the other."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from obstore.exceptions import BaseError as StorageError

from segpipe.errors import DeviceMemoryError, FullError, SegpipeError, StoppedError
from segpipe.export.run_folder import RunFolder
from segpipe.export.scene_files import failed_record
from segpipe.runs.check import ResolvedJob
from segpipe.runs.find_run import open_run
from segpipe.runs.finish import finish_run
from segpipe.runs.steps import begin_scene, complete_scene, compute_scene
from segpipe.sources import SceneRef
from segpipe.store.location import store_named, store_reason
from segpipe.store.stop import StopToken
from segpipe.tables.record import RunRecord, SceneRecord


@dataclass(frozen=True)
class Progress:
    """How far a run is."""

    scene: str
    number: int
    """Of the scene, from 1."""
    scenes: int
    """Of the run."""
    done: int
    """Blocks, or windows of a round of prompts, of this scene that are computed."""
    total: int
    """Blocks or windows of this scene; 0 where its labels are given."""
    record: SceneRecord | None = None
    """What became of the scene, once it has ended."""


def run_local(
    resolved: ResolvedJob, progress: Callable[[Progress], None] = lambda step: None
) -> tuple[RunFolder, RunRecord]:
    """Run a job to its report; a scene that fails does not stop the others.

    A run of the same request that is finished is returned as it is; one that was stopped is resumed.

    Args:
        resolved: the job, checked (`segpipe.runs.check.check_request`).
        progress: called after each block and at the end of each scene.

    Returns:
        The folder of the run, and its record.

    Raises:
        KeyboardInterrupt, StoppedError, FullError: what is committed stays; the same call goes on from there.
    """
    run, before = open_run(resolved.job, resolved.fingerprint)
    if before is not None and not before.failed and len(before.done) == len(resolved.scenes):
        return run, before
    bare, count = resolved.without_scenes(), len(resolved.scenes)
    records = []
    with store_named(resolved.job.outputs.dir), _stop_token(resolved.job.outputs.dir) as stop:
        for number, ref in enumerate(resolved.scenes, start=1):

            def told(done: int, total: int, ref: SceneRef = ref, number: int = number) -> None:
                progress(Progress(ref.name, number, count, done, total))

            record = _run_scene(bare, ref, run, stop, told)
            records.append(record)
            progress(Progress(ref.name, number, count, 0, 0, record))
    with store_named(resolved.job.outputs.dir):
        return run, finish_run(run, resolved, records)


@contextmanager
def _stop_token(out: str) -> Iterator[StopToken]:
    """A name under which this run can be asked to stop, by whoever reads it in the store."""
    token = StopToken(out, f"local-{secrets.token_hex(8)}")
    try:
        yield token
    finally:
        token.forget()


def _run_scene(
    resolved: ResolvedJob,
    ref: SceneRef,
    run: RunFolder,
    stop: StopToken,
    progress: Callable[[int, int], None],
) -> SceneRecord:
    """Run one scene; on a device that is too small it begins again with half the batch."""
    try:
        scene = begin_scene(resolved, ref, run)
        return complete_scene(scene, run, compute_scene(scene, stop, progress), stop)
    except (StoppedError, FullError):  # no other scene would find room
        raise
    except DeviceMemoryError as error:
        if resolved.settings.batch == 1:
            return failed_record(ref, str(error))
        return _run_scene(resolved.with_batch(resolved.settings.batch // 2), ref, run, stop, progress)
    except SegpipeError as error:
        return failed_record(ref, str(error))
    except StorageError as error:  # may do better another time
        reason = f"{resolved.job.outputs.dir}: {store_reason(error)}"
        return replace(failed_record(ref, reason), may_pass=True)
    except (OSError, MemoryError) as error:
        return replace(failed_record(ref, f"{type(error).__name__}: {error}"), may_pass=True)
