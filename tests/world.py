"""A small world for whole runs: scenes with known answers, models to give them, and processes.

The models are TorchScript, whose provider imports nothing but torch: a process is up in seconds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import rasterio
import torch
import yaml

PIXEL = 30.0
"""Metres."""
CLASSES = [
    {"value": 0, "name": "ground", "color": "#000000", "background": True},
    {"value": 1, "name": "crop", "color": "#22aa22"},
    {"value": 2, "name": "water", "color": "#2222ff"},
]
NODATA = 255
"""What labels have where the scene has no valid pixel."""
OBLIQUE = np.array(
    [
        [-1.19, 0.10, 0.05, 12.5],
        [0.12, 1.48, -0.08, -33.25],
        [0.03, 0.07, 2.01, 7.125],
        [0.0, 0.0, 0.0, 1.0],
    ]
)
"""An affine that no format may round or straighten."""


# ------------------------------------------------------------------ models


class Nearest(torch.nn.Module):
    """Scores whose argmax over 0, 1, 2 is the integer nearest to the first channel."""

    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.register_buffer("k", torch.arange(3.0).reshape(1, 3, *[1] * ndim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.k * x[:, :1] - self.k * self.k / 2


def convolutions(width: int) -> torch.nn.Module:
    """Five 3×3 convolutions with fixed random weights: work for a processor, context of 5 pixels."""
    torch.manual_seed(5)
    sizes = [2, width, width, width, width, 3]
    layers: list[torch.nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [torch.nn.Conv2d(before, after, 3, padding=1), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def save_model(module: torch.nn.Module, example: tuple[int, ...], path: Path) -> None:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.trace(module.eval(), torch.zeros(example)).save(str(path))


def write_yaml(path: Path, data: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def card(name: str, kind: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "title": f"{name}, for tests",
        "kind": kind,
        "provider": "torchscript",
        "allow_torchscript": True,
        "weights": f"{name}.pt",
        "classes": CLASSES,
        "licence": "CC0-1.0",
        **fields,
    }


def write_models(folder: Path) -> None:
    """Cards `nearest` (rasters), `nearest-volume`, and `convolutions`, which takes its time."""
    folder.mkdir()
    bands = ["nir", "red"]  # not the order of the files
    counts = [{"op": "subtract", "value": [100.0]}, {"op": "divide", "value": [50.0]}]
    save_model(Nearest(2), (1, 2, 32, 32), folder / "nearest.pt")
    write_yaml(
        folder / "nearest.yaml",
        card(
            "nearest",
            "raster",
            input={"bands": bands, "normalisation": counts},
            window={"size": [32], "halo": [0], "stride": 8},
        ),
    )
    save_model(Nearest(3), (1, 1, 16, 16, 16), folder / "nearest-volume.pt")
    write_yaml(
        folder / "nearest-volume.yaml",
        card(
            "nearest-volume",
            "volume",
            input={"modality": "T1 MRI", "normalisation": counts},
            window={"size": [16], "halo": [0], "stride": 8},
        ),
    )
    save_model(convolutions(80), (1, 2, 64, 64), folder / "convolutions.pt")
    write_yaml(
        folder / "convolutions.yaml",
        card(
            "convolutions",
            "raster",
            input={"bands": bands, "normalisation": counts},
            window={"size": [128], "halo": [8], "stride": 8},
            cleanup={"fill_holes": True},
        ),
    )


# ------------------------------------------------------------------ scenes


def nearest_label(nir: np.ndarray) -> np.ndarray:
    """What the cards `nearest` and `nearest-volume` answer: counts 100, 150, 200 are 0, 1, 2; ties down."""
    return np.clip(np.ceil((nir.astype(float) - 125) / 50), 0, 2).astype(np.uint8)


def write_raster(path: Path, array: np.ndarray, *, names: tuple[str, ...] = (), **profile: Any) -> Path:
    """(c, y, x) as GeoTIFF on 30 m pixels of UTM 17N."""
    count, height, width = array.shape
    settings: dict[str, Any] = {
        "driver": "GTiff",
        "crs": "EPSG:32617",
        "transform": rasterio.Affine(PIXEL, 0.0, 500_000.0, 0.0, -PIXEL, 4_000_000.0),
        "count": count,
        "height": height,
        "width": width,
        "dtype": array.dtype.name,
        **profile,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", **settings) as dataset:
        dataset.write(array)
        for number, name in enumerate(names, start=1):
            dataset.set_band_description(number, name)
    return path


def write_volume(path: Path, array: np.ndarray, affine: np.ndarray = OBLIQUE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    nib.save(image, path)
    return path


def raster_pixels(height: int, width: int, seed: int) -> np.ndarray:
    """Bands red and nir as counts; the upper left corner (0) is nodata."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(60, 240, (2, height, width)).astype(np.uint16)
    pixels[:, : height // 8, : width // 8] = 0
    return pixels


def polygon(name: str, rows: tuple[float, float], columns: tuple[float, float]) -> dict[str, Any]:
    """A rectangle in pixel coordinates as a GeoJSON feature of UTM 17N."""
    (top, bottom), (left, right) = rows, columns
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    ring = [[500_000.0 + PIXEL * x, 4_000_000.0 - PIXEL * y] for x, y in corners]
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "properties": {"district": name}, "geometry": geometry}


