"""How much of each cell of a grid a polygon covers: the exact areas of their intersections."""

from __future__ import annotations

import numpy as np
import shapely

from segpipe.geometry.box import Box
from segpipe.regions.base import FULL


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
