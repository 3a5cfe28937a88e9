"""Tallies: exact sums, the same for any tiling and order, and equal to plain numpy."""

import json
import random
import time

import geopandas
import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS

from segpipe.config.job import Regions
from segpipe.errors import SceneError
from segpipe.geometry.box import Box, grid_boxes
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.metrics.tally import (
    MEASURE_TILE,
    NODATA,
    NOT_REQUESTED,
    SizeScale,
    Tally,
    add,
    compact,
    measure_tile,
    measure_tiles,
)
from segpipe.regions import load_regions
from segpipe.regions.base import FULL
from segpipe.sources.labels import IGNORED

UTM, WGS84 = CRS("EPSG:32616").to_wkt(), CRS("EPSG:4326").to_wkt()


def measure(labels, reference, regions, geometry, tile, nodata=255, order=None):
    boxes = list(grid_boxes(geometry.shape, tile))
    if order is not None:
        random.Random(order).shuffle(boxes)
    scale = SizeScale.of(geometry)
    return add(
        measure_tile(
            labels[b.slices],
            nodata,
            None if reference is None else reference[b.slices],
            regions,
            b,
            geometry.box,
            scale,
        )
        for b in boxes
    )


shapes = st.lists(st.integers(1, 23), min_size=2, max_size=3).map(tuple)


def scene_of(shape, geographic):
    if len(shape) == 3:
        return volume_geometry(shape, np.diag([0.7, 1.1, 2.3, 1]))
    if geographic:
        return RasterGeometry(shape, (0.3, 0, -80, 0, -0.3, 60), WGS84)
    return RasterGeometry(shape, (28.5, 0, 630534, 0, -28.5, 228114), UTM)


@settings(deadline=None)
@given(shapes, st.integers(0, 2**32 - 1), st.integers(1, 23), st.booleans(), st.booleans())
def test_any_tiling_and_order_gives_the_same_tally(shape, seed, step, geographic, with_reference):
    rng = np.random.default_rng(seed)
    geometry = scene_of(shape, geographic)
    labels = rng.choice(np.array([0, 3, 200, 255], np.uint8), shape)
    reference = rng.choice([IGNORED, 0, 3, 70000], shape) if with_reference else None
    regions = load_regions(None, geometry)
    whole = measure(labels, reference, regions, geometry, shape)
    tiles = tuple(max(1, (step + i) % 9) for i in range(len(shape)))
    assert measure(labels, reference, regions, geometry, tiles, order=seed) == whole
    # … and it is the joint histogram
    truth = reference if with_reference else np.full(shape, NOT_REQUESTED)
    predicted = np.where(labels == 255, NODATA, labels.astype(int))
    border = np.ones(shape, dtype=bool)
    border[tuple(slice(1, -1) for _ in shape)] = False
    sizes = np.broadcast_to(geometry.element_sizes().reshape(-1, *[1] * (len(shape) - 1)), shape)
    scale = SizeScale.of(geometry)
    for region, label, ref, cover, size, edge in whole.rows():
        here = (predicted == label) & (truth == ref)
        assert (region, cover, edge) == (0, here.sum() * FULL, (here & border).sum())
        assert scale.size(size) == pytest.approx(sizes[here].sum(), rel=1e-8)
    assert whole.cover.sum() == labels.size * FULL


def test_uniform_sizes_are_not_rounded():
    """1,234 pixels of 0.36 m² are 444.24 m², to the last bit."""
    geometry = RasterGeometry((1, 1234), (0.6, 0, 0, 0, -0.6, 0), UTM)
    tally = measure(np.zeros((1, 1234), np.uint8), None, load_regions(None, geometry), geometry, (1, 500))
    scale = SizeScale.of(geometry)
    assert scale.size(int(tally.size[0])) == 1234 * geometry.element_sizes()[0]


def test_scale_leaves_room_for_the_largest_scene():
    """A raster of 2**21 a side on the globe: the whole stays below 2**62."""
    side = 1 << 21
    geometry = RasterGeometry((side, side), (1e-4, 0, -105, 0, -8e-5, 84), WGS84)
    scale = SizeScale.of(geometry)
    assert scale.bits == 19
    assert int(scale.rows.sum(dtype=object)) * side < 1 << 62
    assert scale.rows.max() == 1 << scale.bits
    again = SizeScale.from_dict(json.loads(json.dumps(scale.to_dict())))
    assert again.size(3 << 40) == scale.size(3 << 40) > 0
    with pytest.raises(SceneError, match="at most"):
        SizeScale.of(RasterGeometry((1 << 23, 1 << 23), (1, 0, 0, 0, -1, 0), UTM))


def polygons(tmp_path, geometry, crs, seed=0, count=12):
    rng = np.random.default_rng(seed)
    rows, columns = geometry.shape
    discs = [
        shapely.Point(rng.uniform(0, columns), rng.uniform(0, rows)).buffer(rng.uniform(2, 40))
        for _ in range(count)
    ]
    placed = [shapely.affinity.affine_transform(d, geometry.affine.to_shapely()) for d in discs]
    geopandas.GeoDataFrame({"geometry": placed}, crs=crs).to_file(tmp_path / "r.gpkg")
    return load_regions(Regions(path=str(tmp_path / "r.gpkg")), geometry)


