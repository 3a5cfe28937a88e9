"""A raster's objects for the programs that work with outlines: GeoPackage, GeoParquet, and COCO's JSON."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyogrio

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.export.staging import commit, staging
from segpipe.geometry.box import Box, grid_boxes
from segpipe.geometry.geometry import RasterGeometry
from segpipe.objects.outlines import block_pieces, dissolve
from segpipe.objects.scene_objects import SceneObjects
from segpipe.sources.base import LabelReader

STEP = 2048
"""Edge of a read, in pixels. Neither file depends on it."""
FACTS = (
    "id", "class", "also", "value", "score", "source", "prompt", "grounder_score", "candidate", "chosen",
    "predicted_iou", "stability", "level", "cut", "count", "area_m2", "area_px", "mask_count", "mask_area_m2",
    "mask_area_px", "touches_edge", "region", "partner", "iou",
)  # fmt: skip
"""Columns of the table of instances that are a polygon's attributes, as far as it has them."""
PROMPTED = (
    "also", "source", "prompt", "grounder_score", "candidate", "chosen", "predicted_iou", "stability",
    "level", "cut", "mask_count", "mask_area_m2", "mask_area_px",
)  # fmt: skip
"""Those that are attributes of a prompted object's annotation in COCO's JSON, as far as there are any."""
SAM_NAMES = {"stability": "stability_score"}
"""What SAM's generator of masks (segment_anything) calls them, where it has another name."""


def write_object_polygons(
    ids: LabelReader, geometry: RasterGeometry, table: pd.DataFrame, path: Path, *more: Path
) -> None:
    """Write one feature an object, along the edges of its pixels, with its numbers; in the scene's CRS.

    In memory are all polygons: they follow the outlines of the objects, not the size of the scene.

    Args:
        ids: windowed reader of the objects' ids, 0 none.
        geometry: of the scene.
        table: of the scene's instances, by ``id`` all that there are.
        path: of a file, whole or not there at all: ``.parquet`` is GeoParquet, anything else a GeoPackage.
        more: of others with the same features.

    Raises:
        SceneError: ids and table are not of the same objects.
    """
    pieces = (block_pieces(ids(box), box) for box in grid_boxes(geometry.shape, (STEP, STEP)))
    known, polygons = dissolve(pieces, geometry.affine)
    if known.tolist() != table["id"].tolist():
        raise SceneError(f"{path}: {len(known)} objects in the scene, {len(table)} in its table")
    rows = table[[name for name in FACTS if name in table]].reset_index(drop=True)
    frame = geopandas.GeoDataFrame(rows, geometry=polygons, crs=geometry.projection)
    for target in (path, *more):
        with staging(target) as folder:
            if target.suffix == ".parquet":
                frame.to_parquet(folder / target.name, index=False)
            else:
                write_gpkg(frame, folder / target.name, "instances", geometry_type="MultiPolygon")
            commit(folder / target.name, target)


def write_gpkg(frame: geopandas.GeoDataFrame, path: Path, layer: str, **options: Any) -> None:
    """Write a GeoPackage that has no date of its making: the same features are the same bytes."""
    pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": "1970-01-01T00:00:00.000Z"})
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a scene without a CRS stays without one
            frame.to_file(path, driver="GPKG", layer=layer, engine="pyogrio", **options)
    finally:
        pyogrio.set_gdal_config_options({"OGR_CURRENT_DATE": None})


def coco_facts(table: pd.DataFrame, points: Mapping[int, np.ndarray]) -> dict[int, dict[str, Any]]:
    """What is known of prompted objects beyond COCO's own attributes, by id, ready for JSON.

    What is not known (NaN, an empty text) is left out. ``point_coords`` are x, y of the points that an object
    was asked with, whole numbers at the centres of pixels, as SAM's generator of masks has them.

    Args:
        table: of the scene's instances.
        points: (p, 2) positions (y, x) on the scene by id, of the objects that have some.
    """
    rows = table[["id", *(name for name in PROMPTED if name in table)]].astype(object)
    rows = rows.rename(columns=SAM_NAMES)
    facts: dict[int, dict[str, Any]] = {}
    for row in rows.to_dict("records"):
        known = {str(k): v for k, v in row.items() if k != "id" and not pd.isna(v) and v != ""}
        at = points.get(row["id"], np.empty((0, 2)))
        facts[row["id"]] = known | ({"point_coords": at[:, ::-1].tolist()} if len(at) else {})
    return facts


