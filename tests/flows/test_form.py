"""What the Prefect UI makes its form of: the deployment's schema, as the server would hold it."""

from __future__ import annotations

from typing import Any

import pytest
from prefect.types.entrypoint import EntrypointType

from flows.prompt import prompt
from flows.segment import segment


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    """Of the parameters of the served deployment."""
    deployment = segment.to_deployment(name="segment", entrypoint_type=EntrypointType.MODULE_PATH)
    assert deployment.entrypoint == "flows.segment.segment"
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
    assert choices["Runner"] == ["threads", "dask"]
    assert choices["Blend"] == ["trim", "gaussian"]
    assert choices["Precision"] == ["auto", "fp32", "bf16", "fp16"]


def test_a_union_offers_one_form_and_nothing(schema: dict[str, Any]) -> None:
    """The form shows a union as tabs: there is none but "this or nothing"."""
    for path, node in fields(schema).items():
        kinds = [o for o in node.get("anyOf", ()) if o.get("type") != "null"]
        assert len(kinds) <= 1, path


def test_the_form_of_a_question_begins_with_the_question() -> None:
    deployment = prompt.to_deployment(name="prompt", entrypoint_type=EntrypointType.MODULE_PATH)
    assert deployment.entrypoint == "flows.prompt.prompt"
    schema: dict[str, Any] = deployment._parameter_openapi_schema.model_dump(mode="json")
    assert list(schema["properties"]) == ["question"]
    question = schema["definitions"]["Question"]
    assert [*question["properties"]][:3] == question["required"] == ["scenes", "model", "prompts"]
    options = schema["definitions"]["PromptOptions"]["properties"]
    assert [*options][:3] == ["text", "grounder", "threshold"]
    assert options["text"]["type"] == "array"
    assert (options["threshold"]["minimum"], options["threshold"]["maximum"]) == (0, 1)
    assert all(
        node.get("description") or schema["definitions"][node["$ref"].rsplit("/", 1)[-1]].get("description")
        for node in options.values()
    )
