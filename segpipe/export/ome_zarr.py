"""Label maps as OME-Zarr 0.5: sharded Zarr 3, levels for zooming out, names and colours of classes.

OME-Zarr 0.5 knows scale and translation only. So its coordinates here run along the array's axes, in mm
(volumes) or the CRS's unit, from the centre of the first element; the full affine, and the CRS, are in the
group's attribute ``segpipe:geometry`` (`Geometry.to_dict`).

A level halves every axis that is longer than `SMALLEST`; an element of it has the most frequent label of the
elements that it stands for, so no label appears that is not in the map. Written shard by shard, each read
once per level: memory follows the shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL.ImageColor import getrgb

from segpipe.config.card import Class
from segpipe.export.staging import commit, fit_labels, label_dtype, staging
from segpipe.geometry.box import Box, grid_boxes
from segpipe.geometry.geometry import Geometry, RasterGeometry
from segpipe.sources.base import LabelReader
from segpipe.store.arrays import LABEL_CODEC

VERSION = "0.5"
SMALLEST = 256
"""Elements: no axis of the last level is longer."""
CHUNK = {2: 512, 3: 64}
SHARD = {2: 2048, 3: 128}
"""Edges by number of axes: 4 Mi and 2 Mi elements, read eight times as many at most."""
UNITS = {"metre": "meter", "foot": "foot"}
"""OME-Zarr's names of units a CRS may have; degrees are none of them."""

Array = zarr.Array[Any]


def write_ome_zarr(
    labels: LabelReader, geometry: Geometry, classes: Sequence[Class], nodata: int | None, path: Path
) -> None:
    """Write a label map as a multiscale image-label; it is there whole or not at all.

    Args:
        labels: windowed reader; called with boxes of at most a shard, in C order.
        geometry: of a raster (y, x) or a volume (z, y, x).
        classes: values, names and colours.
        nodata: the value of elements without data, or None.
        path: local folder that is made, ``….ome.zarr``.

    Raises:
        SceneError: a label does not fit the classes.
    """
    dtype = label_dtype(classes, nodata)
    factors = level_factors(geometry.shape)
    with staging(path) as folder:
        draft = folder / "draft"
        group = zarr.open_group(str(draft), mode="w", zarr_format=3)
        group.attrs.update(_attributes(geometry, classes, nodata, factors))
        first = _create(group, 0, geometry.shape, dtype)
        for box in grid_boxes(first.shape, first.shards or first.chunks):
            first[box.slices] = fit_labels(labels(box), dtype, box, path)
        above = first
        for level in range(1, len(factors)):
            steps = tuple(b // a for a, b in zip(factors[level - 1], factors[level], strict=True))
            above = _shrink(group, level, above, steps)
        commit(draft, path)


def level_factors(shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Elements of the map along each axis that one element of a level stands for, level by level."""
    factors = [(1,) * len(shape)]
    while any(-(-n // f) > SMALLEST for n, f in zip(shape, factors[-1], strict=True)):
        last = zip(shape, factors[-1], strict=True)
        factors.append(tuple(f * 2 if -(-n // f) > SMALLEST else f for n, f in last))
    return factors


def most_frequent(labels: np.ndarray, steps: Sequence[int]) -> np.ndarray:
    """The most frequent label of each cell; of equally frequent ones the first in C order.

    Args:
        labels: integers; cells at the end may be short.
        steps: cell along each axis, 1 or 2.
    """
    pad = [(0, -n % s) for n, s in zip(labels.shape, steps, strict=True)]
    whole = np.pad(labels, pad, mode="edge")  # a short cell's elements count twice each
    members = [whole[tuple(slice(o, None, s) for o, s in zip(offset, steps, strict=True))]
               for offset in product(*(range(s) for s in steps))]  # fmt: skip
    best, count = members[0], np.zeros(members[0].shape, np.uint8)
    for member in members:
        same = sum((member == other).astype(np.uint8) for other in members)
        best, count = np.where(same > count, member, best), np.maximum(same, count)
    return best


def _shrink(group: zarr.Group, level: int, above: Array, steps: tuple[int, ...]) -> Array:
    """Write a level from the one above it."""
    shape = tuple(-(-n // s) for n, s in zip(above.shape, steps, strict=True))
    array = _create(group, level, shape, above.dtype)
    for box in grid_boxes(shape, array.shards or array.chunks):
        start = tuple(a * s for a, s in zip(box.start, steps, strict=True))
        stop = tuple(min(b * s, n) for b, s, n in zip(box.stop, steps, above.shape, strict=True))
        array[box.slices] = most_frequent(np.asarray(above[Box(start, stop).slices]), steps)
    return array


def _create(group: zarr.Group, level: int, shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
    ndim = len(shape)
    chunk = tuple(min(CHUNK[ndim], n) for n in shape)
    shard = tuple(min(SHARD[ndim] // CHUNK[ndim], -(-n // c)) * c for n, c in zip(shape, chunk, strict=True))
    return group.create_array(
        str(level),
        shape=tuple(shape),
        chunks=chunk,
        shards=shard,
        dtype=dtype,
        fill_value=0,
        compressors=LABEL_CODEC,
        dimension_names=("z", "y", "x")[-ndim:],
    )


def _attributes(
    geometry: Geometry, classes: Sequence[Class], nodata: int | None, factors: Sequence[tuple[int, ...]]
) -> dict[str, Any]:
    """The group's attributes: ``ome``, and our geometry."""
    unit = _unit(geometry)
    axes = [{"name": n, "type": "space", **unit} for n in ("z", "y", "x")[-geometry.ndim :]]
    spacing = geometry.spacing or (1.0,) * geometry.ndim
    datasets = []
    for level, factor in enumerate(factors):
        scale = [s * f for s, f in zip(spacing, factor, strict=True)]
        centre = [s * (f - 1) / 2 for s, f in zip(spacing, factor, strict=True)]
        transforms = [{"type": "scale", "scale": scale}, {"type": "translation", "translation": centre}]
        datasets.append({"path": str(level), "coordinateTransformations": transforms})
    multiscale = {"name": "labels", "axes": axes, "datasets": datasets, "type": "mode"}
    listed = sorted(classes, key=lambda c: c.value)
    colors = [
        {"label-value": c.value, "rgba": [*getrgb(c.color), 0 if c.background else 255]} for c in listed
    ]
    names: list[dict[str, Any]] = [{"label-value": c.value, "name": c.name} for c in listed]
    if nodata is not None:
        colors.append({"label-value": nodata, "rgba": [0, 0, 0, 0]})
        names.append({"label-value": nodata, "name": "no data"})
    label = {"version": VERSION, "colors": colors, "properties": names}
    return {
        "ome": {"version": VERSION, "multiscales": [multiscale], "image-label": label},
        "segpipe:geometry": geometry.to_dict(),
    }


def _unit(geometry: Geometry) -> dict[str, str]:
    """The unit of the axes, where OME-Zarr has a name for it."""
    if not isinstance(geometry, RasterGeometry):
        return {"unit": "millimeter"}
    crs = geometry.projection
    name = crs.axis_info[0].unit_name if crs is not None and crs.axis_info else ""
    return {"unit": UNITS[name]} if name in UNITS else {}
