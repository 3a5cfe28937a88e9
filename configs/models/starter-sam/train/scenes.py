"""Labelled scenes as windows of objects: rasters cut, zoomed, turned; slices of volumes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from shapes import Drawn, Groups
from torch.nn import functional

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.sources import discover, open_source

EMPTY = 0.5
"""Stands where a scene has no values: what normalisation maps to 0, as the padding of windows."""
UNKNOWN = -1
"""Label of elements that have none."""
QUANTILES = (0.005, 0.995)
"""Of the scene's values, mapped to 0 and 1: the card's step `scene_quantiles`."""
ZOOMS = (0.5, 1.6)
"""A raster window is enlarged at random by a factor between these two, or not at all."""
PARTS = 12
"""Parts of a raster window that may be asked for."""
CELL = 64
"""Elements of the place that a slice takes beside others."""


@dataclass(frozen=True, eq=False)
class RasterPart:
    """Some rows of a raster."""

    name: str
    image: np.ndarray
    """(c, y, x) float32, 0 to 1."""
    parts: np.ndarray
    """(y, x) int64: connected elements of one class have one number; 0 none."""
    classes: np.ndarray
    """(parts + 1,) class value of each number; the first is no part's."""
    boxes: np.ndarray
    """(parts + 1, 2, 2) start and stop of each number, (y, x)."""
    whole: np.ndarray
    """(parts + 1,) bool: no element lacks a value, and the part ends inside these rows."""


@dataclass(frozen=True, eq=False)
class LabelledVolume:
    """A volume and its labels."""

    name: str
    image: np.ndarray
    """(z, y, x) float32, 0 to 1."""
    labels: np.ndarray
    """(z, y, x) int64."""
    groups: Groups
    """Values that make an object."""


def read_raster(root: Path, raster: Any, rows: Sequence[int], values: Sequence[int]) -> RasterPart:
    """Rows of a raster with the connected parts of some classes.

    Raises:
        RequestError: the rows are not in the file, or image and labels differ in shape.
    """
    with open_source(str(root / raster.image), band_names=raster.bands) as source:
        shape = source.geometry.shape
        if rows[1] > shape[0]:
            raise RequestError(f"{root / raster.image}: found {shape[0]} rows; rows {list(rows)} are wanted")
        box = Box((rows[0], 0), (rows[1], shape[1]))
        pixels = source.read(box)
    with open_source(str(root / raster.labels)) as source:
        if source.geometry.shape != shape:
            raise RequestError(
                f"{root / raster.labels}: found {source.geometry.shape}; the image has {shape}"
            )
        given = source.read(box)
    labels = moved(np.where(given.valid, given.values[0], UNKNOWN).astype(np.int64), raster.labels_shift)
    parts, classes = np.zeros(box.shape, np.int64), [-1]
    for value in values:
        found, count = ndimage.label(labels == value, np.ones((3, 3)))
        parts[found > 0] = found[found > 0] + len(classes) - 1
        classes += [value] * count
    places = ndimage.find_objects(parts)
    boxes = np.array([[[0, 0], [0, 0]], *([[s.start for s in p], [s.stop for s in p]] for p in places)])
    whole = np.ones(len(classes), bool)
    beside = ndimage.binary_dilation(labels == UNKNOWN, np.ones((3, 3)), border_value=True)
    for edge in (parts[beside], parts[~pixels.valid]):
        whole[edge] = False
    whole[0] = False
    image = stretched(pixels.values, pixels.valid)
    return RasterPart(raster.name, image, parts, np.array(classes), boxes, whole)


def moved(labels: np.ndarray, shift: Sequence[int]) -> np.ndarray:
    """Labels (y, x) so many rows further down and columns further right; unknown where none came."""
    out = np.full_like(labels, UNKNOWN)
    to, of = zip(*(_overlap(n, k) for n, k in zip(labels.shape, shift, strict=True)), strict=True)
    out[to] = labels[of]
    return out


def _overlap(count: int, shift: int) -> tuple[slice, slice]:
    """Where an axis of a shifted array gets values, and from where."""
    kept = max(0, count - abs(shift))
    to, of = max(0, shift), max(0, -shift)
    return slice(to, to + kept), slice(of, of + kept)


