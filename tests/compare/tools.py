"""Runs made by the library alone, and the tables of runs and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from world import World

import segpipe

NAMES = ["ground", "crop", "water"]
SHIFT = 20.0
"""Counts by which the second model's thresholds are higher."""


def run_job(path: Path) -> Path:
    """A run made by the library alone, in this process."""
    return Path(segpipe.run(path).path)


def layers(world: World, **more: Any) -> dict[str, Any]:
    """Job keys of two districts and the reference."""
    return {
        "regions": {"path": str(world / "districts.geojson"), "name": "district"},
        "reference": {"path": str(world / "truth")},
        **more,
    }


def read(folder: Path | str, name: str = "compare") -> pd.DataFrame:
    return pd.read_csv(Path(folder) / f"{name}.csv", keep_default_na=False, na_values=[""])
