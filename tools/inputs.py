"""Six small jobs on generated scenes, as files: the inputs of `same_bytes` and `house`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import rasterio
import yaml

ROOT = Path(__file__).parents[1]
SHAPE = (200, 260)
"""Pixels of the scene that prompts are placed on."""
PIXEL = 10.0
WEST, NORTH = 500_000.0, 4_000_000.0
COMPUTE = {"device": "cpu", "threads": 1}


@dataclass(frozen=True)
class Command:
    """One command line of segpipe and where its results are."""

    name: str
    arguments: tuple[str, ...]
    out: Path
    scene: Path
    card: Path | None
    """The model card; None where labels are given."""

    @property
    def file(self) -> str:
        """The job or scan file."""
        return self.arguments[-1]


def library() -> Path:
    """Return the repository whose segpipe a child process imports: that of PYTHONPATH, else this one."""
    code = "import segpipe; print(segpipe.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd="/", env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return Path(done.stdout.strip()).parents[1]


def environment(**extra: str) -> dict[str, str]:
    """Return this process's environment for a child that runs segpipe without any server of the user's."""
    kept = {key: value for key, value in os.environ.items() if key != "PREFECT_API_URL"}
    return {"PYTHONPATH": str(ROOT), **kept, "PREFECT_SERVER_ANALYTICS_ENABLED": "false", **extra}


def make_commands(folder: Path, root: Path) -> list[Command]:
    """Write the scenes, cards and job files of all six commands.

    Args:
        folder: where the files go; it must not exist or be empty.
        root: the repository whose configs/models and tests are used.

    Returns:
        One command each for a raster, a volume, prompts, objects, given labels and a scan of a lake.
    """
    sys.path.insert(0, str(root))
    object_world = import_module("tests.flows.object_world")
    make_world = import_module("tests.world").make_world
    (folder / "world").mkdir(parents=True)
    world = make_world(folder / "world")
    objects = folder / "objects"
    objects.mkdir()
    object_world.write_world(objects)
    _shift(objects / "truth.tif")
    _write_lake(folder / "lake", world.folder)
    _write_prompts(folder / "prompts", root)
    raster, volume = world / "scene1.tif", world / "volume.nii.gz"
    nearest, truth = world.models / "nearest.yaml", world / "truth" / "scene1.tif"
    regions = {"path": str(world / "districts.geojson"), "name": "district"}
    reference: dict[str, Any] = {"reference": {"path": str(truth)}}
    _write_volume_truth(volume, folder / "volume_truth.nii.gz")
    prompts = folder / "prompts"
    asked = {"path": str(prompts / "points.geojson"), "text": ["water . volcano"]}
    asked |= {"grounder": str(prompts / "otsu.yaml")}
    given: dict[str, Any] = {"labels": str(truth), "measure": {"intensity": True}, "regions": regions}
    given |= {"reference": {"path": str(world / "truth" / "scene2.tif")}}
    lake = {"lake": {"location": str(folder / "lake"), "settle_seconds": 0}}
    make = _Maker(folder)
    return [
        make("raster", raster, nearest, regions=regions, outputs={"uncertainty": True}, **reference),
        make("volume", volume, world.models / "nearest-volume.yaml",
             reference={"path": str(folder / "volume_truth.nii.gz")}),
        make("prompts", prompts / "scene.tif", root / "configs" / "models" / "starter-sam.yaml",
             bands=["red", "green", "blue"], prompts=asked),
        make("objects", objects / "scene.tif", objects / "oracle.yaml", bands=["ids"],
             reference={"path": str(objects / "truth.tif"), "divisor": 1000},
             regions={"path": str(objects / "districts.gpkg"), "name": "district"}),
        make("labels", raster, None, **given),
        make("lake", folder / "lake", nearest, "scan", regions=regions, **lake),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Maker:
    folder: Path

    def __call__(
        self, name: str, scene: Path, card: Path | None, verb: str = "run", **fields: Any
    ) -> Command:
        out, path = self.folder / "out" / name, self.folder / f"{name}.yaml"
        data = {"name": name, "compute": COMPUTE, **fields}
        data |= {"outputs": {"dir": str(out), **fields.get("outputs", {})}}
        if verb == "run":
            data["scenes"] = [str(scene)]
        if card is not None:
            data["model"] = str(card)
        path.write_text(yaml.safe_dump(data))
        return Command(name, (verb, str(path)), out, scene, card)


def _write_lake(lake: Path, world: Path) -> None:
    """Two scenes of the world under other names."""
    lake.mkdir()
    for number in (1, 2):
        (lake / f"scene{number}.tif").write_bytes((world / f"scene{number}.tif").read_bytes())


def _shift(reference: Path) -> None:
    """Move a reference by two rows, so that no score of it is 1."""
    with rasterio.open(reference, "r+") as file:
        file.write(np.roll(file.read(), 2, axis=1))


def _write_volume_truth(volume: Path, path: Path) -> None:
    """A reference that is wrong in every fifth slice."""
    tests_world = import_module("tests.world")
    image: Any = nib.load(volume)
    labels = tests_world.nearest_label(np.asarray(image.dataobj))
    labels[..., ::5] = (labels[..., ::5] + 1) % 3
    tests_world.write_volume(path, labels)


def _write_prompts(folder: Path, root: Path) -> None:
    """A scene of bright and dark rectangles, points in some of them, and a model that finds the bright."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 100, (3, -(-SHAPE[0] // 8), -(-SHAPE[1] // 8)))
    pixels = np.kron(coarse, np.ones((1, 8, 8), int))[:, : SHAPE[0], : SHAPE[1]].astype(np.uint8)
    boxes = [(12, 16, 60, 50), (100, 30, 150, 92), (180, 120, 240, 180)]
    for x0, y0, x1, y1 in boxes:
        pixels[0, y0:y1, x0:x1] = 220
    profile = {"driver": "GTiff", "height": SHAPE[0], "width": SHAPE[1], "count": 3, "dtype": "uint8"}
    where = {"crs": "EPSG:32617", "transform": rasterio.Affine(PIXEL, 0, WEST, 0, -PIXEL, NORTH)}
    with rasterio.open(folder / "scene.tif", "w", **profile, **where) as file:
        file.write(pixels)
        for number, name in enumerate(("red", "green", "blue"), start=1):
            file.set_band_description(number, name)
    features = [_point((x0 + x1) / 2, (y0 + y1) / 2) for x0, y0, x1, y1 in boxes[:2]]
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32617"}}
    document = {"type": "FeatureCollection", "crs": crs, "features": features}
    (folder / "points.geojson").write_text(json.dumps(document))
    card = yaml.safe_load((root / "configs" / "models" / "cloud-otsu.yaml").read_text())
    classes = [
        {"value": value, "name": name, "color": "#000000", "background": not value}
        for value, name in enumerate(("land", "water"))
    ]
    card |= {"name": "otsu", "input": {"bands": ["red"]}, "arguments": {"thresholds": [127.5]}}
    (folder / "otsu.yaml").write_text(yaml.safe_dump(card | {"classes": classes}))


def _point(x: float, y: float) -> dict[str, Any]:
    """A feature at a position in pixels."""
    geometry = {"type": "Point", "coordinates": [WEST + PIXEL * x, NORTH - PIXEL * y]}
    return {"type": "Feature", "properties": {"label": 1, "phrase": "field"}, "geometry": geometry}