def write_coco(
    ids: LabelReader,
    shape: tuple[int, int],
    objects: SceneObjects,
    classes: Sequence[Class],
    image: str,
    path: Path,
    facts: Mapping[int, Mapping[str, Any]] | None = None,
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
        facts: further attributes of annotations, by id (`coco_facts`).
    """
    more = facts or {}
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
                text = json.dumps({**annotation, **more.get(annotation["id"], {})}, separators=(",", ":"))
                file.write((",\n" if number else "\n") + text)
            file.write("\n]}\n")
        commit(part, path)


@dataclass(frozen=True, eq=False)
class Runs:
    """Runs of elements of one id, in the image's column-major order; any order of rows, all int64."""

    ids: np.ndarray
    """(n,) above 0."""
    start: np.ndarray
    """(n,) position x·height + y of a run's first element."""
    length: np.ndarray
    """(n,) elements."""


def block_runs(ids: np.ndarray, box: Box, shape: tuple[int, int]) -> Runs:
    """The runs in one block.

    Args:
        ids: (y, x) of the scene over the box, 0 no object.
        box: the block.
        shape: (y, x) of the scene.
    """
    columns = np.pad(ids.T, ((0, 0), (0, 1)))  # no run goes on into the next column
    line = columns.ravel().astype(np.int64)
    begin = np.flatnonzero(np.diff(line, prepend=0))
    end = np.r_[begin[1:], len(line)]
    some = line[begin] > 0
    begin, end = begin[some], end[some]
    x, y = np.divmod(begin, columns.shape[1])
    return Runs(line[begin], (x + box.start[1]) * shape[0] + y + box.start[0], end - begin)


def coco_annotations(
    objects: SceneObjects, runs: Iterable[Runs], shape: tuple[int, int], image: int = 1
) -> Iterator[dict[str, Any]]:
    """One annotation per object, ready for JSON: the same for any blocks, in any order.

    A ``score`` is there where the object has one. ``area`` and ``bbox`` (x, y, width, height) are in pixels.

    Args:
        objects: of the scene.
        runs: of blocks that partition the scene (`block_runs`).
        shape: (y, x) of the scene.
        image: ``image_id``.
    """
    parts = list(runs)
    ids, start, length = (
        np.concatenate([np.zeros(0, np.int64), *(getattr(p, name) for p in parts)])
        for name in ("ids", "start", "length")
    )
    order = np.lexsort((start, ids))
    ids, start, length = ids[order], start[order], length[order]
    bounds = np.searchsorted(ids, np.arange(1, len(objects) + 2)).tolist()
    for place, number in enumerate(objects.ids.tolist()):
        rows = slice(bounds[place], bounds[place + 1])
        (y0, x0), (y1, x1) = objects.start[place].tolist(), objects.stop[place].tolist()
        score = float(objects.scores[place])
        yield {
            "id": number,
            "image_id": image,
            "category_id": int(objects.classes[place]),
            "segmentation": {"size": list(shape), "counts": _counts(start[rows], length[rows], shape)},
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "area": int(objects.elements[place]),
            "iscrowd": 0,
        } | ({} if np.isnan(score) else {"score": score})


def _counts(start: np.ndarray, length: np.ndarray, shape: tuple[int, int]) -> list[int]:
    """Lengths of alternating runs of 0 and 1, from ascending runs of 1; those that meet become one."""
    stop = start + length
    new = np.r_[True, start[1:] != stop[:-1]][: len(start)]
    start, stop = start[new], stop[np.r_[new[1:], True][: len(stop)]]
    edges = np.column_stack([start, stop]).ravel()
    counts: list[int] = np.diff(np.r_[0, edges, shape[0] * shape[1]]).tolist()
    return counts if counts[-1] or len(counts) == 1 else counts[:-1]