def write_polygons(path: Path, *features: dict[str, Any]) -> Path:
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32617"}}
    path.write_text(json.dumps({"type": "FeatureCollection", "crs": crs, "features": features}))
    return path


@dataclass(frozen=True)
class World:
    """Files that every test may read and none may change."""

    folder: Path
    raster_shape: tuple[int, int] = (72, 96)
    volume_shape: tuple[int, int, int] = (20, 26, 18)
    """x, y, z, as nibabel has it."""

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    def pixels(self, seed: int = 1) -> np.ndarray:
        """Of ``scene<seed>.tif``: red, nir."""
        return raster_pixels(*self.raster_shape, seed)

    def labels(self, seed: int = 1) -> np.ndarray:
        """What `nearest` must answer for it."""
        pixels = self.pixels(seed)
        return np.where(pixels[1] > 0, nearest_label(pixels[1]), NODATA).astype(np.uint8)

    def reference(self, seed: int = 1) -> np.ndarray:
        """The answer with every seventh column wrong."""
        truth = self.labels(seed)
        truth[:, ::7] = (truth[:, ::7] + 1) % 3
        truth[self.pixels(seed)[1] == 0] = 0
        return truth

    def voxels(self) -> np.ndarray:
        return np.random.default_rng(9).integers(60, 240, self.volume_shape).astype(np.int16)

    def job(
        self, out: Path, *, card: str = "nearest", scenes: list[str] | None = None, **fields: Any
    ) -> Path:
        """A job file in the output folder's parent; ``fields`` are merged into the defaults."""
        data: dict[str, Any] = {
            "name": "trial",
            "scenes": [str(self / "scene1.tif")] if scenes is None else scenes,
            "model": str(self.models / f"{card}.yaml"),
            "compute": {"device": "cpu", "threads": 1},
            "outputs": {"dir": str(out)},
        }
        for key, value in fields.items():
            merge = isinstance(value, dict) and isinstance(data.get(key), dict)
            data[key] = {**data[key], **value} if merge else value
        return write_yaml(out.parent / f"{out.name}.yaml", {k: v for k, v in data.items() if v is not None})


def make_world(folder: Path) -> World:
    """Two rasters with references and districts, a larger one, a volume, and three model cards."""
    made = World(folder)
    write_models(made.models)
    height, width = made.raster_shape
    for seed in (1, 2):
        write_raster(folder / f"scene{seed}.tif", made.pixels(seed), names=("red", "nir"), nodata=0)
        write_raster(folder / "truth" / f"scene{seed}.tif", made.reference(seed)[np.newaxis])
    write_polygons(
        folder / "districts.geojson",
        polygon("north", (0, 40), (0, width)),
        polygon("south east", (40, height), (48.5, width)),
    )
    write_volume(folder / "volume.nii.gz", made.voxels())
    write_raster(
        folder / "large.tif",
        raster_pixels(560, 672, 3),
        names=("red", "nir"), nodata=0, tiled=True, blockxsize=128, blockysize=128,
    )  # fmt: skip
    truth = np.random.default_rng(11).integers(0, 3, (1, 560, 672)).astype(np.uint8)
    write_raster(folder / "large_truth.tif", truth)
    return made


# ------------------------------------------------------------------ processes


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of stderr that are ours: not the log of the orchestrator."""
        return [line for line in self.err.splitlines() if line.startswith(("error:", "failed:"))]


PROGRAM = str(Path(sys.executable).parent / "segpipe")


def environment(api: str | None = None, **extra: str) -> dict[str, str]:
    """This process's environment for a command; with a server's address where there is one."""
    return {**os.environ, **({"PREFECT_API_URL": api} if api else {}), **extra}


def command(
    *arguments: str, api: str | None = None, cwd: Path | None = None, limit: float = 240, **extra: str
) -> Ended:
    """Run a command line as people do: a process of its own, with ``extra`` in its environment."""
    done = subprocess.run(
        [PROGRAM, *arguments],
        env=environment(api, **extra), cwd=cwd, capture_output=True, text=True, timeout=limit, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


def only_run(out: Path, job: str = "trial") -> Path:
    """The one run's folder under an output folder."""
    folders = [p for p in (out / job).iterdir() if p.is_dir()]
    assert len(folders) == 1, folders
    return folders[0]
