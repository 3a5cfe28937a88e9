"""Polygon layers on every kind of grid, in any CRS and format, against shapely, exactextract and pyproj."""

import json
import time
from pathlib import Path

import geopandas
import numpy as np
import pyarrow.parquet
import pytest
import rasterio
import shapely
from affine import Affine
from exactextract import exact_extract
from exactextract.raster import NumPyRasterSource
from hypothesis import given
from hypothesis import strategies as st
from pyproj import CRS, Transformer

from segpipe.config.job import Regions
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.regions import load_regions
from segpipe.regions.base import FULL, different
from segpipe.regions.polygons import densified
from tests.regions.tools import UTM, data, dense, fixed, star, write

GRIDS = {
    "north-up": Affine(0.5, 0, 500000, 0, -0.5, 4000000),
    "south-up": Affine(0.5, 0, 500000, 0, 0.5, 4000000),
    "east-left": Affine(-0.5, 0, 500000, 0, -0.5, 4000000),
    "rotated": Affine.translation(500000, 4000000) @ Affine.rotation(27) @ Affine.scale(0.5, -0.7),
    "sheared": Affine(0.5, 0.2, 500000, 0.1, -0.6, 4000000),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("tile", [(80, 100), (16, 32), (7, 11)])
def test_area_is_the_polygons_on_every_grid(tmp_path, grid, tile):
    affine, shape = GRIDS[grid], (80, 100)
    polygons = []
    for seed in range(6):
        hole = shapely.Point(50, 40).buffer(5)
        pixel = star(seed).difference(hole) if seed % 2 else star(seed)
        pixel = shapely.union(pixel, shapely.box(2.3, 3.4, 6.1, 9.9))  # multipart
        polygons.append(shapely.affinity.affine_transform(pixel, affine.to_shapely()))
    path = write(tmp_path / "r.gpkg", polygons)
    geometry = RasterGeometry(shape, affine[:6], UTM)
    regions = load_regions(Regions(path=path), geometry)
    assert regions.names == ("1", "2", "3", "4", "5", "6")
    element = geometry.element_sizes()[0]
    for region, (got, polygon) in enumerate(zip(fixed(regions, shape, tile), polygons, strict=True)):
        edge_elements = 4 * (80 + 100)
        assert got / FULL * element == pytest.approx(polygon.area, abs=edge_elements / FULL * element)
        assert regions.outside(region) == 0


def test_plain_north_up_equals_exactextract(tmp_path):
    """The same fractions as exactextract gives in map coordinates, element by element."""
    shape, affine = (60, 90), Affine(2, 0, 500000, 0, -2, 4000000)
    polygon = shapely.affinity.affine_transform(star(3, (45, 30), 28), affine.to_shapely())
    regions = load_regions(
        Regions(path=write(tmp_path / "r.gpkg", [polygon])), RasterGeometry(shape, affine[:6], UTM)
    )
    source = NumPyRasterSource(np.ones(shape), 500000, 4000000 - 120, 500000 + 180, 4000000)
    feature = {"type": "Feature", "properties": {}, "geometry": shapely.geometry.mapping(polygon)}
    (out,) = exact_extract(source, [feature], ["cell_id", "coverage"])
    expected = np.zeros(shape)
    expected.flat[out["properties"]["cell_id"]] = out["properties"]["coverage"]
    got = dense(regions, shape, shape)
    assert np.abs(got - expected * FULL).max() <= 1
    assert (got[expected == 1] == FULL).all()


def test_box_on_the_grid_is_exact(tmp_path):
    polygon = shapely.box(500010, 3999900, 500050, 3999980)
    geometry = RasterGeometry((30, 30), (10, 0, 500000, 0, -10, 4000000), UTM)
    regions = load_regions(Regions(path=write(tmp_path / "r.gpkg", [polygon])), geometry)
    expected = np.zeros((30, 30), dtype=np.int64)
    expected[2:10, 1:5] = FULL
    np.testing.assert_array_equal(dense(regions, (30, 30), (8, 8)), expected)


def test_overlaps_names_and_identity(tmp_path):
    """Two districts that overlap both get the common part; equal names are told apart."""
    a, b = shapely.box(500000, 3999990, 500010, 4000000), shapely.box(500005, 3999990, 500015, 4e6)
    path = write(tmp_path / "r.gpkg", [a, b, a], name=["east", "east", None])
    geometry = RasterGeometry((20, 20), (1, 0, 500000, 0, -1, 4000000), UTM)
    regions = load_regions(Regions(path=path, name="name"), geometry)
    assert regions.names == ("east", "east (2)", "3")
    assert fixed(regions, (20, 20), (20, 20)) == [100 * FULL] * 3
    again = write(tmp_path / "copy.gpkg", [a, b, a], name=["east", "east", None])
    assert load_regions(Regions(path=again, name="name"), geometry).identity() == regions.identity()
    assert load_regions(Regions(path=path), geometry).identity() != regions.identity()
    moved = write(tmp_path / "m.gpkg", [a, b, b], name=["east", "east", None])
    assert load_regions(Regions(path=moved, name="name"), geometry).identity() != regions.identity()
    json.dumps(regions.identity())


def test_a_file_that_changes_is_read_again(tmp_path):
    a, b = shapely.box(500000, 3999990, 500010, 4000000), shapely.box(500000, 3999995, 500010, 4e6)
    geometry = RasterGeometry((20, 20), (1, 0, 500000, 0, -1, 4000000), UTM)
    path = write(tmp_path / "r.gpkg", [a])
    first = load_regions(Regions(path=path), geometry)
    time.sleep(0.02)
    Path(path).unlink()
    write(path, [b, b])
    second = load_regions(Regions(path=path), geometry)
    assert fixed(first, (20, 20), (20, 20)) == [100 * FULL]
    assert fixed(second, (20, 20), (20, 20)) == [50 * FULL] * 2


@given(st.lists(st.sampled_from(["a", "b", "a (2)", "a (3)"]), max_size=12))
def test_names_are_all_different(names):
    result = different(names)
    assert len(set(result)) == len(names)
    assert all(new == old or new.startswith(f"{old} (") for new, old in zip(result, names, strict=True))


@pytest.mark.parametrize("code", ["EPSG:4326", "EPSG:3857", "EPSG:3035", "EPSG:4807"])
def test_other_crs_lands_where_densified_corners_say(tmp_path, code):
    """A scene in UTM, a large box in another CRS: its straight edges there are curves here."""
    affine, shape = Affine(500, 0, 300000, 0, -500, 5500000), (400, 300)
    geometry = RasterGeometry(shape, affine[:6], CRS(32632).to_wkt())
    there = Transformer.from_crs(code, 32632, always_xy=True)
    x, y = there.transform([370000, 430000], [5350000, 5450000], direction="INVERSE")
    box = shapely.box(min(x), min(y), max(x), max(y))
    path = write(tmp_path / "r.gpkg", [box], crs=code)
    regions = load_regions(Regions(path=path), geometry)
    fine = shapely.get_coordinates(shapely.segmentize(box, box.length / 200000))
    truth = shapely.Polygon(np.column_stack(there.transform(fine[:, 0], fine[:, 1])))
    (got,) = fixed(regions, shape, (128, 128))
    # DENSIFY_TOLERANCE of a pixel along the outline, and the fixed point
    slack = truth.length / 500 * (1e-3 + 2 / FULL)
    assert got / FULL == pytest.approx(truth.area / 250000, abs=slack)
    assert regions.outside(0) == 0


def test_edges_are_split_until_they_fit():
    def bend(xy):
        return np.column_stack((xy[:, 0], xy[:, 1] + np.sin(xy[:, 0])))

    ring = np.array([[0.0, 0], [2 * np.pi, 0], [2 * np.pi, -5], [0, -5], [0, 0]])
    image = densified(ring, bend, 1e-3)
    x = np.linspace(0, 2 * np.pi, 10000)
    top = image[image[:, 1] > -2]
    order = np.argsort(top[:, 0])
    assert np.abs(np.interp(x, top[order, 0], top[order, 1]) - np.sin(x)).max() < 3e-3


def test_seen_part_of_a_polygon_that_sticks_out(tmp_path):
    """Half of the first polygon, none of the second, a quarter of the third lies in the scene."""
    geometry = RasterGeometry((10, 10), (1, 0, 500000, 0, -1, 4000000), UTM)
    polygons = [
        shapely.box(500005, 3999992, 500015, 3999998),
        shapely.box(600000, 3999992, 600015, 3999998),
        shapely.box(500008, 3999988, 500012, 3999992),
    ]
    regions = load_regions(Regions(path=write(tmp_path / "r.gpkg", polygons)), geometry)
    assert fixed(regions, (10, 10), (10, 10)) == [30 * FULL, 0, 4 * FULL]
    assert [regions.outside(i) for i in range(3)] == [30 * FULL, 0, 12 * FULL]


def test_a_country_over_a_small_scene(tmp_path):
    """A polygon of half the world is cut before UTM folds it; its far part is estimated."""
    geometry = RasterGeometry((50, 50), (100, 0, 500000, 0, -100, 4000000), UTM)
    world = shapely.box(-179, -80, 0, 80)
    south = shapely.box(-90, 0, 0, 36.12)
    path = write(tmp_path / "r.gpkg", [world, south, shapely.box(10, 0, 170, 80)], crs="EPSG:4326")
    regions = load_regions(Regions(path=path), geometry)
    got = fixed(regions, (50, 50), (50, 50))
    assert got[0] == 2500 * FULL
    assert 0 < got[1] < 2500 * FULL
    assert got[2] == 0
    area, _ = CRS(4326).get_geod().polygon_area_perimeter([-179, -90, 0, 0, -90, -179], [-80] * 3 + [80] * 3)
    assert regions.outside(0) / FULL == pytest.approx(abs(area) / 1e4, rel=0.01)


def test_over_the_antimeridian(tmp_path):
    geometry = RasterGeometry((100, 100), (1000, 0, 750000, 0, -1000, 8050000), CRS(32760).to_wkt())
    centre = Transformer.from_crs(32760, 4326, always_xy=True).transform(800000, 8000000)
    halves = [shapely.box(179.5, -18.4, 180, -17.8), shapely.box(-180, -18.4, -179.7, -17.8)]
    assert 179 < centre[0] < 180
    path = write(tmp_path / "r.gpkg", [shapely.MultiPolygon(halves), *halves], crs="EPSG:4326")
    regions = load_regions(Regions(path=path), geometry)
    whole, west, east = fixed(regions, (100, 100), (64, 64))
    assert min(west, east) > 500 * FULL
    assert whole == pytest.approx(west + east, abs=0.1 * FULL)


def test_invalid_polygons_are_repaired_and_said(tmp_path):
    """A bow tie is its two triangles, 25 pixels each."""
    bow = shapely.Polygon([(500000, 4e6), (500010, 3999990), (500010, 4e6), (500000, 3999990)])
    assert not bow.is_valid
    geometry = RasterGeometry((20, 20), (1, 0, 500000, 0, -1, 4000000), UTM)
    regions = load_regions(Regions(path=write(tmp_path / "r.gpkg", [bow])), geometry)
    (got,) = fixed(regions, (20, 20), (20, 20))
    assert got == 50 * FULL
    assert regions.notes == ("1 invalid region polygons were repaired: 1",)


def test_shapefile_and_geojson_and_layers(tmp_path):
    box = shapely.box(500002, 3999990, 500010, 3999999)
    geometry = RasterGeometry((20, 20), (1, 0, 500000, 0, -1, 4000000), UTM)
    for name in ("r.shp", "r.geojson"):
        regions = load_regions(Regions(path=write(tmp_path / name, [box], id=[7]), name="id"), geometry)
        assert regions.names == ("7",)
        # GeoJSON may be written in WGS 84 with 7 decimals: a centimetre
        assert fixed(regions, (20, 20), (20, 20))[0] / FULL == pytest.approx(72, abs=0.2)
    path = tmp_path / "two.gpkg"
    frame = geopandas.GeoDataFrame({"geometry": [box]}, crs="EPSG:32616")
    frame.to_file(path, layer="one")
    frame.to_file(path, layer="other")
    with pytest.raises(RequestError, match=r"regions.layer: missing; .* layers: one, other"):
        load_regions(Regions(path=str(path)), geometry)
    with pytest.raises(RequestError, match=r"found 'third'; .* layers: one, other"):
        load_regions(Regions(path=str(path), layer="third"), geometry)
    assert load_regions(Regions(path=str(path), layer="one"), geometry).names == ("1",)


@pytest.mark.filterwarnings("ignore:.crs. was not provided")
def test_a_scene_that_no_region_touches_keeps_their_names(tmp_path):
    path = write(tmp_path / "r.gpkg", [shapely.box(500002, 3999990, 500010, 3999999)], district=["a"])
    far = RasterGeometry((20, 20), (1, 0, 600000, 0, -1, 4000000), UTM)
    regions = load_regions(Regions(path=path, name="district"), far)
    assert regions.names == ("a",)
    assert fixed(regions, (20, 20), (20, 20)) == [0]
    assert "none of its 1 regions touches the scene" in regions.notes[0]


def test_what_cannot_be_is_refused_with_what_would_be_valid(tmp_path):
    box = shapely.box(500002, 3999990, 500010, 3999999)
    geometry = RasterGeometry((20, 20), (1, 0, 500000, 0, -1, 4000000), UTM)
    path = write(tmp_path / "r.gpkg", [box], district=["a"], code=[1])
    with pytest.raises(RequestError, match=r"found 'name'; attributes of .*: district, code"):
        load_regions(Regions(path=path, name="name"), geometry)
    bare = RasterGeometry((20, 20), geometry.transform, None)
    with pytest.raises(SceneError, match="the scene has none"):
        load_regions(Regions(path=path), bare)
    free = write(tmp_path / "free.gpkg", [box], crs=None)
    with pytest.raises(RequestError, match="has no CRS and the scenes have one"):
        load_regions(Regions(path=free), geometry)
    assert fixed(load_regions(Regions(path=free), bare), (20, 20), (20, 20)) == [72 * FULL]
    with pytest.raises(RequestError, match="cannot be read"):
        load_regions(Regions(path=str(tmp_path / "absent.gpkg")), geometry)
    with pytest.raises(RequestError, match="polygons are expected"):
        load_regions(Regions(path=write(tmp_path / "p.gpkg", [box.centroid])), geometry)
    with pytest.raises(RequestError, match="the scene is a volume"):
        load_regions(Regions(path=path), volume_geometry((3, 3, 3), np.eye(4)))


@pytest.mark.filterwarnings("ignore:.crs. was not provided")
def test_pixel_coordinates_without_any_crs(tmp_path):
    path = write(tmp_path / "r.gpkg", [shapely.box(1, 2, 4, 7.5)], crs=None)
    geometry = RasterGeometry((10, 10), (1, 0, 0, 0, 1, 0), None)
    got = dense(load_regions(Regions(path=path), geometry), (10, 10), (10, 10))
    expected = np.zeros((10, 10), dtype=np.int64)
    expected[2:7, 1:4] = FULL
    expected[7, 1:4] = FULL // 2
    np.testing.assert_array_equal(got, expected)


def test_thousand_polygons_and_the_same_bits_twice(tmp_path):
    rng = np.random.default_rng(1)
    centres = rng.uniform(0, 2048, (1000, 2))
    polygons = [shapely.Point(500000 + x, 4000000 - y).buffer(20) for x, y in centres]
    geometry = RasterGeometry((2048, 2048), (1, 0, 500000, 0, -1, 4000000), UTM)
    path = write(tmp_path / "r.gpkg", polygons)
    regions, again = (load_regions(Regions(path=path), geometry) for _ in range(2))
    tile = Box.whole((2048, 2048))
    clock = time.perf_counter()
    covers = list(regions.cover(tile))
    assert time.perf_counter() - clock < 10
    scene = shapely.box(500000, 4000000 - 2048, 502048, 4000000)
    inside = shapely.area(shapely.intersection(polygons, scene))
    for one, two in zip(covers, again.cover(tile), strict=True):
        assert (one.region, one.box) == (two.region, two.box)
        np.testing.assert_array_equal(one.fraction, two.fraction)
        assert one.fraction.sum() / FULL == pytest.approx(inside[one.region], abs=200 / FULL)


@pytest.mark.parametrize(
    ("image", "layer", "count", "total"),
    [
        ("spacenet_buildings/image.tif", "spacenet_buildings/buildings.geojson", 43, 8459.4),
        # hand-labelled, in a CRS that is written differently from the scene's
        ("nc_landsat/landsat_multiband.tif", "nc_landsat/landsat96_polygons.shp", 33, 1_876_814.1),
    ],
    ids=["spacenet-footprints", "nc-landsat-training-areas"],
)
def test_polygons_of_real_layers_keep_their_area(image, layer, count, total):
    """Those that meet the scene, in m² by geopandas: in the scene, and what sticks out of it."""
    layer = data(layer)
    with rasterio.open(data(image)) as raster:
        geometry = RasterGeometry(raster.shape, raster.transform[:6], raster.crs.to_wkt())
    regions = load_regions(Regions(path=str(layer)), geometry)
    frame = geopandas.read_file(layer)
    bounds = rasterio.transform.array_bounds(*geometry.shape, geometry.affine)
    inside = frame.geometry.intersects(shapely.box(*bounds)).to_numpy()
    areas = frame.geometry.area.where(inside, 0)
    got = np.array(fixed(regions, geometry.shape, (2048, 2048)))
    got += [regions.outside(i) for i in range(len(got))]
    got = got / FULL * geometry.element_sizes()[0]
    np.testing.assert_allclose(got, areas, rtol=1e-4)
    assert inside.sum() == count
    assert got.sum() == pytest.approx(total, rel=6e-6)


def test_geoparquet(tmp_path):
    """As any other layer: names, CRS and area; what it lacks is said."""
    box = shapely.box(500002, 3999990, 500010, 3999999)
    frame = geopandas.GeoDataFrame({"district": ["a"], "geometry": [box]}, crs="EPSG:32616")
    geometry = RasterGeometry((20, 20), (1, 0, 500000, 0, -1, 4000000), UTM)
    for name, crs in (("r.parquet", 32616), ("r.geoparquet", 3857)):
        path = str(tmp_path / name)
        frame.to_crs(crs).to_parquet(path)
        regions = load_regions(Regions(path=path, name="district"), geometry)
        assert regions.names == ("a",)
        assert fixed(regions, (20, 20), (20, 20))[0] / FULL == pytest.approx(72, abs=1e-3)
    with pytest.raises(RequestError, match=r"found 'b'; .* is GeoParquet and has no layers"):
        load_regions(Regions(path=path, layer="b"), geometry)
    with pytest.raises(RequestError, match=r"found 'name'; attributes of .*: district"):
        load_regions(Regions(path=path, name="name"), geometry)
    pandas_only = str(tmp_path / "plain.parquet")
    frame.drop(columns="geometry").to_parquet(pandas_only)
    (tmp_path / "text.parquet").write_text("text")
    for broken in (pandas_only, str(tmp_path / "text.parquet"), str(tmp_path / "absent.parquet")):
        with pytest.raises(RequestError, match=r"cannot be read .*; give a vector layer .*GeoParquet"):
            load_regions(Regions(path=broken), geometry)


def test_geoparquet_with_spherical_edges_is_refused(tmp_path):
    """BigQuery writes such: a great circle is not the straight line that would be measured."""
    path = tmp_path / "r.parquet"
    geopandas.GeoDataFrame(geometry=[shapely.box(-88, 35, -87, 37)], crs="EPSG:4326").to_parquet(path)
    table = pyarrow.parquet.read_table(path)
    metadata = json.loads(table.schema.metadata[b"geo"])
    metadata["columns"]["geometry"]["edges"] = "spherical"
    table = table.replace_schema_metadata({**table.schema.metadata, b"geo": json.dumps(metadata)})
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(RequestError, match="has spherical edges; write it with planar ones"):
        load_regions(Regions(path=str(path)), RasterGeometry((9, 9), (1, 0, 5e5, 0, -1, 4e6), UTM))


def test_neighbours_keep_their_common_border_in_another_crs(tmp_path):
    """Two districts that share a long edge, which each runs along the other way: no gap, no overlap."""
    there = Transformer.from_crs(32632, 4326, always_xy=True)
    x, y = there.transform([300000, 450000, 450000, 300000], [5500000, 5500000, 5300000, 5300000])
    a, b, c, d = zip(x, y, strict=True)
    path = write(tmp_path / "r.gpkg", [shapely.Polygon([a, b, c]), shapely.Polygon([a, c, d])], crs=4326)
    geometry = RasterGeometry((300, 200), (500, 0, 320000, 0, -500, 5480000), CRS(32632).to_wkt())
    regions = load_regions(Regions(path=path), geometry)
    both = sum(dense(regions, geometry.shape, geometry.shape, i) for i in (0, 1))
    assert np.abs(both[10:, 10:-10] - FULL).max() <= 1
