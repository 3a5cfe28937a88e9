"""Prompts that people drew, from files: vector layers (GeoJSON, GeoPackage, …) and CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import geopandas
import pyogrio
import shapely
from pyproj import CRS

from segpipe.errors import RequestError
from segpipe.geometry.geometry import Geometry, RasterGeometry
from segpipe.prompts.inputs.csv import read_table
from segpipe.prompts.inputs.prompts import Prompts
from segpipe.prompts.inputs.rows import Account, Collector, read_attributes
from segpipe.prompts.inputs.to_grid import Placer
from segpipe.sources import vectors

Use = Literal["box", "outline"]
"""What a polygon is: a box around an object (its envelope), or also its coarse mask."""


def read_prompts(
    path: str | Path, geometry: Geometry, *, crs: str = "", layer: str = "", polygons: Use = "box"
) -> tuple[Prompts, Account]:
    """The prompts of a file on one scene, and what became of each of its features or rows.

    Columns or properties ``object``, ``label`` and ``phrase``: `segpipe.prompts.inputs.rows.read_attributes`.

    Args:
        path: ``.csv`` (`prompts.inputs.csv`), or any vector layer of points and polygons.
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
        return read_table(Path(path), geometry, crs, outlines=polygons == "outline")
    if crs:
        raise RequestError(f"prompts.crs: found {crs!r}; {source} states its own CRS, a CSV does not")
    if not isinstance(geometry, RasterGeometry):
        raise RequestError(
            f"prompts.path: {source} is a map layer, and the scene is a volume; give a CSV with columns "
            "i,j,k (voxels) or x_ras,y_ras,z_ras or x_lps,y_lps,z_lps (mm)"
        )
    frame = read_layer(str(path), layer)
    columns = {c: frame[c].tolist() for c in frame.columns if c != frame.geometry.name}
    attributes = read_attributes(columns, len(frame), source)
    found = None if frame.crs is None else CRS.from_user_input(frame.crs)
    placer = Placer(geometry, found, source)
    collector = Collector(source, geometry, attributes, polygons == "outline")
    for row, shape in enumerate(frame.geometry.array):
        _add(collector, row, shape, placer)
    return collector.result()


def _add(collector: Collector, row: int, shape: shapely.Geometry | None, placer: Placer) -> None:
    """One feature: points or a polygon."""
    if shape is None or shape.is_empty:
        collector.add_empty(row)
    elif shape.geom_type in ("Point", "MultiPoint"):
        collector.add_points(row, placer.positions(shapely.get_coordinates(shape)))
    elif shape.geom_type not in ("Polygon", "MultiPolygon"):
        raise RequestError(
            f"{collector.source}: number {row + 1} is a {shape.geom_type}; valid: points and polygons"
        )
    elif not shape.area > 0:
        collector.add_empty(row)
    else:
        collector.add_polygon(row, placer.polygon(shape))


def read_layer(path: str, layer: str) -> geopandas.GeoDataFrame:
    """A layer with at least one feature."""
    try:
        layers = vectors.list_layers(path)
    except pyogrio.errors.DataSourceError as error:
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
