"""Polygons over a raster: taken to pixel space, then covered exactly.

In pixel space x is the column and y the row, in elements, with corners at whole numbers. The
inverse affine takes polygons there, so rotated and south-up rasters need nothing special.

Cover of a grid's cell is the exact area of its intersection with the polygon.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import shapely
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import ProjError

from segpipe.config.job import Regions
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry, horizontal_crs
from segpipe.regions.base import FULL, Cover, RegionSet
from segpipe.regions.layer import Layer, only_polygons, read_layer
from segpipe.sources.base import reason

DENSIFY_TOLERANCE = 1e-3
"""Before a change of CRS edges are split until they follow the line this closely, in pixels."""
PROBE = 0.4
"""Where along an edge the distance is probed; not the middle, where an S-shaped edge has none."""

Projection = Callable[[np.ndarray], np.ndarray]
"""Coordinates (n, 2) of a layer to pixel space (n, 2)."""


class PolygonRegions(RegionSet):
    """Polygons in the pixel space of one raster."""

    def __init__(
        self,
        names: Sequence[str],
        polygons: np.ndarray,
        outside: Sequence[int],
        identity: dict[str, Any],
        notes: Sequence[str] = (),
        damaged: Sequence[str] = (),
    ) -> None:
        self.names = tuple(names)
        self.notes = tuple(notes)
        self.damaged = tuple(damaged)
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
                (int(np.floor(top)), int(np.floor(left))), (int(np.ceil(bottom)), int(np.ceil(right)))
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


def load_polygons(config: Regions, geometry: Geometry) -> PolygonRegions:
    """The polygons of a layer over one raster.

    Raises:
        RequestError: the layer cannot be read or has no such attribute; it has no CRS and the
            scene has one; or the scene is a volume.
        SceneError: the scene has no CRS and the layer has one, or the layer cannot be transformed to
            the scene's CRS.
    """
    if not isinstance(geometry, RasterGeometry):
        raise RequestError(
            f"regions.path: {config.path} is a polygon layer, and the scene is a volume; "
            "give a label atlas (NIfTI), or leave `regions` out for the whole scene"
        )
    return place_layer(read_layer(config), geometry)


def place_layer(layer: Layer, geometry: RasterGeometry, *, drop_missed: bool = False) -> PolygonRegions:
    """A layer in the pixel space of a raster.

    Args:
        layer: in any CRS; None only where the raster has none.
        geometry: of the raster.
        drop_missed: leave out the regions that do not touch the scene, instead of keeping their names.

    Raises:
        RequestError, SceneError: as `load_polygons`.
    """
    scene_crs = None if geometry.projection is None else horizontal_crs(geometry.projection)
    _check_crs(layer, scene_crs)
    same = scene_crs is None or layer.crs is None or layer.crs == scene_crs
    try:
        transformer = None if same else Transformer.from_crs(layer.crs, scene_crs, always_xy=True)
    except ProjError as error:
        raise SceneError(f"{layer.path}: its CRS does not lead to the scene's: {reason(error)}") from error
    windows = footprint(geometry, transformer)
    pixels, outside = _to_pixels(layer, geometry, transformer, windows)
    touched, notes = ~shapely.is_empty(pixels), list(layer.notes)
    if not touched.any():
        notes.append(
            f"{layer.path}: none of its {len(pixels)} regions touches the scene; in the layer's "
            f"coordinates it spans {_spans(layer.polygons)} and the scene {_spans(windows)}"
        )
    kept = np.flatnonzero(touched if drop_missed else ~layer.damaged)
    names = [layer.names[i] for i in kept]
    damaged = [layer.names[i] for i in np.flatnonzero(layer.damaged)]
    identity = {"kind": "polygons", "layer": layer.digest}
    return PolygonRegions(names, pixels[kept], outside[kept].tolist(), identity, notes, damaged)


def _check_crs(layer: Layer, scene_crs: CRS | None) -> None:
    """Either both have a CRS, or neither has."""
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


def _to_pixels(
    layer: Layer, geometry: RasterGeometry, transformer: Transformer | None, windows: shapely.Geometry
) -> tuple[np.ndarray, np.ndarray]:
    """Each polygon in pixel space, empty where it misses the scene, and its cover beyond the scene."""
    pixels = np.full(len(layer.polygons), shapely.Polygon(), dtype=object)
    outside = np.zeros(len(pixels), dtype=np.int64)
    index = np.sort(shapely.STRtree(layer.polygons).query(windows, predicate="intersects"))
    polygons = layer.polygons[index]
    near, to_pixels = polygons.copy(), _projection(geometry, transformer)
    if transformer is None:
        placed = shapely.transform(polygons, to_pixels)
    else:
        cut = ~shapely.within(polygons, windows)
        near[cut] = [only_polygons(part) for part in shapely.intersection(polygons[cut], windows)]
        placed = np.array([_bent(polygon, to_pixels) for polygon in near], dtype=object)
    for i in np.flatnonzero(shapely.is_missing(placed)):
        raise SceneError(
            f"{layer.path}: region {layer.names[index[i]]!r} cannot be transformed from "
            f"{layer.crs.name if layer.crs else 'its coordinates'} to the scene's CRS"
        )
    broken = ~shapely.is_valid(placed)
    placed[broken] = [only_polygons(shapely.make_valid(polygon)) for polygon in placed[broken]]
    rows, columns = geometry.shape
    scene = shapely.box(0, 0, columns, rows)
    inside = shapely.area(placed)
    whole = inside.copy()
    crossing = ~shapely.within(placed, scene)
    inside[crossing] = shapely.area(shapely.intersection(placed[crossing], scene))
    touched = np.rint(inside * FULL) > 0  # less is nothing: grids touch by the last bit of a coordinate
    for i in np.flatnonzero(touched & (near != polygons)):
        whole[i] *= ground_area(polygons[i], layer.crs) / ground_area(near[i], layer.crs)
    pixels[index[touched]] = placed[touched]
    outside[index[touched]] = np.rint(np.maximum(whole - inside, 0) * FULL)[touched]
    return pixels, outside


def ground_area(polygon: shapely.Geometry, crs: CRS | None) -> float:
    """Area to compare two parts of one polygon by: geodesic for a geographic CRS, else planar."""
    if crs is None or not crs.is_geographic:
        return float(polygon.area)
    geod = crs.get_geod() or Geod(ellps="WGS84")
    parts = shapely.get_parts(shapely.orient_polygons(polygon))
    return float(sum(abs(geod.geometry_area_perimeter(part)[0]) for part in parts))


def _projection(geometry: RasterGeometry, transformer: Transformer | None) -> Projection:
    """From the layer's coordinates to the scene's pixel space."""
    inverse = ~geometry.affine
    if transformer is None:
        return lambda xy: np.column_stack(inverse @ xy.T)
    return lambda xy: np.column_stack(inverse @ transformer.transform(*xy.T))


def footprint(geometry: RasterGeometry, transformer: Transformer | None) -> shapely.Geometry:
    """The scene in the layer's coordinates: its outline, or boxes around it in another CRS.

    The boxes are a twentieth larger on each side. A polygon is cut to them before it is
    transformed, because far from its scene a projection folds over or has no values.
    """
    rows, columns = geometry.shape
    corners = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]], dtype=np.float64)
    affine: Any = geometry.affine  # takes arrays too, which its types do not say
    outline = np.column_stack(affine @ corners.T)
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


def _bent(polygon: shapely.Geometry, to_pixels: Projection) -> shapely.Geometry | None:
    """A polygon in pixel space, its straight edges become curves. None: it has no place there."""
    parts = []
    for part in shapely.get_parts(polygon):
        rings = [
            densified(shapely.get_coordinates(ring), to_pixels, DENSIFY_TOLERANCE)
            for ring in (part.exterior, *part.interiors)
        ]
        if not all(np.isfinite(ring).all() for ring in rings):
            return None
        parts.append(shapely.Polygon(rings[0], rings[1:]))
    return shapely.MultiPolygon(parts) if len(parts) != 1 else parts[0]


def densified(ring: np.ndarray, project: Projection, tolerance: float) -> np.ndarray:
    """A ring projected, with vertices added until its edges follow the projected lines.

    An edge gets the same vertices whichever way it runs, so that neighbours keep their common border.

    Args:
        ring: (n, 2), straight edges between its points.
        project: applied to the points and to those added.
        tolerance: greatest distance between a projected edge's probe and the straight line.
    """
    image = project(ring)
    for _ in range(20):
        (low, high), (low_image, high_image) = _one_way(ring, ring), _one_way(ring, image)
        probe = low + PROBE * (high - low)
        probe_image = project(probe)
        far = _distance(probe_image, low_image, high_image) > tolerance
        if not far.any():
            break
        where = np.flatnonzero(far) + 1
        ring = np.insert(ring, where, probe[far], axis=0)
        image = np.insert(image, where, probe_image[far], axis=0)
    return image


def _one_way(ring: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of each edge of a ring, given for the ring or its image: the west one first (then south)."""
    (x0, y0), (x1, y1) = ring[:-1].T, ring[1:].T
    turned = ((x0 > x1) | ((x0 == x1) & (y0 > y1)))[:, np.newaxis]
    return np.where(turned, points[1:], points[:-1]), np.where(turned, points[:-1], points[1:])


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