@pytest.mark.parametrize("code", ["EPSG:32616", "EPSG:4326"])
def test_polygons_tally_equals_plain_numpy(tmp_path, code):
    transform = (30.0, 0, 5e5, 0, -30.0, 4e6) if code == "EPSG:32616" else (0.3, 0, 1, 0, -0.3, 60)
    geometry = RasterGeometry((97, 113), transform, CRS(code).to_wkt())
    rng = np.random.default_rng(5)
    labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), geometry.shape)
    reference = rng.choice([IGNORED, 0, 1, 2], geometry.shape)
    regions = polygons(tmp_path, geometry, code)
    tally = measure(labels, reference, regions, geometry, geometry.shape)
    scale = SizeScale.of(geometry)
    sizes = np.repeat(geometry.element_sizes()[:, None], 113, axis=1)
    predicted = np.where(labels == 255, NODATA, labels.astype(int))
    rows = {row[:3]: row[3:] for row in tally.rows()}
    expected = 0
    for cover in regions.cover(geometry.box):
        weight = np.zeros(geometry.shape)
        weight[cover.box.slices] = FULL if cover.fraction is None else cover.fraction
        for label in (NODATA, 0, 1, 2):
            for ref in (IGNORED, 0, 1, 2):
                here = (predicted == label) & (reference == ref) & (weight > 0)
                if not here.any():
                    continue
                expected += 1
                got = rows[cover.region, label, ref]
                assert got[0] == weight[here].sum()
                assert scale.size(got[1]) == pytest.approx((weight * sizes)[here].sum() / FULL, rel=1e-8)
    assert expected == len(tally)
    assert sum(measure(labels, reference, regions, geometry, (32, 50)).cover) == pytest.approx(
        sum(tally.cover), abs=2000
    )


@given(
    st.lists(
        st.lists(st.tuples(*[st.integers(-2, 3)] * 3, *[st.integers(0, 2**50)] * 3), max_size=8), max_size=6
    ),
    st.randoms(),
)
def test_adding_is_exact_in_any_order_and_grouping(tables, rng):
    names = ("region", "label", "reference", "cover", "size", "edge")
    tallies = [
        Tally.from_columns(**dict(zip(names, zip(*t, strict=True) if t else [[]] * 6, strict=True)))
        for t in tables
    ]
    whole = add(tallies)
    shuffled = rng.sample(tallies, len(tallies))
    cut = rng.randint(0, len(shuffled))
    assert add([add(shuffled[:cut]), add(shuffled[cut:])]) == whole
    assert Tally.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    sums = {}
    for row in (r for t in tables for r in t):
        old = sums.setdefault(row[:3], [0, 0, 0])
        sums[row[:3]] = [a + b for a, b in zip(old, row[3:], strict=True)]
    assert list(whole.rows()) == [(*k, *v) for k, v in sorted(sums.items())]


@given(st.lists(st.integers(-5, 2**40) | st.integers(0, 9), max_size=50))
def test_compact_is_unique(values):
    array = np.array(values, dtype=np.int64)
    distinct, code = compact(array)
    expected, places = np.unique(array, return_inverse=True)
    np.testing.assert_array_equal(distinct, expected)
    np.testing.assert_array_equal(code, places)


def test_object_ids_given_as_reference():
    """Every pixel another reference value, under 300 predicted values: 90,000 rows, no pair lost."""
    geometry = RasterGeometry((300, 300), (1, 0, 0, 0, -1, 0), UTM)
    reference = np.random.default_rng(2).permutation(90_000).reshape(300, 300)
    labels = (reference % 300).astype(np.uint16)
    regions = load_regions(None, geometry)
    tally = measure(labels, reference, regions, geometry, (128, 128), nodata=65535)
    assert len(tally) == 90_000
    np.testing.assert_array_equal(np.sort(tally.reference), np.arange(90_000))
    np.testing.assert_array_equal(tally.label, tally.reference % 300)


def test_tiles_partition_the_scene():
    geometry = RasterGeometry((4096, 2049), (1, 0, 0, 0, -1, 0), UTM)
    boxes = list(measure_tiles(geometry))
    assert boxes[0] == Box((0, 0), MEASURE_TILE["raster"])
    assert boxes[1] == Box((0, 2048), (2048, 2049))
    assert sum(b.size for b in boxes) == geometry.box.size
    assert {b.shape for b in measure_tiles(volume_geometry((128, 256, 1), np.eye(4)))} == {(128, 128, 1)}


@pytest.mark.parametrize("code", ["EPSG:32616", "EPSG:4326"])
def test_a_whole_tile_is_fast(code):
    shape = MEASURE_TILE["raster"]
    geometry = RasterGeometry(shape, (1e-4, 0, 5, 0, -1e-4, 4), CRS(code).to_wkt())
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, shape).astype(np.uint16)
    reference = rng.integers(-1, 8, shape)
    times = []
    for _ in range(3):
        clock = time.perf_counter()
        tally = measure(labels, reference, load_regions(None, geometry), geometry, shape)
        times.append(time.perf_counter() - clock)
    print(code, min(times))
    assert tally.cover.sum() == labels.size * FULL
    assert min(times) < 2  # 0.1 to 0.2 s on an idle machine


def test_a_tile_too_large_or_of_another_shape_is_a_mistake():
    geometry = RasterGeometry((3000, 3000), (1, 0, 0, 0, -1, 0), UTM)
    arguments = load_regions(None, geometry), geometry.box, geometry.box, SizeScale.of(geometry)
    with pytest.raises(ValueError, match="at most"):
        measure_tile(np.zeros((3000, 3000), np.uint8), None, None, *arguments)
    with pytest.raises(ValueError, match="shape"):
        measure_tile(np.zeros((3, 3), np.uint8), None, None, *arguments)
