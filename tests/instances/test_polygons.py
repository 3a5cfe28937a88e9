"""Polygons of objects: exact areas, read back by rasterio, the same from any blocks."""

import geopandas
import numpy as np
import shapely
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.features import rasterize, shapes

from segpipe.geometry.box import grid_boxes
from segpipe.objects.outlines import block_pieces, dissolve
from tests.instances.scene import discs

TEN_METRES = Affine(10, 0, 500_000, 0, -10, 5_000_000)


def polygons_of(ids, step, affine=TEN_METRES, order=1):
    boxes = list(grid_boxes(ids.shape, step))[::order]
    return dissolve([block_pieces(ids[b.slices], b) for b in boxes], affine)


@st.composite
def specks(draw):
    """Random ids, so that there are holes, corners that touch, and objects in pieces."""
    shape = draw(st.tuples(st.integers(1, 14), st.integers(1, 14)))
    rng = np.random.default_rng(draw(st.integers(0, 99999)))
    ids = rng.integers(1, 1 + draw(st.integers(1, 3)), shape)
    return np.where(rng.random(shape) < draw(st.floats(0.2, 1)), ids, 0)


@settings(max_examples=25, deadline=None)
@given(specks(), st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, -1]))
def test_areas_are_exact_and_blocks_change_no_bit(ids, high, wide, order):
    known, polygons = polygons_of(ids, ids.shape)
    assert known.tolist() == np.unique(ids[ids > 0]).tolist()
    assert shapely.is_valid(polygons).all()
    assert shapely.area(polygons).tolist() == (100 * np.bincount(ids.ravel())[known]).tolist()
    back = rasterize(zip(polygons, known, strict=True), ids.shape, transform=TEN_METRES, dtype="int32")
    np.testing.assert_array_equal(back, ids)
    again, others = polygons_of(ids, (high, wide), order=order)
    np.testing.assert_array_equal(again, known)
    assert shapely.to_wkb(others).tolist() == shapely.to_wkb(polygons).tolist()


def test_many_objects_are_those_of_rasterio_dissolved_by_geopandas():
    """Areas of 900 discs in whole square metres; no vertex but corners."""
    ids = discs((500, 600), 900, seed=1)
    known, polygons = polygons_of(ids, (100, 130))
    found = shapes(ids.astype(np.int32), mask=ids > 0, connectivity=4, transform=TEN_METRES)
    rows = [{"properties": {"id": int(v)}, "geometry": g} for g, v in found]
    want = geopandas.GeoDataFrame.from_features(rows).dissolve("id")
    assert known.tolist() == want.index.tolist() == list(range(1, ids.max() + 1))
    assert shapely.equals(polygons, want.geometry.to_numpy()).all()
    assert shapely.area(polygons).tolist() == (100 * np.bincount(ids.ravel())[1:]).tolist()
    assert shapely.get_num_coordinates(polygons).sum() <= want.count_coordinates().sum()


def test_a_square_over_four_blocks_has_four_corners():
    ids = np.zeros((20, 20), np.uint64)
    ids[5:15, 3:17] = 2**40
    known, [polygon] = polygons_of(ids, (10, 10), Affine.identity())
    assert known.tolist() == [2**40]
    assert polygon.geom_type == "MultiPolygon"
    assert polygon.equals(shapely.box(3, 5, 17, 15))
    assert shapely.get_num_coordinates(polygon) == 5


def test_a_turned_grid():
    """Elements of 0.3 × 0.7 m, turned by 30°: corners lie where the affine puts them."""
    affine = Affine.translation(1e5, 2e5) @ Affine.rotation(30) @ Affine.scale(0.3, -0.7)
    ids = np.zeros((8, 9), int)
    ids[2:5, 1:7] = 1
    _, [polygon] = polygons_of(ids, (3, 4), affine)
    corners = [affine @ (x, y) for x, y in [(1, 2), (7, 2), (7, 5), (1, 5)]]
    assert shapely.hausdorff_distance(polygon, shapely.Polygon(corners)) < 1e-9
    assert abs(polygon.area - 18 * 0.21) < 1e-9


def test_no_objects():
    known, polygons = polygons_of(np.zeros((6, 7), np.uint32), (3, 3))
    assert len(known) == len(polygons) == 0