def stretched(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Channels (c, …) between their quantiles over valid elements (…), 0 to 1, float32."""
    out = np.full(values.shape, EMPTY, np.float32)
    for channel, result in zip(values.astype(np.float32), out, strict=True):
        low, high = np.quantile(channel[valid], QUANTILES)
        result[valid] = np.clip((channel[valid] - low) / (high - low if high > low else 1), 0, 1)
    return out


def read_volumes(root: Path, volumes: Any, judged: bool) -> list[LabelledVolume]:
    """The cases of a set that are learned from, or those that the model is judged by.

    Raises:
        RequestError: a case of `judged` is not there.
    """
    refs = discover([str(root / volumes.images)])
    if missing := set(volumes.judged) - {ref.name for ref in refs}:
        raise RequestError(f"data.volumes.judged: found {min(missing)}; there is none in {volumes.images}")
    found = []
    for ref in refs:
        if (ref.name in volumes.judged) is not judged:
            continue
        with open_source(ref.uri) as source:
            box = Box.whole(source.geometry.shape)
            pixels = source.read(box)
        with open_source(str(root / volumes.labels / Path(ref.uri).name)) as source:
            labels = source.read(box).values[0].astype(np.int64)
        image = stretched(pixels.values[:1], pixels.valid)[0]
        found.append(LabelledVolume(ref.name, image, labels, tuple(map(tuple, volumes.groups))))
    return found


@dataclass(frozen=True, eq=False)
class Scenes:
    """Everything that is learned from."""

    rasters: list[RasterPart]
    volumes: list[LabelledVolume]

    @property
    def textures(self) -> list[np.ndarray]:
        """What drawn shapes lie over."""
        return [raster.image for raster in self.rasters]


def read_scenes(recipe: Any, judged: bool = False) -> Scenes:
    """The scenes of a recipe that are learned from, or that the model is judged by."""
    root = Path(recipe.data.root)
    rasters = []
    for raster in recipe.data.rasters:
        rows = raster.judged if judged else raster.learned
        if rows is not None:
            rasters.append(read_raster(root, raster, rows, raster.judged_values if judged else raster.values))
    volumes = [v for s in recipe.data.volumes for v in read_volumes(root, s, judged)]
    if not judged and not rasters:
        raise RequestError("data.rasters: found none with `learned`; drawn shapes lie over one at least")
    return Scenes(rasters, volumes)


def raster_window(rng: np.random.Generator, raster: RasterPart, edge: int) -> Drawn:
    """A window of three bands or one, around a part drawn at random, mostly; zoomed, turned, mirrored."""
    zoom = 1.0 if rng.random() < 0.5 else float(np.exp(rng.uniform(*np.log(ZOOMS))))
    size = round(edge / zoom)
    shape = np.array(raster.parts.shape)
    lowest, highest = np.minimum(0, shape - size), np.maximum(0, shape - size)
    start = rng.integers(lowest, highest + 1)
    numbers = np.flatnonzero(raster.whole)
    if len(numbers) and rng.random() < 0.8:
        # Every class as often, whatever the number of its parts.
        kinds = np.unique(raster.classes[numbers])
        number = rng.choice(numbers[raster.classes[numbers] == rng.choice(kinds)])
        middle = raster.boxes[number].mean(0) + rng.uniform(-0.4, 0.4, 2) * size
        start = np.clip((middle - size / 2).astype(int), lowest, highest)
    channels = rng.choice(len(raster.image), 3, replace=False)
    if rng.random() < 0.3:
        channels[:] = channels[0]
    image, ids = np.full((3, size, size), EMPTY, np.float32), np.full((size, size), -1)
    low, high = np.maximum(start, 0), np.minimum(start + size, shape)
    here, there = _slices(low - start, high - start), _slices(low, high)
    image[:, *here], ids[here] = raster.image[channels][:, *there], raster.parts[there]
    image, ids = _resized(image, ids, edge)
    turns, mirror = int(rng.integers(4)), int(rng.choice([-1, 1]))
    image, ids = np.rot90(image, turns, (1, 2))[:, ::mirror], np.rot90(ids, turns)[::mirror]
    image = np.where(ids < 0, np.float32(EMPTY), varied(rng, image))
    return Drawn(np.ascontiguousarray(image), np.ascontiguousarray(ids), _some_parts(rng, raster, ids))


def _some_parts(rng: np.random.Generator, raster: RasterPart, ids: np.ndarray) -> Groups:
    """Whole parts inside a window: every class as often, larger ones more often."""
    cut = np.concatenate([ids[0], ids[-1], ids[:, 0], ids[:, -1]])
    numbers, areas = np.unique(ids, return_counts=True)
    keep = raster.whole[numbers] & ~np.isin(numbers, cut) & (numbers > 0)
    numbers, weights = numbers[keep], np.sqrt(areas[keep])
    classes = raster.classes[numbers]
    for value in np.unique(classes):
        weights[classes == value] /= weights[classes == value].sum()
    if not len(numbers):
        return ()
    some = rng.choice(numbers, min(PARTS, len(numbers)), replace=False, p=weights / weights.sum())
    return tuple((int(k),) for k in some)


def volume_window(rng: np.random.Generator, volumes: Sequence[LabelledVolume], edge: int) -> Drawn:
    """Slices laid side by side over a window without values, or one alone in its first corner."""
    alone = rng.random() < 0.35
    zoom = 1.0 if alone or rng.random() < 0.5 else float(rng.uniform(1, min(4, edge / CELL)))
    cell = round(CELL * zoom)
    across = 1 if alone else edge // cell
    image, ids = np.full((edge, edge), EMPTY, np.float32), np.zeros((edge, edge), np.int64)
    groups: list[tuple[int, ...]] = []
    for place in range(across**2):
        volume = volumes[int(rng.integers(len(volumes)))]
        axis = int(rng.integers(3))
        some = np.flatnonzero(volume.labels.any(axis=tuple({0, 1, 2} - {axis})))
        index = int(some[rng.integers(len(some))])
        plane, labels = volume.image.take(index, axis), volume.labels.take(index, axis)
        if not alone:
            turns = int(rng.integers(4))
            plane, labels = np.rot90(plane, turns), np.rot90(labels, turns)
        shape = [min(cell, round(n * zoom)) for n in plane.shape]
        plane, labels = _resized(plane[None].copy(), labels.copy(), *shape)
        room = 0 if alone else 1
        start = [
            cell * p + room * int(rng.integers(0, cell - n + 1))
            for p, n in zip(divmod(place, across), shape, strict=True)
        ]
        here = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        image[here] = varied(rng, plane)[0]
        ids[here] = np.where(labels > 0, labels + 100 * place, 0)
        values = set(np.unique(labels).tolist())
        groups += [tuple(v + 100 * place for v in g) for g in volume.groups if set(g) <= values]
    return Drawn(np.repeat(image[None], 3, axis=0), ids, tuple(groups))


def varied(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """Values 0 to 1 of (c, y, x) with another brightness curve, contrast and noise; still 0 to 1."""
    image = np.power(image, np.float32(np.exp(rng.uniform(-0.5, 0.5))))
    if rng.random() < 0.1:
        image = 1 - image
    span, noise = rng.uniform(0.6, 1.15), rng.uniform(0, 0.04)
    image = (image - 0.5) * np.float32(span) + np.float32(0.5 + rng.uniform(-0.1, 0.1))
    if rng.random() < 0.5:
        image = image + rng.standard_normal(image.shape, np.float32) * np.float32(noise)
    return np.asarray(np.clip(image, 0, 1), np.float32)


def _slices(low: np.ndarray, high: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


def _resized(
    image: np.ndarray, ids: np.ndarray, height: int, width: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Image (c, y, x) by area or bilinear, ids (y, x) nearest, at another size."""
    size = (height, height if width is None else width)
    if ids.shape == size:
        return image, ids
    large = functional.interpolate(
        torch.from_numpy(image)[None], size, mode="bilinear", align_corners=False, antialias=True
    )
    near = functional.interpolate(torch.from_numpy(ids)[None, None].float(), size, mode="nearest-exact")
    return large[0].numpy(), near[0, 0].numpy().astype(np.int64)
