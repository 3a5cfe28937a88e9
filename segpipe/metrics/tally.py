"""The additive table of one scene's elements: region × predicted class × reference class.

Measuring goes over its own lattice of *measure tiles*, anchored at the scene's first element and
independent of the blocks of prediction, and everything in a tally is a whole number. So sums do
not depend on block size, order or runner, and adding again gives the same bits.

So are the counts by confidence (`Calibration`), which tell whether a model is as sure as it is right.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import numpy as np

from segpipe.errors import SceneError
from segpipe.geometry.box import Box, grid_boxes
from segpipe.geometry.geometry import Geometry
from segpipe.regions.base import FULL, Cover, RegionSet

MEASURE_TILE = {"raster": (2048, 2048), "volume": (128, 128, 128)}
"""Shape of a measure tile by kind of scene. Part of the metric definitions: never tuned."""
MOST_ELEMENTS = 1 << 22
"""In one tile: sums of its sizes stay below 2**53, where float64 counts exactly."""

NODATA = -1
"""Predicted class of an element without a valid pixel."""
NOT_REQUESTED = -2
"""Reference class of every element when there is no reference."""


def measure_tiles(geometry: Geometry) -> Iterator[Box]:
    """The tiles of a scene, in C order."""
    return grid_boxes(geometry.shape, MEASURE_TILE[geometry.kind])


@dataclass(frozen=True, eq=False)
class SizeScale:
    """Sizes of a scene's elements as whole numbers: 2**-bits of its largest element.

    So a scene whose elements are all alike is counted without any rounding, and one whose rows
    differ (geographic, Mercator) to 2**-bits of an element; the whole scene stays below 2**62.
    """

    unit: str
    """``m2``, ``mm3`` or ``px``."""
    largest: float
    """Size of the scene's largest element, in `unit`."""
    bits: int
    rows: np.ndarray
    """Size of an element for each index of the first axis, int64."""

    @classmethod
    def of(cls, geometry: Geometry) -> SizeScale:
        """The scale of a scene.

        Raises:
            SceneError: an element has no positive, finite size, or the scene has over 2**45.
        """
        sizes = geometry.element_sizes()
        largest = float(sizes.max(initial=0))
        if not (np.isfinite(sizes).all() and largest > 0):
            raise SceneError(f"its elements have no size: the largest is {largest:g}")
        count = geometry.box.size
        if count > 1 << 45:
            raise SceneError(f"has {count} elements; at most 2**45 can be measured")
        bits = min(30, 62 - count.bit_length())  # 16 or more
        rows = np.rint(sizes / largest * (1 << bits)).astype(np.int64)
        return cls(geometry.size_unit, largest, bits, rows)

    @classmethod
    def elements(cls, geometry: Geometry) -> SizeScale:
        """The scale of a scene whose elements have no size: each counts as one."""
        return cls("px", 1.0, 16, np.full(geometry.shape[0], 1 << 16))

    @property
    def uniform(self) -> bool:
        """Whether all elements have the same size."""
        return bool((self.rows == self.rows[0]).all())

    def size(self, units: int) -> float:
        """A sum of sizes in `unit`."""
        return units / (1 << self.bits) * self.largest

    def to_dict(self) -> dict[str, Any]:
        """What a reader of a tally needs to turn sizes into `unit`: a JSON object."""
        return {"unit": self.unit, "largest": self.largest, "bits": self.bits}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SizeScale:
        """From `to_dict`, to read tallies with (`size`); without `rows` it measures nothing."""
        rows = np.zeros(0, dtype=np.int64)
        return cls(str(data["unit"]), float(data["largest"]), int(data["bits"]), rows)


