"""What the image holds under each class: exact sums and a histogram, by region, class and channel.

Everything is a whole number, and adding knows no order, so nothing depends on how a scene is cut:

- A stored value is taken as mantissa · 2**exponent. Whole numbers are themselves; float32 is exact
  too; float64 is rounded to float32 first (a relative step of 2**-24), value by value. Sums of these
  and of their squares are Python integers, in units of 2**-point and 2**-(2·point).
- A histogram's bins are 2**shift wide and begin at multiples of that. The shift is the smallest under
  which the cell's extremes lie less than `BINS` bins apart; it grows with the range only, and bins of
  one shift fall whole into those of a greater one, so merged histograms are those of the union.

Sums are over elements with a valid pixel and a label, weighted by cover in 1/65536.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.metrics.tally import compact
from segpipe.regions.base import FULL, RegionSet
from segpipe.sources.base import Pixels, Scaling

BINS = 1024
"""Most bins of a cell's histogram."""
FLOAT_POINT = 149
"""Every float32 is a multiple of 2**-149."""
MANTISSA = 24
"""Bits of a float32's."""
LARGEST = 2**31
"""Of whole numbers: their squares fit 64 bits."""
PERCENTILES = (5, 50, 95)
STORED, SCALED = "stored value", "stored value × scale + offset"
"""Units: files say how values are scaled, and rarely in what unit."""
_LIMB = 24
"""Bits summed at once: with cover (16 bits) of a tile (22 bits) a sum stays below 2**62."""
_EXPONENTS, _BIAS = 512, 256
"""Room for the exponents of float32 below a code."""

Key = tuple[int, int, int]
"""Region, class value, channel."""


@dataclass(frozen=True, eq=False)
class Cell:
    """Sums over the elements of one region, class and channel, in stored values."""

    cover: int
    """Σ cover, in 1/65536 elements."""
    total: int
    """Σ cover · value, in 2**-point."""
    squares: int
    """Σ cover · value², in 2**-(2·point)."""
    low: float
    """The least value; an int for whole numbers."""
    high: float
    shift: int
    bins: np.ndarray
    """Occupied bins, ascending, int64: floor(value / 2**shift)."""
    weights: np.ndarray
    """Cover of each."""

    def __add__(self, other: Cell) -> Cell:
        low, high = min(self.low, other.low), max(self.high, other.high)
        shift = bin_shift(low, high)
        bins = np.concatenate([c.bins >> min(shift - c.shift, 63) for c in (self, other)])
        distinct, place = np.unique(bins, return_inverse=True)
        weights = np.zeros(len(distinct), dtype=np.int64)
        np.add.at(weights, place, np.concatenate([self.weights, other.weights]))
        return Cell(
            self.cover + other.cover, self.total + other.total, self.squares + other.squares,
            low, high, shift, distinct, weights,
        )  # fmt: skip

    def to_json(self) -> list[Any]:
        """A JSON list, exact."""
        numbers = [self.cover, self.total, self.squares, self.low, self.high, self.shift]
        return [*numbers, self.bins.tolist(), self.weights.tolist()]

    @classmethod
    def from_json(cls, data: list[Any]) -> Cell:
        """The inverse of `to_json`."""
        cover, total, squares, low, high, shift = data[:6]
        bins, weights = (np.array(column, dtype=np.int64) for column in data[6:])
        return cls(cover, total, squares, low, high, shift, bins, weights)


def bin_shift(low: float, high: float) -> int:
    """The shift of a histogram over this range: whole numbers (0 or more), or floats.

    Floats have no bins finer than 2**-24 of their greatest power of two.
    """
    if isinstance(low, int) and isinstance(high, int):
        shift = max(0, (high - low).bit_length() - BINS.bit_length())
        while (high >> shift) - (low >> shift) >= BINS:
            shift += 1
        return shift
    largest = max(abs(low), abs(high))
    shift = max(-FLOAT_POINT, math.frexp(largest)[1] - MANTISSA) if largest else -FLOAT_POINT
    while math.floor(math.ldexp(high, -shift)) - math.floor(math.ldexp(low, -shift)) >= BINS:
        shift += 1
    return shift


