"""An earlier run's labels as prompts: the box of every object, a point inside, and its outline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import shapely
from affine import Affine

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.alignment import same_grid
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry
from segpipe.objects.outlines import block_pieces, dissolve
from segpipe.prompts.inputs.components import Components, component_strips, deepest, find_components
from segpipe.prompts.inputs.prompts import (
    Prompts,
    element_corners,
    make_boxes,
    make_outlines,
    make_points,
    make_prompts,
)
from segpipe.prompts.inputs.rows import Account, Attributes, Collector
from segpipe.prompts.inputs.to_grid import Placer
from segpipe.sources.base import LabelReader
from segpipe.sources.labels import LabelFile

POINT_TOLERANCE = 0.1
"""How near to the deepest place of a polygon its point is, in elements."""


def read_labels(
    path: str | Path,
    geometry: Geometry,
    *,
    ids: bool,
    names: Mapping[int, str] | None = None,
    smallest: int = 1,
    outlines: bool = False,
) -> tuple[Prompts, Account]:
    """The objects of a label file (GeoTIFF, NIfTI, …) as prompts; 0 and nodata are none.

    A map's labels may lie on any grid in any CRS, coarser ones too: their components' polygons are taken to
    the scene. A volume's must lie on the scene's grid.

    Args:
        path: of the file.
        geometry: of the scene.
        ids: values are ids of objects, which stay their numbers; else classes, whose connected
            components are numbered from 1 by their first elements.
        names: phrase of each class value.
        smallest: elements of the smallest object that is taken, of the file's grid.
        outlines: also give outlines; of a raster only.

    Raises:
        RequestError: outlines of a volume.
        SceneError: the file cannot be read or is on a grid that cannot be used.
    """
    file = LabelFile(str(path))

    def read(box: Box) -> np.ndarray:
        return file.read(box)[0]

    source = Path(path).name
    try:
        try:
            same_grid(geometry, file.geometry)
        except SceneError as error:
            if not isinstance(geometry, RasterGeometry) or not isinstance(file.geometry, RasterGeometry):
                raise SceneError(f"prompts {source} lie on another grid than the scene: {error}") from error
            return _on_other_grid(read, file.geometry, geometry, source, ids, names or {}, smallest, outlines)
        return label_prompts(
            read, geometry, source, ids=ids, names=names, smallest=smallest, outlines=outlines
        )
    finally:
        file.close()


def label_prompts(
    read: LabelReader,
    geometry: Geometry,
    source: str,
    *,
    ids: bool,
    names: Mapping[int, str] | None = None,
    smallest: int = 1,
    outlines: bool = False,
) -> tuple[Prompts, Account]:
    """The same from a reader of labels on the scene's grid, such as a label map of the store.

    Args:
        source: what they are, for the account.
    """
    if outlines and not isinstance(geometry, RasterGeometry):
        raise RequestError("prompts: outlines are of rasters; valid: boxes and points of a volume")
    found, kept, objects, remarks = _chosen(read, geometry, ids, smallest)
    spacing = geometry.spacing or (1.0,) * geometry.ndim
    points, boxes = [], []
    for item, number in zip(kept, objects, strict=True):
        place = deepest(read, found, item, ids, spacing, geometry.shape)
        points.append((number, place, True))
        boxes.append((number, *element_corners(found.box(item))))
    shapes: Sequence[shapely.Geometry] = ()
    if outlines:
        shapes = _polygons(read, geometry, ids, found)[kept].tolist()
    axes = geometry.ndim
    prompts, _ = make_prompts(
        make_points(points, axes),
        make_boxes(boxes, axes),
        make_outlines(zip(objects, shapes, strict=False)),
        {o: (names or {}).get(int(found.value[i]), "") for o, i in zip(objects, kept, strict=True)},
    )
    used = tuple(range(1, len(kept) + 1))
    return prompts, Account(source, len(kept), used, (), (), (), (), remarks)


def _chosen(
    read: LabelReader, geometry: Geometry, ids: bool, smallest: int
) -> tuple[Components, list[int], list[int], tuple[str, ...]]:
    """Components, those that are large enough, their numbers as objects, and what is to be said."""
    found = find_components(read, geometry.shape, ids)
    kept = np.flatnonzero(found.elements >= smallest)
    if ids:
        kept = kept[np.argsort(found.value[kept])]
    objects = found.value[kept].tolist() if ids else list(range(1, len(kept) + 1))
    small = len(found) - len(kept)
    remarks = (f"objects of fewer than {smallest} elements left out: {small}",) if small else ()
    return found, kept.tolist(), objects, remarks


def _polygons(read: LabelReader, geometry: Geometry, ids: bool, found: Components) -> np.ndarray:
    """Every component along the edges of its elements, (x, y) positions on the labels' grid."""
    parts = (
        block_pieces(numbers, box) for box, numbers in component_strips(read, geometry.shape, ids, found)
    )
    return dissolve(parts, Affine.translation(-0.5, -0.5))[1]


def _on_other_grid(
    read: LabelReader,
    own: RasterGeometry,
    geometry: RasterGeometry,
    source: str,
    ids: bool,
    names: Mapping[int, str],
    smallest: int,
    outlines: bool,
) -> tuple[Prompts, Account]:
    """Components as polygons of their own grid, taken to the scene like polygons that were drawn."""
    found, kept, objects, remarks = _chosen(read, own, ids, smallest)
    phrases = tuple(names.get(int(found.value[i]), "") for i in kept)
    attributes = Attributes(tuple(objects), (True,) * len(kept), phrases, remarks)
    placer = Placer(geometry, own.projection, source)
    collector = Collector(source, geometry, attributes, outlines)
    polygons = _polygons(read, own, ids, found)[kept]
    points = []
    for row, polygon in enumerate(polygons):
        world = shapely.transform(polygon, lambda xy: own.to_world(xy[:, ::-1]))
        placed = placer.polygon(world)
        collector.add_polygon(row, placed)
        if not placed.polygon.is_empty:
            points.append((objects[row], inner_point(placed.polygon), True))
    prompts, account = collector.result()
    return replace(prompts, points=make_points(points, 2)), account


def inner_point(polygon: shapely.Geometry) -> tuple[float, float]:
    """Position (y, x) inside a polygon in positions, about as far from its edge as can be."""
    line = shapely.maximum_inscribed_circle(polygon, tolerance=POINT_TOLERANCE)
    x, y = line.coords[0]
    return y, x
