"""Polygons over a raster: taken to pixel space, then covered exactly.

In pixel space x is the column and y the row, in elements, with corners at whole numbers. The
inverse affine takes polygons there, so rotated and south-up rasters need nothing special.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyogrio
import shapely
from exactextract import exact_extract
from exactextract.feature import JSONFeatureSource
from exactextract.raster import NumPyRasterSource
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import ProjError

from segpipe.boxes import Box
from segpipe.config import Regions
from segpipe.errors import RequestError, SceneError
from segpipe.geometry import Geometry, RasterGeometry, horizontal_crs
from segpipe.regions.base import FULL, Cover, RegionSet, different

DENSIFY_TOLERANCE = 1e-3
"""Before a change of CRS edges are split until they follow the line this closely, in pixels."""
PROBE = 0.4
"""Where along an edge the distance is probed; not the middle, where an S-shaped edge has none."""

Projection = Callable[[np.ndarray], np.ndarray]
"""Coordinates (n, 2) of a layer to pixel space (n, 2)."""


@dataclass(frozen=True)
class Layer:
    """A vector layer as read: polygons in its own CRS."""

    path: str
    names: tuple[str, ...]
    polygons: np.ndarray
    """Valid 2D (multi)polygons, maybe empty ones; object array."""
    crs: CRS | None
    notes: tuple[str, ...]
    digest: str
    """Hash of names, coordinates as in the file and CRS."""


class PolygonRegions(RegionSet):
    """Polygons in the pixel space of one raster."""

    def __init__(
        self,
        names: Sequence[str],
        polygons: np.ndarray,
        outside: Sequence[int],
        identity: dict[str, Any],
        notes: Sequence[str] = (),
    ) -> None:
        self.names = tuple(names)
        self.notes = tuple(notes)
        self._polygons = polygons
        self._outside = tuple(outside)
        self._identity = identity
        self._tree = shapely.STRtree(polygons)
        shapely.prepare(polygons)

    def cover(self, tile: Box) -> Iterator[Cover]:
        """Exact cover of edge elements; polygons that hold the tile are not cut."""
        (y0, x0), (y1, x1) = tile.start, tile.stop
        frame = shapely.box(x0, y0, x1, y1)
        for region in np.sort(self._tree.query(frame, predicate="intersects")):
            polygon = self._polygons[region]
            if shapely.covers(polygon, frame):
                yield Cover(int(region), tile, None)
                continue
            left, top, right, bottom = polygon.bounds
            cells = Box(
                (int(np.floor(top)), int(np.floor(left))),
                (int(np.ceil(bottom)), int(np.ceil(right))),
            ).intersect(tile)
            fraction = unit_cover(polygon, cells)
            if fraction.any():
                yield Cover(int(region), cells, fraction)

    def outside(self, region: int) -> int:
        """Area beyond the scene, in its elements."""
        return self._outside[region]

    def identity(self) -> dict[str, Any]:
        """Hash of names, coordinates and CRS: the same for a copy of the file."""
        return self._identity


def unit_cover(polygon: shapely.Geometry, cells: Box) -> np.ndarray:
    """Share of each cell of a box that a polygon in pixel space covers, in 1/65536.

    exactextract answers 0 for a grid whose rows run downwards, without an error: it is given a
    grid whose rows run upwards, and the polygon mirrored with it.
    """
    fraction = np.zeros(cells.shape, dtype=np.uint32)
    if not cells.size:
        return fraction
    (y0, x0), (y1, x1) = cells.start, cells.stop
    frame = shapely.box(x0, y0, x1, y1)
    if not shapely.within(polygon, frame):
        polygon = only_polygons(shapely.intersection(polygon, frame))
    if polygon.is_empty:
        return fraction
    local = shapely.transform(polygon, lambda xy: np.column_stack((xy[:, 0] - x0, y1 - xy[:, 1])))
    ones = np.broadcast_to(np.uint8(1), cells.shape)
    grid = NumPyRasterSource(ones, 0, 0, x1 - x0, y1 - y0)
    feature = {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(local),
        "properties": {},
    }
    (result,) = exact_extract(grid, JSONFeatureSource([feature]), ["cell_id", "coverage"])
    found = result["properties"]
    fixed = np.rint(np.asarray(found["coverage"], dtype=np.float64) * FULL)
    fraction.reshape(-1)[np.asarray(found["cell_id"], dtype=np.int64)] = fixed.astype(np.uint32)
    return fraction


def load_polygons(config: Regions, geometry: Geometry) -> PolygonRegions:
    """The polygons of a layer over one raster.

    Raises:
        RequestError: the layer cannot be read or has no such attribute; it has no CRS and the
            scene has one; or the scene is a volume.
        SceneError: the scene has no CRS and the layer has one; no polygon touches the scene; or
            the layer cannot be transformed to the scene's CRS.
    """
    if not isinstance(geometry, RasterGeometry):
        raise RequestError(
            f"regions.path: {config.path} is a polygon layer, and the scene is a volume; "
            "give a label atlas (NIfTI), or leave `regions` out for the whole scene"
        )
    layer = read_layer(config)
    scene_crs = None if geometry.projection is None else horizontal_crs(geometry.projection)
    if layer.crs is None and scene_crs is not None:
        raise RequestError(
            f"regions.path: {layer.path} has no CRS and the scenes have one "
            f"({scene_crs.name}); assign the layer's CRS in its file"
        )
    if layer.crs is not None and scene_crs is None:
        raise SceneError(
            f"{layer.path} has a CRS ({layer.crs.name}) and the scene has none, so they cannot "
            "be laid over each other; use a layer without CRS in the scene's own coordinates "
            "(GeoPackage or Shapefile: GeoJSON is always WGS 84)"
        )
    same = scene_crs is None or layer.crs is None or layer.crs == scene_crs
    transformer = None if same else Transformer.from_crs(layer.crs, scene_crs, always_xy=True)
    to_pixels = _projection(geometry, transformer)
    windows = _footprint(geometry, transformer)
    touching = set(shapely.STRtree(layer.polygons).query(windows, predicate="intersects"))
    rows, columns = geometry.shape
    scene_box = shapely.box(0, 0, columns, rows)
    pixels = np.full(len(layer.polygons), shapely.Polygon(), dtype=object)
    outside = [0] * len(pixels)
    for index in sorted(touching):
        polygon = layer.polygons[index]
        near = polygon
        if transformer is not None and not shapely.within(polygon, windows):
            near = only_polygons(shapely.intersection(polygon, windows))
        placed = _placed(near, to_pixels, bent=transformer is not None)
        if placed is None:
            raise SceneError(
                f"{layer.path}: region {layer.names[index]!r} cannot be transformed from "
                f"{layer.crs.name if layer.crs else 'its coordinates'} to the scene's CRS"
            )
        inside = shapely.intersection(placed, scene_box).area
        if inside > 0:
            pixels[index] = placed
            whole = placed.area
            if near is not polygon:
                whole *= ground_area(polygon, layer.crs) / ground_area(near, layer.crs)
            outside[index] = max(0, round((whole - inside) * FULL)) if whole > inside else 0
            if shapely.within(placed, scene_box):
                outside[index] = 0
    missed = int(sum(polygon.is_empty for polygon in pixels))
    if missed == len(pixels):
        raise SceneError(
            f"{layer.path}: none of its {missed} regions touches the scene; in the layer's "
            f"coordinates it spans {_spans(layer.polygons)} and the scene {_spans(windows)}"
        )
    identity = {"kind": "polygons", "layer": layer.digest}
    return PolygonRegions(layer.names, pixels, outside, identity, layer.notes)


def read_layer(config: Regions) -> Layer:
    """A polygon layer with its names; read once while its file does not change.

    Raises:
        RequestError: not a vector file, no such layer or attribute, or no polygons in it.
    """
    path = Path(config.path)
    files = [path, *(path.with_suffix(s) for s in (".dbf", ".prj", ".shx"))]
    stamp = tuple((f.stat().st_mtime_ns, f.stat().st_size) for f in files if f.is_file())
    return _read_layer(config.path, config.layer or None, config.name or None, stamp)


@lru_cache(maxsize=4)
def _read_layer(path: str, name: str | None, attribute: str | None, _stamp: object) -> Layer:
    try:
        layers = [str(row[0]) for row in pyogrio.list_layers(path) if row[1] is not None]
    except pyogrio.errors.DataSourceError as error:
        raise RequestError(
            f"regions.path: {path} cannot be read ({' '.join(str(error).split())}); give a vector "
            "layer (GeoPackage, GeoJSON, Shapefile, …) or a label atlas (NIfTI, GeoTIFF)"
        ) from error
    if name is not None and name not in layers:
        raise RequestError(f"regions.layer: found {name!r}; {path} has layers: {', '.join(layers) or 'none'}")
    if name is None and len(layers) != 1:
        raise RequestError(f"regions.layer: missing; {path} has layers: {', '.join(layers) or 'none'}")
    frame = geopandas.read_file(path, layer=name or layers[0], engine="pyogrio")
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
    broken = ~shapely.is_valid(raw)
    polygons = np.array(
        [only_polygons(shapely.make_valid(g) if bad else g) for g, bad in zip(raw, broken, strict=True)],
        dtype=object,
    )
    notes = []
    if broken.any():
        which = ", ".join(names[i] for i in np.flatnonzero(broken)[:5])
        notes.append(f"{int(broken.sum())} invalid region polygons were repaired: {which}")
    empty = [n for n, g in zip(names, polygons, strict=True) if g.is_empty]
    if empty:
        notes.append(f"{len(empty)} regions have no area: {', '.join(empty[:5])}")
    digest = hashlib.sha256(repr((names, None if crs is None else crs.to_wkt())).encode())
    for wkb in shapely.to_wkb(raw, byte_order=1):
        digest.update(wkb)
    return Layer(path, different(names), polygons, crs, tuple(notes), digest.hexdigest())


def _label(value: Any, index: int) -> str:
    """The name of a polygon: its attribute as text, or its place where that is empty."""
    if value is None or value != value or value == "":  # NaN differs from itself
        return str(index + 1)
    if isinstance(value, float) and value.is_integer():  # GDAL makes whole numbers with gaps float
        return str(int(value))
    return str(value)


def only_polygons(geometry: shapely.Geometry) -> shapely.Geometry:
    """The areal part of a geometry: what make_valid and intersection leave beside it is dropped."""
    if geometry.geom_type in ("Polygon", "MultiPolygon"):
        return geometry
    parts = shapely.get_parts(shapely.get_parts(geometry))
    areal = [part for part in parts if part.geom_type == "Polygon"]
    return shapely.MultiPolygon(areal) if areal else shapely.Polygon()


def ground_area(polygon: shapely.Geometry, crs: CRS | None) -> float:
    """Area to compare two parts of one polygon by: geodesic for a geographic CRS, else planar."""
    if crs is None or not crs.is_geographic:
        return float(polygon.area)
    geod = crs.get_geod() or Geod(ellps="WGS84")
    parts = shapely.get_parts(shapely.orient_polygons(polygon))
    return float(sum(abs(geod.geometry_area_perimeter(part)[0]) for part in parts))


def _apply(affine: Any, xy: np.ndarray) -> np.ndarray:
    x, y = xy[:, 0], xy[:, 1]
    a, b, c, d, e, f = affine[:6]
    return np.column_stack((a * x + b * y + c, d * x + e * y + f))


def _projection(geometry: RasterGeometry, transformer: Transformer | None) -> Projection:
    """From the layer's coordinates to the scene's pixel space."""
    inverse = ~geometry.affine
    if transformer is None:
        return lambda xy: _apply(inverse, xy)

    def project(xy: np.ndarray) -> np.ndarray:
        x, y = transformer.transform(xy[:, 0], xy[:, 1])
        return _apply(inverse, np.column_stack((x, y)))

    return project


def _footprint(geometry: RasterGeometry, transformer: Transformer | None) -> shapely.Geometry:
    """The scene in the layer's coordinates: its outline, or boxes around it in another CRS.

    The boxes are a twentieth larger on each side. A polygon is cut to them before it is
    transformed, because far from its scene a projection folds over or has no values.
    """
    rows, columns = geometry.shape
    corners = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]], dtype=np.float64)
    outline = _apply(geometry.affine, corners)
    if transformer is None:
        return shapely.Polygon(outline)
    (left, bottom), (right, top) = outline.min(axis=0), outline.max(axis=0)
    try:
        west, south, east, north = transformer.transform_bounds(
            left, bottom, right, top, densify_pts=99, direction="INVERSE"
        )
    except ProjError as error:
        raise SceneError(
            f"the scene's bounds cannot be transformed to the region layer's CRS ({error})"
        ) from error
    if not np.isfinite([west, south, east, north]).all():
        raise SceneError("the scene's bounds have no place in the region layer's CRS")
    x_margin = 0.05 * ((east - west) % 360 if west > east else east - west)
    y_margin = 0.05 * (north - south)
    south, north = south - y_margin, north + y_margin
    if west > east:  # over the antimeridian: one box on either side
        return shapely.MultiPolygon(
            [
                shapely.box(west - x_margin, south, 180, north),
                shapely.box(-180, south, east + x_margin, north),
            ]
        )
    return shapely.box(west - x_margin, south, east + x_margin, north)


def _placed(polygon: shapely.Geometry, to_pixels: Projection, *, bent: bool) -> shapely.Geometry | None:
    """A polygon in pixel space; ``bent``: straight edges may become curves. None: no values."""
    parts = []
    for part in shapely.get_parts(polygon):
        rings = [
            densified(shapely.get_coordinates(ring), to_pixels, DENSIFY_TOLERANCE)
            if bent
            else to_pixels(shapely.get_coordinates(ring))
            for ring in (part.exterior, *part.interiors)
        ]
        if not all(np.isfinite(ring).all() for ring in rings):
            return None
        parts.append(shapely.Polygon(rings[0], rings[1:]))
    placed = shapely.MultiPolygon(parts) if len(parts) != 1 else parts[0]
    return placed if shapely.is_valid(placed) else only_polygons(shapely.make_valid(placed))


def densified(ring: np.ndarray, project: Projection, tolerance: float) -> np.ndarray:
    """A ring projected, with vertices added until its edges follow the projected lines.

    Args:
        ring: (n, 2), straight edges between its points.
        project: applied to the points and to those added.
        tolerance: greatest distance between a projected edge's probe and the straight line.
    """
    image = project(ring)
    for _ in range(20):
        probe = ring[:-1] + PROBE * (ring[1:] - ring[:-1])
        probe_image = project(probe)
        far = _distance(probe_image, image[:-1], image[1:]) > tolerance
        if not far.any():
            break
        where = np.flatnonzero(far) + 1
        ring = np.insert(ring, where, probe[far], axis=0)
        image = np.insert(image, where, probe_image[far], axis=0)
    return image


def _distance(point: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """From points to the lines a–b, all (n, 2); to a where both ends are the same."""
    line, arm = b - a, point - a
    length = np.hypot(line[:, 0], line[:, 1])
    across = np.abs(line[:, 0] * arm[:, 1] - line[:, 1] * arm[:, 0])
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(length > 0, across / length, np.hypot(arm[:, 0], arm[:, 1])))


def _spans(geometries: Any) -> str:
    west, south, east, north = shapely.total_bounds(geometries)
    return f"x {west:.6g} to {east:.6g}, y {south:.6g} to {north:.6g}"
