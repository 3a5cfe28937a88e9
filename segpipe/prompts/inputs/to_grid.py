"""Take coordinates of the world to positions on a scene's grid: points, and polygons with bent edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import shapely
from pyproj import CRS, Transformer
from pyproj.exceptions import ProjError
from shapely.affinity import translate

from segpipe.errors import SceneError
from segpipe.geometry.geometry import Geometry, RasterGeometry, horizontal_crs
from segpipe.regions.layer import only_polygons
from segpipe.regions.polygons import DENSIFY_TOLERANCE, densified, footprint
from segpipe.sources.base import reason

NEAR_GLOBE = 350.0
"""Degrees of longitude from which a scene holds nearly every meridian, so that none is moved by a turn."""


def world_to_elements(geometry: Geometry, coordinates: np.ndarray) -> np.ndarray:
    """Positions (n, axes) in array order of coordinates (x, y) or RAS (x, y, z); inverse of `to_world`."""
    matrix = geometry.centre_matrix
    offset = np.asarray(coordinates, np.float64) - matrix[:-1, -1]
    return np.asarray(np.linalg.solve(matrix[:-1, :-1], offset.T).T[:, ::-1])


def inside(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which positions (n, axes) lie on an element of a scene of this shape; NaN does not."""
    return np.asarray(((positions >= -0.5) & (positions < np.array(shape) - 0.5)).all(axis=1))


@dataclass(frozen=True)
class ClippedPolygon:
    """A polygon on a scene."""

    polygon: shapely.Geometry
    """The part in the scene, in positions (x along columns, y along rows); empty: it is outside."""
    cut: bool
    """Whether there is a part beyond the scene."""

    @property
    def corners(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """First and opposite corner of the envelope, array order."""
        x0, y0, x1, y1 = self.polygon.bounds
        return (y0, x0), (y1, x1)


class ToGrid:
    """Takes coordinates of one CRS to the positions of one raster."""

    def __init__(self, geometry: RasterGeometry, crs: CRS | None, source: str) -> None:
        """Compare the CRSs.

        Args:
            geometry: of the scene.
            crs: of the coordinates; None: they have none.
            source: where they are from, for messages.

        Raises:
            SceneError: one has a CRS and the other has not; or the scene has no place in the other.
        """
        self.geometry = geometry
        target = None if geometry.projection is None else horizontal_crs(geometry.projection)
        crs = None if crs is None else horizontal_crs(crs)
        if (crs is None) != (target is None):
            have, lack = ("the scene", source) if crs is None else (source, "the scene")
            names = [c.name for c in (crs, target) if c is not None]
            raise SceneError(
                f"{have} has a CRS ({names[0]}) and {lack} has none; valid: both have one, or neither "
                "(GeoJSON is always WGS 84)"
            )
        same = crs is None or crs == target
        try:
            self._transformer = None if same else Transformer.from_crs(crs, target, always_xy=True)
        except ProjError as error:
            raise SceneError(f"{source}: its CRS does not lead to the scene's: {reason(error)}") from error
        self._turn = _turn(geometry, target)
        self._near = self._surroundings(crs) if self._transformer or self._turn else None

    def _surroundings(self, crs: CRS | None) -> shapely.Geometry:
        """The scene and a margin in the given coordinates, where meridians may be told in three ways."""
        near = footprint(self.geometry, self._transformer)
        if self._transformer is None:
            x0, y0, x1, y1 = near.bounds
            near = shapely.box(
                x0 - (x1 - x0) / 20, y0 - (y1 - y0) / 20, x1 + (x1 - x0) / 20, y1 + (y1 - y0) / 20
            )
        if crs is None or not crs.is_geographic:
            return near
        turn = 2 * np.pi / crs.axis_info[0].unit_conversion_factor
        return shapely.union_all([translate(near, way * turn) for way in (-1, 0, 1)])

    def positions(self, coordinates: np.ndarray) -> np.ndarray:
        """Positions (n, 2), array order, of (x, y) or (longitude, latitude); NaN where there is none."""
        xy = np.asarray(coordinates, np.float64).reshape(-1, 2)
        if self._transformer is not None:
            xy = np.column_stack(self._transformer.transform(xy[:, 0], xy[:, 1]))
        found = world_to_elements(self.geometry, np.where(np.isfinite(xy), xy, np.nan))
        if self._turn:
            middle = (self.geometry.shape[1] - 1) / 2
            found[:, 1] += np.rint((middle - found[:, 1]) / self._turn) * self._turn
        return found

    def _to_plane(self, coordinates: np.ndarray) -> np.ndarray:
        """The same as (x, y)."""
        return self.positions(coordinates)[:, ::-1]

    def polygon(self, polygon: shapely.Geometry) -> ClippedPolygon:
        """A polygon's part in the scene; its straight edges in a CRS are curves in another.

        Edges are split until they follow the curve within a thousandth of an element, so that the
        envelope is that of the curve and not of its corners. Far from the scene projections fold over, so
        the polygon is first cut to the scene's surroundings.

        Args:
            polygon: (multi)polygon; repaired where it is invalid.
        """
        whole = only_polygons(shapely.make_valid(shapely.force_2d(polygon)))
        near = whole if self._near is None else only_polygons(shapely.intersection(whole, self._near))
        parts = []
        for part in shapely.get_parts(near):
            if part.is_empty:
                continue
            rings = [self._ring(shapely.get_coordinates(ring)) for ring in (part.exterior, *part.interiors)]
            if all(np.isfinite(ring).all() for ring in rings):
                parts.append(only_polygons(shapely.make_valid(shapely.Polygon(rings[0], rings[1:]))))
        placed = shapely.union_all(parts) if parts else shapely.Polygon()
        rows, columns = self.geometry.shape
        scene = shapely.box(-0.5, -0.5, columns - 0.5, rows - 0.5)
        within = only_polygons(shapely.intersection(placed, scene))
        lost = self._near is not None and not shapely.covers(self._near, whole)
        return ClippedPolygon(within, bool(lost or not shapely.covers(scene, placed)))

    def _ring(self, ring: np.ndarray) -> np.ndarray:
        if self._transformer is None:
            return self._to_plane(ring)
        return densified(ring, self._to_plane, DENSIFY_TOLERANCE)


def _turn(geometry: RasterGeometry, crs: CRS | None) -> float:
    """Columns after which a geographic scene's meridians come again; 0 where that is not looked at.

    A scene over the antimeridian may go from 170 to 190 degrees and a point on it be said at -175.
    """
    if crs is None or not crs.is_geographic or geometry.rotated:
        return 0.0
    per_degree = np.degrees(crs.axis_info[0].unit_conversion_factor)
    width = abs(geometry.transform[0]) * per_degree
    return 0.0 if width * geometry.shape[1] >= NEAR_GLOBE else float(360.0 / width)
