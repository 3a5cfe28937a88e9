"""Run names, rates, the table of scenes; progress, pause and stop of a run on a real server."""

from __future__ import annotations

import contextvars
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling, Paused

import segpipe_flows.watch
from segpipe.config.job import Job
from segpipe.tables.record import SceneRecord
from segpipe_flows.names import name_of
from segpipe_flows.rates import Rates, RateSample, left_told, rate_told
from segpipe_flows.scene_table import FINISHED, SceneTableArtifact
from segpipe_flows.segment import segment
from tests.flows.conftest import JobMaker, load, wait_until

SECONDS = 90.0
WORK = 60
"""Slowness of the model: a block takes about a tenth of a second."""


def test_a_run_is_named_by_scene_and_model(flow_job: JobMaker, flow_scenes: Path) -> None:
    one = load(flow_job("cover", scenes=[flow_scenes / "scene_2.tif"]))
    assert name_of(one) == "cover: scene_2 by small-0"
    several = load(flow_job("cover", scenes=[flow_scenes]))
    assert name_of(several) == "cover: 4 scenes by small-0"
    assert name_of(several.model_dump(mode="json")) == "cover: 4 scenes by small-0"  # before it is validated


def test_a_run_of_a_wrong_request_is_named_too(tmp_path: Path) -> None:
    assert name_of({"name": "cover", "scenes": [str(tmp_path / "none.tif")], "model": "m.yaml"}) == "cover"
    assert name_of({"scenes": 7}) == "run"
    assert name_of(None) == "run"
    text = {
        "name": "scan",
        "lake": {"location": "s3://user:secret@lake/a?sig=secret"},
        "model": "m/unet.yaml",
    }
    assert name_of(text) == "scan: s3://lake/a by unet"
    long = {"name": "n" * 64, "lake": {"location": "/" + "x" * 200}, "model": ""}
    assert len(name_of(long)) == 120


def test_rates_are_those_of_the_last_minute() -> None:
    """Ten blocks of 1 Mpx in 100 s, of which the last 60 s brought 9: by hand."""
    rates = Rates()
    assert (rates.elements, rates.busy(1)) == (0, None)
    for at, blocks in ((0.0, 0), (40.0, 1), (70.0, 5), (100.0, 10)):
        rates.add(RateSample(at, blocks, blocks * 1e6, blocks * 4.0))
    assert rates.elements == pytest.approx(9e6 / 60)
    assert rates.pieces == pytest.approx(9 / 60)
    assert rates.busy(1) == pytest.approx(36 / 60)
    assert rates.busy(2) == pytest.approx(18 / 60)
    rates.restart()
    assert rates.elements == 0


def test_rates_are_told_with_their_unit() -> None:
    assert rate_told(2_140_000, "px") == "2.1 Mpx/s"
    assert rate_told(6_400, "px") == "0.006 Mpx/s"
    assert rate_told(12, "voxel") == "0.000012 Mvox/s"
    assert left_told(200) == "3 min 20 s left"


def test_the_table_of_scenes_is_bounded_and_tells_failures_first() -> None:
    table = SceneTableArtifact()
    table.add(SceneRecord("bad|one", "bad.tif", "failed", error="bad.tif: the file is empty (0 bytes)"))
    for number in range(500):
        table.add(SceneRecord(f"s{number}", "", "done", timings={"predict": 1.0, "measure": 0.5}))
    lines = table.markdown({"s500": "3 of 16 blocks"}, 600).splitlines()
    assert lines[0] == "501 of 600 scenes done, 1 of them failed; 1 in progress"
    assert lines[4] == r"| bad\|one | **failed** | bad.tif: the file is empty (0 bytes) |"
    assert lines[5] == "| s500 | in progress | 3 of 16 blocks |"
    assert lines[6] == "| s499 | done | 1.5 s |"
    assert len(lines) == 4 + 2 + FINISHED + 2
    assert lines[-1] == f"and {502 - 2 - FINISHED} more"


