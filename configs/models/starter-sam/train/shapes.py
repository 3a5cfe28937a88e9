"""Drawn scenes: shapes of known extent, each with a look of its own, over crops of real scenes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy import ndimage
from skimage.draw import line, polygon
from torch.nn import functional

SMALLEST, LARGEST = 8, 240
"""Elements along an object's longer side."""

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Drawn:
    """A window with known objects."""

    image: np.ndarray
    """(c, y, x) float32, 0 to 1."""
    ids: np.ndarray
    """(y, x) int64: which part is on top; 0 none."""
    groups: Groups
    """The objects, each by the ids of its parts: an object may be part of another."""


def draw_scene(rng: np.random.Generator, textures: Sequence[np.ndarray], edge: int) -> Drawn:
    """Several shapes, larger ones first, over a texture.

    Args:
        rng: all is drawn from it.
        textures: (c, y, x) float32 each, 0 to 1; at least one channel.
        edge: elements of the window along each axis.
    """
    image = look(rng, textures, edge, edge, np.full(3, 0.5, np.float32), background=True)
    ids = np.zeros((edge, edge), np.int64)
    areas, pairs = [0], []
    low, high = np.log([SMALLEST, min(LARGEST, edge - 4)]).tolist()
    sizes = np.sort(np.exp(rng.uniform(low, high, int(rng.integers(2 + edge // 128, 5 + edge // 25)))))[::-1]
    room = 0.7 * edge * edge
    for size in sizes.astype(int):
        mask = shape(rng, int(size))
        if (room := room - mask.sum() / 2) < 0:
            room += mask.sum() / 2
            continue
        parts = [mask] if rng.random() < 0.8 or size < 16 else _split(rng, mask)
        y, x = (int(rng.integers(1, edge - n)) for n in mask.shape)
        here = (slice(y, y + mask.shape[0]), slice(x, x + mask.shape[1]))
        if len(parts) == 2:
            pairs.append((len(areas), len(areas) + 1))
        for part in parts:
            _paint(rng, textures, image[:, *here], part)
            ids[here][part] = len(areas)
            areas.append(int(part.sum()))
    seen = np.bincount(ids.ravel(), minlength=len(areas)) >= 0.5 * np.array(areas)
    groups = [(k,) for k in range(1, len(areas)) if seen[k]] + [p for p in pairs if seen[list(p)].all()]
    return Drawn(_sensed(rng, image), ids, tuple(groups))


def shape(rng: np.random.Generator, size: int) -> np.ndarray:
    """A mask (y, x), bool, cut to its extent, about ``size`` long: of one of six kinds."""
    mask = SHAPES[int(rng.integers(len(SHAPES)))](rng, size)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return np.ones((size, size), bool)
    return np.asarray(mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _turned(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of a square, −1 to 1 along the longer axis, turned; the other axis is stretched."""
    y, x = np.mgrid[:size, :size] * (2 / size) + (1 / size - 1)
    angle, aspect = rng.uniform(0, np.pi), rng.uniform(1, 3)
    return y * np.cos(angle) - x * np.sin(angle), aspect * (y * np.sin(angle) + x * np.cos(angle))


def ellipse(rng: np.random.Generator, size: int) -> np.ndarray:
    """A turned ellipse, or a superellipse up to nearly a rectangle."""
    power = rng.choice([2.0, 2.0, 4.0, 10.0])
    y, x = _turned(rng, size)
    reach = 1.0 if power == 2 else 0.72  # corners of a turned square stay inside
    return np.asarray(np.abs(y / reach) ** power + np.abs(x / reach) ** power < 1)


def corners(rng: np.random.Generator, size: int) -> np.ndarray:
    """A polygon of 3 to 9 corners around a centre."""
    count = int(rng.integers(3, 10))
    angles = (np.arange(count) + rng.uniform(0, 0.8, count)) * 2 * np.pi / count
    radii = rng.uniform(0.35, 1, count)
    mask = np.zeros((size, size), bool)
    half = (size - 1) / 2
    mask[polygon(half * (1 + radii * np.sin(angles)), half * (1 + radii * np.cos(angles)), mask.shape)] = True
    return mask


def blob(rng: np.random.Generator, size: int) -> np.ndarray:
    """The largest part of smooth noise above a threshold, inside an ellipse."""
    cells = int(rng.integers(3, 9))
    noise = smooth(rng, size, size, cells)
    y, x = _turned(rng, size)
    field = noise * rng.uniform(0.3, 0.9) + 0.7 - np.hypot(y, x * 0.7)
    parts, count = ndimage.label(field > 0)
    if not count:
        return np.zeros((size, size), bool)
    return np.asarray(parts == np.bincount(parts.ravel())[1:].argmax() + 1)


def snake(rng: np.random.Generator, size: int) -> np.ndarray:
    """A bent band."""
    turns = np.cumsum(rng.normal(0, rng.uniform(0.1, 0.7), 14)) + rng.uniform(0, 2 * np.pi)
    path = np.stack([np.cumsum(np.sin(turns)), np.cumsum(np.cos(turns))], 1)
    path -= path.min(0)
    width = rng.uniform(0.03, 0.12) * size + 0.8
    room = max(2.0, size - 2 * width - 3)
    path = (path * room / path.max() + width + 1).astype(int).clip(0, size - 1)
    off = np.ones((size, size), bool)
    for (y0, x0), (y1, x1) in pairwise(path):
        off[line(y0, x0, y1, x1)] = False
    return np.asarray(ndimage.distance_transform_edt(off) <= width)


def ring(rng: np.random.Generator, size: int) -> np.ndarray:
    """An ellipse with a hole."""
    y, x = _turned(rng, size)
    radius = np.hypot(y, x)
    return np.asarray((radius < 1) & (radius > rng.uniform(0.3, 0.75)))


def waves(rng: np.random.Generator, size: int) -> np.ndarray:
    """A closed curve whose radius is a sum of a few waves: lakes, organs."""
    y, x = _turned(rng, size)
    angle = np.arctan2(y, x)
    orders = np.arange(1, 7)[:, None, None]
    heights = rng.normal(0, 1, (6, 1, 1)) * rng.uniform(0.05, 0.35) / orders
    radius = 0.75 + (heights * np.sin(orders * angle + rng.uniform(0, 6.3, (6, 1, 1)))).sum(0)
    return np.asarray(np.hypot(y, x) < radius)


SHAPES: tuple[Callable[[np.random.Generator, int], np.ndarray], ...] = (
    ellipse,
    corners,
    blob,
    snake,
    ring,
    waves,
)


def _split(rng: np.random.Generator, mask: np.ndarray) -> list[np.ndarray]:
    """Two that touch: a mask cut along a line through its middle."""
    y, x = np.indices(mask.shape)
    ys, xs = np.nonzero(mask)
    angle = rng.uniform(0, 2 * np.pi)
    side = (y - ys.mean()) * np.sin(angle) + (x - xs.mean()) * np.cos(angle) > 0
    parts = [mask & side, mask & ~side]
    return parts if all(p.any() for p in parts) else [mask]


def smooth(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise (y, x) of deviation about 1 with ``cells`` waves along the longer axis."""
    coarse = torch.from_numpy(rng.normal(0, 1.4, (1, 1, cells, cells)).astype(np.float32))
    return np.asarray(
        functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0, 0].numpy()
    )


def look(
    rng: np.random.Generator,
    textures: Sequence[np.ndarray],
    height: int,
    width: int,
    around: np.ndarray,
    background: bool = False,
) -> np.ndarray:
    """What a surface looks like: (3, y, x) float32, a crop of a texture, noise or waves about a colour.

    Args:
        rng, textures: as `draw_scene`.
        height, width: elements.
        around: (3,) colour of the surroundings, from which this one differs more or less.
        background: keep the crop as it is, mostly.
    """
    kind = rng.random()
    if kind < (0.75 if background else 0.4):
        values = _crop(rng, textures, height, width)
    elif kind < 0.8:
        values = smooth(rng, height, width, int(rng.integers(2, 30)))[None] * rng.normal(0, 1, (3, 1, 1))
    else:
        y, x = np.mgrid[:height, :width]
        angle, length = rng.uniform(0, np.pi), rng.uniform(3, 40)
        wave = np.sin((y * np.sin(angle) + x * np.cos(angle)) * 2 * np.pi / length)
        values = wave[None] * rng.normal(0, 1, (3, 1, 1))
    if background and kind < 0.75 and rng.random() < 0.7:
        return np.ascontiguousarray(values, np.float32)
    centred = values - values.mean((1, 2), keepdims=True)
    amount = rng.uniform(0.0, 0.25) / max(float(centred.std()), 1e-3)
    if rng.random() < 0.5:  # lighter or darker in every channel
        colour = around + rng.choice([-1, 1]) * rng.uniform(0.08, 0.5)
    else:
        colour = rng.uniform(0, 1, 3)
    return np.asarray(centred * amount + colour[:, None, None], np.float32)


def _crop(rng: np.random.Generator, textures: Sequence[np.ndarray], height: int, width: int) -> np.ndarray:
    """Three channels of a texture, turned and mirrored; what it lacks is mirrored."""
    texture = textures[int(rng.integers(len(textures)))]
    channels = (
        rng.integers(0, len(texture), 3) if rng.random() < 0.5 else np.full(3, rng.integers(len(texture)))
    )
    sizes = texture.shape[1:]
    y, x = (int(rng.integers(0, max(1, n - w + 1))) for n, w in zip(sizes, (height, width), strict=True))
    part = texture[channels, y : y + height, x : x + width]
    lacking = [(0, 0), (0, height - part.shape[1]), (0, width - part.shape[2])]
    part = np.pad(part, lacking, mode="symmetric")
    return np.asarray(part[:, :: rng.choice([-1, 1]), :: rng.choice([-1, 1])])


def _paint(
    rng: np.random.Generator, textures: Sequence[np.ndarray], place: np.ndarray, mask: np.ndarray
) -> None:
    """Lay a look over a place (3, y, x) of the image where the mask is."""
    around = place[:, ::4, ::4].mean((1, 2))
    surface = look(rng, textures, mask.shape[0], mask.shape[1], around)
    cover = mask * np.float32(rng.uniform(0.6, 1))
    place += (surface - place) * cover


def _sensed(rng: np.random.Generator, image: np.ndarray) -> np.ndarray:
    """As a sensor gives it: sometimes grey, blurred, with noise, stretched between its quantiles."""
    grey = rng.random() < 0.4
    if grey:
        image = image.mean(0, keepdims=True)
    if rng.random() < 0.6:
        spread = rng.uniform(0.3, 1.2)
        image = ndimage.gaussian_filter(image, (0, spread, spread), truncate=2.5)
    image = image + rng.normal(0, 1, image.shape).astype(np.float32) * np.float32(rng.uniform(0, 0.06))
    low, high = np.quantile(image[:, ::4, ::4], (0.005, 0.995), axis=(1, 2), keepdims=True)
    image = np.clip((image - low) / np.maximum(high - low, 1e-3), 0, 1).astype(np.float32)
    return np.repeat(image, 3, axis=0) if grey else np.asarray(image)
