"""Read prompts that people drew from files: vector layers (GeoJSON, GeoPackage, …) and CSV.

The names of a CSV's columns say what its coordinates are:

| columns | are |
|---|---|
| ``x``, ``y`` | coordinates of a raster, in the CRS that a column ``crs`` or the request names |
| ``lon``, ``lat`` | degrees on WGS 84 |
| ``i``, ``j``, ``k`` | voxels of a volume as its file counts them, from 0, whole numbers at centres |
| ``x_ras``, ``y_ras``, ``z_ras`` or ``r``, ``a``, ``s`` | mm toward right, front, head (NIfTI) |
| ``x_lps``, ``y_lps``, ``z_lps`` or ``l``, ``p``, ``s`` | mm toward left, back, head (DICOM) |

A row is a point, or a box if it has ``<axis>_min`` and ``<axis>_max``; both may be in one file. A box of a
volume may have one plain axis, which is its slice: ``i_min,i_max,j_min,j_max,k``.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import geopandas
import numpy as np
import shapely
from pyproj import CRS
from pyproj.exceptions import CRSError

from segpipe.config.cells import CSV_ERRORS, plain_cell
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.geometry import Geometry, RasterGeometry
from segpipe.prompts.inputs.rows import Attributes, Collector, FileAccount, read_attributes
from segpipe.prompts.inputs.to_grid import ToGrid, world_to_elements
from segpipe.prompts.prompt_set import PromptSet
from segpipe.sources import vectors

Use = Literal["box", "outline"]
"""What a polygon is: a box around an object (its envelope), or also its coarse mask."""


WGS84 = "OGC:CRS84"
SLICE_TOLERANCE = 1e-6
"""In voxels: what rounding leaves of the thickness of a slice that is given in millimetres."""


@dataclass(frozen=True)
class CoordinateSystem:
    """What three or two columns mean."""

    axes: tuple[str, ...]
    kind: str
    """Of the scenes that it is for."""
    signs: tuple[int, int, int] | None = None
    """From its millimetres to RAS; None: no millimetres."""


SYSTEMS = (
    CoordinateSystem(("x", "y"), "raster"),
    CoordinateSystem(("lon", "lat"), "raster"),
    CoordinateSystem(("i", "j", "k"), "volume"),
    CoordinateSystem(("x_ras", "y_ras", "z_ras"), "volume", (1, 1, 1)),
    CoordinateSystem(("r", "a", "s"), "volume", (1, 1, 1)),
    CoordinateSystem(("x_lps", "y_lps", "z_lps"), "volume", (-1, -1, 1)),
    CoordinateSystem(("l", "p", "s"), "volume", (-1, -1, 1)),
)
"""In every one the first axis is the array's last."""


def read_prompts(
    path: str | Path, geometry: Geometry, *, crs: str = "", layer: str = "", polygons: Use = "box"
) -> tuple[PromptSet, FileAccount]:
    """The prompts of a file on one scene, and what became of each of its features or rows.

    Columns or properties ``object``, ``label`` and ``phrase``: `segpipe.prompts.inputs.rows.read_attributes`.

    Args:
        path: ``.csv`` (see the module), or any vector layer of points and polygons.
            GeoJSON is longitude and latitude on WGS 84 (RFC 7946), unless it has a ``crs`` member as
            of 2008. A feature of several points has them all in one object.
        geometry: of the scene.
        crs: of a CSV's x and y, as pyproj takes it (``EPSG:32617``); ``scene``: the scene's.
        layer: of a file with several.
        polygons: what they are.

    Raises:
        RequestError: the file cannot be read, has something else in it, or is no file for such a scene.
        SceneError: either the scene or the file has a CRS, and the other none.
    """
    source = Path(path).name
    if not Path(path).is_file():
        raise RequestError(f"prompts.path: {path} does not exist; give GeoJSON, GeoPackage or CSV")
    if Path(path).suffix.lower() == ".csv":
        if layer:
            raise RequestError(f"prompts.layer: found {layer!r}; {source} is CSV and has no layers")
        return _read_csv(Path(path), geometry, crs, outlines=polygons == "outline")
    if crs:
        raise RequestError(f"prompts.crs: found {crs!r}; {source} states its own CRS, a CSV does not")
    if not isinstance(geometry, RasterGeometry):
        raise RequestError(
            f"prompts.path: {source} is a map layer, and the scene is a volume; give a CSV with columns "
            "i,j,k (voxels) or x_ras,y_ras,z_ras or x_lps,y_lps,z_lps (mm)"
        )
    frame = _read_layer(str(path), layer)
    attributes = _layer_attributes(frame, source)
    found = None if frame.crs is None else CRS.from_user_input(frame.crs)
    to_grid = ToGrid(geometry, found, source)
    collector = Collector(source, geometry, attributes, polygons == "outline")
    for row, shape in enumerate(frame.geometry.array):
        _add(collector, row, shape, to_grid)
    return collector.result()


