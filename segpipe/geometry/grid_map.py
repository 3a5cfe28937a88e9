"""Two grids and the way between them: the scene's own (native) and the one a model wants to see.

The map is separable: each model axis runs along one native axis, perhaps backwards, at its own
scale. Coordinates follow the voxel-centre convention: element ``m`` of the model grid sits at
``(m + ½)·ratio − ½`` native elements from the crop's first centre, so the corners of the two grids
coincide and the origin shifts by (ratio − 1)/2. Every coordinate is computed from global integers in
float64, so a piece resampled alone equals the same piece of the whole, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry, VolumeGeometry

SAME_SPACING = 1e-3
"""Spacings that differ by less than this share are the same: nothing is resampled."""


@dataclass(frozen=True)
class GridMap:
    """The model grid laid over (a crop of) the native grid."""

    native_shape: tuple[int, ...]
    """Elements of the scene, array order."""
    crop: Box
    """The part of the native grid that the model grid covers."""
    axes: tuple[int, ...]
    """Native axis along which each model axis runs."""
    flips: tuple[bool, ...]
    """Whether a model axis runs against its native axis."""
    shape: tuple[int, ...]
    """Elements of the model grid, model axis order."""
    ratio: tuple[float, ...]
    """Native elements per model element, model axis order."""

    @property
    def identity(self) -> bool:
        """Whether both grids are the same, so that nothing is ever resampled."""
        return (
            self.crop == Box.whole(self.native_shape)
            and self.axes == tuple(range(len(self.axes)))
            and not any(self.flips)
            and self.shape == self.native_shape
            and all(r == 1.0 for r in self.ratio)
        )

    def _span(self, axis: int) -> tuple[int, int]:
        """First native element of the crop along a model axis, and how many there are."""
        native = self.axes[axis]
        return self.crop.start[native], self.crop.shape[native]

    def _turned(self, axis: int, along: np.ndarray) -> np.ndarray:
        """Positions in the crop along a model axis, from its other end where that axis is flipped."""
        return np.asarray((self._span(axis)[1] - 1) - along) if self.flips[axis] else along

    def to_native(self, axis: int, start: int, stop: int) -> np.ndarray:
        """Native coordinates of the centres of model elements [start, stop) along a model axis."""
        low, size = self._span(axis)
        along = (np.arange(start, stop, dtype=np.float64) + 0.5) * self.ratio[axis] - 0.5
        return np.asarray(np.clip(self._turned(axis, along) + low, low, low + size - 1))

    def to_model(self, axis: int, start: int, stop: int) -> np.ndarray:
        """Model coordinates of the centres of native elements [start, stop) along a model axis."""
        along = self._turned(axis, np.arange(start, stop, dtype=np.float64) - self._span(axis)[0])
        m = (along + 0.5) / self.ratio[axis] - 0.5
        return np.clip(m, 0, self.shape[axis] - 1)

    def nearest_native(self, axis: int, start: int, stop: int) -> np.ndarray:
        """Native element nearest to model elements [start, stop) along a model axis."""
        low, size = self._span(axis)
        return low + self._turned(axis, _nearest(np.arange(start, stop), self.ratio[axis], size))

    def nearest_model(self, axis: int, start: int, stop: int) -> np.ndarray:
        """Model element nearest to native elements [start, stop) along a model axis."""
        along = self._turned(axis, np.arange(start, stop) - self._span(axis)[0])
        return _nearest(along, 1 / self.ratio[axis], self.shape[axis])

    def native_box(self, box: Box) -> Box:
        """The native elements from which a model box is interpolated."""
        start = [0] * box.ndim
        stop = [0] * box.ndim
        for axis, native in enumerate(self.axes):
            at = _ends(self.to_native, axis, box.start[axis], box.stop[axis])
            nearest = _ends(self.nearest_native, axis, box.start[axis], box.stop[axis])
            start[native] = min(int(np.floor(at.min())), int(nearest.min()))
            stop[native] = max(int(np.ceil(at.max())), int(nearest.max())) + 1
        return Box(tuple(start), tuple(stop))

    def model_box(self, box: Box) -> Box:
        """The model elements from which the cropped part of a native box is interpolated."""
        inside = box.intersect(self.crop)
        if not inside.size:
            return Box.whole((0,) * len(self.axes))
        start, stop = [], []
        for axis, native in enumerate(self.axes):
            at = _ends(self.to_model, axis, inside.start[native], inside.stop[native])
            nearest = _ends(self.nearest_model, axis, inside.start[native], inside.stop[native])
            start.append(min(int(np.floor(at.min())), int(nearest.min())))
            stop.append(max(int(np.ceil(at.max())), int(nearest.max())) + 1)
        return Box(tuple(start), tuple(stop))

    def to_dict(self) -> dict[str, Any]:
        """A JSON object for keys and records."""
        return {
            "native_shape": list(self.native_shape),
            "crop": [list(self.crop.start), list(self.crop.stop)],
            "axes": list(self.axes),
            "flips": list(self.flips),
            "shape": list(self.shape),
            "ratio": list(self.ratio),
        }


def _ends(places: Callable[[int, int, int], np.ndarray], axis: int, start: int, stop: int) -> np.ndarray:
    """The places of the first and the last of some elements; all others lie between, as order is kept."""
    return np.concatenate([places(axis, start, start + 1), places(axis, stop - 1, stop)])


def model_grid(
    geometry: Geometry,
    *,
    orientation: str | None = None,
    spacing: Sequence[float] | None = None,
    shape: Sequence[int] | None = None,
    crop: Box | None = None,
) -> GridMap:
    """The grid a model wants, over a scene.

    Args:
        geometry: of the scene.
        orientation: anatomical direction of the model's axes (volumes), e.g. ``RAS``; the closest
            permutation and flips are taken, an oblique volume is never rotated.
        spacing: element size along the model's axes, in mm or m.
        shape: instead of a spacing, the number of elements along the model's axes.
        crop: the part of the native grid to cover; default all of it.

    Raises:
        SceneError: a spacing is asked for where the scene has none in metres or millimetres.
    """
    crop = crop or geometry.box
    axes, flips = _axes(geometry, orientation)
    lengths = [crop.shape[a] for a in axes]
    if shape is not None:
        sizes = tuple(int(n) for n in shape)
        ratio = [n / m for n, m in zip(lengths, sizes, strict=True)]
    elif spacing is not None:
        native = _metric_spacing(geometry)
        ratio = [want / native[a] for want, a in zip(spacing, axes, strict=True)]
        ratio = [1.0 if abs(r - 1) < SAME_SPACING else r for r in ratio]
        sizes = tuple(max(1, round(n / r)) for n, r in zip(lengths, ratio, strict=True))
    else:
        ratio, sizes = [1.0] * len(axes), tuple(lengths)
    return GridMap(geometry.shape, crop, axes, flips, sizes, tuple(float(r) for r in ratio))


def _axes(geometry: Geometry, orientation: str | None) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Native axis and direction of each model axis. File axes (i, j, k) are array axes (2, 1, 0)."""
    if orientation is None or not isinstance(geometry, VolumeGeometry):
        return tuple(range(geometry.ndim)), (False,) * geometry.ndim
    have = nib.orientations.io_orientation(geometry.matrix)
    want = nib.orientations.axcodes2ornt(orientation)
    change = nib.orientations.ornt_transform(have, want)
    axes, flips = [0, 0, 0], [False, False, False]
    for file_axis, (model_axis, direction) in enumerate(change):
        axes[int(model_axis)] = 2 - file_axis
        flips[int(model_axis)] = bool(direction < 0)
    return tuple(axes), tuple(flips)


