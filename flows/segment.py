"""The segmentation flow: rasters and volumes alike, one task per batch of blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID

from prefect import Flow, State, flow, get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import FlowRun
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed
from prefect.task_runners import TaskRunner

from flows.runners import task_runner
from segpipe.config import Job, Runner
from segpipe.deliver import failed_record
from segpipe.errors import SegpipeError
from segpipe.plan import Index
from segpipe.report.record import RunRecord, SceneRecord
from segpipe.request import Request, check_request
from segpipe.run import Run, open_run
from segpipe.scene import Scene, pending_blocks
from segpipe.sources import SceneRef
from segpipe.steps import Done, batches_of
from segpipe.store import clear_stop, request_stop
from tasks.report import write_report
from tasks.scenes import finish_scene, plan_scene, predict_batch
from tasks.told import OUT_OF_MEMORY


def stop_workers(_: Flow[..., Any], run: FlowRun, state: State[Any]) -> None:
    """Cancellation: ask every worker of this run, wherever it is, to stop before its next block."""
    job = Job.model_validate(run.parameters["job"])
    request_stop(job.outputs.dir, str(run.id))


@flow(name="segment", flow_run_name="{job.name}", on_cancellation=[stop_workers], on_crashed=[stop_workers])
def segment(job: Job) -> State[Any]:
    """Segment scenes and report areas, volumes and overlap per region.

    Finds the scenes, cuts each into blocks, runs the model over those that are not done yet,
    measures and exports, and writes one report. A scene that fails does not stop the others; the
    run then ends as Failed. Running the same job again computes only what is missing.
    """
    try:
        request = check_request(job)
        runner = task_runner(job.compute)
    except SegpipeError as error:
        return Failed(message=str(error))
    run, before = open_run(job, request.mark)
    logger = get_run_logger()
    if before is not None and not before.failed and len(before.done) == len(request.scenes):
        return Completed(message=f"nothing to do: {run.report} has all {len(before.done)} scenes")
    logger.info("%d scenes, results in %s", len(request.scenes), run.location)
    run_id = str(flow_run.get_id())
    with runner:
        try:
            records = _Segmentation(request, run, run_id, runner).records()
        except BaseException:
            request_stop(job.outputs.dir, run_id)  # before the runner waits for what is in flight
            raise
        ended = runner.submit(
            write_report,
            {"run": run, "job": job, "settings": request.settings, "scenes": records},
        ).result()
    clear_stop(job.outputs.dir, run_id)
    return _end(run, ended)


def _end(run: Run, record: RunRecord) -> State[Any]:
    failed = [f"{s.name}: {s.error}" for s in record.failed]
    if failed:
        return Failed(
            message=f"{len(failed)} of {len(record.scenes)} scenes failed ({'; '.join(failed[:5])}); "
            f"report: {run.report}"
        )
    return Completed(message=f"{len(record.done)} scenes done; report: {run.report}")


@dataclass
class _Active:
    """A scene whose batches are with the workers."""

    ref: SceneRef
    scene: Scene
    batches: list[list[Index]]
    futures: list[PrefectFuture[Any]] = field(default_factory=list)
    reused: int = 0


@dataclass
class _Segmentation:
    """All scenes of a request through a runner, a bounded number of tasks in flight."""

    request: Request
    run: Run
    run_id: str
    runner: TaskRunner[Any]

    def __post_init__(self) -> None:
        job = self.request.job
        per_worker = 2 if job.compute.runner is Runner.dask else 1  # a cluster keeps one waiting
        self._limit = job.compute.workers * per_worker
        self._in_flight: deque[PrefectFuture[Any]] = deque()
        self._finishing: deque[tuple[SceneRef, PrefectFuture[Any] | SceneRecord]] = deque()
        self._records: dict[str, SceneRecord] = {}
        self._progress: UUID = create_progress_artifact(0, description=f"{self.run.job}: scenes done")

    def records(self) -> list[SceneRecord]:
        """Work through the scenes; their records in the order given."""
        active: deque[_Active] = deque()
        for ref in self.request.scenes:
            started = self._begin(ref)
            if isinstance(started, SceneRecord):
                self._finishing.append((ref, started))
            else:
                active.append(started)
            while len(active) > self.request.job.compute.workers:
                self._conclude(active.popleft())
            self._collect(keep=self.request.job.compute.workers)
        while active:
            self._conclude(active.popleft())
        self._collect(keep=0)
        return [self._records[ref.name] for ref in self.request.scenes]

    def _begin(self, ref: SceneRef, batch: int | None = None) -> _Active | SceneRecord:
        """Plan a scene and send its batches, as places in flight come free."""
        job, settings = self.request.job, self.request.settings
        if batch is not None:
            settings = replace(settings, batch=batch)
        planned = self.runner.submit(plan_scene, {"job": job, "ref": ref, "settings": settings})
        planned.wait()
        if not planned.state.is_completed():
            return failed_record(ref, planned.state.message or "failed")
        scene: Scene = planned.result()
        todo = pending_blocks(scene)
        batches = batches_of(scene, todo, job.compute.batch_minutes)
        logger = get_run_logger()
        logger.info(
            "%s: %d of %d blocks to compute, in %d batches",
            ref.name, len(todo), scene.plan.blocks.count, len(batches),
        )  # fmt: skip
        started = _Active(ref, scene, batches, reused=scene.plan.blocks.count - len(todo))
        task = predict_batch.with_options(retries=job.compute.retries)
        for blocks in batches:
            self._wait_for_place()
            if any(f.state.is_failed() or f.state.is_crashed() for f in started.futures):
                break
            future = self.runner.submit(task, {"scene": scene, "blocks": blocks, "run_id": self.run_id})
            started.futures.append(future)
            self._in_flight.append(future)
        return started

    def _wait_for_place(self) -> None:
        while len(self._in_flight) >= self._limit:
            self._in_flight.popleft().wait()

    def _conclude(self, active: _Active) -> None:
        """Wait for a scene's batches, then have it finished (or begun again in smaller batches)."""
        for future in active.futures:
            future.wait()
        bad = [f.state for f in active.futures if not f.state.is_completed()]
        if any(state.name == OUT_OF_MEMORY for state in bad) and active.scene.settings.batch > 1:
            half = active.scene.settings.batch // 2
            get_run_logger().warning("%s: out of memory, again with batches of %d", active.ref.name, half)
            again = self._begin(active.ref, half)
            if isinstance(again, SceneRecord):
                self._finishing.append((active.ref, again))
            else:
                self._conclude(again)
            return
        if bad:
            self._finishing.append((active.ref, failed_record(active.ref, bad[0].message or "failed")))
            return
        parameters = {
            "scene": active.scene,
            "run": self.run,
            "predicted": {"predict": _sum([f.result() for f in active.futures], active.reused)},
            "run_id": self.run_id,
        }
        self._finishing.append((active.ref, self.runner.submit(finish_scene, parameters)))

    def _collect(self, keep: int) -> None:
        """Take the records of finished scenes until at most ``keep`` are outstanding."""
        while len(self._finishing) > keep:
            ref, ended = self._finishing.popleft()
            if not isinstance(ended, SceneRecord):
                ended.wait()
                completed = ended.state.is_completed()
                ended = ended.result() if completed else failed_record(ref, ended.state.message or "failed")
            self._records[ref.name] = ended
            self._say(ended)

    def _say(self, record: SceneRecord) -> None:
        done, of = len(self._records), len(self.request.scenes)
        update_progress_artifact(self._progress, progress=100 * done / of)
        what = record.state if record.state == "done" else f"failed: {record.error}"
        get_run_logger().info("scene %d of %d, %s: %s", done, of, record.name, what)


def _sum(parts: Sequence[Done], reused: int) -> Done:
    """What all batches of a scene did together."""
    names: Iterator[str] = iter(sorted({name for p in parts for name in p.timings}))
    timings = {name: sum(p.timings.get(name, 0.0) for p in parts) for name in names}
    return Done(
        sum(p.computed for p in parts),
        reused + sum(p.reused for p in parts),
        sum(p.seconds for p in parts),
        timings,
    )
