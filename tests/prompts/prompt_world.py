"""A tiny promptable model with random weights, scenes, and jobs that ask them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from rasterio.transform import from_origin

from segpipe.config.job import Job, load_job
from segpipe.prompts.collect_prompts import collect_prompts
from segpipe.prompts.prompt_scene import PromptScene, prepare_prompts
from segpipe.prompts.segment_scene import create_mask_stages
from segpipe.runs.check import check_request
from tests.prompts.tiny_sams import edge_of, tiny

EDGE = 64
"""Of the tiny network's window."""


def make_card(folder: Path) -> Path:
    """The card of the model, whose weights are beside it."""
    assert edge_of("sam") == EDGE
    tiny("sam").save_pretrained(folder / "net")
    path = folder / "tiny.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "name": "tiny",
                "kind": "raster",
                "provider": "transformers",
                "weights": "net",
                "output": {"kind": "prompted"},
                "input": {
                    "bands": ["red", "green", "blue"],
                    "normalisation": [{"op": "divide", "value": [255.0]}],
                },
                "window": {"size": [EDGE], "fixed": True},
            }
        )
    )
    return path


def pixels(shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(3)
    coarse = rng.integers(0, 255, (3, -(-shape[0] // 8), -(-shape[1] // 8)))
    return np.kron(coarse, np.ones((1, 8, 8), int))[:, : shape[0], : shape[1]].astype(np.uint8)


def make_job(
    folder: Path, card: Path, shape: tuple[int, int], boxes: Sequence[Sequence[float]], **prompts: Any
) -> Job:
    """A scene of 10 m pixels whose boxes (x0, y0, x1, y1, outer edges in pixels) are asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    scene = folder / "scene.tif"
    if not scene.exists():
        profile = {"driver": "GTiff", "height": shape[0], "width": shape[1], "count": 3, "dtype": "uint8"}
        where = {"crs": "EPSG:32617", "transform": from_origin(500_000, 4_000_000, 10, 10)}
        with rasterio.open(scene, "w", **profile, **where) as file:
            file.write(pixels(shape))
    with (folder / "boxes.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["x_min", "x_max", "y_min", "y_max", "phrase"])
        for x0, y0, x1, y1 in boxes:
            west, east = 500_000 + 10 * x0, 500_000 + 10 * x1
            rows.writerow([west, east, 4_000_000 - 10 * y1, 4_000_000 - 10 * y0, "field"])
    data = {
        "name": "ask",
        "scenes": [str(scene)],
        "bands": ["red", "green", "blue"],
        "model": str(card),
        "prompts": {"path": str(folder / "boxes.csv"), "crs": "scene", **prompts},
        "compute": {"device": "cpu", "threads": 1},
        "outputs": {"dir": str(folder / "runs")},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(data))
    return load_job(path)


def planned(job: Job) -> PromptScene:
    """The job's only scene, settled, with its stages."""
    request = check_request(job)
    scene = prepare_prompts(job, request.scenes[0], request.settings)
    collect_prompts(scene)
    create_mask_stages(scene)
    return scene
