"""What can be known before work is told by `plan` and by `run`: the same line, exit code 2, nothing begun.

Run with ``-s`` to read the messages.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rasterio
import torch
import yaml
from onnx import TensorProto, helper
from world import CLASSES, Ended, World, write_raster, write_yaml

import segpipe
from segpipe.config.card import load_card
from segpipe.errors import RequestError
from segpipe.models.registry import check_card
from segpipe.tiling.windows import make_lattice

Here = Callable[..., Ended]
Fields = dict[str, Any]
Make = Callable[[World, Path], Fields]


def a_file(name: str, content: bytes) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return write


TEXT, EMPTY_TABLE = a_file("notes.txt", b"words\n"), a_file("table.csv", b"a,b\n1,2\n")
NO_IMAGE, NO_UTF8 = a_file("atlas.tif", b"no image\n"), a_file("names.csv", b"\xff\xfe\x00,\n")


def raster(world: World, folder: Path, bands: int = 1, **profile: Any) -> str:
    """Labels on the scene's grid, unless the profile moves them."""
    shape = bands, *world.raster_shape
    return str(write_raster(folder / "labels.tif", np.ones(shape, np.uint8), **profile))


def card(world: World, folder: Path, **fields: Any) -> str:
    """The card `nearest` with other fields, and its weights beside it."""
    data = yaml.safe_load((world.models / "nearest.yaml").read_text())
    (folder / "nearest.pt").write_bytes((world.models / "nearest.pt").read_bytes())
    return str(write_yaml(folder / "card.yaml", {**data, **fields}))


