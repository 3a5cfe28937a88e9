"""What one step sees: windows, objects in them, and prompts that point at these."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from segpipe.errors import RequestError
from segpipe.training.prompted.real import CELL, Scenes, raster_window, volume_window
from segpipe.training.prompted.recipe import PromptedRecipe
from segpipe.training.prompted.synthetic import Drawn, draw_scene

MOST_JITTER = 20.0
"""Elements by which an edge of a box is moved, at most (Kirillov et al. 2023, appendix A)."""
KINDS = ("drawn", "raster", "volume")


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of one step and the objects asked for in them."""

    images: np.ndarray
    """(b, 3, y, x) float32, 0 to 1: whole windows, or crops."""
    of: np.ndarray
    """(n,) int64: the window of each object."""
    masks: np.ndarray
    """(n, y, x) bool."""
    boxes: np.ndarray
    """(n, 4) float32: x, y of the first element and of the last, jittered or not."""
    points: np.ndarray
    """(n, 2) float32: x, y of an element of the object."""


class Samples:
    """Draws batches: everything in a batch comes from (seed, its number), whatever came before."""

    def __init__(self, recipe: PromptedRecipe, scenes: Scenes) -> None:
        """Args: recipe, what `read_scenes` gave.

        Raises:
            RequestError: crops are smaller than the place of a slice.
        """
        edge = recipe.sampling.window
        least = min(edge // crops.part for crops in recipe.sampling.cycle)
        if recipe.sampling.volume and least < CELL:
            raise RequestError(f"sampling.cycle: found crops of {least} elements; slices take {CELL} or more")
        self.sampling, self.seed = recipe.sampling, recipe.optimise.seed
        self.scenes, self.edge = scenes, edge

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Batches by number."""
        for number in range(start, stop):
            yield self.batch(number)

    def batch(self, number: int) -> Batch:
        """One batch: whole windows, or crops of them."""
        rng, sampling = np.random.default_rng((self.seed, number)), self.sampling
        crops = sampling.cycle[number % len(sampling.cycle)]
        edge, times = self.edge // crops.part, crops.times
        windows: list[Drawn] = []
        for kind in KINDS:
            windows += [self._window(rng, kind, edge) for _ in range(times * getattr(sampling, kind))]
        of, masks = [], []
        for i, window in enumerate(windows):
            chosen = objects(rng, window, sampling.objects, sampling.smallest)
            masks += chosen
            of += [i] * len(chosen)
        if not masks:  # nothing large enough by chance
            masks, of = [np.ones((edge, edge), bool)], [0]
        boxes = np.stack([box_of(m) for m in masks])
        loose = rng.random(len(boxes)) >= sampling.exact
        boxes[loose] = jittered(rng, boxes[loose], sampling.jitter, edge)
        return Batch(
            np.stack([w.image for w in windows]),
            np.array(of),
            np.stack(masks),
            boxes,
            np.stack([point_in(rng, m) for m in masks]),
        )

    def _window(self, rng: np.random.Generator, kind: str, edge: int) -> Drawn:
        if kind == "drawn":
            return draw_scene(rng, self.scenes.textures, edge)
        if kind == "raster":
            raster = self.scenes.rasters[int(rng.integers(len(self.scenes.rasters)))]
            return raster_window(rng, raster, edge)
        return volume_window(rng, self.scenes.volumes, edge)


def objects(rng: np.random.Generator, window: Drawn, most: int, smallest: int) -> list[np.ndarray]:
    """Masks (y, x) of some objects of a window that are large enough."""
    found = []
    for i in rng.permutation(len(window.groups)):
        mask = np.isin(window.ids, window.groups[i])
        if mask.sum() >= smallest:
            found.append(mask)
        if len(found) == most:
            break
    return found


def box_of(mask: np.ndarray) -> np.ndarray:
    """(4,) float32: x, y of a mask's first element and of its last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


def jittered(rng: np.random.Generator, boxes: np.ndarray, share: float, edge: int) -> np.ndarray:
    """Boxes (n, 4) whose edges are moved by normal noise of a share of the size, 20 elements at most."""
    size = np.tile(boxes[:, 2:] - boxes[:, :2] + 1, 2)
    moved = boxes + np.clip(rng.normal(0, 1, boxes.shape) * share * size, -MOST_JITTER, MOST_JITTER)
    moved = np.clip(moved, 0, edge - 1)
    low, high = np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])
    return np.asarray(np.hstack([low, high]), np.float32)


def point_in(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """(2,) float32: x, y of an element of a mask, each as likely."""
    inside = np.flatnonzero(mask)
    y, x = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1])
    return np.array([x, y], np.float32)
