"""Deployments on a real server: schedules, priorities, GPU slots, and who is told when a run fails."""

# ruff: noqa: F811 (a fixture of another folder is imported, and its name is an argument)

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Running, Scheduled

from segpipe.config.job import load_job
from segpipe.config.scan import Scan
from tests.flows.conftest import JobMaker, flow_job, flow_models, flow_scenes, wait_until  # noqa: F401 (fixtures)
from tests.infra.deploy_world import PATIENCE, Stack, Told, listeners, stack

pytestmark = pytest.mark.slow

PREFECT_YAML = Path(__file__).parents[2] / "infra" / "prefect.yaml"
ENTRIES = {entry["name"]: entry for entry in yaml.safe_load(PREFECT_YAML.read_text())["deployments"]}


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with stack(tmp_path_factory.mktemp("deployed")) as made:
        yield made


@pytest.fixture(scope="module")
def told() -> Iterator[Told]:
    with listeners() as made:
        yield made


def named(stack: Stack, name: str) -> Any:
    return stack.client.read_deployment_by_name(f"{name.removesuffix('-gpu')}/{name}")


def job_of(path: Path) -> dict[str, Any]:
    """As the form would send it."""
    job: dict[str, Any] = load_job(path).model_dump(mode="json")
    return job


def scan_of(job: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A scan that does with its scenes what the job does, as the form would send it."""
    shared = {key: job[key] for key in ("name", "model", "bands", "tiling", "compute", "outputs")}
    scan: dict[str, Any] = Scan.model_validate({**shared, **fields}).model_dump(mode="json")
    return scan


def trigger(stack: Stack, name: str, parameters: dict[str, Any], at: datetime | None = None) -> FlowRun:
    """A run of a deployment, as the UI makes it."""
    state = Scheduled(scheduled_time=at) if at else None
    deployment = named(stack, name).id
    return stack.client.create_flow_run_from_deployment(deployment, parameters=parameters, state=state)


def runs_of(stack: Stack, name: str) -> list[FlowRun]:
    these = DeploymentFilter(id=DeploymentFilterId(any_=[named(stack, name).id]))
    return stack.client.read_flow_runs(deployment_filter=these)


def test_the_server_has_what_the_file_says(deployed: Stack) -> None:
    for name, entry in ENTRIES.items():
        found = named(deployed, name)
        assert found.entrypoint == entry["entrypoint"]
        assert found.description == entry["description"]
        assert found.tags == entry["tags"]
        assert found.parameters == entry["parameters"]
        assert found.pull_steps in (None, [])
        assert (found.work_pool_name, found.work_queue_name) == tuple(entry["work_pool"].values())
        assert found.global_concurrency_limit.limit == entry["concurrency_limit"]["limit"]
        strategy = found.concurrency_options.collision_strategy
        assert strategy.value == entry["concurrency_limit"]["collision_strategy"]
        slugs = {s.slug: s.active for s in found.schedules}
        assert slugs == {s["slug"]: s["active"] for s in entry.get("schedules", ())}
    for pool, limit in (("cpu", None), ("gpu", 1)):
        assert deployed.client.read_work_pool(pool).concurrency_limit == limit
        now, batch = (deployed.client.read_work_queue_by_name(q, pool).priority for q in ("now", "batch"))
        assert now < batch


def test_wrong_values_are_refused_by_the_server(deployed: Stack, flow_job: JobMaker) -> None:
    job = job_of(flow_job("wrong"))
    for wrong, said in (
        ({"tiling": {"window": "wide"}}, "window"),
        ({"tiling": {"blend": "wide"}}, "blend"),
        ({"unheard": 1}, "unheard"),
    ):
        with pytest.raises(PrefectHTTPStatusError) as caught:
            trigger(deployed, "segment", {"job": {**job, **wrong}})
        assert caught.value.response.status_code == 409
        assert said in caught.value.response.text


def test_a_schedule_fires_a_scan(
    deployed: Stack,
    flow_scenes: Path,
    flow_job: JobMaker,
    tmp_path: Path,
) -> None:
    """Both scenes of a lake named relatively are done, by a worker that was started somewhere else."""
    lake = deployed.home / "lake"
    lake.mkdir()
    for n in range(2):
        (lake / f"scene_{n}.tif").write_bytes((flow_scenes / f"scene_{n}.tif").read_bytes())
    wanted = scan_of(job_of(flow_job("nightly")), lake={"location": "lake", "settle_seconds": 0})
    due = (datetime.now(UTC) + timedelta(seconds=75)).replace(second=0, microsecond=0)
    schedule = CronSchedule(cron=f"{due.minute} {due.hour} {due.day} {due.month} *", timezone="UTC")
    scan = named(deployed, "scan")
    (made,) = deployed.client.create_deployment_schedules(
        scan.id, [DeploymentScheduleCreate(schedule=schedule, active=True, parameters={"scan": wanted})]
    )
    with deployed.worker("cpu"):
        run = wait_until(lambda: runs_of(deployed, "scan"), PATIENCE, "the scheduled run")[0]
        ended = deployed.ended(run)
    deployed.client.delete_deployment_schedule(scan.id, made.id)
    assert ended.state is not None
    assert ended.state.name == "Completed", ended.state.message
    assert ended.auto_scheduled
    assert ended.start_time is not None
    print(f"due {due:%H:%M:%S}, begun {ended.start_time:%H:%M:%S}, ended {ended.end_time:%H:%M:%S}")
    assert timedelta(0) <= ended.start_time - due < timedelta(seconds=PATIENCE)
    (record,) = Path(wanted["outputs"]["dir"]).glob("nightly/*/run.json")
    scenes = {scene["name"]: scene["state"] for scene in json.loads(record.read_text())["scenes"]}
    assert scenes == {"scene_0": "done", "scene_1": "done"}


def test_one_run_for_each_gpu_and_what_people_wait_for_first(
    deployed: Stack,
    flow_scenes: Path,
    flow_job: JobMaker,
) -> None:
    jobs = [job_of(flow_job(f"gpu{n}", scenes=[flow_scenes / "scene_0.tif"])) for n in range(2)]
    empty = deployed.home / "empty"
    empty.mkdir()
    scan = scan_of(jobs[0], name="gpu-scan", lake={"location": str(empty)})
    sent = [trigger(deployed, "scan-gpu", {"scan": scan})]  # first come …
    sent += [trigger(deployed, "segment-gpu", {"job": job}) for job in jobs]
    with deployed.worker("gpu", "--limit", "1"):
        ended = [deployed.ended(run) for run in sent]
    assert [run.state.name for run in ended if run.state] == ["Completed"] * 3
    times = sorted((run.start_time, run.end_time, run.id) for run in ended if run.start_time and run.end_time)
    assert times[-1][2] == sent[0].id  # … last served
    for (_, end, _), (start, _, _) in pairwise(times):
        assert end <= start


def create(deployed: Stack, told: Told, files: Sequence[str], *options: str) -> str:
    """`infra/automations/create.py` with the addresses of this test."""
    paths = [f"infra/automations/{name}.yaml" for name in files]
    secrets = {
        "SEGPIPE_WEBHOOK_URL": told.url,
        "SEGPIPE_WEBHOOK_TOKEN": "t0ken",
        "SEGPIPE_MAIL_URL": told.mail_url,
    }
    return deployed.command("python", "infra/automations/create.py", *paths, *options, **secrets)


def test_failure_and_completion_are_told(
    deployed: Stack,
    told: Told,
    flow_scenes: Path,
    flow_job: JobMaker,
    tmp_path: Path,
) -> None:
    create(deployed, told, ["completion-webhook", "failure-mail"])
    create(deployed, told, ["completion-webhook", "failure-mail"])  # again: replaced, not doubled
    printed = tmp_path / "failure.yaml"
    printed.write_text(create(deployed, told, ["failure-webhook"], "--print"))
    deployed.command("prefect", "automation", "create", "--from-file", str(printed))
    listed = deployed.command("prefect", "automation", "ls", COLUMNS="300")
    assert listed.count("segpipe failed, mail") == listed.count("segpipe completed, webhook") == 1

    torn = tmp_path / "torn.tif"
    torn.write_bytes((flow_scenes / "scene_1.tif").read_bytes()[:200_000])
    failing = job_of(flow_job("failing", scenes=[flow_scenes / "scene_0.tif", torn]))
    passing = job_of(flow_job("passing", scenes=[flow_scenes / "scene_0.tif"]))
    bad, good = (trigger(deployed, "segment", {"job": job}) for job in (failing, passing))
    with deployed.worker("cpu"):
        ended = [deployed.ended(run) for run in (bad, good)]
    states = [run.state for run in ended if run.state]
    assert [state.name for state in states] == ["Failed", "Completed"]
    for run, state in zip(ended, states, strict=True):
        headers, body = told.call(lambda body, id=str(run.id): body["id"] == id)  # type: ignore[misc]
        assert (body["flow"], body["run"], body["state"]) == ("segment", run.name, state.name)
        assert body["message"] == state.message
        assert body["url"].endswith(f"/runs/flow-run/{run.id}")
        assert headers["Authorization"] == "Bearer t0ken"
        assert headers["Content-Type"] == "application/json"
    assert "torn" in told.call(lambda body: body["state"] == "Failed")[1]["message"]
    text = told.mail(f"segpipe: {ended[0].name} failed")
    assert "1 of 2 scenes failed (torn: " in " ".join(text.split())
    assert len(told.calls) == 2
    assert len(told.mails) == 1


def test_a_scan_that_is_late_or_does_not_end_is_told(deployed: Stack, told: Told, tmp_path: Path) -> None:
    """With no worker; the proactive trigger waits 10 s instead of six hours."""
    printed = tmp_path / "late.yaml"
    late, unfinished, _ = yaml.safe_load(create(deployed, told, ["scan-late"], "--print"))["automations"]
    unfinished["trigger"]["within"] = 10
    printed.write_text(yaml.safe_dump([late, unfinished]))
    deployed.command("prefect", "automation", "create", "--from-file", str(printed))
    scan = ENTRIES["scan"]["parameters"]
    waiting = trigger(deployed, "scan", scan, datetime.now(UTC) - timedelta(minutes=1))
    hanging = trigger(deployed, "scan-gpu", scan)
    deployed.client.set_flow_run_state(hanging.id, Running())
    text = told.mail(f"segpipe scan late: {waiting.name}")
    assert "is a worker of its pool running?" in text
    told.mail(f"segpipe scan does not end: {hanging.name}")
