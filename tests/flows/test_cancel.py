"""Cancel means cancel: work stops before the next block, what is committed stays, a new run goes on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml
from distributed import LocalCluster, Worker
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling, State

from segpipe.config.job import Job
from segpipe_flows.segment import segment
from tests.flows.conftest import JobMaker, load, results_of, wait_until
from tests.signals import enable_ctrl_c

WORK = 300
"""Slowness of the model: a block takes about half a second."""
BLOCKS = 32
STOPPED = "stopped; what is done stays, run the same job again to go on from there"
STOPS_WITHIN = 60.0
"""Seconds until the tests give up, not what is aimed at: a quiet machine takes 2 to 6."""


@pytest.fixture
def slow_job(flow_job: JobMaker, flow_scenes: Path) -> Path:
    """A job of two scenes that takes long enough to be interrupted."""
    return flow_job("slow", scenes=[flow_scenes / "scene_0.tif", flow_scenes / "scene_1.tif"], work=WORK)


@pytest.fixture(scope="module")
def answer() -> dict[str, bytes]:
    """Empty at first: see `undisturbed`."""
    return {}


@pytest.fixture
def undisturbed(
    slow_job: Path, tmp_path: Path, on_server: SyncPrefectClient, answer: dict[str, bytes]
) -> dict[str, bytes]:
    """What the same job answers when nobody interrupts it; computed once."""
    if not answer:
        data = yaml.safe_load(slow_job.read_text())
        data["outputs"]["dir"] = str(tmp_path / "undisturbed")
        job = Job.model_validate(data)
        assert segment(job, return_state=True).is_completed()
        answer |= results_of(job)
    return answer


def receipts(job: Job) -> dict[Path, int]:
    """Receipts of predicted blocks, with the time of each; a finished scene's are one object."""
    folder = Path(job.outputs.dir, ".store")
    loose, compacted = folder.glob("predict-*/receipts-*/*.json"), folder.glob("predict-*/receipts-*.json")
    return {path: path.stat().st_mtime_ns for path in (*loose, *compacted)}


def some_receipts(job: Job) -> dict[Path, int]:
    """Wait until a part of the blocks is predicted, and not all."""
    found: dict[Path, int] = wait_until(
        lambda: len(known) >= 2 and known if (known := receipts(job)) else None, 90, "two blocks"
    )
    assert len(found) < BLOCKS
    return found


def check_resumes(job: Job, undisturbed: dict[str, bytes]) -> None:
    """Nothing is written any more; a new run keeps what is there and ends with the same bytes."""
    kept = receipts(job)
    time.sleep(2)
    assert receipts(job) == kept
    assert 1 <= len(kept) < BLOCKS
    times = {path.name: at for path, at in kept.items()}
    chunks = {
        p: p.stat().st_mtime_ns for p in Path(job.outputs.dir, ".store").glob("predict-*/**/labels/c/*/*")
    }
    assert segment(job, return_state=True).is_completed()
    assert results_of(job) == undisturbed
    after = {p: p.stat().st_mtime_ns for p in chunks}
    unchanged = [p for p, at in chunks.items() if after[p] == at]
    assert len(unchanged) >= len(times)  # a chunk written without its receipt is written again


@pytest.fixture
def served(flow_server: str, server_environment: dict[str, str], tmp_path: Path) -> Iterator[None]:
    """`segpipe serve` on the server of these tests."""
    address = urlsplit(flow_server)
    command = [sys.executable, "-m", "segpipe.cli", "serve", "--host", str(address.hostname)]
    with (tmp_path / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(address.port)],
            env=server_environment,
            stdout=log,
            stderr=log,
            preexec_fn=enable_ctrl_c,
        )
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@pytest.mark.slow
def test_a_served_run_is_cancelled_by_the_api(
    served: None, on_server: SyncPrefectClient, slow_job: Path, undisturbed: dict[str, bytes]
) -> None:
    def deployment() -> object:
        try:
            return on_server.read_deployment_by_name("segment/segment")
        except ObjectNotFound:
            return None

    found = wait_until(deployment, 60, "the deployment")
    job = load(slow_job)
    parameters = {"job": json.loads(job.model_dump_json())}  # as the form would send them
    flow_run = on_server.create_flow_run_from_deployment(found.id, parameters=parameters)
    some_receipts(job)
    begun = time.monotonic()
    on_server.set_flow_run_state(flow_run.id, Cancelling())
    stop = Path(job.outputs.dir, ".store", "stop", f"{flow_run.id}-1")
    wait_until(stop.exists, STOPS_WITHIN, "the request to stop")
    asked = time.monotonic() - begun
    assert stop.is_file()

    def final() -> State | None:
        state = on_server.read_flow_run(flow_run.id).state
        return state if state is not None and state.is_final() else None

    ended = wait_until(final, STOPS_WITHIN + 10, "a final state")
    assert ended.name == "Cancelled"
    print(f"asked to stop after {asked:.1f} s, Cancelled after {time.monotonic() - begun:.1f} s")
    check_resumes(job, undisturbed)


