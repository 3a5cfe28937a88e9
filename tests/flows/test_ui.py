"""What an operator does in the browser: fill in the form, watch, pause, cancel, retry, read the report.

Pictures of each step go to the folder SEGPIPE_SHOTS, where it is set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
import yaml
from playwright.sync_api import Locator, Page, sync_playwright
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.exceptions import ObjectNotFound

from tests.flows.conftest import wait_until
from tests.signals import enable_ctrl_c

pytestmark = pytest.mark.slow
BLOCKS = 32
WORK = 300
"""Slowness of the model: a block takes about half a second."""
SECONDS = 300.0
"""Until a test gives up: for machines that do other things too."""


@pytest.fixture(scope="module")
def served(flow_server: str, flow_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`segpipe serve` on the server of these tests; where the UI is."""
    address = urlsplit(flow_server)
    environment = {**os.environ, "PREFECT_API_URL": flow_server, "PREFECT_HOME": str(flow_home)}
    command = [sys.executable, "-m", "segpipe.cli", "serve", "--host", str(address.hostname)]
    with (tmp_path_factory.mktemp("serve") / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--port", str(address.port)],
            env=environment,
            stdout=log,
            stderr=log,
            preexec_fn=enable_ctrl_c,
        )
        try:
            yield f"http://{address.netloc}"
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)


@pytest.fixture(scope="module")
def page(served: str) -> Iterator[Page]:
    """A page of a real browser."""
    browser_path = shutil.which("chromium")
    if browser_path is None:
        pytest.skip("no chromium here: install the Debian package chromium")
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        page = browser.new_page(viewport={"width": 1300, "height": 1100})
        page.set_default_timeout(SECONDS * 1000)
        yield page
        browser.close()


class Form:
    """The parameters of a deployment, filled in by clicks and typing."""

    def __init__(self, page: Page, base: str, deployment: UUID) -> None:
        self.page = page
        page.goto(f"{base}/v2/deployments/deployment/{deployment}/run")
        self.field("Name").wait_for()

    def field(self, label: str) -> Locator:
        """The first box of this label."""
        return self.page.get_by_label(f"{label} (Optional)", exact=True).first

    def fill(self, label: str, value: str) -> None:
        self.field(label).fill(value)

    def items(self, which: int, values: list[str]) -> None:
        """Fill in the list of this number, of those on the page; lists before it are filled."""
        handles = self.page.get_by_role("button", name="Drag to reorder")
        for value in values:
            before = handles.count()
            self.page.get_by_role("button", name="Add item").nth(which).click()
            handles.nth(before).wait_for()
            handles.nth(before).locator("xpath=following::*[self::input or self::textarea][1]").fill(value)

    def clear(self) -> None:
        """Empty all lists: the form comes filled in with an example."""
        handles = self.page.get_by_role("button", name="Drag to reorder")
        while (number := handles.count()) > 0:
            handles.first.locator("xpath=following::button[contains(., 'Open menu')][1]").click()
            self.page.get_by_role("menuitem", name=re.compile("^(Delete|Remove)")).click()
            self.page.wait_for_function(
                "n => document.querySelectorAll('button[aria-label=\"Drag to reorder\"]').length < n",
                arg=number,
            )

    def json(self, which: int, value: object) -> None:
        """Fill in the editor of this number, which a field with keys of its own has."""
        self.page.locator(".cm-content").nth(which).fill(json.dumps(value))

    def submit(self) -> None:
        self.page.get_by_role("button", name="Submit").click()

    def refused(self) -> str:
        """What the page says against it, in the notification."""
        note = self.page.get_by_role("region", name=re.compile("Notifications")).get_by_role("listitem")
        note.first.wait_for()
        return str(note.first.inner_text())


def receipts(out: Path) -> dict[str, dict[str, Any]]:
    """Receipts of predicted blocks, by stage and block; a finished scene's are one object."""
    found: dict[str, dict[str, Any]] = {}
    for path in out.glob(".store/predict-*/receipts-*/*.json"):
        try:
            found[f"{path.parts[-3]}/{path.stem}"] = json.loads(path.read_bytes().splitlines()[0])
        except FileNotFoundError:  # compacted meanwhile
            continue
    for path in out.glob(".store/predict-*/receipts-*.json"):
        found |= {
            f"{path.parts[-2]}/{block}": r
            for block, r in json.loads(path.read_bytes().splitlines()[0]).items()
        }
    return found


