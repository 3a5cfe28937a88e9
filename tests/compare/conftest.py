"""A second model, and a run of each model on the same scenes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from world import World, card, write_yaml

from tests.compare.tools import SHIFT, layers, run_job


@pytest.fixture(scope="session")
def shifted(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A card as `nearest`, whose thresholds lie `SHIFT` counts higher."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copy(world.models / "nearest.pt", folder / "shifted.pt")
    known = yaml.safe_load((world.models / "nearest.yaml").read_text())
    counts = [{"op": "subtract", "value": [100.0 + SHIFT]}, {"op": "divide", "value": [50.0]}]
    known["input"]["normalisation"] = counts
    fields = {key: known[key] for key in ("input", "window")}
    return write_yaml(folder / "shifted.yaml", card("shifted", "raster", **fields))


@pytest.fixture(scope="session")
def runs(world: World, shifted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both scenes by either model."""
    out = tmp_path_factory.mktemp("runs")
    scenes = [str(world / f"scene{seed}.tif") for seed in (1, 2)]
    before = run_job(world.job(out / "a", scenes=scenes, **layers(world)))
    more = {"model": str(shifted), "tiling": {"blend": "gaussian"}}
    return before, run_job(world.job(out / "b", scenes=scenes, **layers(world, **more)))
