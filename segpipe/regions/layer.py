"""Polygon layers as they are in files: geometries, names and CRS, before any scene is seen."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import shapely
from pyproj import CRS

from segpipe.config.job import Regions
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.geometry import horizontal_crs
from segpipe.regions.base import different
from segpipe.sources import vectors
from segpipe.sources.identity import check_unchanged, file_identity, members

PARQUET_SUFFIXES = (".parquet", ".geoparquet")
"""GeoParquet is read by pyarrow: pyogrio's wheels come without GDAL's driver for it."""


@dataclass(frozen=True)
class Layer:
    """Polygons in their own CRS."""

    path: str
    """Where they are from, as the job says it."""
    names: tuple[str, ...]
    """One per polygon, all different."""
    polygons: np.ndarray
    """Valid 2D (multi)polygons, maybe empty ones; object array."""
    crs: CRS | None
    notes: tuple[str, ...]
    digest: str
    """Hash of names, coordinates as they were given, and CRS."""
    damaged: np.ndarray
    """Whether a polygon had vertices that are not finite, and is empty here; bool array."""


def make_layer(
    path: str, names: Sequence[str], polygons: np.ndarray, crs: CRS | None, notes: Iterable[str] = ()
) -> Layer:
    """A layer of polygons that may be invalid: those are repaired, and noted.

    Args:
        path: where they are from.
        names: one per polygon; equal ones are told apart.
        polygons: object array of 2D (multi)polygons.
        crs: of the polygons.
        notes: said before those on repairs.
    """
    polygons, wild = _cleaned(polygons)
    broken = ~shapely.is_valid(polygons)
    valid = np.array(
        [only_polygons(shapely.make_valid(g) if bad else g) for g, bad in zip(polygons, broken, strict=True)],
        dtype=object,
    )
    said = list(notes)
    if broken.any():
        which = ", ".join(names[i] for i in np.flatnonzero(broken)[:5])
        said.append(f"{int(broken.sum())} invalid region polygons were repaired: {which}")
    empty = [n for n, g, bad in zip(names, valid, wild, strict=True) if g.is_empty and not bad]
    if empty:
        said.append(f"{len(empty)} regions have no area: {', '.join(empty[:5])}")
    digest = hashlib.sha256(repr((list(names), None if crs is None else crs.to_wkt())).encode())
    for wkb in shapely.to_wkb(polygons, byte_order=1):
        digest.update(wkb)
    return Layer(path, different(names), valid, crs, tuple(said), digest.hexdigest(), wild)


def _cleaned(polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return polygons that GEOS takes, and which of them had vertices that are not finite.

    GEOS dies of an empty inner ring of a polygon that is not empty, so those rings are dropped; it
    throws at coordinates that are not finite, so such a polygon becomes an empty one.
    """
    polygons = polygons.copy()
    parts, owner = shapely.get_parts(polygons, return_index=True)
    rings, part = shapely.get_rings(parts, return_index=True)
    empty_hole = shapely.is_empty(rings) & ~shapely.is_empty(parts)[part]
    for i in np.unique(owner[part[empty_hole]]):
        kept = [_without_empty_holes(p) for p in shapely.get_parts(polygons[i])]
        polygons[i] = kept[0] if len(kept) == 1 else shapely.MultiPolygon(kept)
    xy, index = shapely.get_coordinates(polygons, return_index=True)
    wild = np.zeros(len(polygons), dtype=bool)
    wild[index[~np.isfinite(xy).all(axis=1)]] = True
    polygons[wild] = shapely.Polygon()
    return polygons, wild


def _without_empty_holes(polygon: shapely.Geometry) -> shapely.Geometry:
    if polygon.geom_type != "Polygon":
        return polygon
    return shapely.Polygon(polygon.exterior, [ring for ring in polygon.interiors if not ring.is_empty])


