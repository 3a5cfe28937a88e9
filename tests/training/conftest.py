"""Small labelled scenes, and recipes that train a tiny network on them in a second."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from world import PIXEL, write_raster, write_volume

from segpipe.config.recipe import Recipe
from segpipe.sources import discover
from segpipe.training.scenes import TrainScene, prepare
from segpipe.training.split import Fold
from tests.training.no_augmentation import NONE

CLASSES = [
    {"value": 0, "name": "ground", "color": "#000000", "background": True},
    {"value": 7, "name": "crop", "color": "#22aa22"},
    {"value": 3, "name": "water", "color": "#2222ff"},
]
"""Values in no order: channel 1 is 7, channel 2 is 3."""
VALUES = np.array([c["value"] for c in CLASSES])
COUNTS = np.array([100, 150, 200])
"""Of band nir over each channel's elements: what makes the problem easy."""
NO_AUGMENTATION = NONE.model_dump(mode="json")
AFFINE = np.array([[-1.0, 0, 0, 30], [0, 1.5, 0, -20], [0, 0, 2.0, 5], [0, 0, 0, 1]])
"""Of volumes: the first axis runs to the left."""


def channels_of(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Patches of the three channels' numbers, (…) of any number of axes."""
    coarse = np.random.default_rng(seed).integers(0, 3, [-(-n // 6) for n in shape])
    for axis in range(len(shape)):
        coarse = np.repeat(coarse, 6, axis=axis)
    return coarse[tuple(slice(0, n) for n in shape)]


def write_scene(folder: Path, name: str, shape: tuple[int, int], seed: int) -> np.ndarray:
    """A raster of bands red (noise) and nir (which tells the class), and its labels; the channels."""
    rng = np.random.default_rng(seed + 1000)
    channels = channels_of(shape, seed)
    nir = COUNTS[channels] + rng.integers(-10, 11, shape)
    pixels = np.stack([rng.integers(60, 240, shape), nir]).astype(np.uint16)
    write_raster(folder / "images" / f"{name}.tif", pixels, names=("red", "nir"))
    write_raster(folder / "labels" / f"{name}.tif", VALUES[channels].astype(np.uint8)[None])
    return channels


def write_scan(folder: Path, name: str, shape: tuple[int, int, int], seed: int) -> np.ndarray:
    """The same as a volume of one channel, (z, y, x) to files in (x, y, z)."""
    channels = channels_of(shape, seed)
    voxels = COUNTS[channels] + np.random.default_rng(seed + 1000).integers(-10, 11, shape)
    write_volume(folder / "images" / f"{name}.nii.gz", voxels.astype(np.int16).T, AFFINE)
    write_volume(folder / "labels" / f"{name}.nii.gz", VALUES[channels].astype(np.uint8).T, AFFINE)
    return channels


def merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Mappings merged at every depth, but for a network's arguments."""
    found = dict(base)
    for key, value in more.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict) and key != "arguments"
        found[key] = merged(found[key], value) if both else value
    return found


def recipe_data(folder: Path, kind: str = "raster", **fields: Any) -> dict[str, Any]:
    """A recipe over the scenes of a folder, as YAML has it; ``fields`` are merged into it."""
    size, bands = (32, ["nir", "red"]) if kind == "raster" else (16, [])
    data = {
        "name": "tiny",
        "card": {
            "title": "Tiny <b>network</b>",
            "kind": kind,
            "provider": "monai",
            "architecture": "UNet",
            "arguments": {"channels": [8, 16], "strides": [2], "num_res_units": 0},
            "input": {
                "bands": bands,  # not the order of the files
                "normalisation": [{"op": "subtract", "value": [150.0]}, {"op": "divide", "value": [50.0]}],
            },
            "window": {"size": [size], "halo": [8 if kind == "raster" else 4], "stride": 2},
            "classes": CLASSES,
            "licence": "CC0-1.0",
        },
        "data": {"scenes": [str(folder / "images")], "reference": {"path": str(folder / "labels")}},
        "split": {"folds": 2},
        "augment": NO_AUGMENTATION,
        "optimise": {"steps": 6, "batch": 2, "rate": 0.01, "ema": 0.5},
        "judge": {"every": 3},
        "compute": {"device": "cpu", "precision": "fp32", "threads": 1},
        "out": str(folder / "out"),
    }
    return merged(data, fields)


def recipe_of(folder: Path, kind: str = "raster", **fields: Any) -> Recipe:
    """The same, validated."""
    return Recipe.model_validate(recipe_data(folder, kind, **fields))


def write_recipe(path: Path, data: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def prepared(recipe: Recipe) -> list[TrainScene]:
    """The recipe's scenes in the store."""
    return prepare(recipe, discover(recipe.data.scenes), lambda ready: None)


def fold_of(recipe: Recipe, scenes: list[TrainScene], apart: int | None = 0) -> Fold:
    return Fold.of(recipe.split, {s.name: s.shape for s in scenes}, apart)


RasterFolder = tuple[Path, dict[str, np.ndarray]]


@pytest.fixture(scope="session")
def four_rasters(tmp_path_factory: pytest.TempPathFactory) -> RasterFolder:
    """A folder of four rasters of 44 by 50 pixels of 30 m, and their channels by name."""
    assert PIXEL == 30.0
    folder = tmp_path_factory.mktemp("rasters")
    names = [f"scene{number}" for number in range(4)]
    return folder, {name: write_scene(folder, name, (44, 50), seed) for seed, name in enumerate(names)}


@pytest.fixture
def rasters(four_rasters: RasterFolder, tmp_path: Path) -> Callable[..., Recipe]:
    """``rasters(**fields)``: a recipe over them whose results lie in this test's folder."""

    def make(**fields: Any) -> Recipe:
        return recipe_of(four_rasters[0], **{"out": str(tmp_path / "out"), **fields})

    return make