def _metric_spacing(geometry: Geometry) -> tuple[float, ...]:
    """Element size in metres or mm, array order."""
    spacing = geometry.spacing
    if isinstance(geometry, RasterGeometry):
        crs = geometry.projection
        if spacing is None or crs is None:
            raise SceneError(
                "the card asks for a spacing in metres, and the raster has no CRS; give the file a "
                "projected CRS, or remove input.spacing from the card"
            )
        if not crs.is_projected:
            raise SceneError(
                f"the card asks for a spacing in metres, and the raster's CRS is {crs.name!r} "
                "(degrees); warp it to a projected CRS first"
            )
        unit = crs.axis_info[0].unit_conversion_factor
        return tuple(s * unit for s in spacing)
    if spacing is None:
        raise SceneError("the scene has no spacing")
    return spacing


def _nearest(index: np.ndarray, ratio: float, size: int) -> np.ndarray:
    """Source element whose extent holds the centre of each element: ``⌊(i + ½)·ratio⌋``.

    In float32, as torch's ``nearest-exact`` computes it: where a centre falls on the border of two
    elements, both are nearest, and published pipelines are met voxel by voxel.
    """
    at = (index.astype(np.float32) + np.float32(0.5)) * np.float32(ratio)
    return np.asarray(np.minimum(np.floor(at).astype(np.intp), size - 1))