def started(client: SyncPrefectClient, job: Job) -> tuple[threading.Thread, Callable[[], FlowRun]]:
    """A job begun in a thread, and its flow run."""
    before = {run.id for run in client.read_flow_runs()}
    context = contextvars.copy_context()  # the settings of this test
    thread = threading.Thread(target=lambda: context.run(segment, job, return_state=True), daemon=True)
    thread.start()
    new = wait_until(
        lambda: [run.id for run in client.read_flow_runs() if run.id not in before], SECONDS, "the run"
    )
    return thread, lambda: client.read_flow_run(new[0])


def progress(client: SyncPrefectClient, run: UUID) -> str:
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    found = [a for a in client.read_artifacts(artifact_filter=mine) if a.type == "progress"]
    return (found[0].description or "") if found else ""


def blocks(job: Job) -> int:
    """Receipts; those of a finished scene are one object."""
    store = Path(job.outputs.dir, ".store")
    whole = [
        len(json.loads(path.read_bytes().splitlines()[0])) for path in store.glob("predict-*/receipts-*.json")
    ]
    return len(list(store.glob("predict-*/receipts-*/*.json"))) + sum(whole)


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow looks at its state several times a second."""
    monkeypatch.setattr(segpipe_flows.watch, "LOOK_SECONDS", 0.3)


def pause(client: SyncPrefectClient, job: Job, run: UUID) -> int:
    """Pause as the API does, and wait until nothing more is computed; blocks done until then."""
    wait_until(lambda: blocks(job) >= 2, SECONDS, "two blocks")
    client.set_flow_run_state(run, Paused())
    wait_until(lambda: progress(client, run).startswith("paused"), SECONDS, "a progress that says so")

    def still() -> int:
        found = blocks(job)
        time.sleep(1.5)
        return found if blocks(job) == found else 0

    done: int = wait_until(still, SECONDS, "no new blocks")
    assert 2 <= done < 32
    return done


FULL = r"\d of 2 scenes done; [^;]+ left; [\d.]+ Mpx/s; device busy (\d+) %; scene_\d: \d+ of 16 blocks.*"


def test_a_run_tells_its_progress_stands_still_when_paused_and_goes_on(
    looks_often: None, on_server: SyncPrefectClient, flow_job: JobMaker
) -> None:
    job = load(flow_job("pausing", work=WORK))
    thread, run = started(on_server, job)
    told = wait_until(lambda: re.fullmatch(FULL, progress(on_server, run().id)), SECONDS, "a full line")
    print(told[0])
    assert 0 < int(told[1]) <= 100
    pause(on_server, job, run().id)
    assert re.match(r"paused; \d of 2 scenes done; scene_\d: \d+ of 16", progress(on_server, run().id))
    on_server.resume_flow_run(run().id)
    thread.join(SECONDS)
    state = run().state
    assert state is not None
    assert state.is_completed(), state
    assert progress(on_server, run().id) == "2 of 2 scenes done"
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run().id]))
    [table] = [
        a for a in on_server.read_artifacts(artifact_filter=mine) if a.type == "markdown" and a.key is None
    ]
    assert str(table.data).startswith("2 of 2 scenes done, 0 of them failed; 0 in progress")


def test_a_paused_run_can_be_cancelled(
    looks_often: None, on_server: SyncPrefectClient, flow_job: JobMaker
) -> None:
    job = load(flow_job("halted", work=WORK))
    thread, run = started(on_server, job)
    done = pause(on_server, job, run().id)
    begun = time.monotonic()
    on_server.set_flow_run_state(run().id, Cancelling())
    thread.join(SECONDS)
    print(f"cancelled while paused: ended after {time.monotonic() - begun:.1f} s")
    state = run().state
    assert state is not None
    assert state.name == "Cancelled"
    assert blocks(job) == done