def unit_cover(polygon: shapely.Geometry, cells: Box) -> np.ndarray:
    """Share of each cell of a box that a polygon in pixel space covers, in 1/65536.

    By the divergence theorem, as font rasterisers do it (FreeType's ``ftgrays.c``): what is covered
    lies to the right of edges that go one way and left of those that go the other. So each edge, cut
    at the grid's lines, adds its rise times the part of the cell to its right; a running sum along the
    row carries whole rises on to the cells behind. Float64 all through; no cell is visited by a loop.

    Args:
        polygon: valid Polygon or MultiPolygon; x is the column and y the row, corners at whole numbers.
        cells: any box (y, x) of the same grid, also one that only meets the polygon, or misses it.

    Returns:
        uint32 (rows, columns).
    """
    rows, columns = cells.shape
    start, end = _edges(polygon, cells)
    start, end = _cut(start, end, (columns, rows))
    middle = (start + end) / 2
    row = np.floor(middle[:, 1]).astype(np.int64)
    here = (row >= 0) & (row < rows)
    row, across, rise = row[here], middle[here, 0], (start - end)[here, 1]
    # Left of the box an edge counts for whole rows; right of it for none: into a column that is dropped.
    column = np.clip(np.floor(across), 0, columns).astype(np.int64)
    right = rise * np.clip(column + 1 - across, 0, 1)
    width = columns + 2
    place = row * width + column
    sums = np.bincount(
        np.concatenate((place, place + 1)),
        weights=np.concatenate((right, rise - right)),
        minlength=rows * width,
    ).reshape(rows, width)
    share = np.cumsum(sums, axis=1, out=sums)[:, :columns]
    return np.clip(np.rint(share * FULL), 0, FULL).astype(np.uint32)