@dataclass(frozen=True, eq=False)
class Intensity:
    """The cells of a tile or a scene; those that hold no element are not there."""

    point: int
    """0 for stored whole numbers, `FLOAT_POINT` for floats."""
    cells: dict[Key, Cell]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Intensity) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, Any]:
        """A JSON object, exact; for receipts."""
        return {"point": self.point, "cells": [[*k, *c.to_json()] for k, c in sorted(self.cells.items())]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Intensity:
        """The inverse of `to_json`."""
        return cls(data["point"], {tuple(row[:3]): Cell.from_json(row[3:]) for row in data["cells"]})


def add(parts: Iterable[Intensity]) -> Intensity:
    """The sum of a scene's tiles, of which there is at least one: the same in any order and grouping."""
    cells: dict[Key, Cell] = {}
    points = set()
    for part in parts:
        points.add(part.point)
        for key, cell in part.cells.items():
            cells[key] = cells[key] + cell if key in cells else cell
    (point,) = points
    return Intensity(point, cells)


def measure_intensity(
    pixels: Pixels, labels: np.ndarray, nodata: int | None, regions: RegionSet, box: Box
) -> Intensity:
    """The cells of one tile.

    Args:
        pixels: of the box, as stored: values (c, …), and where they are valid.
        labels: class values of the box's shape; ``nodata`` and negative ones are left out.
        nodata: value of ``labels`` without a class; None: none.
        regions: of the scene.
        box: the tile (`segpipe.metrics.tally.measure_tiles`).

    Raises:
        SceneError: a whole number beyond ±2**31, or a float beyond float32.
    """
    inside = pixels.valid & (labels >= 0)
    if nodata is not None:
        inside &= labels != nodata
    values = stored(pixels.values, inside)
    distinct, code = compact(labels)
    cells: dict[Key, Cell] = {}
    for cover in regions.cover(box):
        inner = cover.box.within(box)
        fraction = None if cover.fraction is None else cover.fraction.astype(np.int64)
        held = inside[inner] if fraction is None else inside[inner] & (fraction > 0)
        part = code[inner][held]
        if not part.size:
            continue
        weights = np.full(part.size, FULL, dtype=np.int64) if fraction is None else fraction[held]
        for channel, plane in enumerate(values):
            for place, cell in _cells(*_merged(part, plane[inner][held], weights)):
                cells[cover.region, int(distinct[place]), channel] = cell
    return Intensity(FLOAT_POINT if values.dtype.kind == "f" else 0, cells)


def stored(values: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Stored values as int64 or float32, 0 where they do not count.

    Args:
        values: (c, …).
        inside: bool (…): where they count.
    """
    kept = np.where(inside, values, 0)
    if kept.dtype.kind == "f":
        with np.errstate(over="ignore"):
            single = kept.astype(np.float32)
        if not np.isfinite(single).all():
            raise SceneError(f"measure.intensity: holds {kept[~np.isfinite(single)][0]:g}, beyond float32")
        return single
    largest = max(abs(int(kept.max(initial=0))), abs(int(kept.min(initial=0))))
    if largest > LARGEST:
        raise SceneError(f"measure.intensity: holds {largest}; whole numbers up to 2**31 are summed")
    return kept.astype(np.int64)


def _merged(
    part: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same elements, those of one code and value made one: many, where whole numbers repeat."""
    if values.dtype.kind == "f":
        return part, values, weights
    low = int(values.min())
    span = int(values.max()) - low + 1
    if (int(part.max()) + 1) * span > 4 * part.size:
        return part, values, weights
    sums = np.bincount(part * span + (values - low), weights=weights)  # below 2**38: exact
    at = np.flatnonzero(sums)
    return at // span, at % span + low, sums[at].astype(np.int64)


def _cells(part: np.ndarray, values: np.ndarray, weights: np.ndarray) -> Iterator[tuple[int, Cell]]:
    """The cell of each code, with no channel and no region.

    Args:
        part: code of each element (n,).
        values: int64 or float32 (n,).
        weights: cover (n,), int64, above 0.
    """
    moments = _moments(part, values, weights)
    whole = values.dtype.kind == "i"
    codes = np.array(sorted(moments))
    shifts = np.array([bin_shift(*moments[c][3:]) for c in codes])
    place = np.searchsorted(codes, part)
    if whole:
        bins = values >> shifts[place]
    else:
        bins = np.floor(np.ldexp(values.astype(np.float64), -shifts[place])).astype(np.int64)
    first = np.array([_bin(moments[c][3], int(s)) for c, s in zip(codes, shifts, strict=True)])
    occupied, which = compact(place * BINS + (bins - first[place]))
    # float64 holds these sums: at most 2**22 elements of 2**16
    sums = np.rint(np.bincount(which, weights=weights, minlength=len(occupied))).astype(np.int64)
    ends = np.searchsorted(occupied, np.arange(len(codes) + 1) * BINS)
    for i, c in enumerate(codes):
        span = slice(ends[i], ends[i + 1])
        yield int(c), Cell(*moments[c], int(shifts[i]), occupied[span] - i * BINS + first[i], sums[span])


def _bin(value: float, shift: int) -> int:
    return value >> shift if isinstance(value, int) else math.floor(math.ldexp(value, -shift))


def _moments(
    part: np.ndarray, values: np.ndarray, weights: np.ndarray
) -> dict[int, tuple[int, int, int, float, float]]:
    """Cover, total, squares, least and greatest value of each code."""
    exponent: np.ndarray | int = 0
    mantissa = values
    if values.dtype.kind == "f":
        fraction, exponent = np.frexp(values)
        mantissa = np.ldexp(fraction, MANTISSA).astype(np.int64)
    keys, key = compact(part.astype(np.int64) * _EXPONENTS + (exponent + _BIAS))
    order = np.argsort(key.astype(np.uint16) if len(keys) <= 1 << 16 else key, kind="stable")
    starts = np.searchsorted(key[order], np.arange(len(keys)))
    value, m, w = values[order], mantissa[order], weights[order]
    columns = (
        np.add.reduceat(w, starts).tolist(), _exact(m, w, starts), _exact(m * m, w, starts),
        np.minimum.reduceat(value, starts).tolist(), np.maximum.reduceat(value, starts).tolist(),
    )  # fmt: skip
    result: dict[int, tuple[int, int, int, float, float]] = {}
    for k, cover, total, squares, low, high in zip(keys.tolist(), *columns, strict=True):
        code, biased = divmod(k, _EXPONENTS)
        if values.dtype.kind == "f":
            up = biased - _BIAS - MANTISSA + FLOAT_POINT
            total, squares = _scaled(total, up), _scaled(squares, 2 * up)
        if code in result:
            before = result[code]
            cover, total, squares = before[0] + cover, before[1] + total, before[2] + squares
            low, high = min(before[3], low), max(before[4], high)
        result[code] = (cover, total, squares, low, high)
    return result


def _scaled(number: int, up: int) -> int:
    """Number · 2**up; a subnormal float's mantissa has the zeros that go."""
    return number << up if up >= 0 else number >> -up


def _exact(values: np.ndarray, weights: np.ndarray, starts: np.ndarray) -> list[int]:
    """Σ weights · values of each run, as Python integers: summed in limbs that cannot overflow."""
    signed, rest = weights * np.sign(values), np.abs(values)
    total, shift = [0] * len(starts), 0
    while rest.any():
        limbs = np.add.reduceat(signed * (rest & ((1 << _LIMB) - 1)), starts).tolist()
        total = [t + (n << shift) for t, n in zip(total, limbs, strict=True)]
        rest = rest >> _LIMB
        shift += _LIMB
    return total


@dataclass(frozen=True)
class Channel:
    """A channel of the image."""

    name: str
    scaling: Scaling

    @property
    def unit(self) -> str:
        return STORED if self.scaling == Scaling() else SCALED

    def to_json(self) -> list[Any]:
        return [self.name, self.scaling.scale, self.scaling.offset]

    @classmethod
    def from_json(cls, data: list[Any]) -> Channel:
        """The inverse of `to_json`."""
        return cls(data[0], Scaling(data[1], data[2]))


@dataclass(frozen=True)
class IntensityStatistics:
    """A cell in the real unit: stored · scale + offset."""

    n: float
    """Elements, a share of those on a polygon's edge."""
    mean: float
    sd: float
    """Of all elements, divided by n (not n − 1)."""
    min: float
    max: float
    percentiles: tuple[float, ...]
    """`PERCENTILES`, each within `bin` of the least value up to which that share of n lies."""
    bin: float
    """Width of the histogram's bins. Of whole numbers 1 stored unit wide, percentiles are exact."""


def statistics(cell: Cell, point: int, scaling: Scaling) -> IntensityStatistics:
    """The numbers of a cell, from exact sums.

    Args:
        point: of the `Intensity`.
        scaling: of the channel.
    """
    scale, offset = scaling.scale, scaling.offset
    variance = cell.cover * cell.squares - cell.total**2
    quantiles = PERCENTILES if scale > 0 else tuple(100 - p for p in PERCENTILES)
    found = [_percentile(cell, p) for p in quantiles]
    ends = sorted((cell.low * scale + offset, cell.high * scale + offset))
    return IntensityStatistics(
        n=cell.cover / FULL,
        mean=cell.total / (cell.cover << point) * scale + offset,
        sd=math.sqrt(variance / (cell.cover << point) ** 2) * abs(scale),
        min=ends[0],
        max=ends[1],
        percentiles=tuple(value * scale + offset for value in found),
        bin=math.ldexp(1.0, cell.shift) * abs(scale),
    )


def _percentile(cell: Cell, percent: int) -> float:
    """The least value with this share of the cover at or below it, interpolated inside its bin."""
    below = np.cumsum(cell.weights)
    at = int(np.searchsorted(below * 100, percent * cell.cover))  # whole numbers: no rounding
    first = math.ldexp(float(cell.bins[at]), cell.shift)
    wide = math.ldexp(1.0, cell.shift) - (1 if isinstance(cell.low, int) else 0)
    before = int(below[at] - cell.weights[at])
    share = (percent * cell.cover / 100 - before) / int(cell.weights[at])
    return float(min(max(first + share * wide, cell.low), cell.high))
