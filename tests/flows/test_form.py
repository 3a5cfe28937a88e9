"""What the Prefect UI makes its form of: the deployment's schema, as the server would hold it."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.flows import load_flow_from_entrypoint
from prefect.types.entrypoint import EntrypointType

from segpipe_flows.deployments import DEPLOYMENTS
from segpipe_flows.prompt import prompt
from segpipe_flows.segment import segment


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """Of the parameters of the served deployment."""
    deployment = segment.to_deployment(name="segment", entrypoint_type=EntrypointType.MODULE_PATH)
    assert deployment.entrypoint == "segpipe_flows.segment.segment"
    found: dict[str, Any] = deployment._parameter_openapi_schema.model_dump(mode="json")
    return found


def fields(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every field that the form shows, by its path."""
    found: dict[str, dict[str, Any]] = {}

    def visit(path: str, node: dict[str, Any]) -> None:
        references = [node.get("$ref"), *(option.get("$ref") for option in node.get("anyOf", ()))]
        for reference in filter(None, references):
            model = schema["definitions"][reference.rsplit("/", 1)[-1]]
            for name, inner in model.get("properties", {}).items():
                found[f"{path}.{name}"] = inner
                visit(f"{path}.{name}", inner)

    for name, node in schema["properties"].items():
        found[name] = node
        visit(name, node)
    return found


def test_one_parameter_which_is_the_job(schema: dict[str, Any]) -> None:
    assert list(schema["properties"]) == ["job"]
    assert schema["required"] == ["job"]
    assert schema["definitions"]["Job"]["required"] == ["scenes"]
    assert schema["properties"]["job"]["description"].startswith("Which scenes, which model")


def test_every_field_says_what_it_is(schema: dict[str, Any]) -> None:
    shown = fields(schema)
    assert len(shown) > 30
    silent = [
        path
        for path, node in shown.items()
        if not node.get("description")
        and not schema["definitions"].get(node.get("$ref", "").rsplit("/", 1)[-1], {}).get("description")
    ]
    assert silent == []


def test_choices_are_lists(schema: dict[str, Any]) -> None:
    choices = {name: d["enum"] for name, d in schema["definitions"].items() if "enum" in d}
    assert choices["Runner"] == ["threads", "dask", "dask-cuda", "kubernetes", "slurm"]
    assert choices["Blend"] == ["trim", "gaussian"]
    assert choices["Precision"] == ["auto", "fp32", "bf16", "fp16"]


def test_a_union_offers_one_form_and_nothing(schema: dict[str, Any]) -> None:
    """The form shows a union as tabs: there is none but "this or nothing"."""
    for path, node in fields(schema).items():
        kinds = [o for o in node.get("anyOf", ()) if o.get("type") != "null"]
        assert len(kinds) <= 1, path


def test_the_form_of_a_question_begins_with_the_question() -> None:
    deployment = prompt.to_deployment(name="prompt", entrypoint_type=EntrypointType.MODULE_PATH)
    assert deployment.entrypoint == "segpipe_flows.prompt.prompt"
    schema: dict[str, Any] = deployment._parameter_openapi_schema.model_dump(mode="json")
    assert list(schema["properties"]) == ["question"]
    question = schema["definitions"]["PromptJob"]
    assert [*question["properties"]][:3] == question["required"] == ["scenes", "model", "prompts"]
    options = schema["definitions"]["PromptOptions"]["properties"]
    assert [*options][:3] == ["text", "grounder", "threshold"]
    assert options["text"]["type"] == "array"
    assert (options["threshold"]["minimum"], options["threshold"]["maximum"]) == (0, 1)
    assert all(
        node.get("description") or schema["definitions"][node["$ref"].rsplit("/", 1)[-1]].get("description")
        for node in options.values()
    )


def form_of(name: str) -> dict[str, Any]:
    """The schema of a deployment of the table."""
    (known,) = [d for d in DEPLOYMENTS if d.name == name]
    flow = load_flow_from_entrypoint(known.entrypoint, use_placeholder_flow=False)
    deployment = flow.to_deployment(name=known.name, entrypoint_type=EntrypointType.MODULE_PATH)
    found: dict[str, Any] = deployment._parameter_openapi_schema.model_dump(mode="json")
    return found


@pytest.mark.parametrize(
    ("name", "parameters", "required"),
    [
        ("segment", ["job"], ["job"]),
        ("scan", ["scan"], ["scan"]),
        ("prompt", ["question"], ["question"]),
        ("train", ["recipe", "changes"], ["recipe"]),
        ("compare", ["before", "after", "out"], ["before", "after"]),
    ],
)
def test_every_form_says_what_its_fields_are(name: str, parameters: list[str], required: list[str]) -> None:
    found = form_of(name)
    assert list(found["properties"]) == parameters
    assert found["required"] == required
    positions = {field: node["position"] for field, node in found["properties"].items()}
    assert sorted(positions, key=positions.__getitem__) == parameters
    for field, node in found["properties"].items():
        assert node["description"], field
        assert field in required or "default" in node
    for path, node in fields(found).items():
        model = found["definitions"].get(node.get("$ref", "").rsplit("/", 1)[-1], {})
        assert node.get("description") or model.get("description"), path
        kinds = [option for option in node.get("anyOf", ()) if option.get("type") != "null"]
        assert len(kinds) <= 1, path  # the form shows a union as tabs


def test_every_default_of_a_model_is_in_the_form() -> None:
    """A field is required, or has a default that the form shows."""
    for known in DEPLOYMENTS:
        for name, model in form_of(known.name).get("definitions", {}).items():
            for field, node in model.get("properties", {}).items():
                assert field in model.get("required", ()) or "default" in node or is_group(node), (
                    name,
                    field,
                )


def is_group(node: dict[str, Any]) -> bool:
    """A nested model, whose own fields have the defaults, or a list or mapping, which is empty at first."""
    return "$ref" in node or node.get("type") in ("array", "object")


def test_the_form_of_a_scan_begins_with_the_lake() -> None:
    found = form_of("scan")
    definitions = found["definitions"]
    assert definitions["LakeKind"]["enum"] == ["files", "stac", "bids", "dicom"]
    assert definitions["LakeIdentity"]["enum"] == ["stat", "content"]
    assert definitions["Identity"]["enum"] == ["sampled", "content"]
    scan = definitions["Scan"]
    assert [*scan["properties"]][:3] == ["name", "lake", "model"]
    assert scan["required"] == ["lake"]
    lake = definitions["Lake"]
    assert [*lake["properties"]][:3] == ["location", "kind", "pattern"]
    assert lake["required"] == ["location"]
    assert lake["properties"]["settle_seconds"]["minimum"] == 0
    cover = definitions["StacFilter"]["properties"]["cloud_cover"]
    assert (cover["minimum"], cover["maximum"], cover["default"]) == (0, 100, 100)
    assert definitions["StacFilter"]["properties"]["begin"]["anyOf"][0]["format"] == "date-time"
