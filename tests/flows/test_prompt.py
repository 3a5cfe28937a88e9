"""The prompt flow on a real server: questions by words and by boxes, killed and asked again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.states import Cancelling
from scipy import ndimage

from segpipe.config.job import Job, PromptJob
from segpipe_flows.prompt import prompt
from tests.flows.conftest import record_of, run_folder, wait_until
from tests.prompts.prompt_world import make_card, make_job

SHAPE = (200, 260)
BOXES = [(10, 12, 40, 44), (60, 20, 95, 50), (120, 30, 131, 39), (200, 150, 250, 190), (8, 140, 70, 190)]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_card(tmp_path_factory.mktemp("card"))


@pytest.fixture(scope="module")
def thresholds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A semantic model whose answer is known without it: water is where red is above a threshold."""
    path = tmp_path_factory.mktemp("grounder") / "otsu.yaml"
    card = yaml.safe_load(Path("configs/models/cloud-otsu.yaml").read_text())
    names = [("land", True), ("water", False)]
    card |= {
        "name": "otsu",
        "input": {"bands": ["red"]},
        "arguments": {"thresholds": [127.5]},
        "classes": [
            {"value": v, "name": n, "color": "#000000", "background": b} for v, (n, b) in enumerate(names)
        ],
    }
    path.write_text(yaml.safe_dump(card))
    return path


def encoder_passes(job: Job) -> int:
    [scene] = record_of(job).done
    return int(scene.plan["encoder_passes"])


def ids_of(job: Job) -> np.ndarray:
    with rasterio.open(run_folder(job) / "scenes" / "scene" / "instances.tif") as file:
        return np.asarray(file.read(1))


def windows_kept(job: Job) -> int:
    return len([*Path(job.outputs.dir, ".store").glob("embed-*/receipts-*/*.json")])


def test_boxes_become_objects_files_and_rows(
    card: Path, tmp_path: Path, on_server: SyncPrefectClient
) -> None:
    job = make_job(tmp_path, card, SHAPE, BOXES)
    assert prompt(PromptJob.model_validate(job.model_dump()), return_state=True).is_completed()
    folder, ids = run_folder(job), ids_of(job)
    table = pd.read_csv(folder / "instances.csv")
    found = np.unique(ids[ids > 0])
    assert table["id"].tolist() == found.tolist()
    assert table["count"].tolist() == ndimage.sum_labels(ids > 0, ids, found).astype(int).tolist()
    np.testing.assert_allclose(table["area_m2"], table["count"] * 100.0)  # pixels of 10 m
    assert set(table["class"]) == {"field"} and set(table["source"]) == {"drawn"}
    regions = pd.read_csv(folder / "regions.csv").set_index("class")
    assert regions.loc["field", "area_m2"] == (ids > 0).sum() * 100
    coco = json.loads((folder / "scenes" / "scene" / "instances.json").read_text())
    assert [a["id"] for a in coco["annotations"]] == table["id"].tolist()
    assert [c["name"] for c in coco["categories"]] == ["field"]
    assert any("5 of 5 prompts are used" in line for line in record_of(job).done[0].prompts)


def test_words_are_accounted_for(
    card: Path, thresholds: Path, tmp_path: Path, on_server: SyncPrefectClient
) -> None:
    job = make_job(
        tmp_path, card, SHAPE, [], path="", crs="", text=["water . volcano"], grounder=str(thresholds)
    )
    state = prompt(PromptJob.model_validate(job.model_dump()), return_state=True)
    assert state.is_completed(), state.message
    asked = pd.read_csv(run_folder(job) / "asked.csv").set_index("phrase")
    with rasterio.open(tmp_path / "scene.tif") as file:
        red = file.read(1)
    parts = ndimage.label(red > 127.5, np.ones((3, 3)))[1]
    assert asked.loc["water", "outcome"] == "found"
    assert asked.loc["water", "found"] == parts
    assert asked.loc["volcano", "outcome"] == "not in the vocabulary"
    assert asked.loc["volcano", "objects"] == 0
    page = (run_folder(job) / "report.html").read_text()
    assert "volcano" in page and "What was asked" in page


