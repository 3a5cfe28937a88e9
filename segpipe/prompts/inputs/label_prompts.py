"""Make prompts from the labels of a previous run: the box of every object, and a point inside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import shapely
from affine import Affine

from segpipe.errors import SceneError
from segpipe.geometry.alignment import same_grid
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry
from segpipe.objects.outlines import block_pieces, dissolve
from segpipe.prompts.inputs.components import Components, component_strips, deepest, find_components
from segpipe.prompts.inputs.rows import Attributes, Collector, FileAccount
from segpipe.prompts.inputs.to_grid import ToGrid
from segpipe.prompts.prompt_set import (
    PromptSet,
    element_corners,
    make_boxes,
    make_outlines,
    make_points,
    make_prompts,
)
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
) -> tuple[PromptSet, FileAccount]:
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

    Raises:
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
            return _on_other_grid(read, file.geometry, geometry, source, ids, names or {}, smallest)
        return label_prompts(read, geometry, source, ids=ids, names=names, smallest=smallest)
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
) -> tuple[PromptSet, FileAccount]:
    """The same from a reader of labels on the scene's grid, such as a label map of the store.

    Args:
        source: what they are, for the account.
    """
    found, kept, objects, remarks = _chosen(read, geometry, ids, smallest)
    spacing = geometry.spacing or (1.0,) * geometry.ndim
    points, boxes = [], []
    for item, number in zip(kept, objects, strict=True):
        place = deepest(read, found, item, ids, spacing, geometry.shape)
        points.append((number, place, True))
        boxes.append((number, *element_corners(found.box(item))))
    axes = geometry.ndim
    prompts, _ = make_prompts(
        make_points(points, axes), make_boxes(boxes, axes), make_outlines([]),
        {o: (names or {}).get(int(found.value[i]), "") for o, i in zip(objects, kept, strict=True)},
    )  # fmt: skip
    used = tuple(range(1, len(kept) + 1))
    return prompts, FileAccount(source=source, given=len(kept), used=used, remarks=remarks)


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


def _on_other_grid(
    read: LabelReader, own: RasterGeometry, geometry: RasterGeometry, source: str, ids: bool,
    names: Mapping[int, str], smallest: int,
) -> tuple[PromptSet, FileAccount]:  # fmt: skip
    """Components as polygons of their own grid, taken to the scene like polygons that were drawn."""
    found, kept, objects, remarks = _chosen(read, own, ids, smallest)
    phrases = tuple(names.get(int(found.value[i]), "") for i in kept)
    attributes = Attributes(tuple(objects), (True,) * len(kept), phrases, remarks)
    to_grid = ToGrid(geometry, own.projection, source)
    collector = Collector(source, geometry, attributes, outlines=False)
    parts = (block_pieces(numbers, box) for box, numbers in component_strips(read, own.shape, ids, found))
    polygons = dissolve(parts, Affine.translation(-0.5, -0.5))[1][kept]
    points = []
    for row, polygon in enumerate(polygons):
        world = shapely.transform(polygon, lambda xy: own.to_world(xy[:, ::-1]))
        placed = to_grid.polygon(world)
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