def onnx_card(folder: Path, edge: int | str, **window: Any) -> str:
    """Scores as `world.Nearest`, but of windows of one size."""
    shape = [1, 2, edge, edge]
    weights = np.zeros((3, 2, 1, 1), np.float32)
    weights[:, 0, 0, 0] = range(3)
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w", "b"], ["y"])],
        "nearest",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, edge, edge])],
        [
            helper.make_tensor("w", TensorProto.FLOAT, weights.shape, weights.ravel()),
            helper.make_tensor("b", TensorProto.FLOAT, [3], [0.0, -0.5, -2.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    onnx.save(model, folder / "nearest.onnx")
    steps = [{"op": "subtract", "value": [100.0]}, {"op": "divide", "value": [50.0]}]
    data = {
        "name": "nearest-onnx", "kind": "raster", "provider": "onnx", "weights": "nearest.onnx",
        "input": {"bands": ["nir", "red"], "normalisation": steps}, "classes": CLASSES, "window": window,
    }  # fmt: skip
    return str(write_yaml(folder / "onnx.yaml", data))


def cut(world: World, folder: Path) -> str:
    made = card(world, folder)
    weights = folder / "nearest.pt"
    weights.write_bytes(weights.read_bytes()[:900])
    return made


def other_network(world: World, folder: Path) -> str:
    made = card(world, folder)
    torch.save({"weight": torch.zeros(3)}, folder / "nearest.pt")
    return made


def in_degrees(world: World, folder: Path) -> str:
    degrees = rasterio.Affine(1e-3, 0.0, 10.0, 0.0, -1e-3, 50.0)
    scene = {"names": ("red", "nir"), "nodata": 0, "crs": "EPSG:4326", "transform": degrees}
    return str(write_raster(folder / "degrees.tif", world.pixels(), **scene))


def regions(path: str, **more: str) -> Fields:
    return {"regions": {"path": path, **more}}


def given(world: World, folder: Path, **fields: Any) -> Fields:
    return {"model": None, "labels": raster(world, folder), **fields}


MOVED = rasterio.Affine(30.0, 0.0, 500_015.0, 0.0, -30.0, 4_000_000.0)

WRONG: dict[str, tuple[Make, list[str]]] = {
    "region attribute": (
        lambda w, f: regions(str(w / "districts.geojson"), name="distrct"),
        ["regions.name: found 'distrct'", "district"],
    ),
    "region layer": (
        lambda w, f: regions(str(w / "districts.geojson"), layer="roads"),
        ["regions.layer: found 'roads'", "districts"],
    ),
    "regions are a text": (
        lambda w, f: regions(TEXT(f)),
        ["regions.path", "notes.txt", "give a vector layer"],
    ),
    "regions are a table": (lambda w, f: regions(EMPTY_TABLE(f)), ["regions.", "table.csv"]),
    "regions are an image": (
        lambda w, f: regions(str(w / "scene1.tif")),
        ["regions.path", "scene1.tif: has 2 bands; a label file has one"],
    ),
    "regions of a raster for a volume": (
        lambda w, f: {
            **regions(str(w / "districts.geojson")),
            "scenes": [str(w / "volume.nii.gz")],
            "model": str(w.models / "nearest-volume.yaml"),
        },
        ["volume: regions.path", "is a polygon layer, and the scene is a volume"],
    ),
    "atlas unreadable": (lambda w, f: regions(NO_IMAGE(f)), ["regions.path", "atlas.tif: cannot be opened"]),
    "atlas of fractions": (
        lambda w, f: regions(
            str(write_raster(f / "half.tif", np.full((1, *w.raster_shape), 0.5, np.float32)))
        ),
        ["scene1: regions.path", "holds 0.5; labels are whole numbers"],
    ),
    "atlas in no CRS on another grid": (
        lambda w, f: regions(raster(w, f, crs=None, transform=MOVED)),
        ["scene1: regions.path", "only one has a CRS and their grids differ"],
    ),
    "names of an atlas unreadable": (
        lambda w, f: regions(raster(w, f), name=NO_UTF8(f)),
        ["regions.name", "names.csv cannot be read"],
    ),
    "names of an atlas without columns": (
        lambda w, f: regions(raster(w, f), name=EMPTY_TABLE(f)),
        ["regions.name", "has columns a, b; needed: value, name"],
    ),
    "kilometres of a raster in degrees": (
        lambda w, f: {**regions("grid:1000"), "scenes": [in_degrees(w, f)]},
        ["degrees: regions.path: grid:1000", "degree", "grid:0.01"],
    ),
    "spacing of a raster in degrees": (
        lambda w, f: {
            "scenes": [in_degrees(w, f)],
            "model": card(w, f, input={"bands": ["nir", "red"], "spacing": [30.0, 30.0]}),
        },
        ["degrees: the card asks for a spacing in metres", "WGS 84"],
    ),
    "reference of three bands": (
        lambda w, f: {"reference": {"path": raster(w, f, bands=3)}},
        ["scene1: ", "labels.tif: has 3 bands; a label file has one"],
    ),
    "reference on another grid": (
        lambda w, f: {"reference": {"path": raster(w, f, transform=MOVED)}},
        ["scene1: reference", "lies on another grid than its scene", "0.5 elements apart"],
    ),
    "reference unreadable": (
        lambda w, f: {"reference": {"path": NO_IMAGE(f)}},
        ["scene1: ", "atlas.tif: cannot be opened"],
    ),
    "labels on another grid": (
        lambda w, f: {"model": None, "labels": raster(w, f, transform=MOVED)},
        ["scene1: labels ", "lie on another grid"],
    ),
    "classes unreadable": (lambda w, f: given(w, f, classes=NO_UTF8(f)), ["classes: ", "not UTF-8 text"]),
    "classes of another kind": (lambda w, f: given(w, f, classes=TEXT(f)), ["classes: found", "give a CSV"]),
    "groups unreadable": (
        lambda w, f: {"measure": {"groups": NO_UTF8(f)}},
        ["measure.groups", "names.csv"],
    ),
    "groups of other scenes": (
        lambda w, f: {"measure": {"groups": a_file("groups.csv", b"scene,group\nother,1\n")(f)}},
        ["measure.groups", "scene1"],
    ),
    "weights missing": (lambda w, f: {"model": card(w, f, weights="gone.pt")}, ["weights: no file at"]),
    "weights cut": (lambda w, f: {"model": cut(w, f)}, ["nearest: weights", "nearest.pt"]),
    "weights of another kind of file": (
        lambda w, f: {"model": other_network(w, f)},
        ["nearest: weights", "nearest.pt"],
    ),
    "bands that no scene has": (
        lambda w, f: {"model": card(w, f, input={"bands": ["blue", "red"]})},
        ["scene1: bands: the scene has no blue; it has red, nir"],
    ),
    "window that is no multiple of the stride": (
        lambda w, f: {"tiling": {"window": 36}},
        ["tiling.window: found 36", "multiples of 8"],
    ),
    "window of an ONNX file": (
        lambda w, f: {"model": onnx_card(f, 32, size=[32], fixed=True), "tiling": {"window": 48}},
        ["tiling.window: found 48", "takes its own size only", "valid: auto"],
    ),
    "window of an ONNX card": (
        lambda w, f: {"model": onnx_card(f, 32, size=[48], fixed=True)},
        ["nearest-onnx: window", "takes [32, 32] only"],
    ),
    "halo over half the window": (
        lambda w, f: {"tiling": {"halo": 16}},
        ["scene1: tiling.halo: found 16 for a window of 32 (stride 8); valid: 0 to 8"],
    ),
    "memory": (
        lambda w, f: {"tiling": {"memory": "64MiB"}},
        ["scene1: tiling.memory: found 64 MiB; blocks of 32x32 need 9", "libraries 900 MiB"],
    ),
    "output that cannot be written": (
        lambda w, f: {"outputs": {"dir": TEXT(f)}},
        ["outputs.dir: ", "notes.txt: cannot be made"],
    ),
}
"""What is wrong with a job that one scene would otherwise suit, and words of the line that says so."""


def begun(out: Path) -> list[str]:
    """Stages and runs below an output folder."""
    return [str(p) for p in out.rglob("*") if p.is_file() and not p.name.startswith(".")]


@pytest.mark.parametrize("what", WRONG)
def test_plan_and_run_refuse_a_request_alike(
    what: str, world: World, here: Here, tmp_path: Path, messages: list[tuple[str, int, str]]
) -> None:
    make, words = WRONG[what]
    out = tmp_path / "out"
    job = str(world.job(out, **make(world, tmp_path)))
    planned, ran = here("plan", job), here("run", job, "--local")
    assert planned == ran
    assert planned.code == 2 and planned.out == "", planned
    [line] = planned.err.splitlines()
    messages.append((what, 2, line))
    for word in words:
        assert word in line
    with pytest.raises(RequestError) as told:
        segpipe.run(job)
    assert line == f"error: {told.value}"
    assert begun(out) == []


def test_what_is_wrong_with_one_scene_is_told_of_that_scene(world: World, here: Here, tmp_path: Path) -> None:
    """Each with its own reference: the others are planned, and done; maps are there of all that open."""
    truth = tmp_path / "truth"
    for name in ("right", "bands", "moved", "torn"):
        write_raster(tmp_path / f"{name}.tif", world.pixels(), names=("red", "nir"), nodata=0)
        write_raster(truth / f"{name}.tif", world.reference()[np.newaxis])
    write_raster(truth / "bands.tif", np.ones((3, *world.raster_shape), np.uint8))
    write_raster(truth / "moved.tif", world.reference()[np.newaxis], transform=MOVED)
    (tmp_path / "torn.tif").write_text("no image")
    scenes = [str(tmp_path / f"{name}.tif") for name in ("bands", "torn", "right", "moved")]
    job = str(world.job(tmp_path / "out", scenes=scenes, reference={"path": str(truth)}))
    planned, ran = here("plan", job), here("run", job, "--local")
    assert (planned.code, ran.code) == (1, 1)
    assert planned.errors == [line.replace("not measured: reference: ", "") for line in ran.errors]
    assert len(list((tmp_path / "out").glob("*/*/scenes/*/labels.tif"))) == 3
    told = dict(line.removeprefix("failed: ").split(": ", 1) for line in ran.errors)
    assert list(told) == ["bands", "torn", "moved"]
    assert "has 3 bands" in told["bands"] and "0.5 elements apart" in told["moved"]
    assert "cannot be opened" in told["torn"]
    assert "  right: " in planned.out and "1 of 4 scenes done" in ran.out


@pytest.mark.parametrize(
    ("window", "stride", "halo"),
    [(64, 32, 16), (64, 16, 17), (32, 8, 16), (32, 1, 16), (8, 8, 1), (48, 8, -1)],
)
def test_the_halo_that_is_called_valid_is_taken(
    window: int, stride: int, halo: int, world: World, tmp_path: Path
) -> None:
    """Of a card and of a job; one more is refused."""

    def of_card(halo: int) -> None:
        shape = {"size": [window], "halo": [halo], "stride": stride}
        check_card(load_card(card(world, tmp_path, window=shape)))

    def of_job(halo: int) -> None:
        make_lattice([500, 500], [window] * 2, [halo] * 2, stride)

    for check in (of_card, of_job):
        with pytest.raises(RequestError) as told:
            check(halo)
        valid = re.search(r"valid: (\d+) to (\d+)$", str(told.value))
        assert valid, told.value
        for good in map(int, valid.groups()):
            check(good)
        for bad in (int(valid[1]) - 1, int(valid[2]) + 1):
            with pytest.raises(RequestError, match=f"found {bad} "):
                check(bad)