@dataclass
class Operator:
    """Who sits at the browser: the UI, the server behind it, and the deployment of the segment flow."""

    page: Page
    base: str
    client: SyncPrefectClient
    deployment: UUID
    shots: Path

    def __post_init__(self) -> None:
        self.before = {run.id for run in self.client.read_flow_runs()}

    def shot(self, name: str) -> None:
        """A picture of the page as it is: ``1-form``."""
        self.page.wait_for_timeout(1000)  # transitions of the UI
        self.page.screenshot(path=self.shots / f"{name}.png")

    def form(self) -> Form:
        """The deployment's, as it comes."""
        return Form(self.page, self.base, self.deployment)

    def new_runs(self) -> set[UUID]:
        """Flow runs that were not there at first."""
        return {run.id for run in self.client.read_flow_runs()} - self.before

    def submitted(self) -> UUID:
        """The one flow run that a form has made."""
        [run] = wait_until(self.new_runs, SECONDS, "the flow run")
        assert isinstance(run, UUID)
        return run

    def open(self, run: UUID) -> None:
        self.page.goto(f"{self.base}/v2/runs/flow-run/{run}")

    def act(self, run: UUID, item: str) -> None:
        """Open a run's page, choose from its menu, and wait for what is asked."""
        self.open(run)
        self.page.get_by_role("button", name="Open menu").first.click()
        self.page.get_by_role("menuitem", name=item, exact=True).click()
        self.page.get_by_role("dialog").or_(self.page.get_by_role("alertdialog")).wait_for()

    def when(self, run: UUID, *names: str) -> FlowRun:
        """The flow run as soon as its state has one of these names."""

        def look() -> FlowRun | None:
            found = self.client.read_flow_run(run)
            return found if found.state is not None and found.state.name in names else None

        found: FlowRun = wait_until(look, SECONDS, f"{' or '.join(names)} of {run}")
        return found

    def artifacts(self, run: UUID, kind: str) -> list[Artifact]:
        mine = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
        return [a for a in self.client.read_artifacts(artifact_filter=mine) if a.type == kind]

    def progress(self, artifact: UUID) -> float:
        """Per cent on the page of a progress artifact."""
        self.page.goto(f"{self.base}/v2/artifacts/artifact/{artifact}")
        bar = self.page.get_by_test_id("progress-display")
        bar.wait_for()
        return float(str(bar.inner_text()).removeprefix("Progress: ").rstrip("%"))


@pytest.fixture
def operator(
    page: Page, served: str, on_server: SyncPrefectClient, tmp_path_factory: pytest.TempPathFactory
) -> Operator:
    """At the page of this module, as soon as the flow is served."""

    def look() -> UUID | None:
        try:
            return on_server.read_deployment_by_name("segment/segment").id
        except ObjectNotFound:
            return None

    deployment = wait_until(look, SECONDS, "the deployment")
    shots = Path(os.environ.get("SEGPIPE_SHOTS") or tmp_path_factory.mktemp("shots"))
    shots.mkdir(parents=True, exist_ok=True)
    return Operator(page, served, on_server, deployment, shots)


def filled(form: Form, name: str, out: Path, scenes: Path, model: Path) -> None:
    """A job of two scenes of sixteen blocks."""
    form.clear()
    form.fill("Name", name)
    form.items(0, [str(scenes / "scene_0.tif"), str(scenes / "scene_1.tif")])
    form.fill("Model", str(model))
    form.items(1, ["near", "far"])
    form.fill("Folder", str(out))
    form.fill("Block", "64")
    form.fill("Device", "cpu")
    form.fill("Batch", "2")
    form.fill("Threads", "1")
    form.fill("Batch minutes", "0.04")


