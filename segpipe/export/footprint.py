"""Where a raster lies on the Earth, as GeoJSON wants it: WGS 84, straight edges, cut at the antimeridian."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import shapely
from pyproj import Transformer
from pyproj.exceptions import ProjError

from segpipe.errors import SceneError
from segpipe.geometry.areas import horizontal_crs
from segpipe.geometry.geometry import RasterGeometry

PIECES = 64
"""Of each edge: its curve in degrees is followed by so many straight lines."""
SLACK = 1e-7
"""Degrees, a centimetre: vertices that move the outline by less are left out."""
WORLD = shapely.box(-180.0, -90.0, 180.0, 90.0)


def outline(geometry: RasterGeometry) -> tuple[dict[str, Any], list[float]]:
    """The raster's outline as a GeoJSON geometry, and its bounds (west, south, east, north) in degrees.

    Over the antimeridian it is a MultiPolygon of two parts, and west is greater than east (RFC 7946, 3.1.9
    and 5.2). Around a pole it reaches up to it.

    Raises:
        SceneError: the raster has no CRS, or none that can be brought to WGS 84.
    """
    ring = _ring(geometry)
    turn = ring[-1, 0] - ring[0, 0]
    if abs(turn) > 180:  # once around a pole
        pole = np.copysign(90.0, ring[:, 1].mean())
        ring = np.vstack([ring, [ring[-1, 0], pole], [ring[0, 0], pole]])
    whole = shapely.make_valid(shapely.simplify(shapely.Polygon(ring), SLACK))
    parts = []
    for turns in range(-2, 3):
        shifted = shapely.transform(whole, lambda xy, by=360.0 * turns: xy + np.array([by, 0.0]))
        inside = shapely.intersection(shifted, WORLD)
        parts += [p for p in shapely.get_parts(inside) if p.geom_type == "Polygon" and p.area > 0]
    parts = [shapely.orient_polygons(part) for part in parts]
    shape = parts[0] if len(parts) == 1 else shapely.MultiPolygon(parts)
    return dict(shapely.geometry.mapping(shape)), _bounds(ring, abs(turn) > 180)


def why_no_place(geometry: RasterGeometry) -> str:
    """Why a raster has no outline on the Earth; empty: it has one."""
    try:
        _ring(geometry)
    except SceneError as error:
        return str(error)
    return ""


def _bounds(ring: np.ndarray, around: bool) -> list[float]:
    """Of a ring whose longitudes go on beyond ±180."""
    (west, south), (east, north) = ring.min(axis=0), ring.max(axis=0)
    if around or east - west >= 360:
        return [-180.0, float(south), 180.0, float(north)]
    middle = (west + east) / 2
    turns = 360.0 * np.round(middle / 360.0)
    west, east = west - turns, east - turns
    west, east = (west + 360 if west < -180 else west), (east - 360 if east > 180 else east)
    return [float(west), float(south), float(east), float(north)]


def _ring(geometry: RasterGeometry) -> np.ndarray:
    """The closed outline (n, 2) as longitude and latitude, longitudes without a jump at ±180."""
    crs = geometry.projection
    if crs is None:
        raise SceneError("it has no CRS")
    rows, columns = geometry.shape
    corners = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows], [0, 0]], dtype=np.float64)
    share = np.arange(PIECES)[:, np.newaxis] / PIECES
    edges = [a + share * (b - a) for a, b in pairwise(corners)]
    pixels = np.vstack([*edges, corners[-1:]])
    a, b, c, d, e, f = geometry.transform
    x, y = pixels @ [a, b] + c, pixels @ [d, e] + f
    flat = horizontal_crs(crs)
    if flat.is_geographic:
        quarter = np.pi / 2 / flat.axis_info[0].unit_conversion_factor
        y = np.clip(y, -quarter, quarter)  # cells around a pole reach over it
    try:
        project = Transformer.from_crs(crs, "OGC:CRS84", always_xy=True)
        longitudes, latitudes = project.transform(x, y)
    except ProjError as error:
        raise SceneError(f"its CRS {crs.name!r} cannot be brought to WGS 84 ({error})") from error
    if not (np.isfinite(longitudes).all() and np.isfinite(latitudes).all()):
        raise SceneError(f"its outline has no place in WGS 84 (CRS {crs.name!r})")
    return np.column_stack([np.unwrap(longitudes, period=360.0), latitudes])
