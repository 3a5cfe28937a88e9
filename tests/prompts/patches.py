"""Masks of objects with torch's interpolation as the oracle of what they cover."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from segpipe.prompts.masks.patches import Patch


def interpolated(logits: np.ndarray, scale: int) -> np.ndarray:
    """(y, x) bool: where torch's bilinear interpolation of logits (y, x) is above 0."""
    values = torch.from_numpy(logits.astype(np.float64))[None, None]
    if scale > 1:
        values = torch.nn.functional.interpolate(
            values, scale_factor=scale, mode="bilinear", align_corners=False
        )
    return np.asarray((values[0, 0] > 0).numpy())


def placed(patches: Iterable[Patch], shape: Sequence[int]) -> np.ndarray:
    """Bool of the scene's shape: the elements of an object."""
    out = np.zeros(shape, bool)
    for patch in patches:
        view = out if patch.plane is None else out.take(patch.plane[1], axis=patch.plane[0])
        cover = interpolated(patch.logits, patch.scale)
        (y, x), (height, width) = patch.origin, view.shape
        cover = cover[: height - y, : width - x]
        if patch.plane is None:
            out[y : y + cover.shape[0], x : x + cover.shape[1]] |= cover
        else:
            index: list[slice | int] = [slice(y, y + cover.shape[0]), slice(x, x + cover.shape[1])]
            index.insert(patch.plane[0], patch.plane[1])
            out[tuple(index)] |= cover
    return out


def random_patch(
    rng: np.random.Generator, shape: Sequence[int], plane: tuple[int, int] | None = None, largest: int = 9
) -> Patch:
    """A ragged blob somewhere in a plane of a shape, at a random scale; may hang over the trailing edge."""
    scale = int(rng.choice([1, 1, 2, 4, 8]))
    size = rng.integers(1, largest, 2)
    logits = rng.normal(0.5, 1, size).astype(np.float16)
    y, x = (int(rng.integers(0, n)) for n in shape)
    return Patch(scale, (y, x), logits, plane)


def rectangle(start: Sequence[int], stop: Sequence[int], plane: tuple[int, int] | None = None) -> Patch:
    """All of a box of a plane."""
    shape = [b - a for a, b in zip(start, stop, strict=True)]
    return Patch(1, (int(start[0]), int(start[1])), np.ones(shape, np.float16), plane)
