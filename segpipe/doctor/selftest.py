"""A run of seconds: a real network over a drawn raster through the engine, against a known answer."""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import yaml

from segpipe.doctor.finding import Finding, State, check

EDGE = 160
"""Of the raster, in pixels: nine blocks of 64, the last ones smaller."""
PIXEL = 10.0
"""Metres."""
LIMIT = 100.0
"""Pixels above are class 1."""


def drawn_raster(path: Path) -> np.ndarray:
    """Write one band of concentric waves, with a position; returns the pixels (y, x), float32."""
    import rasterio

    y, x = np.mgrid[:EDGE, :EDGE].astype(np.float32)
    pixels = np.rint(LIMIT + 50 * np.sin(np.hypot(y - 40, x - 90) / 9)).astype(np.float32) + 0.25
    transform = rasterio.Affine(PIXEL, 0.0, 500_000.0, 0.0, -PIXEL, 4_000_000.0)
    profile = {"driver": "GTiff", "width": EDGE, "height": EDGE, "count": 1, "dtype": "float32"}
    with rasterio.open(path, "w", crs="EPSG:32616", transform=transform, **profile) as dataset:
        dataset.write(pixels[None])
    return np.asarray(pixels)


def threshold_card(folder: Path, limit: float = LIMIT) -> Path:
    """The card of a 1×1 convolution with scores 0 and x − limit: class 1 where a pixel is above."""
    import torch

    network = torch.nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1))
        network.bias.copy_(torch.tensor([0.0, -limit]))  # type: ignore[union-attr]
    with warnings.catch_warnings(action="ignore"):  # TorchScript is to go; it needs no further package yet
        torch.jit.trace(network.eval(), torch.zeros(1, 1, 64, 64)).save(str(folder / "threshold.pt"))
    card = {
        "name": "threshold",
        "kind": "raster",
        "provider": "torchscript",
        "allow_torchscript": True,
        "weights": "threshold.pt",
        "input": {"bands": ["value"]},
        "window": {"size": [64], "halo": [0], "stride": 1},
        "classes": [
            {"value": 0, "name": "below", "color": "#000000"},
            {"value": 1, "name": "above", "color": "#ffffff"},
        ],
    }
    path = folder / "threshold.yaml"
    path.write_text(yaml.safe_dump(card))
    return path


@check("self-test")
def check_engine() -> Finding:
    """Run a small scene from the plan to its report, without Prefect; compare with the threshold itself."""
    from segpipe.api import run

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="segpipe-doctor-") as name:
        folder = Path(name)
        expected = drawn_raster(folder / "scene.tif") > LIMIT
        ended = run(
            {
                "name": "doctor",
                "scenes": [str(folder / "scene.tif")],
                "model": str(threshold_card(folder)),
                "bands": ["value"],
                "tiling": {"block": 64},
                "compute": {"batch": 2, "precision": "fp32"},
                "outputs": {"dir": str(folder / "runs")},
            }
        )
        for error in ended.failed.values():
            return Finding("self-test", State.fail, error, "reinstall segpipe, and report it with this line")
        labels, regions = ended.labels().values, ended.regions
    area = float(regions.loc[regions["class"] == "above", "area_m2"].sum())
    seconds, device = time.perf_counter() - begun, ended.record.versions["device"]
    wrong = int((labels != expected).sum())
    where = f"{ended.record.done[0].plan['blocks']} blocks on {device} in {seconds:.1f} s"
    if wrong == 0 and area == expected.sum() * PIXEL**2:
        return Finding("self-test", State.ok, f"{where}: every pixel right, area {area:,.0f} m2")
    found = (
        f"{where}: {wrong} of {expected.size} pixels wrong, area {area} instead of "
        f"{expected.sum() * PIXEL**2:g} m2"
    )
    advice = (
        "results of this machine cannot be trusted; try compute.device: cpu, and report it with this line"
    )
    return Finding("self-test", State.fail, found, advice)
