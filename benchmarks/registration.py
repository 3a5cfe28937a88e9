"""Does a map lie on its image? ``python -m benchmarks.registration [RECIPE] [--data FOLDER]``.

For every labelled raster of a recipe: the share of the bands' variance that the map's classes explain (η²,
mean over bands), with the map where its file says and moved by whole pixels. Only rows that are learned from
decide on `labels_shift`; rows that are judged are printed beside them.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.geometry.box import Box
from segpipe.sources import open_source

# This folder holds scripts and is no package.
sys.path.append(str(Path(__file__).parents[1] / "configs/models/starter-sam/train"))

from scenes import UNKNOWN, moved
from train import RECIPE, load_recipe

REACH = 3
"""Pixels that a map is moved by, at most."""


def main() -> None:
    """Print a row a raster and part of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("recipe", nargs="?", type=Path, default=RECIPE)
    parser.add_argument("--data", help="folder of the scenes; left out: the recipe's")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe, given.data)
    print(f"{'raster':28} {'rows':8} {'of file':>8} {'best':>8}  rows and columns moved by")
    for raster in recipe.data.rasters:
        for name, rows in (("learned", raster.learned), ("judged", raster.judged)):
            if rows is None:
                continue
            found = explained(Path(recipe.data.root), raster, rows)
            best = max(found, key=lambda shift: found[shift])
            print(f"{raster.name:28} {name:8} {found[0, 0]:8.4f} {found[best]:8.4f}  {list(best)}")


def explained(root: Path, raster: Any, rows: list[int]) -> dict[tuple[int, int], float]:
    """η² by how far the map is moved."""
    with open_source(str(root / raster.image), band_names=raster.bands) as source:
        box = Box((rows[0], 0), (rows[1], source.geometry.shape[1]))
        pixels = source.read(box)
    with open_source(str(root / raster.labels)) as source:
        given = source.read(box)
    labels = np.where(given.valid, given.values[0], UNKNOWN).astype(np.int64)
    steps = range(-REACH, REACH + 1)
    return {
        shift: correlation_ratio(pixels.values, moved(labels, shift), pixels.valid)
        for shift in product(steps, steps)
    }


def correlation_ratio(image: np.ndarray, labels: np.ndarray, valid: np.ndarray) -> float:
    """η²: variance of class means over variance of values, mean over bands (c, y, x); labels (y, x)."""
    keep = valid & (labels != UNKNOWN)
    classes, counts = labels[keep], np.maximum(np.bincount(labels[keep]), 1)
    shares = []
    for band in image.astype(np.float64):
        means = np.bincount(classes, band[keep]) / counts
        shares.append(means[classes].var() / band[keep].var())
    return float(np.mean(shares))


if __name__ == "__main__":
    main()
