"""The flow on a real server: failures stay where they are, faults pass, progress and results are shown."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from PIL import Image
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun, TaskRun
from prefect.client.schemas.sorting import FlowRunSort

from segpipe.config.job import Job
from segpipe.store.stage import Stage
from segpipe_flows.dispatch import ahead
from segpipe_flows.segment import segment
from tests.flows.conftest import JobMaker, load, record_of, results_of, run_folder, wait_until

BLOCKS = 16


def run(job: Job) -> Any:
    return segment(job, return_state=True)


def last_run(client: SyncPrefectClient) -> FlowRun:
    return client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)[0]


def tasks_of(client: SyncPrefectClient, flow_run: FlowRun) -> list[TaskRun]:
    runs = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
    return client.read_task_runs(flow_run_filter=runs)


def ended_tasks(client: SyncPrefectClient, flow_run: FlowRun) -> dict[str, TaskRun]:
    """The task runs by name, once all have arrived: they are recorded a moment after they end."""
    scenes = {"scene_0", "scene_1"}

    def arrived() -> list[TaskRun] | None:
        found = tasks_of(client, flow_run)
        ended = [t for t in found if t.state and (t.state.is_final() or t.state.name == "NotReady")]
        names = {t.name for t in ended}
        parts = {
            name.rsplit(" of ", 1)[0].split(" ", 1)[1]: name for name in names if name.startswith("predict")
        }
        sent = sum(int(parts[f"{scene}, 1"].rsplit(" ", 1)[1]) for scene in scenes if f"{scene}, 1" in parts)
        whole = sent and len(parts) == sent and {p.split(",")[0] for p in parts} == scenes
        return found if whole and len(ended) == len(found) == sent + 2 * len(scenes) + 1 else None

    return {t.name: t for t in wait_until(arrived, 60, "all task runs")}


def logs_of(client: SyncPrefectClient, flow_run: FlowRun, last: str) -> list[str]:
    """The lines logged in a run, once ``last`` is among them."""

    def lines() -> list[str] | None:
        found = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])), limit=200)
        texts = [entry.message for entry in found]
        return texts if any(last in text for text in texts) else None

    found: list[str] = wait_until(lines, 30, f"the log line {last!r}")
    return found


def test_ahead_holds_back_and_loses_nothing() -> None:
    begun = []
    held = []

    def items() -> Any:
        for n in range(5):
            begun.append(n)
            yield n

    for n in ahead(items(), 2):
        held.append((n, len(begun)))
    # (item handed on, items begun by then): two newer ones are always under way
    assert held == [(0, 3), (1, 4), (2, 5), (3, 5), (4, 5)]
    assert list(ahead(range(2), 0)) == [0, 1]
    assert list(ahead([], 3)) == []


def test_a_run_and_what_the_ui_shows_of_it(on_server: SyncPrefectClient, flow_job: JobMaker) -> None:
    job = load(flow_job("shown"))
    state = run(job)
    folder = run_folder(job)
    assert state.is_completed()
    assert state.message == f"2 scenes done; report: {folder}/report.html"

    flow_run = last_run(on_server)
    assert flow_run.name == "shown: 2 scenes by small-0"
    tasks = ended_tasks(on_server, flow_run)
    names = {f"{step} scene_{n}" for n in (0, 1) for step in ("plan", "finish")} | {"write report"}
    batches = -(-BLOCKS // 4)  # of the first scene, whose pace is not known yet
    names |= {f"predict scene_0, {k} of {batches}" for k in range(1, batches + 1)}
    assert {name for name in tasks if not name.startswith("predict scene_1")} == names

    artifacts = {
        a.key or a.type: a
        for a in on_server.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run.id]))
        )
    }
    assert artifacts["progress"].data == 100.0
    assert artifacts["progress"].description == "2 of 2 scenes done"
    markdown = str(artifacts["shown-report"].data)
    pictures = re.findall(r"!\[scene\\_(\d)\]\(data:image/jpeg;base64,([^)]+)\)", markdown)
    assert [name for name, _ in pictures] == ["0", "1"]
    for _, text in pictures:
        content = base64.b64decode(text)
        assert len(content) < 20_000
        assert max(Image.open(io.BytesIO(content)).size) == 192
    table = pd.DataFrame(json.loads(str(artifacts["shown-regions"].data)))
    regions = pd.read_csv(folder / "regions.csv")
    assert list(table.columns) == ["scene", "region", "class", "area_m2", "share", "seen", "state"]
    assert list(table["area_m2"]) == pytest.approx(list(regions["area_m2"]), abs=0.05)
    # 2 scenes of 256 × 256 pixels of 100 m²
    assert regions["area_m2"].sum() == pytest.approx(2 * 256 * 256 * 100)


def test_the_same_request_again_does_nothing(on_server: SyncPrefectClient, flow_job: JobMaker) -> None:
    job = load(flow_job("again"))
    run(job)
    before = {p: p.stat().st_mtime_ns for p in Path(job.outputs.dir).rglob("*") if p.is_file()}
    state = run(job)
    assert state.message == f"nothing to do: 2 scenes done, see {run_folder(job)}/report.html"
    assert {p: p.stat().st_mtime_ns for p in Path(job.outputs.dir).rglob("*") if p.is_file()} == before


def test_a_refusal_tells_no_secret_of_a_url(on_server: SyncPrefectClient, flow_job: JobMaker) -> None:
    job = load(flow_job("refused"))
    asked = job.model_copy(update={"scenes": ["https://me:word@example.org/*.tif?sig=word"]})
    state = run(asked)
    assert state.is_failed()
    assert state.message == (
        "scenes: https://example.org/*.tif: globs work on local folders only; list the URLs"
    )


def test_a_scene_that_fails_does_not_stop_the_others(
    on_server: SyncPrefectClient, flow_job: JobMaker, flow_scenes: Path, tmp_path: Path
) -> None:
    torn = tmp_path / "torn.tif"
    torn.write_bytes((flow_scenes / "scene_1.tif").read_bytes()[:200_000])
    text = tmp_path / "text.tif"
    text.write_text("no picture")
    scenes = [text, flow_scenes / "scene_0.tif", torn, flow_scenes / "scene_2.tif"]
    job = load(flow_job("partly", scenes=scenes))
    state = run(job)
    assert state.is_failed()

    scene = {s.name: s for s in record_of(job).scenes}
    assert {name: s.state for name, s in scene.items()} == {
        "text": "failed", "scene_0": "done", "torn": "failed", "scene_2": "done",
    }  # fmt: skip
    assert list(scene) == ["text", "scene_0", "torn", "scene_2"]
    assert str(text) in scene["text"].error
    assert str(torn) in scene["torn"].error
    assert state.message.startswith("2 of 4 scenes failed (text: ")
    assert "\n" not in state.message

    flow_run = last_run(on_server)
    lines = logs_of(on_server, flow_run, "2 of 4 scenes failed")
    assert not [line for line in lines if "Traceback" in line]
    found = {t.name: t for t in tasks_of(on_server, flow_run)}
    assert found["plan text"].state and found["plan text"].state.is_failed()
    assert found["plan text"].run_count == 1  # a mistake is not tried again
    assert "finish torn" not in found
    # the first batch that cannot be read is the last one sent, save for those in flight
    assert len([name for name in found if name.startswith("predict torn")]) < BLOCKS // 4

    # mended, the job computes the failed scenes only
    shutil.copy(flow_scenes / "scene_1.tif", torn)
    shutil.copy(flow_scenes / "scene_3.tif", text)
    assert run(job).is_completed()
    flow_run = last_run(on_server)
    computed = {t.name.split(",")[0] for t in tasks_of(on_server, flow_run) if t.name.startswith("predict")}
    assert computed == {"predict text", "predict torn"}


def test_a_passing_fault_of_the_storage_is_tried_again(
    on_server: SyncPrefectClient, flow_job: JobMaker, flow_scenes: Path
) -> None:
    """A plain file where the store's folder of chunks belongs: writing fails until it is taken away."""
    scenes = [flow_scenes / "scene_0.tif"]
    whole = load(flow_job("whole", scenes=scenes))
    run(whole)
    job = load(flow_job("fault", scenes=scenes))
    run(job)
    key = record_of(job).scenes[0].keys["predict"]
    folder = Path(job.outputs.dir)
    for receipts in (folder / ".store" / key).glob("receipts*"):
        shutil.rmtree(receipts) if receipts.is_dir() else receipts.unlink()
    (chunks,) = (folder / ".store" / key).glob("**/labels/c")
    shutil.rmtree(chunks)
    shutil.rmtree(folder / job.name)
    chunks.write_text("in the way")

    seen: list[TaskRun] = []
    started = last_run(on_server).id

    def mend() -> None:
        def retrying() -> list[TaskRun]:
            flow_run = last_run(on_server)
            waiting = [] if flow_run.id == started else tasks_of(on_server, flow_run)
            return [t for t in waiting if t.state_name == "AwaitingRetry"]

        seen.extend(wait_until(retrying, 60, "a task that waits to be tried again"))
        chunks.unlink()

    with ThreadPoolExecutor(1) as pool:
        mended = pool.submit(mend)
        state = run(job)
        mended.result()
    assert state.is_completed()
    assert {t.name for t in seen} == {"predict scene_0, 1 of 4"}
    assert record_of(job).scenes[0].attempts == 2
    receipts = Stage(job.outputs.dir, key).receipts().values()
    assert sorted(r["attempts"] for r in receipts) == [1] * 12 + [2] * 4
    assert results_of(job) == results_of(whole)
    lines = logs_of(on_server, last_run(on_server), "Retry 1/2 will start 2 second(s) from now")
    assert not [line for line in lines if "Traceback" in line]


def test_no_more_batches_at_once_than_workers(on_server: SyncPrefectClient, flow_job: JobMaker) -> None:
    job = load(flow_job("bounded", work=20, compute={"workers": 2}))
    run(job)
    tasks = ended_tasks(on_server, last_run(on_server)).values()
    spans = [(t.start_time, t.end_time) for t in tasks if t.name.startswith("predict")]
    at_once = [sum(begin <= start < end for begin, end in spans) for start, _ in spans]
    assert max(at_once) == 2
