"""Grids as regions: ``grid:1000`` (squares in the scene's CRS) and ``h3:7`` (H3 cells).

A grid becomes a layer of polygons, so its cells are covered and measured as any others are.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from types import ModuleType

import numpy as np
import shapely
from pyproj import CRS, Transformer

from segpipe.config.job import Regions
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.geometry import Geometry, RasterGeometry, horizontal_crs
from segpipe.process.extras import require
from segpipe.regions.base import GRID, H3
from segpipe.regions.layer import Layer, make_layer, only_polygons
from segpipe.regions.polygons import PolygonRegions, footprint, place_layer

FINEST_H3 = 15
MOST_CELLS = 100_000
"""Over one scene; a finer grid is refused."""
WIDEST_DEGREES = 90
"""A square of as many degrees is meant in metres."""
ARC = np.radians(0.01)
"""H3 cells have great circles for edges: they are split into arcs of at most this, in radians."""


@dataclass(frozen=True)
class Grid:
    """A grid as a job asks for it."""

    kind: str
    """`GRID` or `H3`."""
    size: Decimal
    """Edge of a square, in units of the scene's CRS (without one: of its affine); or H3's resolution."""

    @property
    def text(self) -> str:
        """As in the job: ``grid:1000``."""
        return f"{self.kind}:{plain(self.size)}"


def parse_grid(config: Regions) -> Grid:
    """The grid that `regions.path` names.

    Raises:
        RequestError: no such grid; or `regions.name` or `regions.layer` is set.
    """
    kind, _, text = config.path.partition(":")
    for field in ("name", "layer"):
        if value := getattr(config, field):
            raise RequestError(
                f"regions.{field}: found {value!r}; {config.path} names its own cells: leave it out"
            )
    try:
        size = Decimal(text.strip()).normalize()
    except InvalidOperation:  # signalling NaNs too
        size = Decimal("NaN")
    if kind == H3:
        if size not in range(FINEST_H3 + 1):
            raise RequestError(
                f"regions.path: found {config.path!r}; valid: h3:RESOLUTION, 0 (4 million km²) "
                f"to {FINEST_H3} (1 m²), such as h3:7"
            )
        _h3()
    elif not 0 < float(size) < np.inf:
        raise RequestError(
            f"regions.path: found {config.path!r}; valid: grid:SIZE, above 0 and in units of the "
            "scenes' CRS, such as grid:1000 for a kilometre where the unit is metres"
        )
    return Grid(kind, size)


def load_grid(config: Regions, geometry: Geometry) -> PolygonRegions:
    """The cells of a grid that meet one raster.

    Raises:
        RequestError: no such grid, or the scene is a volume.
        SceneError: the grid has too many cells over the scene; or an H3 grid and the scene has no CRS.
    """
    grid = parse_grid(config)
    if not isinstance(geometry, RasterGeometry):
        raise RequestError(
            f"regions.path: {config.path} is a grid on the ground, and the scene is a volume; "
            "give a label atlas (NIfTI), or leave `regions` out for the whole scene"
        )
    return place_layer(grid_layer(grid, geometry), geometry, drop_missed=True)


def grid_layer(grid: Grid, geometry: RasterGeometry) -> Layer:
    """The cells that may meet a raster, as polygons.

    Raises:
        SceneError: as `load_grid`.
    """
    return _squares(grid, geometry) if grid.kind == GRID else _hexagons(grid, geometry)


def _squares(grid: Grid, geometry: RasterGeometry) -> Layer:
    """Squares whose corners are multiples of the size in the scene's CRS, by row from the south-west.

    So the cells of scenes in one CRS coincide, and are named by their corner: ``E500000N4100000``.
    """
    crs = None if geometry.projection is None else horizontal_crs(geometry.projection)
    scene = footprint(geometry, None)
    edge = float(grid.size)
    if crs is not None and not crs.is_projected and edge >= WIDEST_DEGREES:
        raise SceneError(
            f"regions.path: {grid.text} is in the units of {crs.name}, the scene's CRS: "
            f"{crs.axis_info[0].unit_name}; "
            "valid: such as grid:0.01; for metres, warp the scene to a projected CRS"
        )
    west, south, east, north = (float(v) / edge for v in scene.bounds)
    first = int(np.floor(west)), int(np.floor(south))
    stop = int(np.ceil(east)), int(np.ceil(north))
    _check_count(grid, (stop[0] - first[0]) * (stop[1] - first[1]))
    row, column = (axis.ravel() for axis in np.mgrid[first[1] : stop[1], first[0] : stop[0]])
    cells = shapely.box(column * edge, row * edge, (column + 1) * edge, (row + 1) * edge)
    shapely.prepare(scene)
    met = np.flatnonzero(shapely.relate_pattern(cells, scene, "T********"))
    names = [_signed(int(column[i]) * grid.size, "EW") + _signed(int(row[i]) * grid.size, "NS") for i in met]
    unit = "in the scene's own coordinates" if crs is None else f"{crs.axis_info[0].unit_name} of {crs.name}"
    note = f"regions: square cells of {plain(grid.size)} {unit}, named by their south-west corner"
    return make_layer(grid.text, names, cells[met], crs, [note])


def _hexagons(grid: Grid, geometry: RasterGeometry) -> Layer:
    """H3 cells that may meet the scene, in longitude and latitude: found from its middle outwards."""
    if geometry.projection is None:
        raise SceneError(
            f"{grid.text}: H3 cells have a place on the Earth, and the scene has no CRS; valid: grid:SIZE"
        )
    h3, lonlat = _h3(), CRS("EPSG:4326")
    crs = horizontal_crs(geometry.projection)
    transformer = Transformer.from_crs(lonlat, crs, always_xy=True)
    windows = footprint(geometry, None if crs == lonlat else transformer)
    rows, columns = geometry.shape
    x, y = geometry.affine @ (columns / 2, rows / 2)
    longitude, latitude = transformer.transform(x, y, direction="INVERSE")
    if not np.isfinite([longitude, latitude]).all():
        raise SceneError(f"{grid.text}: the middle of the scene has no longitude and latitude")
    centre = (windows.bounds[0] + windows.bounds[2]) / 2
    front = {h3.latlng_to_cell(latitude, longitude, int(grid.size))}
    seen: set[str] = set(front)
    found: dict[str, shapely.Geometry] = {}
    while front:
        cells = sorted(front)
        polygons = [_hexagon(h3, cell, centre) for cell in cells]
        met = shapely.intersects(polygons, windows)
        new = {cell: polygon for cell, polygon, hit in zip(cells, polygons, met, strict=True) if hit}
        found.update(new)
        _check_count(grid, len(found))
        front = {other for cell in new for other in h3.grid_disk(cell, 1)} - seen
        seen |= front
    names = sorted(found)
    note = f"regions: H3 cells of resolution {plain(grid.size)}"
    return make_layer(grid.text, names, np.array([found[n] for n in names], dtype=object), lonlat, [note])


def _hexagon(h3: ModuleType, cell: str, centre: float) -> shapely.Geometry:
    """An H3 cell in degrees of longitude and latitude, with longitudes within 180° of a centre.

    It is cut where it crosses that meridian; a cell around a pole goes up to it.
    """
    lat, lon = np.radians(np.array(h3.cell_to_boundary(cell))).T
    corners = np.column_stack((np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)))
    points = great_circles(np.vstack((corners, corners[:1])))
    longitude = np.degrees(np.unwrap(np.arctan2(points[:, 1], points[:, 0])))
    latitude = np.degrees(np.arcsin(np.clip(points[:, 2], -1, 1)))
    if abs(longitude[-1] - longitude[0]) > 180:
        longitude = np.append(longitude, longitude[[-1, 0]])
        latitude = np.append(latitude, np.copysign([90.0, 90.0], latitude[0]))
    else:  # the last point is the first, but for rounding: the polygon closes itself
        longitude, latitude = longitude[:-1], latitude[:-1]
    longitude += 360 * np.round((centre - longitude.mean()) / 360)
    if np.abs(longitude - centre).max() <= 180:
        return shapely.Polygon(np.column_stack((longitude, latitude)))
    frame = shapely.box(centre - 180, -90, centre + 180, 90)
    turns = [shapely.Polygon(np.column_stack((longitude + turn, latitude))) for turn in (-360, 0, 360)]
    return only_polygons(shapely.union_all(shapely.intersection(turns, frame)))


def great_circles(points: np.ndarray) -> np.ndarray:
    """Unit vectors (n, 3) with others put between them along great circles, no further than `ARC` apart."""
    one, two = points[:-1], points[1:]
    length = 2 * np.arcsin(np.clip(np.linalg.norm(two - one, axis=1) / 2, 0, 1))
    count = np.maximum(np.ceil(length / ARC), 1).astype(np.int64)
    edge = np.repeat(np.arange(len(one)), count)
    way = (np.arange(len(edge)) - np.repeat(np.cumsum(count) - count, count)) / count[edge]
    line = one[edge] * (1 - way)[:, np.newaxis] + two[edge] * way[:, np.newaxis]
    return np.vstack((line / np.linalg.norm(line, axis=1, keepdims=True), points[-1:]))


def _h3() -> ModuleType:
    """The library, which only H3 grids need."""
    return require("h3", "regions.path: h3:RESOLUTION")


def _check_count(grid: Grid, count: int) -> None:
    if count > MOST_CELLS:
        coarser = "a larger SIZE" if grid.kind == GRID else "a lower RESOLUTION"
        raise SceneError(
            f"regions.path: {grid.text} makes {count} cells or more over this scene; "
            f"at most {MOST_CELLS}: give {coarser}"
        )


def _signed(value: Decimal, letters: str) -> str:
    """A coordinate as ``E500`` or ``W0.5``."""
    return f"{letters[value < 0]}{plain(abs(value))}"


def plain(value: Decimal) -> str:
    """A number in full and without needless zeros: 1000, not 1E+3; 0.5, not 0.50."""
    text = f"{value:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
