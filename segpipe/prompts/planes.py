"""What a segmenter looks at: a raster, or the slices of a volume along one axis, window by window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segpipe.blocks import SceneBlocks
from segpipe.boxes import Box
from segpipe.errors import RequestError
from segpipe.geometry import Geometry, RasterGeometry, VolumeGeometry
from segpipe.inference.normalise import Normaliser
from segpipe.prompts.options import PlaneOf
from segpipe.prompts.pyramid import Pyramid, Window

STRIP = 1 << 22
"""Elements of the scene that are read at once for a coarse window."""

ACROSS = {PlaneOf.axial: "SI", PlaneOf.coronal: "AP", PlaneOf.sagittal: "LR"}
"""Directions that each kind of slice lies across."""


@dataclass(frozen=True)
class Planes:
    """The planes of a scene: one of a raster, as many of a volume as it has slices along an axis."""

    shape: tuple[int, ...]
    """Of the scene."""
    axis: int | None
    """Which axis slices are across; None: a raster."""

    @classmethod
    def of(cls, geometry: Geometry, plane: PlaneOf) -> Planes:
        """Of a scene.

        Raises:
            RequestError: a kind of slice is asked of a raster.
        """
        if isinstance(geometry, RasterGeometry):
            if plane is not PlaneOf.auto:
                raise RequestError(f"prompts.volume.plane: found {plane.value}; a raster has no slices")
            return cls(geometry.shape, None)
        assert isinstance(geometry, VolumeGeometry)
        # codes are of (i, j, k), the array's axes are (k, j, i)
        codes = geometry.orientation[::-1]
        if plane is PlaneOf.auto:
            farthest = max(geometry.spacing)
            thick = [a for a, s in enumerate(geometry.spacing) if s > 1.01 * min(geometry.spacing)]
            axial = next(a for a, code in enumerate(codes) if code in ACROSS[PlaneOf.axial])
            return cls(geometry.shape, geometry.spacing.index(farthest) if thick else axial)
        return cls(geometry.shape, next(a for a, code in enumerate(codes) if code in ACROSS[plane]))

    @property
    def plane_shape(self) -> tuple[int, int]:
        """(y, x) of one plane."""
        y, x = (n for a, n in enumerate(self.shape) if a != self.axis)
        return y, x

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.axis is None else self.shape[self.axis]

    def box(self, plane: Box, index: int) -> Box:
        """A box of one plane as a box of the scene."""
        if self.axis is None:
            return plane
        start, stop = list(plane.start), list(plane.stop)
        start.insert(self.axis, index)
        stop.insert(self.axis, index + 1)
        return Box(tuple(start), tuple(stop))


def read_window(
    store: SceneBlocks, normaliser: Normaliser, planes: Planes, pyramid: Pyramid, window: Window, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the encoder sees of a window: (c, y, x) float32, normalised; padding and nodata are 0.

    Also which of its elements have data, (y, x) bool: those with any valid element under them.

    Above the finest level each element is the mean of the valid ones under it. Rows are read in strips, so
    that memory follows the window and not what it covers.
    """
    step = 1 << window.level
    whole = pyramid.box(window)
    box = whole.intersect(Box.whole(planes.plane_shape))
    out = np.zeros((len(store.channels), pyramid.window, pyramid.window), np.float32)
    known = np.zeros(out.shape[1:], bool)
    rows = max(1, STRIP // (box.shape[1] * step)) * step
    for start in range(box.start[0], box.stop[0], rows):
        strip = Box((start, box.start[1]), (min(start + rows, box.stop[0]), box.stop[1]))
        pixels = store.read(planes.box(strip, index))
        values = normaliser.elementwise(pixels).reshape(len(out), *strip.shape)
        valid = pixels.valid.reshape(strip.shape)
        small, any_of = (values, valid) if step == 1 else _means(values, valid, step)
        first = (start - box.start[0]) // step
        out[:, first : first + small.shape[1], : small.shape[2]] = small
        known[first : first + small.shape[1], : small.shape[2]] = any_of
    return out, known


def _means(values: np.ndarray, valid: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of the valid elements of each ``step`` × ``step``, 0 where there is none; where there is any.

    Args:
        values: (c, y, x), 0 where not valid; a last short square is a square too.
    """
    edges = [np.arange(0, n, step) for n in valid.shape]
    sums = np.add.reduceat(np.add.reduceat(values.astype(np.float64), edges[0], 1), edges[1], 2)
    counts = np.add.reduceat(np.add.reduceat(valid.astype(np.int64), edges[0], 0), edges[1], 1)
    return np.asarray(sums / np.maximum(counts, 1), np.float32), np.asarray(counts > 0)
