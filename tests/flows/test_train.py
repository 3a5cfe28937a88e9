"""`segpipe train` from end to end: what the UI shows, exit codes, and stops that lose nothing."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterName,
)
from prefect.client.schemas.objects import FlowRun
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Cancelling
from prefect.types.entrypoint import EntrypointType
from world import Ended, write_raster

from segpipe.config.card import load_card
from segpipe.training.loop import MetricsRow
from segpipe_flows.train import train_model
from segpipe_tasks.training import training_markdown
from tests.flows.conftest import wait_until
from tests.signals import enable_ctrl_c
from tests.training.conftest import recipe_data, recipe_of, write_recipe, write_scene

STOPS_WITHIN = 90.0
"""Seconds until the tests give up; a quiet machine takes 2 to 6."""
PATIENCE = 300.0
"""The same for a process that has libraries to load on a busy machine."""
UNET = {  # of the provider that is loaded fastest
    "provider": "smp",
    "architecture": "Unet",
    "arguments": {"encoder_name": "mobilenet_v2", "encoder_depth": 3, "decoder_channels": [8, 8, 8]},
    "window": {"stride": 8},
}
LONG = {"optimise": {"steps": 100_000}, "judge": {"every": 5}}


@pytest.fixture(scope="module")
def few_rasters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small labelled rasters."""
    folder = tmp_path_factory.mktemp("rasters")
    for number in range(3):
        write_scene(folder, f"scene{number}", (40, 40), number)
    return folder


RecipeMaker = Callable[..., Path]


@pytest.fixture
def recipe_file(few_rasters: Path, tmp_path: Path) -> RecipeMaker:
    """``recipe_file(name, **fields)``: the path of a recipe whose results lie in this test's folder."""

    def make(name: str, **fields: Any) -> Path:
        data = recipe_data(few_rasters, name=name, out=str(tmp_path / "out"), card=UNET, **fields)
        return write_recipe(tmp_path / f"{name}.yaml", data)

    return make


