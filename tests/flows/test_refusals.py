"""What is expected to fail says so in Prefect's log: the reason last and at ERROR, and no traceback."""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from pathlib import Path
from uuid import UUID

import numpy as np
import rasterio
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, Log
from prefect.client.schemas.sorting import FlowRunSort, LogSort

from segpipe.config.scan import Scan
from segpipe_flows.scan import scan
from segpipe_flows.segment import segment
from tests.flows.conftest import JobMaker, load, record_of, run_folder, wait_until


def last_run(client: SyncPrefectClient) -> FlowRun:
    return client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)[0]


def last_words(client: SyncPrefectClient, end: str) -> dict[UUID | None, Log]:
    """Return the last record of each task of the newest flow run, and the run's last error (None).

    No record may be a traceback.

    Args:
        client: of the server.
        end: of the flow run's message, whose arrival is waited for.
    """
    asked = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[last_run(client).id]))

    def arrived() -> list[Log] | None:
        found = client.read_logs(asked, limit=200, sort=LogSort.TIMESTAMP_ASC)
        own = [entry for entry in found if entry.task_run_id is None]
        return found if own and "Finished in state" in own[-1].message and end in own[-1].message else None

    found: list[Log] = wait_until(arrived, 30, f"the log line {end!r}")
    assert not [entry.message for entry in found if "Traceback" in entry.message]
    by_task: defaultdict[UUID | None, list[Log]] = defaultdict(list)
    for entry in found:
        by_task[entry.task_run_id].append(entry)
    errors = [entry for entry in by_task.pop(None) if entry.level == logging.ERROR]  # Prefect's own is INFO
    return {None: errors[-1], **{task: entries[-1] for task, entries in by_task.items()}}


def failed_words(words: dict[UUID | None, Log]) -> list[str]:
    """Last records of tasks that are errors, without those whose inputs failed."""
    told = [w.message for task, w in words.items() if task and w.level == logging.ERROR]
    return [line for line in told if "state NotReady" not in line]


def test_a_failed_scene_ends_with_its_reason(
    on_server: SyncPrefectClient, flow_job: JobMaker, flow_scenes: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.tif"
    text.write_text("no picture")
    job = load(flow_job("refused", scenes=[text, flow_scenes / "scene_0.tif"]))
    segment(job, return_state=True)
    words = last_words(on_server, "1 of 2 scenes failed (text: ")
    assert str(text) in words[None].message
    (told,) = failed_words(words)
    assert str(text) in told and "\n" not in told


def test_a_scene_that_is_not_measured_ends_with_its_reason(
    on_server: SyncPrefectClient, flow_job: JobMaker, flow_scenes: Path
) -> None:
    truth = flow_scenes.parent / "truth-of-two"
    truth.mkdir()
    shutil.copy(flow_scenes / "scene_0.tif", truth)  # two bands
    with rasterio.open(flow_scenes / "scene_1.tif") as scene:
        profile = {**scene.profile, "count": 1, "dtype": "uint8", "nodata": None}
        with rasterio.open(truth / "scene_1.tif", "w", **profile) as file:
            file.write(np.zeros((1, *scene.shape), np.uint8))
    scenes = [flow_scenes / f"scene_{n}.tif" for n in (0, 1)]
    job = load(flow_job("unmeasured", scenes=scenes, reference={"path": str(truth)}))
    segment(job, return_state=True)
    words = last_words(on_server, "scene_0: not measured: reference: ")
    assert "not measured: reference: " in words[None].message
    scene, _ = record_of(job).scenes
    assert (run_folder(job) / scene.files["labels"]).is_file()


def test_a_wrong_request_ends_with_its_reason(on_server: SyncPrefectClient, flow_job: JobMaker) -> None:
    segment({**load(flow_job("wrong")).model_dump(mode="json"), "scenes": 3}, return_state=True)  # type: ignore[arg-type]
    assert last_words(on_server, "scenes").keys() == {None}


def test_a_fault_that_did_not_pass_ends_with_its_reason(
    on_server: SyncPrefectClient, flow_job: JobMaker, flow_scenes: Path
) -> None:
    """A plain file where the store's folder of chunks belongs."""
    job = load(flow_job("fault", scenes=[flow_scenes / "scene_0.tif"], compute={"retries": 1}))
    segment(job, return_state=True)
    key, folder = record_of(job).scenes[0].keys["predict"], Path(job.outputs.dir)
    for receipts in (folder / ".store" / key).glob("receipts*"):
        shutil.rmtree(receipts) if receipts.is_dir() else receipts.unlink()
    (chunks,) = (folder / ".store" / key).glob("**/labels/c")
    shutil.rmtree(chunks)
    shutil.rmtree(folder / job.name)
    chunks.write_text("in the way")
    segment(job, return_state=True)
    words = last_words(on_server, "1 of 1 scene failed (scene_0: ")
    told = failed_words(words)
    assert told and all("Error: " in line and "\n" not in line for line in told), told
    assert record_of(job).scenes[0].may_pass


def test_a_report_that_cannot_be_written_ends_with_its_reason(
    on_server: SyncPrefectClient, flow_job: JobMaker, flow_scenes: Path
) -> None:
    job = load(flow_job("report", scenes=[flow_scenes / "scene_0.tif"]))
    segment(job, return_state=True)
    folder = run_folder(job)
    (folder / "run.json").unlink()
    (folder / "regions.csv").unlink()
    (folder / "regions.csv" / "in the way").mkdir(parents=True)
    state = segment(job, return_state=True)
    assert state.is_failed()
    words = last_words(on_server, "regions.csv")
    assert "regions.csv" in words[None].message
    (told,) = failed_words(words)
    assert "IsADirectoryError" in told and "regions.csv" in told


def test_a_scan_with_a_failed_scene_ends_with_its_reason(
    on_server: SyncPrefectClient, flow_job: JobMaker, flow_scenes: Path, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    lake.mkdir()
    shutil.copy(flow_scenes / "scene_0.tif", lake)
    (lake / "text.tif").write_text("no picture")
    job = load(flow_job("lake"))
    scan(
        Scan.model_validate(
            {
                "name": "nightly",
                "lake": {"location": str(lake), "settle_seconds": 0},
                "model": job.model,
                "bands": ["near", "far"],
                "outputs": {"dir": str(tmp_path / "scans"), "formats": ["cog"]},
                "compute": {"device": "cpu", "threads": 1, "batch": 2},
            }
        ),
        return_state=True,
    )
    words = last_words(on_server, "1 failed, 1 of them in quarantine (text: ")
    assert "text.tif" in words[None].message
    (told,) = failed_words(words)
    assert "text.tif" in told
