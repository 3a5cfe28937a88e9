"""Read the windows of a raster, or of the slices of a volume along one axis, as a segmenter takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segpipe.config.prompts import PlaneOf
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry, VolumeGeometry
from segpipe.inference.normalise import Normaliser
from segpipe.pipeline.scene_io import SceneBlocks
from segpipe.tiling.pyramid import Pyramid, Window

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
    """Return what the encoder sees of a window, and which of its elements have data; see `read_box`."""
    return read_box(store, normaliser, planes, pyramid.box(window), 1 << window.level, index)


def read_box(
    store: SceneBlocks, normaliser: Normaliser, planes: Planes, whole: Box, step: int, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a box of a plane, (c, y, x) float32, normalised, and whether its elements have data, (y, x).

    Of ``step`` × ``step`` elements each is the mean of the valid ones, and has data if there is any. What is
    beyond the plane or has no data is 0. Rows are read in strips, so that memory follows the result and not
    what it covers.

    Args:
        whole: (y, x) elements of the plane, multiples of ``step`` long; may reach beyond it.
        index: of the slice.
    """
    box = whole.intersect(Box.whole(planes.plane_shape))
    # squares begin where the box does, also before the plane
    lead = [(a - b) % step for a, b in zip(box.start, whole.start, strict=True)]
    shape = tuple(n // step for n in whole.shape)
    out = np.zeros((len(store.pixels.channels), *shape), np.float32)
    known = np.zeros(shape, bool)
    left = (box.start[1] - whole.start[1]) // step
    rows = max(1, STRIP // max(1, box.shape[1] * step)) * step
    for start in range(box.start[0] - lead[0], box.stop[0], rows):
        strip = Box((max(start, box.start[0]), box.start[1]), (min(start + rows, box.stop[0]), box.stop[1]))
        pixels = store.read(planes.box(strip, index))
        before = ((strip.start[0] - start), lead[1])
        values = np.pad(
            normaliser.elementwise(pixels).reshape(len(out), *strip.shape),
            ((0, 0), (before[0], 0), (before[1], 0)),
        )
        valid = np.pad(pixels.valid.reshape(strip.shape), ((before[0], 0), (before[1], 0)))
        small, any_of = (values, valid) if step == 1 else _means(values, valid, step)
        top = (start - whole.start[0]) // step
        out[:, top : top + small.shape[1], left : left + small.shape[2]] = small
        known[top : top + small.shape[1], left : left + small.shape[2]] = any_of
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