class SumTable:
    """Sums of whole numbers by key: int64 columns, one row a key, sorted by key, no key twice.

    Tables of one scene add up to the same bits in any order, grouping and tiling.

    A subclass is a dataclass of arrays whose first `KEYS` fields are the key and whose others are added up.
    """

    KEYS: ClassVar[int]

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the columns' names in order."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    @classmethod
    def from_columns(cls, **columns: Any) -> Self:
        """Return a table of rows in any order; rows with the same key are added up."""
        rows = np.stack([np.asarray(columns[name], dtype=np.int64).ravel() for name in cls.names()])
        rows = rows[:, np.lexsort(rows[: cls.KEYS][::-1])]
        if not rows.size:
            return cls(*rows)
        keys = rows[: cls.KEYS]
        first = np.flatnonzero(np.r_[True, (keys[:, 1:] != keys[:, :-1]).any(axis=0)])
        return cls(*keys[:, first], *np.add.reduceat(rows[cls.KEYS :], first, axis=1))

    @classmethod
    def sum(cls, parts: Iterable[Self]) -> Self:
        """Return the sum of tables of one scene."""
        tables, nothing = list(parts), np.zeros(0, dtype=np.int64)
        return cls.from_columns(
            **{name: np.concatenate([nothing, *(getattr(t, name) for t in tables)]) for name in cls.names()}
        )

    def __len__(self) -> int:
        return len(getattr(self, self.names()[0]))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, list[int]]:
        """Return a JSON object, exact; for receipts."""
        return {name: getattr(self, name).tolist() for name in self.names()}

    @classmethod
    def from_json(cls, data: dict[str, list[int]]) -> Self:
        """Return the inverse of `to_json`."""
        return cls.from_columns(**data)


@dataclass(frozen=True, eq=False)
class Tally(SumTable):
    """Sums by region, predicted class and reference class: one row each, sorted, none twice."""

    KEYS: ClassVar[int] = 3
    region: np.ndarray
    """Index into the region set's names, int64 as all columns."""
    label: np.ndarray
    """Predicted class value, or `NODATA`."""
    reference: np.ndarray
    """Reference class value, `IGNORED` or `NOT_REQUESTED`."""
    cover: np.ndarray
    """Elements, in 1/65536."""
    size: np.ndarray
    """Area or volume, in 2**-bits of the scene's largest element (`SizeScale`)."""
    edge: np.ndarray
    """How many of the elements (whole ones, however little covered) lie on the scene's border."""

    @classmethod
    def empty(cls) -> Tally:
        """Return a tally of nothing."""
        return cls.sum(())

    def rows(self) -> Iterator[tuple[int, ...]]:
        """(region, label, reference, cover, size, edge) as Python integers."""
        return zip(*self.to_json().values(), strict=True)


add = Tally.sum