def start(recipe: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    """`segpipe train` as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "segpipe.cli", "train", str(recipe)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=enable_ctrl_c,
    )  # fmt: skip


def runs_of(client: SyncPrefectClient, name: str) -> list[FlowRun]:
    found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
    return sorted(found, key=lambda run: run.created or run.expected_start_time)  # type: ignore[arg-type,return-value]


def steps_of(checkpoint: Path) -> int:
    state = torch.load(checkpoint, weights_only=True)
    return int(state["progress"]["step"])


def test_a_recipe_becomes_a_card_and_the_ui_shows_how(
    on_server: SyncPrefectClient, server_environment: dict[str, str], recipe_file: RecipeMaker, tmp_path: Path
) -> None:
    process = start(recipe_file("Whole_run.1"), server_environment)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    (fold,) = (tmp_path / "out/Whole_run.1").glob("*/fold-0")
    scores = load_card(fold / "card.yaml").scores
    first, last = out.splitlines()[0], out.splitlines()[-1]
    assert first == "Whole_run.1: 3 scenes, 6 steps a fold"
    assert last == f"{scores} Card: {fold}/card.yaml"
    (run,) = runs_of(on_server, "Whole_run.1")
    assert run.state is not None
    assert (run.state.name, run.state.message) == ("Completed", last)
    mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    artifacts = on_server.read_artifacts(artifact_filter=mine)
    (progress,) = [a for a in artifacts if a.type == "progress"]
    assert progress.data == 100.0
    history = pd.read_csv(fold / "history.csv")
    assert progress.description == f"fold-0: step 6 of 6, mean Dice {history['score'].iloc[-1]:.4f}"
    pages = sorted((a for a in artifacts if a.type == "markdown"), key=lambda a: str(a.created))
    assert [page.key for page in pages] == ["whole-run-1-training"] * 2
    text = str(pages[-1].data)
    assert "Step 6 of 6" in text
    row = re.search(r"\| Loss \| ([\d.]+) \| ([\d.]+) \|", text)
    assert row is not None
    assert row.groups() == (f"{history['loss'].iloc[-1]:.4f}", f"{history['loss'].min():.4f}")
    row = re.search(r"\| Mean Dice on what is kept apart \| ([\d.]+) \| ([\d.]+) \|", text)
    assert row is not None
    assert row.groups() == (f"{history['score'].iloc[-1]:.4f}", f"{history['score'].max():.4f}")
    assert text.count("data:image/svg+xml;base64,") == 2
    assert f"`{fold}/training.html`" in text


def test_a_wrong_recipe_is_told_in_a_line_before_any_server(
    here: Callable[..., Ended], recipe_file: RecipeMaker
) -> None:
    path = recipe_file("wrong", optimise={"rate": -1})
    ended = here("train", str(path))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == f"error: {path}: optimise.rate: found -1; input should be greater than 0\n"
    ended = here("train", str(recipe_file("wrong")), "--set", "windows.size=33")
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "error: windows.size: found 33x33; valid: multiples of 8, the total stride\n"


COLORS = {"image": (200, 40, 40), "reference": (40, 200, 40), "predicted": (40, 40, 200)}


@pytest.mark.parametrize("count", [0, 2, 5])
def test_the_ui_shows_the_first_places_that_are_kept_apart(
    count: int, few_rasters: Path, tmp_path: Path
) -> None:
    (tmp_path / "history.csv").write_text("step,loss,score\n3,0.5,\n6,0.25,0.75\n")
    (tmp_path / "samples").mkdir()
    for number in range(count):
        for caption, color in {**COLORS, "difference": (0, 0, 0)}.items():
            picture = Image.new("RGB", (480, 240 + 60 * number), color)
            picture.save(tmp_path / "samples" / f"{number}-{caption}.jpg")
    text = training_markdown(recipe_of(few_rasters), "fold-0", MetricsRow(6, 6, 0.25, 0.1, 0.75), tmp_path)
    rows = [line for line in text.splitlines() if "image/jpeg" in line]
    assert len(rows) == min(count, 3)
    assert ("| Image | Reference | Predicted |" in text) == bool(count)
    for number, row in enumerate(rows):
        cells = re.findall(r"!\[(\w+) (\d)\]\(data:image/jpeg;base64,([^)]+)\)", row)
        assert [(caption, place) for caption, place, _ in cells] == [(c, str(number + 1)) for c in COLORS]
        for caption, _, data in cells:
            with Image.open(io.BytesIO(base64.b64decode(data))) as shown:
                assert shown.size == (200, 100 + 25 * number)
                np.testing.assert_allclose(np.asarray(shown).mean((0, 1)), COLORS[caption], atol=4)


@pytest.fixture(scope="module")
def deployed(flow_server: str, flow_home: Path) -> UUID:
    """The deployment that `segpipe serve` makes of the flow, on the server."""
    with temporary_settings({PREFECT_API_URL: flow_server, PREFECT_HOME: flow_home}):
        found = train_model.to_deployment(name="train", entrypoint_type=EntrypointType.MODULE_PATH).apply()
    assert isinstance(found, UUID)
    return found


def submitted(client: SyncPrefectClient, deployment: UUID, form: dict[str, Any]) -> FlowRun:
    """A run of what the UI's form sends, carried out here as the deployment's process does."""
    run = client.create_flow_run_from_deployment(deployment, parameters=form)
    run_flow(train_model, flow_run=run, return_type="state")
    return client.read_flow_run(run.id)


def test_the_form_is_a_path_and_a_list_and_each_says_what_it_is(
    deployed: UUID, on_server: SyncPrefectClient
) -> None:
    schema = on_server.read_deployment(deployed).parameter_openapi_schema
    assert schema is not None
    assert {name: field["type"] for name, field in schema["properties"].items()} == {
        "recipe": "string",
        "changes": "array",
    }
    assert schema["required"] == ["recipe"]
    assert schema["properties"]["changes"]["items"] == {"type": "string"}
    assert "configs/train/hippocampus.yaml" in schema["properties"]["recipe"]["description"]
    assert "a.b=value" in schema["properties"]["changes"]["description"]


def test_the_form_trains_with_its_changes_from_the_working_folder(
    deployed: UUID,
    on_server: SyncPrefectClient,
    recipe_file: RecipeMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe_file("before")
    monkeypatch.chdir(tmp_path)
    changes = ["name=form.1", "optimise.steps=4", "judge.every=2"]
    run = submitted(on_server, deployed, {"recipe": "before.yaml", "changes": changes})
    (card,) = (tmp_path / "out/form.1").glob("*/fold-0/card.yaml")
    assert run.state is not None
    assert (run.name, run.state.name) == ("form.1", "Completed")
    assert str(run.state.message).endswith(f"Card: {card}")
    assert pd.read_csv(card.parent / "history.csv")["step"].tolist() == [2, 4]
    assert not (tmp_path / "out/before").exists()


@pytest.mark.parametrize(
    ("form", "name", "said"),
    [
        ({}, "plain", "data.objects: ids have two classes"),
        ({"changes": ["optimise.rate=-1"]}, "plain", "optimise.rate: found -1; input should be"),
        ({"changes": ["optimise.rates=1"]}, "plain", "unknown key; did you mean `rate`?"),
        ({"changes": ["fast"]}, "plain", "fast: found no `key=value`"),
        ({"recipe": "nowhere/missing.yaml"}, "missing", "missing.yaml: cannot be read"),
        ({"changes": ["data.objects=false", "windows.size=33"]}, "plain", "windows.size: found"),
    ],
    ids=["recipe", "value", "key", "no value", "no file", "what does not fit"],
)
def test_a_mistake_in_the_form_fails_the_run_with_its_line(
    form: dict[str, Any],
    name: str,
    said: str,
    deployed: UUID,
    on_server: SyncPrefectClient,
    recipe_file: RecipeMaker,
    tmp_path: Path,
) -> None:
    recipe = recipe_file("plain", data={"objects": True})
    run = submitted(on_server, deployed, {"recipe": str(recipe), **form})
    assert run.state is not None
    assert (run.name, run.state.name) == (name, "Failed")
    assert said in str(run.state.message)
    assert not (tmp_path / "out").exists()


def test_a_wrong_scene_fails_the_run_with_a_line(
    on_server: SyncPrefectClient, recipe_file: RecipeMaker, tmp_path: Path
) -> None:
    write_scene(tmp_path, "bad", (40, 40), 1)
    labels = write_raster(tmp_path / "labels/bad.tif", np.full((1, 40, 40), 9, np.uint8))
    data = {"scenes": [str(tmp_path / "images")], "reference": {"path": str(tmp_path / "labels")}}
    state = train_model(str(recipe_file("bad", data=data)), return_state=True)
    assert state.is_failed()
    assert str(state.message).startswith(f"{labels}: holds 9, which is no class of the card")


def stop(how: str, process: subprocess.Popen[str], run: FlowRun, client: SyncPrefectClient) -> None:
    if how == "api":
        client.set_flow_run_state(run.id, Cancelling())
    elif how == "ctrl-c":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stops",
    [("api", "ctrl-c"), ("sigterm", "sigterm")],
    ids=["here", "terminated"],
)
def test_a_stop_leaves_a_checkpoint_and_the_next_call_goes_on(
    stops: tuple[str, str],
    on_server: SyncPrefectClient,
    server_environment: dict[str, str],
    recipe_file: RecipeMaker,
    tmp_path: Path,
) -> None:
    name = f"long-{stops[0]}"
    recipe = recipe_file(name, **LONG)
    reached = [0]
    for how in stops:
        process = start(recipe, server_environment)

        def further() -> Path | None:
            assert process.poll() is None, process.communicate()  # noqa: B023
            found = list((tmp_path / "out" / name).glob("*/fold-0/checkpoint.pt"))
            return found[0] if found and steps_of(found[0]) > reached[-1] else None

        checkpoint = wait_until(further, PATIENCE, "a checkpoint")
        run = runs_of(on_server, name)[-1]
        assert len(runs_of(on_server, name)) == len(reached)
        stop(how, process, run, on_server)
        _, err = process.communicate(timeout=STOPS_WITHIN)
        assert process.returncode == 130
        assert "Traceback" not in err
        assert err.splitlines()[-1] == "stopped: the same command goes on from the checkpoint"
        state = on_server.read_flow_run(run.id).state
        assert state is not None
        assert state.name == "Cancelled"
        reached.append(steps_of(checkpoint))
    progress = torch.load(checkpoint, weights_only=True)["progress"]
    assert [m["step"] for m in progress["history"]] == list(range(5, reached[-1] + 1, 5))
    assert len(progress["losses"]) == reached[-1] % 5