def _add(collector: Collector, row: int, shape: shapely.Geometry | None, to_grid: ToGrid) -> None:
    """One feature: points or a polygon."""
    if shape is None or shape.is_empty:
        collector.add_empty(row)
    elif shape.geom_type in ("Point", "MultiPoint"):
        collector.add_points(row, to_grid.positions(shapely.get_coordinates(shape)))
    elif shape.geom_type not in ("Polygon", "MultiPolygon"):
        raise RequestError(
            f"{collector.source}: number {row + 1} is a {shape.geom_type}; valid: points and polygons"
        )
    elif not shape.area > 0:
        collector.add_empty(row)
    else:
        collector.add_polygon(row, to_grid.polygon(shape))


def read_file_attributes(path: Path, layer: str) -> Attributes:
    """Return objects, labels and phrases of the rows of a file alone, without a scene."""
    if path.suffix.lower() != ".csv":
        return _layer_attributes(_read_layer(str(path), layer), path.name)
    columns = _read_columns(path)
    return read_attributes(columns, len(next(iter(columns.values()))), path.name)


def _layer_attributes(frame: geopandas.GeoDataFrame, source: str) -> Attributes:
    columns = {c: frame[c].tolist() for c in frame.columns if c != frame.geometry.name}
    return read_attributes(columns, len(frame), source)


def _read_layer(path: str, layer: str) -> geopandas.GeoDataFrame:
    """A layer with at least one feature."""
    try:
        layers = vectors.list_layers(path)
    except SceneError as error:
        raise RequestError(
            f"prompts.path: {path} cannot be read ({' '.join(str(error).split())}); "
            "give GeoJSON, GeoPackage or CSV"
        ) from error
    if layer not in layers and (layer or len(layers) != 1):
        raise RequestError(
            f"prompts.layer: found {layer or 'none'}; layers of {path}: {', '.join(layers) or 'none'}"
        )
    frame = vectors.read_layer(path, layer or layers[0])
    if not len(frame):
        raise RequestError(f"prompts.path: {path} has no features; give points or polygons")
    return frame


def _read_csv(path: Path, geometry: Geometry, crs: str, outlines: bool) -> tuple[PromptSet, FileAccount]:
    """Read a CSV as `read_prompts`.

    Cells are separated by commas, semicolons or tabs, whichever the first line has most of; UTF-8.
    """
    columns = _read_columns(path)
    count = len(next(iter(columns.values())))
    system = _system(columns, geometry, path.name)
    attributes = read_attributes(columns, count, path.name)
    collector = Collector(path.name, geometry, attributes, outlines)
    if isinstance(geometry, RasterGeometry):
        to_grid = ToGrid(geometry, _crs(columns, system, geometry, crs, path.name), path.name)
    elif crs:
        raise RequestError(f"prompts.crs: found {crs!r}; a volume has no CRS, its columns say what they are")
    for row in range(count):
        low, high = _row(columns, system, row, path.name)
        if low is None or high is None:
            collector.add_empty(row)
        elif isinstance(geometry, RasterGeometry):
            _add_to_raster(collector, row, low, high, to_grid)
        else:
            _add_to_volume(collector, row, low, high, system)
    return collector.result()


