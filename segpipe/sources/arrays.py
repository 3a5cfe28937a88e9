"""Scenes and label maps as xarray.DataArray, lazily, with their geometry; and back.

Rasters follow the convention of rioxarray and CF: `x` and `y` are coordinates of pixel centres; the scalar
coordinate `spatial_ref` holds `crs_wkt` and `GeoTransform`. Volumes have the 4×4 affine of voxel
centres (i, j, k) to RAS millimetres in ``attrs["affine"]``; their dimensions z, y, x are k, j, i.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pyproj import CRS

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry, VolumeGeometry, volume_geometry

if TYPE_CHECKING:
    import xarray

TOLERANCE = 1e-6
"""Largest deviation of the steps between coordinates from their mean, as a share of a step."""


def lazy_array(
    read: Callable[[Box], np.ndarray],
    geometry: Geometry,
    dtype: np.dtype[Any],
    bands: Sequence[str] | None = None,
    name: str | None = None,
    valid: Callable[[Box], np.ndarray] | None = None,
) -> xarray.DataArray:
    """A DataArray whose elements are read when they are asked for.

    Args:
        read: of a box of the native grid: (c, *box.shape) where bands are given, else box.shape.
        geometry: of the native grid.
        dtype: of what is read.
        bands: names of the channels, which become the first dimension; None: there is none.
        name: of the DataArray.
        valid: of a box, bool: where there is data; it becomes the coordinate `valid`.

    Returns:
        Dimensions (band,) (z,) y, x; coordinates and attributes as the module says.
    """
    import xarray

    dims = ("z", "y", "x")[-geometry.ndim :]
    coords, attrs = _coordinates(geometry)
    if bands is not None:
        coords["band"] = list(bands)
    if valid is not None:
        coords["valid"] = (dims, _lazy(valid, (), geometry.shape, np.dtype(bool)))
    lead = () if bands is None else (len(bands),)
    values = _lazy(read, lead, geometry.shape, np.dtype(dtype))
    variable = xarray.Variable(("band", *dims) if lead else dims, values, attrs=attrs)
    return xarray.DataArray(variable, coords=coords, name=name)


def _lazy(
    read: Callable[[Box], np.ndarray], lead: tuple[int, ...], shape: tuple[int, ...], dtype: np.dtype[Any]
) -> Any:
    """An array that xarray indexes lazily, of shape (*lead, *shape)."""
    from xarray.backends import BackendArray
    from xarray.core import indexing

    class _Lazy(BackendArray):
        def __init__(self) -> None:
            self.shape = (*lead, *shape)
            self.dtype = dtype

        def __getitem__(self, key: Any) -> np.ndarray:
            return np.asarray(
                indexing.explicit_indexing_adapter(
                    key, self.shape, indexing.IndexingSupport.BASIC, self._read
                )
            )

        def _read(self, key: tuple[Any, ...]) -> np.ndarray:
            grid = key[len(lead) :]
            spans = [_span(k, n) for k, n in zip(grid, shape, strict=True)]
            box = Box(tuple(low for low, _ in spans), tuple(high for _, high in spans))
            found = read(box) if box.size else np.zeros((*lead, *box.shape), dtype)
            local = tuple(_local(k, low) for k, (low, _) in zip(grid, spans, strict=True))
            return np.asarray(found[(*key[: len(lead)], *local)])

    return indexing.LazilyIndexedArray(_Lazy())


def _span(key: int | slice, size: int) -> tuple[int, int]:
    """First element and the one after the last that a basic index touches."""
    if isinstance(key, slice):
        picked = range(*key.indices(size))
        return (min(picked[0], picked[-1]), max(picked[0], picked[-1]) + 1) if len(picked) else (0, 0)
    at = key + size if key < 0 else key
    return at, at + 1


def _local(key: int | slice, low: int) -> int | slice:
    """The same index into what was read from `low` on."""
    if not isinstance(key, slice):
        return 0
    step = 1 if key.step is None else key.step
    return slice(None, None, step)


def _coordinates(geometry: Geometry) -> tuple[dict[str, Any], dict[str, Any]]:
    """Coordinates and attributes that say where a grid is."""
    if isinstance(geometry, VolumeGeometry):
        return {}, {"affine": [list(row) for row in geometry.affine], "space": "RAS", "units": "mm"}
    assert isinstance(geometry, RasterGeometry)
    a, b, c, d, e, f = geometry.transform
    mapping: dict[str, Any] = {"GeoTransform": f"{c!r} {a!r} {b!r} {f!r} {d!r} {e!r}"}
    if geometry.crs is not None:
        mapping["crs_wkt"] = geometry.crs
    coords: dict[str, Any] = {"spatial_ref": ((), 0, mapping)}
    if not geometry.rotated:
        rows, columns = geometry.shape
        coords["y"] = f + e * (np.arange(rows) + 0.5)
        coords["x"] = c + a * (np.arange(columns) + 0.5)
    return coords, {"grid_mapping": "spatial_ref"}


def array_parts(
    array: np.ndarray | xarray.DataArray, volume: bool
) -> tuple[np.ndarray, Geometry, tuple[str, ...], np.ndarray | None]:
    """Values with a leading channel axis, geometry and band names of an array.

    Args:
        array: (y, x), (c, y, x), (z, y, x) or (c, z, y, x); a DataArray says where it is as the module's
            convention has it.
        volume: whether three spatial axes are meant.

    Returns:
        Values (c, *grid), the grid (pixels or voxels of 1 where the array does not say), band names,
        and where there is data: by the coordinate `valid` or the attribute `_FillValue`; None: not said.

    Raises:
        RequestError: the number of axes is another, or coordinates have no constant step.
    """
    ndim = 3 if volume else 2
    values = np.asarray(array)
    if values.ndim not in (ndim, ndim + 1):
        raise RequestError(
            f"array: found {values.ndim} axes, {values.shape}; valid: {ndim}, or {ndim + 1}, channels first"
        )
    bands: tuple[str, ...] = ()
    if values.ndim == ndim:
        values = values[None]
    elif not isinstance(array, np.ndarray) and array.dims[0] in array.coords:
        bands = tuple(str(b) for b in np.asarray(array.coords[array.dims[0]]))
    valid = None
    if not isinstance(array, np.ndarray) and "valid" in array.coords:
        valid = np.asarray(array.coords["valid"])
    elif not isinstance(array, np.ndarray) and "_FillValue" in array.attrs:
        valid = (values != array.attrs["_FillValue"]).any(axis=0)
    return values, _geometry(array, values.shape[1:]), bands, valid


def _geometry(array: Any, shape: tuple[int, ...]) -> Geometry:
    attrs, coords = getattr(array, "attrs", {}), getattr(array, "coords", {})
    if len(shape) == 3:
        return volume_geometry(shape, np.asarray(attrs.get("affine", np.eye(4)), dtype=np.float64))
    mapping = coords["spatial_ref"].attrs if "spatial_ref" in coords else {}
    wkt = mapping.get("crs_wkt") or mapping.get("spatial_ref")
    crs = CRS.from_user_input(wkt).to_wkt() if wkt else None
    if "x" in coords and "y" in coords:
        (c, a), (f, e) = _axis(coords["x"]), _axis(coords["y"])
        return RasterGeometry(shape, (a, 0.0, c - a / 2, 0.0, e, f - e / 2), crs)
    if "GeoTransform" in mapping:
        c, a, b, f, d, e = (float(v) for v in mapping["GeoTransform"].split())
        return RasterGeometry(shape, (a, b, c, d, e, f), crs)
    return RasterGeometry(shape, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), crs)


def _axis(coordinate: Any) -> tuple[float, float]:
    """First centre and step of a coordinate."""
    centres = np.asarray(coordinate, dtype=np.float64)
    if len(centres) < 2:
        return float(centres[0]), 1.0
    steps = np.diff(centres)
    step = (centres[-1] - centres[0]) / (len(centres) - 1)
    if not step or float(np.abs(steps - step).max()) > TOLERANCE * abs(step) * math.sqrt(len(centres)):
        raise RequestError(
            f"array: its coordinate {coordinate.name!r} has no constant step; resample it first"
        )
    return float(centres[0]), float(step)
