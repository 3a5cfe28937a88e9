"""One model of a job: the YAML, ``--set`` and the schema say the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from segpipe.config.card import load_card
from segpipe.config.job import Job, load_job, parse_memory, parse_size
from segpipe.config.loading import validate
from segpipe.errors import RequestError

CONFIGS = Path(__file__).parents[1] / "configs"
LEAST: dict[str, Any] = {"scenes": ["a.tif"], "model": "card.yaml"}

SIZE = st.lists(st.integers(1, 4096), min_size=1, max_size=3).map(lambda s: "x".join(map(str, s)))
TILING = st.fixed_dictionaries(
    {},
    optional={
        "window": st.one_of(st.just("auto"), st.just("whole"), SIZE),
        "halo": st.one_of(st.just("auto"), SIZE),
        "block": st.one_of(st.just("auto"), SIZE, st.integers(1, 9999)),
        "blend": st.sampled_from(["trim", "gaussian"]),
        "memory": st.builds("{}{}".format, st.integers(1, 999), st.sampled_from(["MiB", "GiB", "TiB"])),
        "store": st.sampled_from(["zarr", "direct"]),
    },
)
COMPUTE = st.fixed_dictionaries(
    {},
    optional={
        "device": st.sampled_from(["auto", "cpu", "cuda", "cuda:3"]),
        "precision": st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
        "batch": st.one_of(st.just("auto"), st.integers(1, 64)),
        "threads": st.one_of(st.just("auto"), st.integers(1, 64).map(str)),
        "workers": st.integers(1, 1024),
        "retries": st.integers(0, 10),
        "tta": st.sampled_from(["none", "flips"]),
    },
)
WORDS = st.text(st.characters(categories=["L", "N"], max_codepoint=0x2FF), min_size=1, max_size=12)
JOBS = st.fixed_dictionaries(
    {
        "scenes": st.lists(WORDS.map("{}.tif".format), min_size=1, max_size=3),
        "model": WORDS.map("{}.yaml".format),
    },
    optional={
        "name": st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,20}\Z"),
        "description": WORDS,
        "bands": st.lists(WORDS, max_size=4),
        "tiling": TILING,
        "compute": COMPUTE,
        "regions": st.fixed_dictionaries({"path": WORDS}, optional={"name": WORDS, "layer": WORDS}),
        "reference": st.fixed_dictionaries(
            {"path": WORDS},
            optional={
                "values": st.dictionaries(st.integers(0, 99), st.one_of(st.none(), st.integers(0, 99)))
            },
        ),
        "outputs": st.fixed_dictionaries(
            {"dir": WORDS},
            optional={"formats": st.lists(st.sampled_from(["cog", "nifti"])), "scores": st.booleans()},
        ),
    },
)


def flat(data: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves of a nested mapping with their dotted paths; `values` is one leaf."""
    found: list[tuple[str, Any]] = []
    for key, value in data.items():
        nested = isinstance(value, dict) and key != "values" and value
        found += flat(value, f"{prefix}{key}.") if nested else [(f"{prefix}{key}", value)]
    return found


def as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, allow_unicode=True).removesuffix("...\n").strip()


@given(data=JOBS)
def test_yaml_and_overrides_and_data_make_the_same_job(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, Any]
) -> None:
    folder = tmp_path_factory.mktemp("jobs")
    whole, least = folder / "whole.yaml", folder / "least.yaml"
    whole.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    least.write_text(yaml.safe_dump(LEAST), encoding="utf-8")
    job = validate(Job, data, "data")
    assert load_job(whole) == job
    assert load_job(least, [f"{key}={as_yaml(value)}" for key, value in flat(data)]) == job
    assert Job.model_validate(json.loads(job.model_dump_json())) == job


@given(data=JOBS)
def test_what_a_job_dumps_is_valid_by_the_schema(data: dict[str, Any]) -> None:
    dumped = Job.model_validate(data).model_dump(mode="json")
    assert list(jsonschema.Draft202012Validator(Job.model_json_schema()).iter_errors(dumped)) == []


