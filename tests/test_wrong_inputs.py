"""What people get wrong: one line that names the file or field, no traceback, and the right exit code.

A wrong request (2) starts nothing. A wrong scene (1) fails alone: the others are done, and the tables
say so. Run with ``-s`` to read the messages.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import rasterio
import yaml
from world import (
    OBLIQUE,
    PIXEL,
    Ended,
    World,
    command,
    nearest_label,
    only_run,
    raster_pixels,
    write_raster,
    write_yaml,
)

Here = Callable[..., Ended]


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, int, str]]]:
    """What was wrong, the exit code and the message; printed at the end."""
    rows: list[tuple[str, int, str]] = []
    yield rows
    print("\n\n| wrong input | exit code | message |\n|---|---|---|")
    for what, code, line in rows:
        print(f"| {what} | {code} | `{line}` |")


def told(ended: Ended, code: int) -> None:
    assert "Traceback" not in ended.out + ended.err
    assert ended.code == code, ended


# ------------------------------------------------------------------ requests


def refused(here: Here, job: Path, *overrides: str) -> str:
    """The one line that a request is refused with; nothing was made."""
    ended = here("run", str(job), *[part for item in overrides for part in ("--set", item)])
    told(ended, 2)
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
    "prompts": ({"prompts": {"text": ["lakes"]}}, ["`prompts` is not available", "remove it"]),
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
    what: str, world: World, here: Here, tmp_path: Path, table: list[tuple[str, int, str]]
) -> None:
    fields, words = FIELDS[what]
    line = refused(here, world.job(tmp_path / "out", **fields))
    table.append((what, 2, line))
    for word in words:
        assert word in line
    assert not list((tmp_path / "out").glob("trial/*"))


def test_every_mistake_of_a_job_is_told_at_once(world: World, here: Here, tmp_path: Path) -> None:
    job = world.job(tmp_path / "out", tiling={"windw": 64, "memory": "4GB"}, scens=["x"])
    ended = here("run", str(job))
    told(ended, 2)
    lines = ended.err.removeprefix("error: ").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["tiling.memory", "tiling.windw", "scens"]
    assert all(line.startswith(str(job)) for line in lines)


@pytest.mark.parametrize("out", ["a file", "below a file", "/proc/segpipe"])
def test_an_output_that_cannot_be_written(
    out: str, world: World, here: Here, tmp_path: Path, table: list[tuple[str, int, str]]
) -> None:
    (tmp_path / "taken").write_text("not a folder")
    folder = {"a file": str(tmp_path / "taken"), "below a file": str(tmp_path / "taken/deeper")}.get(out, out)
    job = world.job(tmp_path / "out")
    line = refused(here, job, f"outputs.dir={folder}")
    table.append((f"unwritable output: {out}", 2, line))
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
    text: str, words: list[str], here: Here, tmp_path: Path, table: list[tuple[str, int, str]]
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    line = refused(here, job)
    table.append(("YAML", 2, line))
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
        ("provider unknown", {"provider": "keras"}, ["provider: found 'keras'", "'smp', 'monai'"]),
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
    table: list[tuple[str, int, str]],
) -> None:
    model = changed_card(world, tmp_path, **fields)
    line = refused(here, world.job(tmp_path / "out", model=str(model)))
    table.append((what, 2, line))
    for word in words:
        assert word in line


def test_a_gpu_where_there_is_none(
    world: World, here: Here, tmp_path: Path, table: list[tuple[str, int, str]]
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    line = refused(here, world.job(tmp_path / "out"), "compute.device=cuda:1")
    table.append(("GPU where there is none", 2, line))
    assert line.startswith("compute.device: found 'cuda:1', but torch")
    assert line.endswith("sees no GPU; use auto or cpu")


def test_a_server_that_does_not_answer(world: World, tmp_path: Path) -> None:
    ended = command("run", str(world.job(tmp_path / "out")), api="http://127.0.0.1:9/api")
    told(ended, 2)
    assert ended.err.splitlines() == [
        "error: PREFECT_API_URL: no Prefect server answers at http://127.0.0.1:9/api; start one with "
        "`prefect server start`, or unset it for a temporary one"
    ]


def test_a_memory_bound_that_no_plan_meets(
    world: World, here: Here, tmp_path: Path, table: list[tuple[str, int, str]]
) -> None:
    ended = here("plan", str(world.job(tmp_path / "out")), "--set", "tiling.memory=64MiB")
    told(ended, 1)
    [line] = ended.err.splitlines()
    table.append(("memory too small", 1, line))
    assert line.startswith("failed: scene1: tiling.memory: found 64 MiB; blocks of 32x32 need 9")
    assert "libraries 900 MiB" in line


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
    told(ended, 2)
    assert ended.err.startswith("Usage:")
    assert words in " ".join(ended.err.split())


# ------------------------------------------------------------------ scenes


def write_scenes(world: World, folder: Path) -> tuple[list[str], Path]:
    """Two scenes that are right and eight that are not, with a reference for each."""
    names: dict[str, Any] = {"names": ("red", "nir"), "nodata": 0}
    tiles: dict[str, Any] = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "lzw"}
    elsewhere = rasterio.Affine(PIXEL, 0, 900_000, 0, -PIXEL, 4_000_000)
    scenes, truth = folder / "scenes", folder / "truth"
    pixels = world.pixels()
    write_raster(scenes / "first.tif", pixels, **names)
    (scenes / "empty.tif").touch()
    (scenes / "text.tif").write_text("not a picture\n")
    damaged = write_raster(scenes / "damaged.tif", raster_pixels(512, 512, 4), **tiles, **names)
    data = bytearray(damaged.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = b"\xff" * 4000
    damaged.write_bytes(data)
    write_raster(scenes / "names.tif", pixels, names=("red", "green"), nodata=0)
    write_raster(scenes / "bands.tif", np.concatenate([pixels, pixels[:1]]), nodata=0)
    write_raster(scenes / "shape.tif", pixels, **names)
    write_raster(scenes / "far.tif", pixels, transform=elsewhere, **names)
    write_raster(scenes / "last.tif", world.pixels(2), **names)
    right = world.reference()[np.newaxis]
    for name in ("first", "empty", "text", "names", "bands"):
        write_raster(truth / f"{name}.tif", right)
    write_raster(truth / "damaged.tif", np.ones((1, 512, 512), np.uint8))
    write_raster(truth / "shape.tif", right[:, :-1])
    write_raster(truth / "far.tif", right, transform=elsewhere)
    write_raster(truth / "last.tif", world.reference(2)[np.newaxis])
    order = ("first", "missing", "empty", "text", "damaged", "names", "bands", "shape", "far", "last")
    return [str(scenes / f"{name}.tif") for name in order], truth


WRONG_SCENES = {
    "missing": ["{scenes}/missing.tif: no such file"],
    "empty": ["{scenes}/empty.tif: the file is empty (0 bytes)"],
    "text": ["{scenes}/text.tif: cannot be opened: ", "not recognized as being in a supported file format"],
    "damaged": ["{scenes}/damaged.tif: cannot be read: "],
    "names": ["bands: the scene has no nir; it has red, green", "asks for nir, red", "the job's `bands`"],
    "bands": ["bands: the scene has 3 unnamed bands", "asks for 2 (nir, red)"],
    "shape": [
        "{truth}/shape.tif lies on another grid",
        "the scene's shape is (72, 96), the other's (71, 96)",
    ],
    "far": ["districts.geojson: none of its 2 regions touches the scene", "x 900000 to 902880"],
}


def districts(labels: np.ndarray) -> dict[tuple[str, int], float]:
    """Area in m² by district and class, counted here: one column of ``south east`` counts half."""
    half = np.ones(labels.shape[1] - 48)
    half[0] = 0.5
    counted = {}
    for value in (0, 1, 2):
        counted["scene", value] = float((labels == value).sum()) * PIXEL**2
        counted["north", value] = float((labels[:40] == value).sum()) * PIXEL**2
        counted["south east", value] = float(((labels[40:, 48:] == value) * half).sum()) * PIXEL**2
    return counted


def test_a_wrong_scene_fails_alone_and_is_told_everywhere(
    world: World, server: str, tmp_path: Path, table: list[tuple[str, int, str]]
) -> None:
    scenes, truth = write_scenes(world, tmp_path)
    out = tmp_path / "out"
    regions = {"path": str(world / "districts.geojson"), "name": "district"}
    job = world.job(out, scenes=scenes, reference={"path": str(truth)}, regions=regions)
    ended = command("run", str(job), api=server)
    told(ended, 1)
    lines = dict(line.removeprefix("failed: ").split(": ", 1) for line in ended.errors)
    assert list(lines) == list(WRONG_SCENES)  # one line each, in the order of the job
    for name, words in WRONG_SCENES.items():
        table.append((f"scene: {name}", 1, f"failed: {name}: {lines[name]}"))
        for word in words:
            assert word.format(scenes=tmp_path / "scenes", truth=truth) in lines[name]
    assert ended.out.splitlines()[0] == "trial: 2 of 10 scenes done"

    run = only_run(out)
    rows = pd.read_csv(run / "regions.csv", keep_default_na=False, na_values=[""])
    for name, seed in (("first", 1), ("last", 2)):
        mine = rows[rows["scene"] == name]
        assert set(mine["state"]) == {"measured"}
        found = {(r["region"], r["value"]): r["area_m2"] for r in mine.to_dict("records")}
        assert found == districts(world.labels(seed))
    metrics = pd.read_csv(run / "metrics.csv", keep_default_na=False, na_values=[""])
    for name in WRONG_SCENES:
        mine = rows[rows["scene"] == name]
        assert list(mine["class"]) == ["ground", "crop", "water"]
        assert set(mine["state"]) == {"failed"}
        assert mine[["count", "area_m2", "share"]].isna().all(axis=None)
        compared = metrics[metrics["scene"] == name]
        assert set(compared["state"]) == {"failed"}
        assert set(compared["reason"]) == {lines[name]}
        assert compared["iou"].isna().all()

    record = json.loads((run / "run.json").read_text())
    states = {s["name"]: (s["state"], s["error"]) for s in record["scenes"]}
    assert states == {
        **{n: ("failed", lines[n]) for n in WRONG_SCENES},
        **dict.fromkeys(("first", "last"), ("done", "")),
    }
    page = (run / "report.html").read_text()
    for name in WRONG_SCENES:
        assert name in page


def test_a_truncated_volume_fails_alone(
    world: World, server: str, tmp_path: Path, table: list[tuple[str, int, str]]
) -> None:
    whole = (world / "volume.nii.gz").read_bytes()
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    (scenes / "a_truncated.nii.gz").write_bytes(whole[: len(whole) // 2])
    (scenes / "b_header.nii.gz").write_bytes(whole[:60])
    (scenes / "c_empty.nii.gz").touch()
    shutil.copy(world / "scene1.tif", scenes / "d_raster.tif")
    shutil.copy(world / "volume.nii.gz", scenes / "e_right.nii.gz")
    job = world.job(tmp_path / "out", card="nearest-volume", scenes=[f"{scenes}/*"])
    ended = command("run", str(job), api=server)
    told(ended, 1)
    lines = dict(line.removeprefix("failed: ").split(": ", 1) for line in ended.errors)
    for name, line in lines.items():
        table.append((f"volume: {name}", 1, f"failed: {name}: {line}"))
    assert list(lines) == ["a_truncated", "b_header", "c_empty", "d_raster"]
    assert lines["a_truncated"] == (
        f"{scenes}/a_truncated.nii.gz: truncated: the file ends before its last voxel"
    )
    assert lines["b_header"].startswith(f"{scenes}/b_header.nii.gz: ")
    assert lines["c_empty"] == f"{scenes}/c_empty.nii.gz: the file is empty (0 bytes)"
    assert lines["d_raster"] == "the scene is a raster, the card 'nearest-volume' is for a volume"
    rows = pd.read_csv(only_run(tmp_path / "out") / "regions.csv")
    states = rows.groupby("scene", sort=False)["state"].unique().map(list).to_dict()
    assert states == {**{name: ["failed"] for name in lines}, "e_right": ["measured"]}
    counts = np.bincount(nearest_label(world.voxels()).ravel(), minlength=3)
    right = rows[rows["scene"] == "e_right"]
    assert list(right["count"]) == list(counts)
    voxel = abs(np.linalg.det(OBLIQUE[:3, :3]))
    np.testing.assert_allclose(right["volume_mm3"], counts * voxel, rtol=1e-6)
