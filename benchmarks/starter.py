"""What the starter promptable model finds on data that it never saw: ``python -m benchmarks.starter``.

``[--card CARD] [--recipe RECIPE] [--data FOLDER] [--quick]``. Drawn scenes over textures of those
parts of the real scenes that are kept apart, and every set that the recipe judges by: mean IoU with a box
around the object beside the floor, the ellipse inscribed in that box; and with one point, its deepest
element. Of the three candidates it is the one that the model holds for the best. An object takes the window
that `segpipe.tiling.pyramid` gives it, and is compared at the scene's own resolution. Predicted IoU is set
against true IoU by Pearson's r and Spearman's rho.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import ndimage, stats

from segpipe.config.card import load_card
from segpipe.prompts.segmenters.base import Prompt, Segmenter
from segpipe.prompts.segmenters.registry import load_segmenter
from segpipe.tiling.pyramid import Pyramid, Window
from segpipe.training.promptable import mask_box

# This folder holds scripts and is no package.
sys.path.append(str(Path(__file__).parents[1] / "configs/models/starter-sam/train"))

from scenes import EMPTY, LabelledVolume, RasterPart, read_scenes
from shapes import draw_scene
from train import CENTRE, RECIPE, SPREAD, load_recipe

CARD = "configs/models/starter-sam.yaml"
MARGIN = 0.1
"""Around an object, as a share of its longer edge."""
SEED = 1_000_000
"""Far from every seed of training."""
DRAWN, SLICES = 40, 3
"""Drawn scenes, and slices of each case and axis."""
LEAST = {"volume": 20, "raster": 12}
"""Elements of a judged object, at least; what is smaller is hardly more than its box."""


@dataclass(frozen=True, eq=False)
class Case:
    """A window and the objects asked for in it."""

    name: str
    image: np.ndarray
    """(3, y, x) float32, 0 to 1, as the encoder takes it."""
    masks: Sequence[np.ndarray]
    """(Y, X) bool each, at the scene's resolution: a multiple of the window's."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--card", default=CARD)
    parser.add_argument("--recipe", type=Path, default=RECIPE)
    parser.add_argument("--data", help="folder of the scenes; left out: the recipe's")
    parser.add_argument("--quick", action="store_true", help="a few objects of each set")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    segmenter = load_segmenter(load_card(given.card), torch.device("cpu"), given.threads)
    recipe = load_recipe(given.recipe, given.data)
    found = measured(segmenter, recipe, given.quick)
    print(table(found).to_string(index=False))
    print(f"Seed {recipe.optimise.seed}; {Path(given.card).name}; {segmenter.parameters:,} parameters.")


def measured(segmenter: Segmenter, recipe: Any, quick: bool = False) -> pd.DataFrame:
    """A row an object: set, size, floor, and for box and point IoU, best IoU and predicted IoU."""
    rows = []
    for case in cases(recipe, segmenter.window[0], quick):
        embedding = segmenter.encode((case.image - np.float32(CENTRE)) / np.float32(SPREAD))
        scale = case.masks[0].shape[0] // segmenter.window[0]
        for mask in case.masks:
            row: dict[str, object] = {"set": case.name, "size": int(mask.sum()), "floor": floor(mask)}
            for kind, prompt in prompts(mask, scale).items():
                answer = segmenter.decode(embedding, [prompt])
                truth = torch.from_numpy(mask)
                large = torch.nn.functional.interpolate(
                    torch.from_numpy(answer.logits), truth.shape, mode="bilinear", align_corners=False
                )
                true = [iou((logits > 0).numpy(), mask) for logits in large[0]]
                held = int(answer.iou[0].argmax())
                row |= {
                    kind: true[held],
                    f"{kind} best": max(true),
                    f"{kind} told": float(answer.iou[0, held]),
                }
            rows.append(row)
    return pd.DataFrame(rows)


