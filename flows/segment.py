"""The segmentation flow: rasters and volumes alike, one task per batch of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from uuid import UUID

from prefect import Flow, State, flow, get_run_logger, runtime
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelled, Completed, Failed

from segpipe.config.job import Job, Outputs
from segpipe.errors import RequestError, SegpipeError, StoppedError
from segpipe.export.run_folder import RunFolder
from segpipe.runs.check import check_request
from segpipe.runs.find_run import open_run
from segpipe.store.stop import StopToken
from segpipe.tables.record import RunRecord, SceneRecord
from segpipe_flows.dispatch import Dispatch
from segpipe_flows.here import handed_on, request_of
from segpipe_flows.names import run_name
from segpipe_flows.packs import Packs
from segpipe_flows.runners import check_cluster, task_runner
from segpipe_flows.watch import Watch
from segpipe_tasks.events import tell_scene
from segpipe_tasks.report import write_report
from segpipe_tasks.told import refused, told

FAILURES_TOLD = 5
"""Failed scenes named in the run's final message; the report has all."""


def stop_workers(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:
    """Cancelled or crashed: ask every worker of this run, wherever it is, to stop before its next block."""
    [asked] = flow_run.parameters.values()
    outputs = Outputs.model_validate(asked.get("outputs", {}))
    StopToken(outputs.dir, attempt_name(flow_run.id, flow_run.run_count)).request()


OF_REQUEST: dict[str, Any] = {
    "flow_run_name": run_name,
    "validate_parameters": False,  # `as_request` tells a mistake in one line
    "on_cancellation": [stop_workers],
    "on_crashed": [stop_workers],
}
"""Options of a flow that takes one request and has workers to stop."""


@flow(name="segment", **OF_REQUEST)
def segment(job: Job) -> State[Any]:
    """Segment scenes and report areas, volumes and overlap per region.

    Finds the scenes, cuts each into blocks, runs the model over those that are not done yet, measures,
    exports and writes one report. A scene that fails does not stop the others; the run then ends as
    Failed. Running the same job again computes only what is missing.

    Args:
        job: Which scenes, which model, what to report. Required: scenes, and a model or labels.
    """
    try:
        return carry_out(request_of(Job, job, "job"))
    except RequestError as error:
        return refused(error)


@told
def carry_out(job: Job) -> State[Any]:
    """The body of a flow over scenes: from the request to the report."""
    try:
        resolved = handed_on(job) or check_request(job)
        runner = task_runner(job.compute)
        check_cluster(job.compute, resolved.settings)
    except SegpipeError as error:
        return refused(error)
    run, before = open_run(job, resolved.fingerprint)
    if before is not None and not before.failed and len(before.done) == len(resolved.scenes):
        return Completed(message=f"nothing to do: {_scenes(len(before.done))} done, see {run.report}")
    get_run_logger().info("%s, results in %s", _scenes(len(resolved.scenes)), run.location)
    run_id, attempt = UUID(runtime.flow_run.get_id()), runtime.flow_run.get_run_count()
    try:
        with runner, stop_on_error(StopToken(job.outputs.dir, attempt_name(run_id, attempt))) as stop:
            watch = Watch(run_id, len(resolved.scenes))
            dispatch = Dispatch(resolved.without_scenes(), run, stop, runner, watch)
            found: dict[str, SceneRecord] = {}
            for record in Packs(dispatch).scenes(resolved.scenes):
                watch.end(record)
                tell_scene(run, record)
                found[record.name] = record
            records = [found[ref.name] for ref in resolved.scenes]
            parameters = {"run": run, "resolved": resolved.without_scenes(), "scenes": records}
            record = runner.submit(write_report, parameters).result()
    except (StoppedError, KeyboardInterrupt):
        return Cancelled(message="stopped; what is done stays, run the same job again to go on from there")
    return _end(run, record)


def attempt_name(run_id: UUID, attempt: int) -> str:
    """The name under which workers are asked to stop: a retry of the same flow run has another."""
    return f"{run_id}-{attempt}"


@contextmanager
def stop_on_error(token: StopToken) -> Iterator[StopToken]:
    """Ask the workers to stop if the block is left by any error, Ctrl-C and SIGTERM included.

    Inside the runner's own block: it waits for what is in flight when it is left.
    """
    token.forget()
    with ExitStack() as unless_done:
        unless_done.callback(token.request)
        yield token
        unless_done.pop_all()


def _end(run: RunFolder, record: RunRecord) -> State[Any]:
    if not record.failed:
        return Completed(message=f"{_scenes(len(record.done))} done; report: {run.report}")
    named = [f"{scene.name}: {scene.error}" for scene in record.failed[:FAILURES_TOLD]]
    if len(record.failed) > FAILURES_TOLD:
        named.append(f"and {len(record.failed) - FAILURES_TOLD} more")
    failed = f"{len(record.failed)} of {_scenes(len(record.scenes))} failed"
    return Failed(message=f"{failed} ({'; '.join(named)}); report: {run.report}")


def _scenes(number: int) -> str:
    return f"{number} scene{'' if number == 1 else 's'}"
