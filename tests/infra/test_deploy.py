"""infra/prefect.yaml and infra/automations/ against the flows, Prefect's own models and the clock."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import anyio
import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.cli.deploy._schedules import _schedule_config_to_deployment_schedule
from prefect.flows import load_flow_from_entrypoint
from prefect.server.events.schemas.automations import Automation
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.schema_tools.validation import is_valid, validate

from infra.automations.create import ID, load
from segpipe_flows.deployments import DEPLOYMENTS, Deployment

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
ENTRIES: list[dict[str, Any]] = yaml.safe_load((INFRA / "prefect.yaml").read_text())["deployments"]
NAMES = [entry["name"] for entry in ENTRIES]
AUTOMATIONS = [
    pytest.param(each, id=each["name"])
    for path in sorted((INFRA / "automations").glob("*.yaml"))
    for each in load(path)
]
BERLIN = ZoneInfo("Europe/Berlin")


def by_name(name: str) -> dict[str, Any]:
    return ENTRIES[NAMES.index(name)]


def schema(entrypoint: str) -> dict[str, Any]:
    """Of a flow's parameters, as the server holds it."""
    flow = load_flow_from_entrypoint(entrypoint, use_placeholder_flow=False)
    deployment = flow.to_deployment(name="any", entrypoint_type=EntrypointType.MODULE_PATH)
    assert deployment.entrypoint == entrypoint
    found: dict[str, Any] = deployment._parameter_openapi_schema.model_dump(mode="json")
    return found


def test_prefect_knows_every_key() -> None:
    """Prefect ignores a key it does not know: what it read is what is written."""
    text = yaml.safe_load((INFRA / "prefect.yaml").read_text())
    read = PrefectYamlModel.model_validate(text).model_dump(exclude_unset=True, mode="json")
    for entry in (*text["deployments"], *read["deployments"]):
        for schedule in entry.get("schedules", ()):
            schedule.pop("interval", None)  # 3600 and PT1H
    assert read == text


def test_every_deployment_of_the_laptop_is_there() -> None:
    assert [d.name for d in DEPLOYMENTS] == ["segment", "scan", "prompt", "train", "compare"]
    assert sorted(NAMES) == sorted([*(d.name for d in DEPLOYMENTS), "segment-gpu", "scan-gpu"])


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry["name"]) for entry in ENTRIES])
def test_the_file_says_what_the_table_says(entry: dict[str, Any]) -> None:
    (known,) = [d for d in DEPLOYMENTS if d.name == entry["name"].removesuffix("-gpu")]
    gpu = ("gpu",) if entry["name"].endswith("-gpu") else ()
    assert entry["entrypoint"] == known.entrypoint
    assert entry["description"] == known.description
    assert tuple(entry["tags"]) == known.tags + gpu
    assert entry["parameters"] == known.parameters
    assert entry["enforce_parameter_schema"] is True
    assert set(entry["concurrency_limit"]) == {"limit", "collision_strategy"}


@pytest.mark.parametrize("known", [pytest.param(d, id=d.name) for d in DEPLOYMENTS])
def test_defaults_are_valid_by_the_schema_and_by_the_flow(known: Deployment) -> None:
    flow = load_flow_from_entrypoint(known.entrypoint, use_placeholder_flow=False)
    assert flow.name == known.name
    found = schema(known.entrypoint)
    assert validate(dict(known.parameters), found, ignore_required=True) == []
    if known.name != "compare":  # whose two runs have no default
        flow.validate_parameters(dict(known.parameters))
    for name, value in known.parameters.items():
        if isinstance(value, dict):
            assert not is_valid({name: {**value, "unheard": 1}}, found)


def test_files_that_defaults_name_are_in_the_repository() -> None:
    text = yaml.safe_dump([dict(d.parameters) for d in DEPLOYMENTS])
    named = set(re.findall(r"configs/\S+", text))
    assert len(named) >= 3
    assert [path for path in named if not (ROOT / path).is_file()] == []


def test_schedules_of_parameters_are_valid_too() -> None:
    for entry in ENTRIES:
        for schedule in entry.get("schedules", ()):
            given = {**entry["parameters"], **schedule.get("parameters", {})}
            flow = load_flow_from_entrypoint(entry["entrypoint"], use_placeholder_flow=False)
            assert flow.validate_parameters(given).keys() == given.keys()


@pytest.mark.parametrize("day", [datetime(2026, 1, 15, tzinfo=UTC), datetime(2026, 7, 15, tzinfo=UTC)])
def test_the_nightly_scan_is_at_two_in_winter_and_in_summer(day: datetime) -> None:
    nightly, hourly = map(_schedule_config_to_deployment_schedule, by_name("scan")["schedules"])
    cron = CronSchedule.model_validate(nightly["schedule"].model_dump())
    (first, second) = anyio.run(cron.get_dates, 2, day)
    assert first.astimezone(BERLIN).strftime("%H:%M") == "02:00"
    assert second - first == timedelta(days=1)
    interval = IntervalSchedule.model_validate(hourly["schedule"].model_dump())
    (first, second) = anyio.run(interval.get_dates, 2, day)
    assert (first.minute, second - first) == (20, timedelta(hours=1))
    assert not nightly["active"]
    assert not hourly["active"]


def test_pools_and_queues_are_made_by_the_script() -> None:
    script = (INFRA / "pools.sh").read_text()
    pools = set(re.search(r"for pool in (.+);", script)[1].split())  # type: ignore[index]
    queues = {q.split(":")[0] for q in re.search(r"for queue in (.+);", script)[1].split()}  # type: ignore[index]
    assert {entry["work_pool"]["name"] for entry in ENTRIES} == pools == {"cpu", "gpu"}
    assert {entry["work_pool"]["work_queue_name"] for entry in ENTRIES} == queues == {"now", "batch"}


@pytest.mark.parametrize("automation", AUTOMATIONS)
def test_an_automation_is_what_the_server_takes(automation: dict[str, Any]) -> None:
    """The server's own model, which compiles the templates; keys it would ignore are none."""
    for action in automation["actions"]:
        assert re.fullmatch(r"(webhook|slack-webhook)/[a-z-]+", action[ID])
    actions = [{**action, ID: str(UUID(int=1))} for action in automation["actions"]]
    read = Automation.model_validate({**automation, "actions": actions})
    assert set(automation) <= set(Automation.model_fields)
    assert set(automation["trigger"]) <= set(type(read.trigger).model_fields)
    for action, known in zip(automation["actions"], read.actions, strict=True):
        assert set(action) <= set(type(known).model_fields)
    tags = {tag for entry in ENTRIES for tag in entry["tags"]}
    assert automation["trigger"]["match_related"]["prefect.resource.id"].removeprefix("prefect.tag.") in tags
