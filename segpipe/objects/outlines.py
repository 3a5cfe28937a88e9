"""Objects of a raster as polygons along the edges of their elements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import shapely
from affine import Affine
from rasterio.features import shapes

from segpipe.geometry.box import Box
from segpipe.metrics.tally import compact


@dataclass(frozen=True, eq=False)
class Pieces:
    """Parts of objects, as polygons in (x, y) = (column, row) of the scene."""

    ids: np.ndarray
    """(n,) int64; an object may have several parts."""
    polygons: np.ndarray
    """(n,) shapely polygons with whole numbers as coordinates."""


def block_pieces(ids: np.ndarray, box: Box) -> Pieces:
    """The parts in one block; elements that touch only at a corner are in different parts.

    Args:
        ids: (y, x) of the scene over the box, 0 no object.
        box: the block.
    """
    known, code = compact(ids)  # GDAL's ids are of 32 bits
    there = ids > 0
    corner = Affine.translation(box.start[1], box.start[0])
    found = list(shapes(code, mask=there, connectivity=4, transform=corner)) if there.any() else []
    polygons = np.array([shapely.geometry.shape(polygon) for polygon, _ in found], dtype=object)
    return Pieces(known[[int(value) for _, value in found]], polygons)


def dissolve(pieces: Iterable[Pieces], affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Ascending ids, and one MultiPolygon for each: the same bits for any blocks, in any order.

    Unions are made in whole numbers of elements, where they are exact, and have no vertex but corners.

    Args:
        pieces: of blocks that partition the scene (`block_pieces`).
        affine: from (column, row) to coordinates.
    """
    parts = list(pieces)
    ids = np.concatenate([np.zeros(0, np.int64), *(p.ids for p in parts)])
    polygons = np.concatenate([np.zeros(0, object), *(p.polygons for p in parts)])
    order = np.argsort(ids, kind="stable")
    known, begin = np.unique(ids[order], return_index=True)
    if not len(known):
        return known, polygons
    groups = np.split(polygons[order], begin[1:])
    whole = shapely.normalize(_corners(np.array([shapely.union_all(group) for group in groups])))
    a, b, c, d, e, f = tuple(affine)[:6]
    placed = shapely.transform(whole, lambda xy: np.column_stack([xy @ [a, b] + c, xy @ [d, e] + f]))
    return known, placed


def _corners(polygons: np.ndarray) -> np.ndarray:
    """MultiPolygons with edges along the axes, without the vertices at which a ring goes straight on."""
    parts, owner = shapely.get_parts(polygons, return_index=True)
    _, xy, offsets = shapely.to_ragged_array(shapely.multipolygons(parts, indices=owner))
    rings = offsets[0]
    before, after = np.arange(len(xy)) - 1, np.arange(len(xy)) + 1
    before[rings[:-1]] = rings[1:] - 2  # a ring's last point is its first again
    after[rings[1:] - 1] = rings[:-1] + 1
    straight = ((xy[before] == xy) & (xy == xy[after])).any(1)
    last = np.zeros(len(xy), bool)
    last[rings[1:] - 1] = True
    keep = ~straight & ~last
    count = np.add.reduceat(keep, rings[:-1], dtype=np.int64)
    new = np.r_[0, np.cumsum(count + 1)]
    points = np.insert(xy[keep], np.cumsum(count), xy[keep][np.r_[0, np.cumsum(count)[:-1]]], axis=0)
    made = shapely.from_ragged_array(shapely.GeometryType.MULTIPOLYGON, points, (new, *offsets[1:]))
    return np.asarray(made)