def _take(values: np.ndarray, axis: int, at: np.ndarray, offset: int) -> np.ndarray:
    """Values at coordinates along one axis, linear between elements, or whole where ``at`` is.

    Args:
        at: global coordinates (float64), or global indices (integers) for nearest.
        offset: the global index of item 0.
    """
    if at.dtype.kind == "i":
        return np.asarray(np.take(values, at - offset, axis=axis))
    low = np.floor(at)
    weight = (at - low).astype(np.float32)
    index = low.astype(np.intp) - offset
    first = np.take(values, index, axis=axis)
    if not weight.any():
        return np.asarray(first)
    upper = np.minimum(index + 1, values.shape[axis] - 1)
    second = np.take(values, upper, axis=axis)
    shape = [1] * values.ndim
    shape[axis] = -1
    w = weight.reshape(shape)
    return np.asarray(first * (np.float32(1) - w) + second * w)


def onto_model(
    values: np.ndarray, box: Box, grid: GridMap, target: Box, *, nearest: bool = False
) -> np.ndarray:
    """Resample native values onto a box of the model grid.

    Args:
        values: (c, …) over the native ``box``, float32, or any dtype with ``nearest``.
        box: holds `grid.native_box(target)`.
        target: on the model grid, inside it.

    Returns:
        (c, …) over ``target``, axes in the model's order.
    """
    for axis, native in enumerate(grid.axes):
        pick = grid.nearest_native if nearest else grid.to_native
        at = pick(axis, target.start[axis], target.stop[axis])
        values = _take(values, native + 1, at, box.start[native])
    return np.ascontiguousarray(values.transpose((0, *(a + 1 for a in grid.axes))))


def onto_native(
    values: np.ndarray, box: Box, grid: GridMap, target: Box, *, nearest: bool = False
) -> np.ndarray:
    """Resample values of the model grid onto a native box inside the crop; the inverse way.

    Args:
        values: (c, …) over the model ``box``, which holds `grid.model_box(target)`.
        target: on the native grid, inside ``grid.crop``.

    Returns:
        (c, …) over ``target``, native axis order.
    """
    order = [grid.axes.index(native) for native in range(len(grid.axes))]
    for axis, native in enumerate(grid.axes):
        pick = grid.nearest_model if nearest else grid.to_model
        at = pick(axis, target.start[native], target.stop[native])
        values = _take(values, axis + 1, at, box.start[axis])
    return np.ascontiguousarray(values.transpose((0, *(a + 1 for a in order))))


def sample_nearest(read: Callable[[Box], np.ndarray], grid: GridMap, dtype: Any) -> np.ndarray:
    """The scene sampled onto a small model grid, plane by plane: (c, …), memory of one native slab.

    Args:
        read: native box to (c, …) values.
        grid: its shape is what comes back.
    """
    first_axis = grid.axes.index(0)
    at = grid.nearest_native(first_axis, 0, grid.shape[first_axis])
    planes: list[np.ndarray] = []
    last: tuple[int, np.ndarray] | None = None
    for m, native in enumerate(at):
        if last is None or last[0] != native:
            slab = grid.crop.narrowed(0, int(native), int(native) + 1)
            target = Box.whole(grid.shape).narrowed(first_axis, m, m + 1)
            plane = onto_model(read(slab), slab, grid, target, nearest=True)
            last = (int(native), plane.astype(dtype, copy=False))
        planes.append(last[1])
    return np.concatenate(planes, axis=first_axis + 1)
