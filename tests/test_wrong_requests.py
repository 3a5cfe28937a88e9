"""Wrong requests: one line that names the file or field, no traceback, exit code 2, and nothing is made.

Run with ``-s`` to read the messages.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from world import Ended, World, command, write_yaml

Here = Callable[..., Ended]


def refused(here: Here, job: Path, *overrides: str) -> str:
    """The one line that a request is refused with; nothing was made."""
    ended = here("run", str(job), *[part for item in overrides for part in ("--set", item)])
    assert ended.code == 2, ended
    assert "Traceback" not in ended.out + ended.err
    assert ended.out == ""
    [line] = ended.err.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


FIELDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": (
        {"tiling": {"windw": 64}},
        ["tiling.windw: unknown key", "did you mean `window`?", "valid keys: blend, block"],
    ),
    "wrong type": ({"compute": {"workers": "many"}}, ["compute.workers: found 'many'", "valid integer"]),
    "unit unknown": ({"tiling": {"memory": "4GB"}}, ["tiling.memory: found '4GB'", "512MiB, 4GiB"]),
    "word unknown": ({"tiling": {"blend": "mean"}}, ["tiling.blend: found 'mean'", "'trim' or 'gaussian'"]),
    "model and labels": ({"labels": "old/*.tif"}, ["one of `model` or `labels`", "found both"]),
    "neither": ({"model": None}, ["one of `model` or `labels`", "found neither"]),
    "no scenes": ({"scenes": []}, ["scenes: ", "found []; valid: Files, globs"]),
    "words and nobody who finds them": (
        {"prompts": {"text": ["lakes"]}},
        ["prompts", "`text` needs a `grounder`"],
    ),
    "prompts of another model": (
        {"prompts": {"everything": True}},
        ["is a semantic model, which takes no prompts", "output.kind: prompted"],
    ),
    "tolerance": ({"measure": {"tolerance": 0}}, ["measure.tolerance: ", "found 0"]),
    "uncertainty of given labels": (
        {"model": None, "labels": "x.tif", "outputs": {"uncertainty": True}},
        ["`outputs.uncertainty` needs a model"],
    ),
    "grid without a size": ({"regions": {"path": "grid:"}}, ["regions.path", "grid:"]),
    "address without dask": (
        {"compute": {"address": "tcp://x:1"}},
        ["compute.address needs compute.runner: dask"],
    ),
    "window off the stride": (
        {"tiling": {"window": 100}},
        ["tiling.window: found 100", "multiples of 8", "total stride"],
    ),
    "axes of a volume": ({"tiling": {"block": "8x8x8"}}, ["tiling.block: found '8x8x8'", "the scene has 2"]),
    "block of nothing": ({"tiling": {"block": 0}}, ["tiling.block: found '0'", "above 0"]),
    "regions missing": ({"regions": {"path": "nowhere.gpkg"}}, ["regions.path: nowhere.gpkg does not exist"]),
    "reference missing": ({"reference": {"path": "truth/"}}, ["reference.path: truth/ does not exist"]),
    "glob of nothing": ({"scenes": ["nowhere/*.tif"]}, ["scenes: nowhere/*.tif", "matches"]),
    "missing file, alone": ({"scenes": ["a.tif"]}, ["scenes: no such file", "a.tif"]),
    "card missing": ({"model": "nowhere.yaml"}, ["nowhere.yaml: cannot be read", "No such file"]),
    "half precision of a file": (
        {"compute": {"precision": "bf16"}},
        ["compute.precision: found bf16", "valid: auto or fp32"],
    ),
    "dask without a server": ({"compute": {"runner": "dask"}}, ["compute.runner: dask", "PREFECT_API_URL"]),
}
"""What is changed in a job that is right, and what the message says."""


@pytest.mark.parametrize("what", FIELDS)
def test_a_wrong_field_is_named_with_what_would_be_valid(
    what: str, world: World, here: Here, tmp_path: Path, messages: list[tuple[str, int, str]]
) -> None:
    fields, words = FIELDS[what]
    line = refused(here, world.job(tmp_path / "out", **fields))
    messages.append((what, 2, line))
    for word in words:
        assert word in line
    assert not list((tmp_path / "out").glob("trial/*"))


def test_every_mistake_of_a_job_is_told_at_once(world: World, here: Here, tmp_path: Path) -> None:
    job = world.job(tmp_path / "out", tiling={"windw": 64, "memory": "4GB"}, scens=["x"])
    ended = here("run", str(job))
    assert ended.code == 2, ended
    assert "Traceback" not in ended.out + ended.err
    lines = ended.err.removeprefix("error: ").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["tiling.memory", "tiling.windw", "scens"]
    assert all(line.startswith(str(job)) for line in lines)


@pytest.mark.parametrize("out", ["a file", "below a file", "/proc/segpipe"])
def test_an_output_that_cannot_be_written(
    out: str, world: World, here: Here, tmp_path: Path, messages: list[tuple[str, int, str]]
) -> None:
    (tmp_path / "taken").write_text("not a folder")
    folder = {"a file": str(tmp_path / "taken"), "below a file": str(tmp_path / "taken/deeper")}.get(out, out)
    job = world.job(tmp_path / "out")
    line = refused(here, job, f"outputs.dir={folder}")
    messages.append((f"unwritable output: {out}", 2, line))
    assert line.startswith(f"outputs.dir: {folder}: cannot be made")
    assert line.endswith("give a folder that can be written")
    assert (tmp_path / "taken").read_text() == "not a folder"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scenes: [a.tif]\nmodel: 'card.yaml\nname: x\n", ["line 4", "not valid YAML"]),
        ("scenes: [a.tif]\n\tmodel: card.yaml\n", ["line 2, column 1", "not valid YAML"]),
        ("- a\n- b\n", ["found list", "a mapping of keys was expected"]),
        ("", ["found NoneType", "a mapping of keys was expected"]),
    ],
)
def test_a_job_that_is_no_yaml_mapping_is_told_with_its_line(
    text: str, words: list[str], here: Here, tmp_path: Path, messages: list[tuple[str, int, str]]
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    line = refused(here, job)
    messages.append(("YAML", 2, line))
    assert line.startswith(f"{job}:")
    for word in words:
        assert word in line


def test_a_job_that_is_not_there_or_no_text(here: Here, tmp_path: Path) -> None:
    assert refused(here, tmp_path / "no.yaml").startswith(f"{tmp_path / 'no.yaml'}: cannot be read")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8 text" in refused(here, tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("tiling.window", ["--set tiling.window: found no `key=value`"]),
        ("name.x=1", ["--set name.x=1: `name` is a value"]),
        ("scenes=[a", ["--set scenes=[a", "not a YAML value"]),
        ("compute.devic=cpu", ["compute.devic: unknown key; did you mean `device`?"]),
    ],
)
def test_a_wrong_override(item: str, words: list[str], world: World, here: Here, tmp_path: Path) -> None:
    line = refused(here, world.job(tmp_path / "out"), item)
    for word in words:
        assert word in line


def changed_card(world: World, folder: Path, **fields: Any) -> Path:
    data = yaml.safe_load((world.models / "nearest.yaml").read_text())
    shutil.copy(world.models / "nearest.pt", folder / "nearest.pt")
    return write_yaml(folder / "card.yaml", {**data, **fields})


@pytest.mark.parametrize(
    ("what", "fields", "words"),
    [
        (
            "weights missing",
            {"weights": "gone.pt"},
            ["nearest: weights: no file at", "gone.pt", ".pth"],
        ),
        ("weights of another kind", {"weights": "card.yaml"}, ["weights", "does not read card.yaml"]),
        ("card with a typo", {"provder": "smp"}, ["provder: unknown key; did you mean `provider`?"]),
        ("provider unknown", {"provider": "keras"}, ["provider: found 'keras'", "smp, monai"]),
        (
            "TorchScript not allowed",
            {"allow_torchscript": False},
            ["provider torchscript runs the file as a program", "allow_torchscript: true"],
        ),
        (
            "halo of the whole window",
            {"window": {"size": [32], "halo": [16], "stride": 8}},
            ["nearest: window.halo: found 16", "valid: 0 to 8"],
        ),
    ],
)
def test_a_wrong_card(
    what: str,
    fields: dict[str, Any],
    words: list[str],
    world: World,
    here: Here,
    tmp_path: Path,
    messages: list[tuple[str, int, str]],
) -> None:
    model = changed_card(world, tmp_path, **fields)
    line = refused(here, world.job(tmp_path / "out", model=str(model)))
    messages.append((what, 2, line))
    for word in words:
        assert word in line


def test_a_gpu_where_there_is_none(
    world: World, here: Here, tmp_path: Path, messages: list[tuple[str, int, str]]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    line = refused(here, world.job(tmp_path / "out"), "compute.device=cuda:1")
    messages.append(("GPU where there is none", 2, line))
    assert line.startswith("compute.device: found 'cuda:1', but torch")
    assert line.endswith("sees no GPU; use auto or cpu")


def test_a_server_that_does_not_answer(world: World, tmp_path: Path) -> None:
    ended = command("run", str(world.job(tmp_path / "out")), api="http://127.0.0.1:9/api")
    assert ended.code == 2, ended
    assert "Traceback" not in ended.out + ended.err
    assert ended.err.splitlines() == [
        "error: PREFECT_API_URL: no Prefect server answers at http://127.0.0.1:9/api; start one with "
        "`prefect server start`, or unset it for a temporary one"
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rum", "job.yaml"], "No such command 'rum'"),
        (["run"], "Missing argument 'JOB.yaml'"),
        (["run", "job.yaml", "--force"], "No such option: --force"),
        (["models", "shwo"], "Did you mean 'show'?"),
    ],
)
def test_a_wrong_command_line_shows_its_usage(arguments: list[str], words: str, here: Here) -> None:
    ended = here(*arguments)
    assert ended.code == 2, ended
    assert "Traceback" not in ended.out + ended.err
    assert ended.err.startswith("Usage:")
    assert words in " ".join(ended.err.split())
