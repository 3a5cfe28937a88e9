"""A tiny recipe: a small raster and small volumes on disk, a network of a 128-element window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import rasterio
import yaml
from rasterio.transform import from_origin

from segpipe.training.prompted.recipe import PromptedRecipe, load_prompted_recipe

NETWORK = {"width": 4, "context": 8}


def write_raster(path: Path, values: np.ndarray, nodata: float | None = None) -> None:
    transform = from_origin(0, 0, 30, 30)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        height=values.shape[1],
        width=values.shape[2],
        count=len(values),
        dtype=values.dtype,
        crs="EPSG:32617",
        transform=transform,
        nodata=nodata,
    ) as file:
        file.write(values)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Discs over a ramp as a raster of four bands, and balls in two volumes."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:120, :100]
    labels = np.zeros((120, 100), np.uint8)
    for cy, cx, radius, value in (
        (20, 20, 9, 1),
        (20, 70, 7, 2),
        (60, 50, 12, 1),
        (95, 30, 8, 1),
        (90, 75, 9, 2),
    ):
        labels[np.hypot(y - cy, x - cx) < radius] = value
    image = rng.normal(100, 5, (4, 120, 100)) + 60 * labels
    write_raster(root / "image.tif", image.astype(np.float32), nodata=-9999)
    write_raster(root / "labels.tif", labels[None])
    for folder in ("images", "labels"):
        (root / folder).mkdir()
    for name in ("case_1", "case_2"):
        z, y, x = np.mgrid[:20, :24, :22]
        ball = (np.sqrt((z - 10) ** 2 + (y - 12) ** 2 + (x - 11) ** 2) < 6).astype(np.int16)
        ball[ball > 0] += (y > 12)[ball > 0]
        values = (rng.normal(50, 3, ball.shape) + 30 * ball).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / "images" / f"{name}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(ball, np.eye(4)), root / "labels" / f"{name}.nii.gz")
    return root


@pytest.fixture
def fields(data: Path, tmp_path: Path) -> dict[str, Any]:
    """The recipe as a mapping, to be changed."""
    raster = {
        "name": "discs",
        "image": "image.tif",
        "labels": "labels.tif",
        "bands": ["a", "b", "c", "d"],
        "values": [1, 2],
        "learned": [0, 76],
        "judged": [80, 120],
        "judged_values": [1, 2],
        "composites": [["c", "b", "a"]],
    }
    volumes = {
        "name": "balls",
        "images": "images/*.nii.gz",
        "labels": "labels",
        "groups": [[1], [2], [1, 2]],
        "judged": ["case_2"],
    }
    return {
        "name": "tiny",
        "network": NETWORK,
        "data": {"root": str(data), "rasters": [raster], "volumes": [volumes]},
        "sampling": {
            "window": 128,
            "drawn": 1,
            "objects": 3,
            "again": 2,
            "cycle": [{"part": 1}, {"part": 2, "times": 2}],
        },
        "optimise": {"steps": 4, "warmup": 1, "cooldown": 2, "threads": 1, "every": 2, "ema": 0.5},
        "out": str(tmp_path / "runs"),
        "export": str(tmp_path / "net.safetensors"),
    }


@pytest.fixture
def recipe(fields: dict[str, Any], tmp_path: Path) -> PromptedRecipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(fields))
    return load_prompted_recipe(path)
