"""Small pictures of large scenes: every block is read once and thinned before the next one.

A cell of the picture is a box of the scene. Images take the mean of the cell's valid elements;
labels take the element at the cell's centre, so that a class never appears that is not there, and
prediction and reference are sampled at the same places.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from segpipe.boxes import Box, grid_boxes
from segpipe.sources.base import Pixels

READ_EDGE = 2048
"""Edge of a read, in elements; memory is this squared times the channels shown."""


class ImageReader(Protocol):
    """Reads a window of the image; `Source.read` is one."""

    def __call__(self, box: Box, channels: tuple[int, ...] | None = None, /) -> Pixels: ...


class ArrayReader(Protocol):
    """Reads a window of a label map: ``read(box)`` has the box's shape."""

    def __call__(self, box: Box, /) -> np.ndarray: ...


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

    def parts(self) -> Iterator[tuple[Box, tuple[slice, slice]]]:
        """Reads that cover the plane once, each with the cells it fills: whole cells only."""
        steps = [max(1, READ_EDGE // f) for f in self.factors]
        for cells in grid_boxes(self.size, steps):
            spans = [
                slice(a * f, min(b * f, self.shape[axis]))
                for a, b, f, axis in zip(cells.start, cells.stop, self.factors, self.axes, strict=True)
            ]
            rows, columns = cells.slices
            yield self.box(spans[0], spans[1]), (rows, columns)

    def flat(self, values: np.ndarray) -> np.ndarray:
        """(…, *box.shape) as (…, rows, columns): the cut's own axis is dropped."""
        if len(self.shape) == 2:
            return values
        dropped = ({0, 1, 2} - set(self.axes)).pop()
        return np.asarray(np.take(values, 0, axis=values.ndim - 3 + dropped))


def thinned(shape: tuple[int, ...], axes: tuple[int, int], at: int, limit: int) -> Plane:
    """The plane with the smallest common factor that keeps both sides within ``limit`` cells."""
    factor = max(1, *(-(-shape[axis] // limit) for axis in axes))
    return Plane(shape, axes, (factor, factor), at)


def sample_image(read: ImageReader, plane: Plane, channels: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Mean of the valid elements of every cell.

    Returns:
        float32 (channels, rows, columns), and bool (rows, columns): cells with any valid element.
    """
    values = np.zeros((len(channels), *plane.size), dtype=np.float32)
    valid = np.zeros(plane.size, dtype=bool)
    for box, cells in plane.parts():
        pixels = read(box, channels)
        seen = plane.flat(pixels.valid)
        number = _sums(seen.astype(np.float64), plane.factors)
        for index in range(len(channels)):
            channel = np.where(seen, plane.flat(pixels.values[index]), 0)
            total = _sums(channel.astype(np.float64), plane.factors)
            values[index][cells] = total / np.maximum(number, 1)
        valid[cells] = number > 0
    return values, valid


def sample_labels(read: ArrayReader, plane: Plane) -> np.ndarray:
    """The element at the centre of every cell, (rows, columns)."""
    result: np.ndarray | None = None
    for box, cells in plane.parts():
        part = plane.flat(np.asarray(read(box)))
        rows, columns = (
            np.minimum(np.arange(f // 2, n - 1 + f, f), n - 1)[: -(-n // f)]
            for n, f in zip(part.shape, plane.factors, strict=True)
        )
        if result is None:
            result = np.zeros(plane.size, dtype=part.dtype)
        result[cells] = part[np.ix_(rows, columns)]
    if result is None:
        raise ValueError(f"an empty scene has no picture: {plane.shape}")
    return result


def _sums(values: np.ndarray, factors: tuple[int, int]) -> np.ndarray:
    """Sum over cells of ``factors`` elements; the last along an axis may be short."""
    if factors == (1, 1):
        return values
    for axis, factor in enumerate(factors):
        values = np.add.reduceat(values, np.arange(0, values.shape[axis], factor), axis=axis)
    return values