def measure_tile(
    labels: np.ndarray,
    nodata: int | None,
    reference: np.ndarray | None,
    regions: RegionSet,
    box: Box,
    scene: Box,
    scale: SizeScale,
) -> Tally:
    """The tally of one tile.

    Args:
        labels: predicted class values, integers, of the box's shape.
        nodata: value of ``labels`` where there is no valid pixel; None: all are valid.
        reference: class values with `IGNORED`, of the box's shape; None: `NOT_REQUESTED`.
        regions: of the scene.
        box: the tile (`measure_tiles`), on the scene's grid.
        scene: the whole scene, for its border.
        scale: of the scene.
    """
    if labels.shape != box.shape or (reference is not None and reference.shape != box.shape):
        raise ValueError(f"labels or reference of another shape than {box}")
    if box.size > MOST_ELEMENTS:
        raise ValueError(f"a tile of {box.size} elements; at most {MOST_ELEMENTS} can be summed")
    values, code = compact(labels)
    if nodata is not None:
        values = np.where(values == nodata, NODATA, values)
    truths = np.array([NOT_REQUESTED])
    if reference is not None:
        truths, truth_code = compact(reference)
        code = code * np.int64(len(truths)) + truth_code
    pairs = np.arange(len(values) * len(truths))
    if len(pairs) > 1 << 16:  # object ids given as classes: most pairs do not occur
        pairs, code = compact(code)
    border = _border(box, scene)
    parts = []
    for cover in regions.cover(box):
        found, cover_sum, size, edge = _sums(code, len(pairs), cover, box, border, scale)
        pair = pairs[found]
        parts.append(
            Tally.from_columns(
                region=np.full(len(pair), cover.region),
                label=values[pair // len(truths)],
                reference=truths[pair % len(truths)],
                cover=cover_sum,
                size=size,
                edge=edge,
            )
        )
    return add(parts)


def _sums(
    code: np.ndarray, pairs: int, cover: Cover, box: Box, border: np.ndarray | None, scale: SizeScale
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of classes that a region's cover holds, and for each its cover, size and edge."""
    inner = cover.box.within(box)
    part = code[inner].ravel()
    fraction = None if cover.fraction is None else cover.fraction.ravel()
    sums = FULL * np.bincount(part, minlength=pairs) if fraction is None else _exact(part, fraction, pairs)
    if scale.uniform:
        sizes = sums << (scale.bits - 16)
    else:
        rows = scale.rows[cover.box.start[0] : cover.box.stop[0]]
        each = np.repeat(rows, part.size // len(rows))
        if fraction is not None:
            each = (each * fraction.astype(np.int64) + FULL // 2) >> 16
        sizes = _exact(part, each, pairs)
    edge = np.zeros(pairs, dtype=np.int64)
    if border is not None:
        on = border[inner].ravel()
        if fraction is not None:
            on = on & (fraction > 0)
        edge = np.bincount(part[on], minlength=pairs)
    pair = np.flatnonzero(sums)
    return pair, sums[pair], sizes[pair], edge[pair]


def _exact(part: np.ndarray, weights: np.ndarray, pairs: int) -> np.ndarray:
    """Sums of whole numbers by code; float64 holds them all (`MOST_ELEMENTS`)."""
    return np.rint(np.bincount(part, weights=weights, minlength=pairs)).astype(np.int64)


def _border(box: Box, scene: Box) -> np.ndarray | None:
    """Which elements of a box lie on the scene's faces; None when none does."""
    border = np.zeros(box.shape, dtype=bool)
    for axis in range(box.ndim):
        face = [slice(None)] * box.ndim
        if box.start[axis] == scene.start[axis]:
            face[axis] = slice(0, 1)
            border[tuple(face)] = True
        if box.stop[axis] == scene.stop[axis]:
            face[axis] = slice(-1, None)
            border[tuple(face)] = True
    return border if border.any() else None


def compact(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values (int64, sorted) and for each element its place among them (int32).

    Label maps hold few values in a small range: those are counted instead of sorted.
    """
    if not values.size:
        return np.zeros(0, dtype=np.int64), np.zeros(values.shape, dtype=np.int32)
    low, high = int(values.min()), int(values.max())
    if high - low >= 1 << 20:
        distinct, code = np.unique(values, return_inverse=True)
        return distinct.astype(np.int64), code.reshape(values.shape).astype(np.int32)
    shifted = values.astype(np.int64) - low if low else values
    present = np.bincount(shifted.ravel()) > 0
    place = (np.cumsum(present) - 1).astype(np.int32)
    return np.flatnonzero(present) + low, place[shifted]


BINS = 15
"""Of equal width, as Guo et al. 2017 (arXiv:1706.04599) have it; a bin holds its lower end."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Additive counts over elements with a valid pixel and a reference: whole numbers, no order."""

    count: np.ndarray
    """Elements in each bin (BINS,), int64 as all of them."""
    confidence: np.ndarray
    """Sum of their confidence, in 1/65535."""
    right: np.ndarray
    """How many of them are right."""

    @classmethod
    def empty(cls) -> Calibration:
        """Of nothing."""
        return cls(*(np.zeros(BINS, np.int64) for _ in range(3)))

    def __add__(self, other: Calibration) -> Calibration:
        return Calibration(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def error(self) -> float:
        """Expected calibration error: Σ count/total · |accuracy − mean confidence|; NaN of nothing."""
        total = int(self.count.sum())
        gaps = np.abs(self.right - self.confidence / LEVELS)
        return math.fsum(gaps) / total if total else math.nan

    def to_json(self) -> list[Any]:
        """A JSON list, exact."""
        return [self.count.tolist(), self.confidence.tolist(), self.right.tolist()]

    @classmethod
    def from_json(cls, data: list[Any]) -> Calibration:
        """The inverse of `to_json`."""
        return cls(*(np.array(column, dtype=np.int64) for column in data))


def calibrate(
    confidence: np.ndarray, labels: np.ndarray, nodata: int | None, reference: np.ndarray
) -> Calibration:
    """The counts of one tile.

    Args:
        confidence: share of the best class, uint16 in 1/65535.
        labels: predicted class values of the same shape.
        nodata: value of ``labels`` without a valid pixel; None: none.
        reference: class values; negative ones are not compared.
    """
    compared = reference >= 0
    if nodata is not None:
        compared &= labels != nodata
    sure = confidence[compared].astype(np.int64)
    right = labels[compared] == reference[compared]
    place = np.minimum(sure * BINS // LEVELS, BINS - 1)
    sums = np.rint(np.bincount(place, weights=sure, minlength=BINS)).astype(np.int64)  # below 2**38: exact
    return Calibration(np.bincount(place, minlength=BINS), sums, np.bincount(place[right], minlength=BINS))


CHANNELS = ("entropy", "margin", "confidence", "disagreement")
"""Of the stored map, in this order; the last only where there is more than one answer."""


LEVELS = 65535
"""Shares are stored as whole numbers of 1/65535."""