def test_wrong_values_are_refused(
    operator: Operator,
    flow_scenes: Path,
    flow_models: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    form = operator.form()
    operator.shot("1-form")
    form.clear()
    form.submit()
    refused = form.refused()
    assert "scenes" in refused
    print(refused)
    operator.shot("2-form-without-scenes")
    form = operator.form()
    filled(form, "wrong", tmp_path, flow_scenes, flow_models(0))
    form.fill("Window", "512y")
    form.submit()
    refused = form.refused()
    assert "window" in refused
    print(refused)
    assert not operator.new_runs()

    # what only the model's card can say, the run says in one line
    form = operator.form()
    filled(form, "wrong", tmp_path, flow_scenes, flow_models(0))
    form.fill("Window", "500")
    form.json(0, {"1": 2.5})  # measure.tolerances
    form.submit()
    run = operator.submitted()
    state = operator.when(run, "Failed").state
    assert state is not None
    print(state.message)
    assert operator.client.read_flow_run(run).parameters["job"]["measure"]["tolerances"] == {"1": 2.5}
    assert state.message == "tiling.window: found 500; valid: multiples of 8, the model's total stride"
    operator.open(run)
    operator.shot("4-run-wrong-window")
    assert not list(tmp_path.iterdir())


def test_a_run_from_the_form_to_the_report(
    operator: Operator,
    flow_scenes: Path,
    flow_models: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    """Submitted by the form, paused, resumed, cancelled and retried; nothing is computed twice."""
    out = tmp_path / "out"
    form = operator.form()
    filled(form, "operator", out, flow_scenes, flow_models(WORK))
    operator.shot("5-form-filled")
    form.submit()
    run = operator.submitted()
    operator.when(run, "Running")
    wait_until(lambda: len(receipts(out)) >= 2, SECONDS, "two blocks")

    # progress moves, in the browser
    progress = wait_until(lambda: operator.artifacts(run, "progress"), SECONDS, "the progress")[0]
    seen = operator.progress(progress.id)
    operator.shot("6-progress")
    moved = wait_until(lambda: (now := operator.progress(progress.id)) > seen and now, SECONDS, "progress")
    print(f"progress in the browser: {seen} %, then {moved} %")
    operator.open(run)
    operator.shot("7-run")

    # cancel
    operator.act(run, "Cancel")
    operator.shot("8-cancel")
    operator.page.get_by_role("button", name="Cancel Flow Run").click()
    clicked = time.time()
    operator.when(run, "Cancelled")
    ended = time.time() - clicked
    time.sleep(3)
    kept = receipts(out)
    last = max(r["time"] for r in kept.values()) - clicked
    print(f"cancelled: last receipt {last:.1f} s after the click, state Cancelled after {ended:.1f} s")
    assert 2 <= len(kept) < BLOCKS
    assert last < 60
    operator.page.reload()
    operator.shot("9-cancelled")

    # retry
    operator.act(run, "Retry")
    operator.shot("10-retry")
    operator.page.get_by_role("button", name=re.compile("Retry")).last.click()
    operator.when(run, "Completed")
    after = receipts(out)
    assert len(after) == BLOCKS
    assert {block: after[block] for block in kept} == kept  # with their times: not computed again
    print(f"retry: {len(kept)} blocks kept, {BLOCKS - len(kept)} computed")
    operator.open(run)
    operator.shot("11-completed")

    # the report and its pictures
    [report] = [a for a in operator.artifacts(run, "markdown") if a.key == "operator-report"]
    operator.page.goto(f"{operator.base}/v2/artifacts/artifact/{report.id}")
    pictures = operator.page.locator("main img[src^='data:image/jpeg']")
    pictures.first.wait_for()
    operator.shot("12-report")
    sizes = [pictures.nth(i).evaluate("e => [e.naturalWidth, e.naturalHeight]") for i in range(2)]
    assert all(min(size) > 50 for size in sizes), sizes
    operator.page.get_by_role("tab", name="Raw").wait_for()
    tables = [a for a in operator.artifacts(run, "markdown") if a.key is None]  # of both attempts
    scenes = max(tables, key=lambda a: a.created)
    operator.page.goto(f"{operator.base}/v2/artifacts/artifact/{scenes.id}")
    operator.page.get_by_role("row", name=re.compile("scene_1.*done")).wait_for()
    operator.shot("13-scenes")


def test_a_run_paused_in_the_browser_goes_on(
    operator: Operator,
    flow_job: Callable[..., Path],
    flow_scenes: Path,
) -> None:
    """The UI's Pause suspends: the process ends, and when it is resumed another goes on."""
    job = yaml.safe_load(flow_job("halted", work=WORK).read_text())
    out = Path(job["outputs"]["dir"])
    job["tiling"]["block"] = str(job["tiling"]["block"])
    job["compute"] |= {"threads": "1", "batch": "2"}
    run = operator.client.create_flow_run_from_deployment(operator.deployment, parameters={"job": job}).id
    operator.when(run, "Running")
    wait_until(lambda: len(receipts(out)) >= 2, SECONDS, "two blocks")
    operator.act(run, "Pause")
    operator.shot("14-pause")
    operator.page.get_by_role("button", name="Pause Flow Run").click()
    clicked = time.time()
    operator.when(run, "Suspended")

    def still() -> dict[str, Any] | None:
        found = receipts(out)
        time.sleep(6)
        return found if receipts(out) == found else None

    kept = wait_until(still, 60, "no new receipts")
    last = max(r["time"] for r in kept.values()) - clicked
    print(f"paused: last receipt {last:.1f} s after the click; {len(kept)} of {BLOCKS} blocks")
    assert len(kept) < BLOCKS
    operator.page.reload()
    operator.shot("15-paused")
    operator.act(run, "Resume")
    operator.page.get_by_role("button", name="Resume", exact=True).click()
    operator.when(run, "Completed")
    after = receipts(out)
    assert len(after) == BLOCKS
    assert {block: after[block] for block in kept} == kept
