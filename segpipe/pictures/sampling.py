"""Small pictures of large scenes: every block is read once and thinned before the next one.

A cell of the picture is a box of the scene. Images take the mean of the cell's valid elements;
labels take the element at the cell's centre, so that a class never appears that is not there, and
prediction and reference are sampled at the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Protocol

import numpy as np

from segpipe.geometry.box import Box, grid_boxes
from segpipe.sources.base import Pixels

READ_EDGE = 2048
"""Edge of a read, in elements; memory is this squared times the channels shown."""
SLAB_ELEMENTS = 2**23
"""Elements of a read where cuts through a volume are taken in one pass."""


class ImageReader(Protocol):
    """Reads a window of the image; `Source.read` is one."""

    def __call__(self, box: Box, channels: tuple[int, ...] | None = None, /) -> Pixels: ...


class ArrayReader(Protocol):
    """Reads a window of a label map: ``read(box)`` has the box's shape."""

    def __call__(self, box: Box, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Readers:
    """Windowed readers of a scene."""

    image: ImageReader
    labels: ArrayReader
    reference: ArrayReader | None = None
    """In the classes' values; any other value is not compared."""
    uncertainty: ArrayReader | None = None
    """Shares of 0 (sure) to 1."""
    ids: ArrayReader | None = None
    """Of predicted objects, 0 none."""


class Cells(Protocol):
    """The cells of a picture, or of a stack of them, and the reads that fill them."""

    @property
    def size(self) -> tuple[int, ...]:
        """Cells: (rows, columns), or (cuts, rows, columns)."""

    @property
    def factors(self) -> tuple[int, int]:
        """Elements per cell along rows and columns."""

    def parts(self) -> Iterator[tuple[Box, tuple[slice, ...]]]:
        """Reads that cover all cells once, each with the cells it fills: whole cells only."""

    def flat(self, values: np.ndarray, box: Box) -> np.ndarray:
        """(…, *box.shape) as elements (…, rows, columns) or (…, cuts, rows, columns)."""


@dataclass(frozen=True)
class Plane:
    """A 2D cut through a scene in array order, thinned by whole factors."""

    shape: tuple[int, ...]
    """Of the scene: (y, x) or (z, y, x)."""
    axes: tuple[int, int]
    """The scene's axes that become the picture's rows and columns, ascending."""
    factors: tuple[int, int]
    """Elements per cell along the two axes."""
    at: int = 0
    """Index on the remaining axis of a volume."""

    @property
    def size(self) -> tuple[int, int]:
        """Cells along rows and columns; the last may be short."""
        rows, columns = (-(-self.shape[axis] // f) for axis, f in zip(self.axes, self.factors, strict=True))
        return rows, columns

    def box(self, rows: slice, columns: slice) -> Box:
        """The scene's box behind these rows and columns of elements (not of cells)."""
        start, stop = [self.at] * len(self.shape), [self.at + 1] * len(self.shape)
        for axis, span in zip(self.axes, (rows, columns), strict=True):
            start[axis], stop[axis] = span.start, span.stop
        return Box(tuple(start), tuple(stop))

    def parts(self) -> Iterator[tuple[Box, tuple[slice, ...]]]:
        """Reads of at most `READ_EDGE` along each axis."""
        steps = [max(1, READ_EDGE // f) for f in self.factors]
        for cells in grid_boxes(self.size, steps):
            spans = [
                slice(a * f, min(b * f, self.shape[axis]))
                for a, b, f, axis in zip(cells.start, cells.stop, self.factors, self.axes, strict=True)
            ]
            rows, columns = cells.slices
            yield self.box(spans[0], spans[1]), (rows, columns)

    def flat(self, values: np.ndarray, box: Box) -> np.ndarray:
        """(…, *box.shape) as (…, rows, columns): the cut's own axis is dropped."""
        if len(self.shape) == 2:
            return values
        dropped = ({0, 1, 2} - set(self.axes)).pop()
        return np.asarray(np.take(values, 0, axis=values.ndim - 3 + dropped))


@dataclass(frozen=True)
class Stack:
    """Parallel cuts through a volume, read in one pass over slabs along its first axis.

    One pass, because a compressed file is decoded from its beginning and a chunk as a whole.
    """

    shape: tuple[int, ...]
    """Of the volume, (z, y, x)."""
    across: int
    """The axis cut through; the other two become rows and columns, ascending."""
    at: tuple[int, ...]
    """Indices on it, ascending."""
    factor: int
    """Elements per cell along rows and columns."""

    @property
    def factors(self) -> tuple[int, int]:
        """The same along both axes."""
        return self.factor, self.factor

    @property
    def size(self) -> tuple[int, int, int]:
        """Cuts, and cells along rows and columns; the last may be short."""
        rows, columns = (-(-n // self.factor) for axis, n in enumerate(self.shape) if axis != self.across)
        return len(self.at), rows, columns

    def parts(self) -> Iterator[tuple[Box, tuple[slice, ...]]]:
        """Slabs of about `SLAB_ELEMENTS`; those without a cut are not read."""
        depth = max(1, SLAB_ELEMENTS // prod(self.shape[1:]))
        every = slice(None)
        if self.across:
            depth = max(1, depth // self.factor) * self.factor
        for start in range(0, self.shape[0], depth):
            stop = min(start + depth, self.shape[0])
            cells: tuple[slice, ...] = (every, slice(start // self.factor, -(-stop // self.factor)), every)
            if not self.across:
                first, last = np.searchsorted(self.at, (start, stop)).tolist()
                if first == last:
                    continue
                start, stop = self.at[first], self.at[last - 1] + 1
                cells = (slice(first, last), every, every)
            yield Box((start, 0, 0), (stop, *self.shape[1:])), cells

    def flat(self, values: np.ndarray, box: Box) -> np.ndarray:
        """(…, *box.shape) as (…, cuts, rows, columns)."""
        here = [i - box.start[self.across] for i in self.at if i < box.stop[self.across]]
        here = [i for i in here if i >= 0]
        axis = values.ndim - 3 + self.across
        return np.moveaxis(np.take(values, here, axis=axis), axis, -3)


def thinned(shape: tuple[int, ...], axes: tuple[int, int], at: int, limit: int) -> Plane:
    """The plane with the smallest common factor that keeps both sides within ``limit`` cells."""
    factor = max(1, *(-(-shape[axis] // limit) for axis in axes))
    return Plane(shape, axes, (factor, factor), at)


def sample_image(
    read: ImageReader, picture: Cells, channels: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the valid elements of every cell.

    Returns:
        float32 (channels, *size), and bool (*size): cells with any valid element.
    """
    values = np.zeros((len(channels), *picture.size), dtype=np.float32)
    valid = np.zeros(picture.size, dtype=bool)
    for box, cells in picture.parts():
        pixels = read(box, channels)
        seen = picture.flat(pixels.valid, box)
        number = _sums(seen.astype(np.float64), picture.factors)
        for index in range(len(channels)):
            channel = np.where(seen, picture.flat(pixels.values[index], box), 0)
            total = _sums(channel.astype(np.float64), picture.factors)
            values[index][cells] = total / np.maximum(number, 1)
        valid[cells] = number > 0
    return values, valid


def sample_labels(read: ArrayReader, picture: Cells) -> np.ndarray:
    """The element at the centre of every cell, of the picture's size."""
    result: np.ndarray | None = None
    for box, cells in picture.parts():
        part = picture.flat(np.asarray(read(box)), box)
        rows, columns = (
            np.minimum(np.arange(f // 2, n - 1 + f, f), n - 1)[: -(-n // f)]
            for n, f in zip(part.shape[-2:], picture.factors, strict=True)
        )
        if result is None:
            result = np.zeros(picture.size, dtype=part.dtype)
        result[cells] = part[..., rows[:, None], columns]
    if result is None:
        raise ValueError(f"an empty scene has no picture: {picture}")
    return result


def _sums(values: np.ndarray, factors: tuple[int, int]) -> np.ndarray:
    """Sum over cells of ``factors`` elements, (…, rows, columns); the last along an axis may be short."""
    for axis, factor in zip((-2, -1), factors, strict=True):
        if factor > 1:
            values = np.add.reduceat(values, np.arange(0, values.shape[axis], factor), axis=axis)
    return values
