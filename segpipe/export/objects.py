"""A raster's objects for the programs that work with outlines: a GeoPackage, and COCO's JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import geopandas
import pandas as pd

from segpipe.boxes import grid_boxes
from segpipe.errors import SceneError
from segpipe.export.common import LabelReader, commit, staging
from segpipe.geometry import RasterGeometry
from segpipe.instances.coco import block_runs, coco_annotations
from segpipe.instances.merge import SceneObjects
from segpipe.instances.polygons import block_pieces, dissolve
from segpipe.models.card import Class

STEP = 2048
"""Edge of a read, in pixels. Neither file depends on it."""
FACTS = ("id", "class", "value", "score", "count", "area_m2", "area_px", "touches_edge", "region",
         "partner", "iou")  # fmt: skip
"""Columns of the table of instances that are a polygon's attributes, as far as it has them."""


def write_object_polygons(
    ids: LabelReader, geometry: RasterGeometry, table: pd.DataFrame, path: Path
) -> None:
    """Write one feature an object, along the edges of its pixels, with its numbers; in the scene's CRS.

    In memory are all polygons: they follow the outlines of the objects, not the size of the scene.

    Args:
        ids: windowed reader of the objects' ids, 0 none.
        geometry: of the scene.
        table: of the scene's instances, by ``id`` all that there are.
        path: of the GeoPackage; whole or not there at all.

    Raises:
        SceneError: ids and table are not of the same objects.
    """
    pieces = (block_pieces(ids(box), box) for box in grid_boxes(geometry.shape, (STEP, STEP)))
    known, polygons = dissolve(pieces, geometry.affine)
    if known.tolist() != table["id"].tolist():
        raise SceneError(f"{path}: {len(known)} objects in the scene, {len(table)} in its table")
    rows = table[[name for name in FACTS if name in table]].reset_index(drop=True)
    frame = geopandas.GeoDataFrame(rows, geometry=polygons, crs=geometry.projection)
    with staging(path) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a scene without a CRS stays without one
        frame.to_file(
            folder / path.name,
            driver="GPKG",
            layer="instances",
            engine="pyogrio",
            geometry_type="MultiPolygon",
        )
        commit(folder / path.name, path)


def write_coco(
    ids: LabelReader,
    shape: tuple[int, int],
    objects: SceneObjects,
    classes: Sequence[Class],
    image: str,
    path: Path,
) -> None:
    """Write objects as a COCO data set of one image, masks as uncompressed run lengths.

    Categories are the classes that are no background, under their values in label maps; ``isthing`` is 0
    for stuff, as in COCO's panoptic files. In memory are all runs; annotations are written one by one.

    Args:
        ids: windowed reader of the objects' ids, 0 none.
        shape: (y, x) of the scene.
        objects: of the scene.
        classes: values and names.
        image: ``file_name`` of the image.
        path: of the file; whole or not there at all.
    """
    listed = [{"id": c.value, "name": c.name, "isthing": int(c.thing)} for c in classes if not c.background]
    head = {
        "images": [{"id": 1, "file_name": image, "height": shape[0], "width": shape[1]}],
        "categories": listed,
    }
    runs = (block_runs(ids(box), box, shape) for box in grid_boxes(shape, (STEP, STEP)))
    with staging(path) as folder:
        part = folder / path.name
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(head, ensure_ascii=False)[:-1] + ', "annotations": [')
            for number, annotation in enumerate(coco_annotations(objects, runs, shape)):
                file.write((",\n" if number else "\n") + json.dumps(annotation, separators=(",", ":")))
            file.write("\n]}\n")
        commit(part, path)