def prompts(mask: np.ndarray, scale: int) -> dict[str, Prompt]:
    """The tight box of a mask, and its deepest element, in elements of a window ``scale`` times coarser."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    y, x = divmod(int(depth.argmax()), mask.shape[1])

    def coarse(xy: np.ndarray) -> np.ndarray:
        return np.asarray((xy + 0.5) / scale - 0.5, np.float32)

    return {
        "box": Prompt(box_xyxy=coarse(mask_box(mask))),
        "point": Prompt(points_xy=coarse(np.array([[x, y]])), labels=np.ones(1, np.int64)),
    }


def floor(mask: np.ndarray) -> float:
    """IoU of a mask with the ellipse inscribed in its box."""
    x0, y0, x1, y1 = mask_box(mask)
    y, x = np.indices(mask.shape)
    half = (y1 - y0 + 1) / 2, (x1 - x0 + 1) / 2
    inside = ((y - (y0 + y1) / 2) / half[0]) ** 2 + ((x - (x0 + x1) / 2) / half[1]) ** 2 <= 1
    return iou(inside, mask)


def iou(found: np.ndarray, mask: np.ndarray) -> float:
    """Intersection over union of two masks, one of which is not empty."""
    return float((found & mask).sum() / (found | mask).sum())


def cases(recipe: Any, edge: int, quick: bool) -> Iterator[Case]:
    """Every judged window."""
    scenes = read_scenes(recipe, judged=True)
    least = recipe.sampling.smallest
    for number in range(3 if quick else DRAWN):
        drawn = draw_scene(np.random.default_rng((SEED, number)), scenes.textures, edge)
        masks = [np.isin(drawn.ids, group) for group in drawn.groups]
        yield Case("drawn scenes", drawn.image, [m for m in masks if m.sum() >= least])
    named = {raster.name: raster for raster in recipe.data.rasters}
    for part in scenes.rasters:
        raster = named[part.name]
        for composite in raster.composites:
            channels = [raster.bands.index(band) for band in composite]
            label = f"{part.name}: {', '.join(composite)}"
            found = raster_cases(part, channels, label, edge)
            yield from _some(found, 2 if quick else None)
    for volume in scenes.volumes[: 2 if quick else None]:
        yield from _some(volume_cases(volume, edge), 2 if quick else None)


def _some(found: Iterator[Case], most: int | None) -> Iterator[Case]:
    for number, case in enumerate(found):
        if most is not None and number >= most:
            return
        yield case


def raster_cases(part: RasterPart, channels: Sequence[int], name: str, edge: int) -> Iterator[Case]:
    """Windows of a raster's rows and the whole parts that take them."""
    areas = np.bincount(part.parts.ravel(), minlength=len(part.classes))
    numbers = np.flatnonzero(part.whole & (areas >= LEAST["raster"]))
    pyramid = Pyramid(part.parts.shape, edge, MARGIN)
    windows, which = pyramid.needed(part.boxes[numbers, 0] - 0.5, part.boxes[numbers, 1] - 0.5)
    for k, window in enumerate(windows):
        image, parts = window_of(part, channels, pyramid, window)
        yield Case(name, image, [parts == n for n in numbers[which == k]])


def window_of(
    part: RasterPart, channels: Sequence[int], pyramid: Pyramid, window: Window
) -> tuple[np.ndarray, np.ndarray]:
    """A window's image (3, y, x), means of blocks at coarser levels, and its parts at full resolution."""
    box = pyramid.box(window)
    there = tuple(slice(a, min(b, n)) for a, b, n in zip(box.start, box.stop, part.parts.shape, strict=True))
    parts = part.parts[there]
    lacking = [(0, want - have) for want, have in zip(box.shape, parts.shape, strict=True)]
    image = np.pad(part.image[list(channels)][:, *there], [(0, 0), *lacking], constant_values=EMPTY)
    scale = 1 << window.level
    blocks = image.reshape(3, box.shape[0] // scale, scale, box.shape[1] // scale, scale)
    return blocks.mean((2, 4)), np.pad(parts, lacking)


def volume_cases(volume: LabelledVolume, edge: int) -> Iterator[Case]:
    """Slices along every axis, evenly among those with labels; each in the first corner of a window."""
    for axis in range(3):
        others = tuple({0, 1, 2} - {axis})
        held = np.flatnonzero((volume.labels > 0).sum(axis=others) >= LEAST["volume"])
        for share in (np.arange(SLICES) + 0.5) / SLICES:
            index = int(held[int(share * len(held))])
            plane, labels = volume.image.take(index, axis), volume.labels.take(index, axis)
            lacking = [(0, edge - n) for n in plane.shape]
            image = np.repeat(np.pad(plane, lacking, constant_values=EMPTY)[None], 3, axis=0)
            masks = []
            for group in volume.groups:
                whole = set(group) <= set(np.unique(labels).tolist())
                mask = np.pad(np.isin(labels, group), lacking)
                if whole and mask.sum() >= LEAST["volume"]:
                    masks.append(mask)
            if masks:
                yield Case("hippocampus, slices", image, masks)


def table(rows: pd.DataFrame) -> pd.DataFrame:
    """Means by set; the gain over the floor with its 95 % interval over objects (bootstrap)."""
    lines = []
    for name, found in rows.groupby("set", sort=False):
        gain = (found["box"] - found["floor"]).to_numpy()
        draws = np.random.default_rng(0).choice(gain, (2000, len(gain))).mean(1)
        low, high = np.quantile(draws, (0.025, 0.975))
        line: dict[str, object] = defaultdict(str)
        line |= {"set": name, "objects": len(found), "median px": int(found["size"].median())}
        line |= {key: round(float(found[key].mean()), 3) for key in ("floor", "box")}
        line["gain"] = f"{gain.mean():+.3f} ({low:+.3f} to {high:+.3f})"
        line |= {key: round(float(found[key].mean()), 3) for key in ("box best", "point", "point best")}
        for kind in ("box", "point"):
            line[f"r {kind}"] = round(float(stats.pearsonr(found[f"{kind} told"], found[kind])[0]), 2)
            line[f"rho {kind}"] = round(float(stats.spearmanr(found[f"{kind} told"], found[kind])[0]), 2)
        lines.append(line)
    return pd.DataFrame(lines)


if __name__ == "__main__":
    main()