def _edges(polygon: shapely.Geometry, cells: Box) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends (n, 2) of a polygon's edges from the box's first corner, the inside on their left.

    Left as seen with y upwards. Edges that say nothing about the box are left out: above, below or
    right of it, and horizontal ones.
    """
    (y0, x0), (y1, x1) = cells.start, cells.stop
    rings = shapely.get_rings(shapely.get_parts(shapely.orient_polygons(polygon)))
    xy, ring = shapely.get_coordinates(rings, return_index=True)
    one, two = xy[:-1], xy[1:]
    low, high = np.minimum(one[:, 1], two[:, 1]), np.maximum(one[:, 1], two[:, 1])
    use = (ring[:-1] == ring[1:]) & (low < y1) & (high > y0) & (low < high)
    use &= np.minimum(one[:, 0], two[:, 0]) < x1
    return one[use] - (x0, y0), two[use] - (x0, y0)


def _cut(start: np.ndarray, end: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Edges (n, 2) cut wherever they cross a line of a grid of ``size`` (columns, rows)."""
    edge = [np.arange(len(start)), np.arange(len(start))]
    way = [np.zeros(len(start)), np.ones(len(start))]  # along an edge, 0 to 1
    for axis in (0, 1):
        low = np.minimum(start[:, axis], end[:, axis])
        high = np.maximum(start[:, axis], end[:, axis])
        first = np.maximum(np.floor(low) + 1, 0)
        count = np.maximum(np.minimum(np.ceil(high) - 1, size[axis]) - first + 1, 0).astype(np.int64)
        crossed = np.repeat(np.arange(len(start)), count)
        line = first[crossed] + np.arange(len(crossed)) - np.repeat(np.cumsum(count) - count, count)
        edge.append(crossed)
        way.append((line - start[crossed, axis]) / (end - start)[crossed, axis])
    edges, ways = np.concatenate(edge), np.concatenate(way)
    order = np.lexsort((ways, edges))
    edges, ways = edges[order], ways[order, np.newaxis]
    points = start[edges] * (1 - ways) + end[edges] * ways
    same = edges[:-1] == edges[1:]
    return points[:-1][same], points[1:][same]
