"""Exact cover of unit cells, against the areas of intersections by GEOS and against exactextract."""

import numpy as np
import pytest
import shapely
from exactextract import exact_extract
from exactextract.raster import NumPyRasterSource
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.geometry.box import Box
from segpipe.regions.base import FULL
from segpipe.regions.polygons import unit_cover
from tests.regions.tools import star


def intersections(polygon, cells):
    """The area of each cell's intersection with the polygon, by GEOS."""
    (y0, x0), (y1, x1) = cells.start, cells.stop
    x, y = np.meshgrid(np.arange(x0, x1), np.arange(y0, y1))
    return shapely.area(shapely.intersection(shapely.box(x, y, x + 1, y + 1), polygon))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.booleans())
def test_cover_of_any_polygon_on_any_box(seed, height, width, radius, wide):
    """Every cell is the area of the polygon's intersection with it, to fixed-point resolution."""
    polygon = star(seed, centre=(width / 2, height / 3), radius=radius, points=9)
    cells = Box((3, -2), (3 + min(height, 12), -2 + min(width, 12 if wide else 3)))
    got = unit_cover(polygon, cells)
    assert np.abs(got - intersections(polygon, cells) * FULL).max() <= 0.5 + 1e-6


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_corners_on_the_grid_holes_and_parts(seed, half):
    """Vertices, edges and holes that lie on grid lines or on half ones, in several parts."""
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, 25, (4, 3, 2)) / (2 if half else 1)
    triangles = [shapely.Polygon(c) for c in corners if shapely.Polygon(c).area]
    polygon = shapely.make_valid(
        shapely.union_all(triangles[1:]).difference(shapely.union_all(triangles[:1]))
    )
    cells = Box((1, 2), (11, 10))
    assert np.abs(unit_cover(polygon, cells) - intersections(polygon, cells) * FULL).max() <= 0.5 + 1e-6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 29), st.integers(1, 29))
def test_another_tiling_differs_in_the_last_bit_at_most(seed, row, column):
    polygon = star(seed, centre=(15, 14), radius=16, points=30)
    whole = unit_cover(polygon, Box((0, 0), (30, 30))).astype(int)
    for cells in (Box((row, column), (30, 30)), Box((0, 0), (row, column)), Box((row, 0), (30, column))):
        assert np.abs(unit_cover(polygon, cells) - whole[cells.slices]).max() <= 1


def test_equals_exactextract_in_a_large_box():
    """A star of 1,380 × 1,380 elements with a hole: element by element, and the sum is its area."""
    polygon = star(5, (800, 700), 690, 40).difference(shapely.Point(790, 690).buffer(60))
    grid = NumPyRasterSource(np.ones((1400, 1600)), 0, 0, 1600, 1400)
    feature = {"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(polygon)}
    (out,) = exact_extract(grid, [feature], ["cell_id", "coverage"])
    expected = np.zeros((1400, 1600))
    expected.flat[out["properties"]["cell_id"]] = out["properties"]["coverage"]
    got = unit_cover(polygon, Box.whole((1400, 1600)))
    np.testing.assert_allclose(got, expected[::-1] * FULL, rtol=0, atol=0.51)
    assert got.sum(dtype=np.int64) / FULL == pytest.approx(polygon.area, abs=0.01)


def test_a_polygon_of_millions_of_elements_around_a_small_box():
    """Only the edge through the box is cut; the rest of the polygon costs no cells."""
    polygon = shapely.Polygon([(-4e7, -3e7), (5e7, -3e7), (5e7, 4e7), (5.25, 8), (3.75, 0), (-4e7, -2e7)])
    cells = Box((0, 0), (8, 9))
    expected = intersections(shapely.intersection(polygon, shapely.box(-9, -9, 19, 19)), cells)
    got = unit_cover(polygon, cells)
    assert np.abs(got - expected * FULL).max() <= 0.51
    assert got.min() == 0
    assert got.max() == FULL


@pytest.mark.parametrize(
    ("polygon", "cells"),
    [
        (shapely.Polygon(), Box((0, 0), (4, 5))),
        (shapely.box(20, 20, 30, 30), Box((0, 0), (4, 5))),
        (shapely.box(-9, 0, -2, 30), Box((0, 0), (4, 5))),
        (shapely.box(0, 0, 4, 4), Box((1, 1), (1, 4))),
    ],
)
def test_nothing_where_they_do_not_meet(polygon, cells):
    np.testing.assert_array_equal(unit_cover(polygon, cells), np.zeros(cells.shape, np.uint32))