def start(job_file: Path, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """`segpipe run` as a terminal starts it: in a process group of its own, with Ctrl-C enabled."""
    command = [sys.executable, "-m", "segpipe.cli", "run", str(job_file)]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=log.parent,
        stdout=log.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=enable_ctrl_c,
    )


def test_a_run_of_the_command_line_is_cancelled_by_the_api(
    on_server: SyncPrefectClient,
    server_environment: dict[str, str],
    slow_job: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    job = load(slow_job)
    named = FlowRunFilter(name=FlowRunFilterName(like_=f"{job.name}: "))
    known = {run.id for run in on_server.read_flow_runs(flow_run_filter=named)}
    process = start(slow_job, server_environment, tmp_path / "log")
    some_receipts(job)
    (run,) = [r for r in on_server.read_flow_runs(flow_run_filter=named) if r.id not in known]
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))

    def blocks_told() -> re.Match[str] | None:
        told = [a for a in on_server.read_artifacts(artifact_filter=mine) if a.type == "progress"]
        pattern = r"0 of 2 scenes done; .*scene_0: (\d+) of 16 blocks.*"
        (progress,) = told
        return re.fullmatch(pattern, progress.description or "")

    told = wait_until(blocks_told, 60, "a progress that counts blocks")
    assert 0 < int(told[1]) <= 16
    begun = time.monotonic()
    on_server.set_flow_run_state(run.id, Cancelling())
    assert process.wait(STOPS_WITHIN) == 130
    print(f"ended after {time.monotonic() - begun:.1f} s")
    state = on_server.read_flow_run(run.id).state
    assert state is not None
    assert state.name == "Cancelled"
    assert state.message == STOPPED
    assert not list(Path(job.outputs.dir).glob("*/*/report.html"))
    check_resumes(job, undisturbed)


@pytest.mark.parametrize("server", ["own", pytest.param("named", marks=pytest.mark.slow)])
def test_ctrl_c_ends_within_seconds_and_says_how_to_go_on(
    server: str,
    server_environment: dict[str, str],
    slow_job: Path,
    undisturbed: dict[str, bytes],
    tmp_path: Path,
) -> None:
    job = load(slow_job)
    if server == "own":
        del server_environment["PREFECT_API_URL"]
    process = start(slow_job, server_environment, tmp_path / "log")
    some_receipts(job)
    begun = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells the whole group, a server of our own too
    assert process.wait(STOPS_WITHIN) == 130
    print(f"ended after {time.monotonic() - begun:.1f} s")
    told = (tmp_path / "log").read_text()
    assert "Traceback" not in told
    assert told.strip().splitlines()[-1] == STOPPED
    check_resumes(job, undisturbed)


def at_work(dask_worker: Worker) -> int:
    """Runs in a Dask worker: tasks its threads are busy with, those that nobody waits for included."""
    return len(dask_worker.active_threads)


@pytest.mark.slow
def test_workers_of_another_cluster_stop_too(
    server_environment: dict[str, str], slow_job: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """A Dask cluster that outlives the run: nothing of the run is left at work on it."""
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster:
        job = yaml.safe_load(slow_job.read_text())
        job["compute"] |= {"runner": "dask", "address": cluster.scheduler_address, "workers": 2}
        slow_job.write_text(yaml.safe_dump(job))
        process = start(slow_job, server_environment, tmp_path / "log")
        some_receipts(load(slow_job))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(STOPS_WITHIN) == 130
        with cluster.get_client() as client:
            wait_until(lambda: not any(client.run(at_work).values()), STOPS_WITHIN, "idle workers")
        check_resumes(load(slow_job), undisturbed)