def test_a_second_question_reads_what_is_kept(
    card: Path, tmp_path: Path, on_server: SyncPrefectClient
) -> None:
    first = make_job(tmp_path, card, SHAPE, BOXES)
    assert prompt(PromptJob.model_validate(first.model_dump()), return_state=True).is_completed()
    assert encoder_passes(first) > 0
    kept = windows_kept(first)
    again = Job.model_validate(
        {**first.model_dump(), "name": "again", "prompts": {**first.prompts.model_dump(), "choice": "large"}}
    )
    assert prompt(PromptJob.model_validate(again.model_dump()), return_state=True).is_completed()
    # larger masks may reach further windows: only these are new
    assert encoder_passes(again) == windows_kept(again) - kept


def test_nothing_asked_is_told(card: Path, tmp_path: Path, on_server: SyncPrefectClient) -> None:
    job = make_job(tmp_path, card, SHAPE, [], path="", crs="")
    state = prompt(PromptJob.model_validate(job.model_dump()), return_state=True)
    assert state.is_failed()
    assert state.message == "prompts: nothing is asked; valid: `text`, `path`, `earlier` or `everything`"


def killed(process: subprocess.Popen[bytes], client: SyncPrefectClient) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cancelled(process: subprocess.Popen[bytes], client: SyncPrefectClient) -> None:
    """As in the UI: the run itself finds out, and ends its workers."""
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(like_="ask: ")))
    running = [r for r in found if r.state is not None and r.state.is_running()]
    # One that was killed before counts as running still.
    run = max(running, key=lambda r: r.start_time or r.expected_start_time)
    client.set_flow_run_state(run.id, Cancelling())
    assert process.wait(timeout=120) == 130


def shards(job: Job, name: str) -> list[Path]:
    """The files of a window's maps, by the name of its receipt."""
    level, row, column, _ = (int(part) for part in name.split("."))
    folder = Path(job.outputs.dir, ".store")
    return [*folder.glob(f"embed-*/*/level{level}/*/c/{row}/{column}/0/0/0")]


@pytest.mark.slow
@pytest.mark.parametrize("end", [killed, cancelled])
def test_a_run_that_was_ended_goes_on_without_encoding_again(
    end: Callable[[subprocess.Popen[bytes], SyncPrefectClient], None],
    card: Path,
    tmp_path: Path,
    server_environment: dict[str, str],
    on_server: SyncPrefectClient,
) -> None:
    boxes = [(x, y, x + 9, y + 9) for x in range(4, 1000, 64) for y in range(4, 1000, 64)]
    job = make_job(tmp_path, card, (1024, 1024), boxes)
    command = [sys.executable, "-m", "segpipe.cli", "prompt", str(tmp_path / "job.yaml")]
    process = subprocess.Popen(
        command,
        env=server_environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    wait_until(lambda: windows_kept(job) >= 5, 180, "five windows")
    end(process, on_server)
    names = [path.stem for path in Path(job.outputs.dir, ".store").glob("embed-*/receipts-*/*.json")]
    stamps = {path: path.stat().st_mtime_ns for name in names for path in shards(job, name)}
    assert len(stamps) >= 2 * len(names) >= 10  # the encoder's map, and what has data
    assert prompt(PromptJob.model_validate(job.model_dump()), return_state=True).is_completed()
    undisturbed = Job.model_validate({**job.model_dump(), "outputs": {"dir": str(tmp_path / "undisturbed")}})
    assert prompt(PromptJob.model_validate(undisturbed.model_dump()), return_state=True).is_completed()
    assert len(names) < encoder_passes(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    np.testing.assert_array_equal(ids_of(job), ids_of(undisturbed))


def test_the_command_asks_a_run_again(
    card: Path, tmp_path: Path, server_environment: dict[str, str], on_server: SyncPrefectClient
) -> None:
    job = make_job(tmp_path, card, SHAPE, BOXES)
    assert prompt(PromptJob.model_validate(job.model_dump()), return_state=True).is_completed()
    run = run_folder(job)
    other = make_job(tmp_path / "other", card, SHAPE, BOXES[:2])
    command = [
        sys.executable,
        "-m",
        "segpipe.cli.main",
        "prompt",
        str(run),
        "--boxes",
        other.prompts.path,
        "--set",
        "name=two",
        "--set",
        "prompts.crs=scene",
    ]
    ended = subprocess.run(command, env=server_environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    two: Any = Job.model_validate({**job.model_dump(), "name": "two"})
    assert record_of(two).job["prompts"]["path"] == other.prompts.path
    assert "2 of 2 prompts are used" in " ".join(record_of(two).done[0].prompts)