@given(
    data=JOBS,
    wrong=st.sampled_from([("tiling", "windw"), ("compute", "devices"), ("", "scens"), ("outputs", "x")]),
)
def test_a_key_that_the_schema_does_not_have_is_refused_by_both(
    data: dict[str, Any], wrong: tuple[str, str]
) -> None:
    section, key = wrong
    inside = data.setdefault(section, {}) if section else data
    inside[key] = "1"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, Job.model_json_schema())
    with pytest.raises(RequestError, match=re.escape(f"{section}.{key}".lstrip(".") + ": unknown key")):
        validate(Job, data, "job.yaml")


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("scenez", "scenes"),
        ("tiling.windows", "window"),
        ("compute.prescision", "precision"),
        ("regions.pth", "path"),
        ("outputs.format", "formats"),
        ("reference.value", "values"),
    ],
)
def test_an_unknown_key_is_told_with_the_one_that_was_meant(path: str, hint: str) -> None:
    data: dict[str, Any] = {**LEAST, "regions": {"path": "a"}, "reference": {"path": "b"}}
    *sections, key = path.split(".")
    inside = data
    for section in sections:
        inside = inside.setdefault(section, {})
    inside[key] = "x"
    with pytest.raises(RequestError) as caught:
        validate(Job, data, "job.yaml")
    assert str(caught.value).startswith(f"job.yaml: {path}: unknown key; did you mean `{hint}`? valid keys: ")


def test_a_missing_key_is_told_with_what_belongs_there() -> None:
    with pytest.raises(RequestError) as caught:
        validate(Job, {**LEAST, "regions": {}}, "job.yaml")
    assert str(caught.value).startswith("job.yaml: regions.path: missing; valid: Vector layer (GeoPackage")


def test_the_schema_says_what_every_key_is_for() -> None:
    schema = Job.model_json_schema()
    models = [schema, *(d for d in schema["$defs"].values() if "properties" in d)]

    def said(field: dict[str, Any]) -> str:
        """Its own words, or those of the section that it is."""
        section = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
        return str(field.get("description") or section.get("description") or "")

    unsaid = [f"{m['title']}.{n}" for m in models for n, f in m["properties"].items() if not said(f)]
    assert unsaid == []
    assert all(m["additionalProperties"] is False for m in models)


@given(
    number=st.integers(1, 9999), unit=st.sampled_from(["MiB", "GiB", "TiB"]), space=st.sampled_from(["", " "])
)
def test_memory_is_bytes_by_powers_of_1024(number: int, unit: str, space: str) -> None:
    job = Job.model_validate({**LEAST, "tiling": {"memory": f"{number}{space}{unit}"}})
    assert parse_memory(job.tiling.memory) == number << {"MiB": 20, "GiB": 30, "TiB": 40}[unit]


def test_memory_takes_a_fraction() -> None:
    assert parse_memory("1.5GiB") == 3 << 29


@given(st.text(max_size=12))
def test_memory_refuses_everything_else(text: str) -> None:
    valid = re.fullmatch(r"[0-9]+(\.[0-9]+)?\s?(MiB|GiB|TiB)", text)
    try:
        job = Job.model_validate({**LEAST, "tiling": {"memory": text}})
    except ValueError:
        assert valid is None
    else:
        assert parse_memory(job.tiling.memory) >= 0


@given(sizes=st.lists(st.integers(1, 10**6), min_size=1, max_size=3), ndim=st.sampled_from([2, 3]))
def test_a_size_is_one_number_for_all_axes_or_one_for_each(sizes: list[int], ndim: int) -> None:
    text = "x".join(map(str, sizes))
    if len(sizes) == 1:
        assert parse_size(text, ndim, "tiling.block") == (sizes[0],) * ndim
    elif len(sizes) == ndim:
        assert parse_size(text, ndim, "tiling.block") == tuple(sizes)
    else:
        with pytest.raises(RequestError, match=rf"tiling\.block: found '{text}' with {len(sizes)} axes"):
            parse_size(text, ndim, "tiling.block")


@given(sizes=st.lists(st.integers(1, 99), min_size=1, max_size=3), place=st.integers(0, 2))
def test_a_size_of_zero_is_a_halo_only(sizes: list[int], place: int) -> None:
    sizes[place % len(sizes)] = 0
    text, ndim = "x".join(map(str, sizes)), 3 if len(sizes) == 3 else 2
    assert 0 in parse_size(text, ndim, "tiling.halo")
    with pytest.raises(RequestError, match="above 0"):
        parse_size(text, ndim, "tiling.window")


@pytest.mark.parametrize("path", sorted((CONFIGS / "jobs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_job_that_comes_with_segpipe_is_right(path: Path) -> None:
    job = load_job(path)
    assert job.name == path.stem
    assert job.model
    card = load_card(CONFIGS.parent / job.model)
    assert (CONFIGS.parent / job.model).stem == card.name
    jsonschema.validate(job.model_dump(mode="json"), Job.model_json_schema())
    if job.regions is not None and job.regions.path.startswith("configs/"):
        assert (CONFIGS.parent / job.regions.path).is_file()


@pytest.mark.parametrize("path", sorted((CONFIGS / "models").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_card_that_comes_with_segpipe_is_right_and_says_its_limits(path: Path) -> None:
    card = load_card(path)
    assert card.name == path.stem
    for field in ("title", "data", "scores", "limits", "licence", "source"):
        assert getattr(card, field).strip(), field