def only_polygons(geometry: shapely.Geometry) -> shapely.Geometry:
    """The areal part of a geometry: what make_valid and intersection leave beside it is dropped."""
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return geometry
    parts = shapely.get_parts(shapely.get_parts(geometry))
    areal = [part for part in parts if part.geom_type == "Polygon"]
    return shapely.MultiPolygon(areal) if areal else shapely.Polygon()


def read_layer(config: Regions) -> Layer:
    """A polygon layer with its names; read once while its file does not change.

    Raises:
        RequestError: not a vector file, no such layer or attribute, or no polygons in it.
        SceneError: a file changed while it was read.
    """
    files = file_identity(members(Path(config.path)))
    layer = _read_layer(config.path, config.layer or None, config.name or None, repr(files))
    try:
        check_unchanged(files)
    except SceneError:  # what was read may be half of each: it is not kept
        _read_layer.cache_clear()
        raise
    return layer


@lru_cache(maxsize=4)
def _read_layer(path: str, name: str | None, attribute: str | None, _stamp: object) -> Layer:
    is_parquet = path.lower().endswith(PARQUET_SUFFIXES)
    frame = _read_parquet(path, name) if is_parquet else _read_vector(path, name)
    columns = [str(column) for column in frame.columns if column != frame.geometry.name]
    if attribute is not None and attribute not in columns:
        raise RequestError(
            f"regions.name: found {attribute!r}; attributes of {path}: {', '.join(columns) or 'none'}"
        )
    raw = np.asarray(frame.geometry.array, dtype=object)
    raw = np.array([shapely.Polygon() if g is None else shapely.force_2d(g) for g in raw], object)
    if not len(raw) or all(g.is_empty for g in raw):
        raise RequestError(f"regions.path: {path} has no polygons")
    for geometry in raw:
        if shapely.get_dimensions(geometry) not in (-1, 2):
            raise RequestError(f"regions.path: {path} holds a {geometry.geom_type}; polygons are expected")
    names = (
        [str(i + 1) for i in range(len(raw))]
        if attribute is None
        else [_label(v, i) for i, v in enumerate(frame[attribute])]
    )
    crs = None if frame.crs is None else horizontal_crs(CRS.from_user_input(frame.crs))
    layer = make_layer(path, names, raw, crs)
    if layer.damaged.all():
        raise RequestError(f"regions.path: {path}: every polygon has vertices that are not finite")
    return layer


def _read_vector(path: str, name: str | None) -> geopandas.GeoDataFrame:
    """A layer of any format that `segpipe.sources.vectors` reads."""
    try:
        layers = vectors.list_layers(path)
    except SceneError as error:
        raise _unreadable(path, error) from error
    if name is not None and name not in layers:
        raise RequestError(f"regions.layer: found {name!r}; {path} has layers: {', '.join(layers) or 'none'}")
    if name is None and len(layers) != 1:
        raise RequestError(f"regions.layer: missing; {path} has layers: {', '.join(layers) or 'none'}")
    try:
        return vectors.read_layer(path, name or layers[0])
    except SceneError as error:
        raise _unreadable(path, error) from error


def _read_parquet(path: str, name: str | None) -> geopandas.GeoDataFrame:
    """GeoParquet; edges must be straight, as in every other format here."""
    if name is not None:
        raise RequestError(f"regions.layer: found {name!r}; {path} is GeoParquet and has no layers")
    try:
        return vectors.read_layer(path, None)
    except SceneError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: Exception) -> RequestError:
    return RequestError(
        f"regions.path: {path} cannot be read ({' '.join(str(error).split())}); give a vector layer "
        "(GeoPackage, GeoJSON, Shapefile, GeoParquet, …), a label atlas (NIfTI, GeoTIFF), "
        "grid:SIZE or h3:RESOLUTION"
    )


def _label(value: Any, index: int) -> str:
    """The name of a polygon: its attribute as text, or its place where that is empty."""
    if value is None or value != value or value == "":  # NaN differs from itself
        return str(index + 1)
    if isinstance(value, float) and value.is_integer():  # GDAL makes whole numbers with gaps float
        return str(int(value))
    return str(value)