def _read_columns(path: Path) -> dict[str, list[str]]:
    """Columns by name in small letters, cells as text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        head = lines[0] if lines else ""
        separator = max(",;\t", key=head.count)
        cells = ([*map(plain_cell, row)] for row in csv.reader(lines, delimiter=separator))
        rows = [row for row in cells if any(cell.strip() for cell in row)]
    except UnicodeDecodeError as error:
        raise RequestError(f"prompts.path: {path} is not UTF-8 text ({error.reason}); give a CSV") from error
    except CSV_ERRORS as error:
        raise RequestError(f"prompts.path: {path} cannot be read ({error}); give a CSV") from error
    if len(rows) < 2:
        raise RequestError(
            f"prompts.path: {path} has no rows; give a line of column names, then one line a prompt"
        )
    names = [name.strip().lower() for name in rows[0]]
    if len(set(names)) < len(names):
        raise RequestError(f"{path.name}: columns: found {', '.join(names)}; valid: every name once")
    for number, row in enumerate(rows[1:], 1):
        if len(row) != len(names):
            raise RequestError(
                f"{path.name}: number {number} has {len(row)} cells; valid: {len(names)}, as the first line"
            )
    return {name: [row[i].strip() for row in rows[1:]] for i, name in enumerate(names)}


def _system(columns: dict[str, list[str]], geometry: Geometry, source: str) -> CoordinateSystem:
    """The one whose columns are there."""

    def there(axis: str) -> bool:
        return axis in columns or (f"{axis}_min" in columns and f"{axis}_max" in columns)

    found = [s for s in SYSTEMS if all(there(axis) for axis in s.axes)]
    fitting = [s for s in found if s.kind == geometry.kind]
    if len(fitting) != 1:
        valid = " or ".join(",".join(s.axes) for s in SYSTEMS if s.kind == geometry.kind)
        several = "coordinates in several ways in " if fitting else ""
        raise RequestError(
            f"{source}: columns: found {several}{', '.join(columns)}; "
            f"valid for a {geometry.kind}: {valid}, each also as _min and _max"
        )
    return fitting[0]


def _crs(
    columns: dict[str, list[str]], system: CoordinateSystem, geometry: RasterGeometry, crs: str, source: str
) -> CRS | None:
    """The CRS of a raster's prompts; None where neither they nor the raster have one."""
    named = {v for v in columns.get("crs", []) if v} | ({crs} if crs else set())
    if system.axes == ("lon", "lat"):
        named.add(WGS84)
    if len(named) > 1:
        raise RequestError(f"{source}: crs: found {', '.join(sorted(named))}; valid: one for the whole file")
    if named == {"scene"}:
        return geometry.projection
    if not named:
        if geometry.projection is None:
            return None
        raise RequestError(
            f"{source}: crs: none is named for x and y; valid: a column crs or prompts.crs, such as "
            f"EPSG:32617, or scene ({geometry.projection.name})"
        )
    try:
        return CRS.from_user_input(named.pop())
    except CRSError as error:
        raise RequestError(f"{source}: crs: {error}; valid: such as EPSG:32617, or scene") from error


def _row(
    columns: dict[str, list[str]], system: CoordinateSystem, row: int, source: str
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Smallest and greatest coordinates of a row, axes in the system's order; None where it has none."""
    low, high = [], []
    for axis in system.axes:
        cells = [_number(columns, name, row, source) for name in (axis, f"{axis}_min", f"{axis}_max")]
        at, least, most = cells
        if (least is None) != (most is None) or (at is not None and least is not None):
            raise RequestError(
                f"{source}: number {row + 1} has {axis}, {axis}_min, {axis}_max = {cells}; valid: the "
                "first alone (a point or slice), or the other two (a box)"
            )
        if least is not None and most is not None and least >= most:
            raise RequestError(
                f"{source}: {axis}_min: found {least:g} in number {row + 1}; valid: below {most:g}"
            )
        low.append(at if least is None else least)
        high.append(at if most is None else most)
    if all(v is None for v in low):
        return None, None
    if any(v is None for v in low):
        missing = [a for a, v in zip(system.axes, low, strict=True) if v is None]
        raise RequestError(f"{source}: number {row + 1} has no {', '.join(missing)}; valid: a number")
    return np.array(low, np.float64), np.array(high, np.float64)


def _number(columns: dict[str, list[str]], name: str, row: int, source: str) -> float | None:
    cell = columns[name][row] if name in columns else ""
    if not cell:
        return None
    try:
        value = float(cell)
    except ValueError:
        value = np.nan
    if not np.isfinite(value):
        raise RequestError(
            f"{source}: {name}: found {cell!r} in number {row + 1}; valid: a number such as 431.5"
        )
    return value


def _add_to_raster(
    collector: Collector, row: int, low: np.ndarray, high: np.ndarray, to_grid: ToGrid
) -> None:
    if (low == high).all():
        collector.add_points(row, to_grid.positions(low))
    elif (low == high).any():
        raise RequestError(
            f"{collector.source}: number {row + 1} is a line; valid: a point, or a box in x and y"
        )
    else:
        collector.add_polygon(row, to_grid.polygon(shapely.box(*low, *high)))


def _add_to_volume(
    collector: Collector, row: int, low: np.ndarray, high: np.ndarray, system: CoordinateSystem
) -> None:
    """A point, a box, or a box on one slice; the box of mm is the envelope of its corners."""
    if (low == high).sum() == 2:
        raise RequestError(
            f"{collector.source}: number {row + 1} is a line; valid: a point, a box, or a box on one slice"
        )
    corners = np.array(list(product(*zip(low, high, strict=True))))
    if system.signs is None:
        positions = corners[:, ::-1]
    else:
        positions = world_to_elements(collector.geometry, corners * system.signs)
    if (low == high).all():
        collector.add_points(row, positions[:1])
        return
    start, stop = positions.min(axis=0), positions.max(axis=0)
    thin = stop - start < SLICE_TOLERANCE
    middle = (start + stop) / 2
    collector.add_box(row, np.where(thin, middle, start), np.where(thin, middle, stop))
