"""Areas of classes in regions, from label map to square metres, against libraries and the ellipsoid.

Oracles: exactextract (fractions) and rasterstats (whole pixels) for counts, pyproj's geodesics for
areas on the ellipsoid, shapely for planar ones, and the published area of the SpaceNet footprints.
"""

from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from exactextract import exact_extract
from pyproj import CRS, Geod, Transformer
from rasterstats import zonal_stats
from shapely.affinity import translate

from segpipe.config.job import Regions
from segpipe.geometry.geometry import RasterGeometry
from segpipe.metrics.tally import SizeScale, add, measure_tile, measure_tiles
from segpipe.regions import load_regions
from segpipe.regions.base import FULL

SPACENET = Path(__file__).resolve().parents[2] / "shared" / "data" / "spacenet_buildings"
UTM = "EPSG:32616"
CLASSES = 4
NO_MATMUL = pytest.mark.filterwarnings("ignore:Use `@` matmul")  # in rasterstats' and rasterio's own code


def geometry_of(path):
    with rasterio.open(path) as source:
        crs = None if source.crs is None else source.crs.to_wkt()
        return RasterGeometry(source.shape, source.transform[:6], crs), source.read(1)


def tallied(geometry, labels, path):
    """Elements and area by region and class: two arrays (regions, CLASSES), and the regions."""
    regions, scale = load_regions(Regions(path=str(path)), geometry), SizeScale.of(geometry)
    tally = add(
        measure_tile(labels[box.slices], None, None, regions, box, geometry.box, scale)
        for box in measure_tiles(geometry)
    )
    elements, areas = np.zeros((2, len(regions.names), CLASSES))
    for region, label, _, cover, size, _ in tally.rows():
        elements[region, label] = cover / FULL
        areas[region, label] = scale.size(size)
    return elements, areas, regions


def write_polygons(path, polygons, crs):
    geopandas.GeoDataFrame(geometry=list(polygons), crs=crs).to_file(path)
    return path


def write_labels(path, labels, transform, crs):
    profile = {
        "driver": "GTiff", "dtype": labels.dtype, "count": 1, "crs": crs, "transform": transform,
        "height": labels.shape[0], "width": labels.shape[1],
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as target:
        target.write(labels, 1)
    return path


def patches(shape, seed=0):
    """A label map of patches of 7 elements."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, CLASSES, tuple(n // 7 + 1 for n in shape), dtype=np.uint8)
    return coarse.repeat(7, 0).repeat(7, 1)[: shape[0], : shape[1]]


def stars(count, extent, seed=0):
    """Valid star-shaped polygons, some with a hole and some of two parts, that overlap."""
    rng = np.random.default_rng(seed)
    for index in range(count):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 13))
        reach = extent / 6 * rng.uniform(0.4, 1, 13)[:, None]
        centre = rng.uniform(0.2, 0.8, 2) * extent
        polygon = shapely.Polygon(centre + reach * np.column_stack((np.cos(angles), np.sin(angles))))
        polygon = polygon.buffer(0)
        if index % 2:
            polygon = polygon.difference(shapely.Point(centre).buffer(extent / 50))
        if index % 3 == 0:
            polygon = polygon.union(shapely.box(*(centre / 9), *(centre / 7)))
        yield polygon


@pytest.fixture(scope="module")
def zones(tmp_path_factory):
    """A label map of 500 × 500 elements of 10 m, and 40 overlapping polygons."""
    folder, transform = tmp_path_factory.mktemp("zones"), Affine(10, 0, 500000, 0, -10, 4000000)
    labels = write_labels(folder / "labels.tif", patches((500, 500)), transform, UTM)
    polygons = [translate(p, 500000, 3995000) for p in stars(40, 5000)]
    return labels, write_polygons(folder / "zones.gpkg", polygons, UTM)


def test_equals_exactextract(zones):
    """Every region and class: the same fractional counts, and 100 m² an element."""
    elements, areas, _ = tallied(*geometry_of(zones[0]), zones[1])
    found = exact_extract(zones[0], geopandas.read_file(zones[1]), ["count", "unique", "frac"])
    expected = np.zeros_like(elements)
    for region, feature in enumerate(f["properties"] for f in found):
        expected[region, np.asarray(feature["unique"], int)] = feature["count"] * np.asarray(feature["frac"])
    assert (expected > 0).sum() > 100
    np.testing.assert_allclose(elements, expected, rtol=0, atol=2e-3)  # 2⁻¹⁷ for each edge element
    np.testing.assert_allclose(areas, 100 * elements, rtol=1e-12)
    whole = geopandas.read_file(zones[1]).area
    np.testing.assert_allclose(areas.sum(axis=1), whole, rtol=1e-7, atol=0.1)


@NO_MATMUL
def test_is_within_the_border_of_rasterstats(zones):
    """rasterstats counts pixels by their centre: as many, but for those that the border cuts."""
    geometry, labels = geometry_of(zones[0])
    elements, _, regions = tallied(geometry, labels, zones[1])
    found = zonal_stats(zones[1], zones[0], categorical=True, nodata=255)
    counts = np.array([[region.get(value, 0) for value in range(CLASSES)] for region in found])
    cut = [((c.fraction > 0) & (c.fraction < FULL)).sum() for c in regions.cover(geometry.box)]
    assert (np.abs(elements - counts).sum(axis=1) < np.array(cut) / 2).all()
    # the differences have no direction: together far smaller than the cut pixels' own
    assert elements.sum() == pytest.approx(counts.sum(), rel=1e-3)


@NO_MATMUL
def test_polygons_of_whole_pixels_equal_rasterstats(tmp_path, zones):
    """Where no pixel is cut there is nothing to disagree on: the same whole numbers."""
    rng = np.random.default_rng(2)
    corners = [(np.sort(rng.integers(0, 500, 2)), np.sort(rng.integers(0, 500, 2))) for _ in range(20)]
    boxes = [
        shapely.box(500000 + 10 * x[0], 4e6 - 10 * y[1] - 10, 500010 + 10 * x[1], 4e6 - 10 * y[0])
        for x, y in corners
    ]
    path = write_polygons(tmp_path / "boxes.gpkg", boxes, UTM)
    elements, _, _ = tallied(*geometry_of(zones[0]), path)
    found = zonal_stats(path, zones[0], categorical=True, nodata=255)
    counts = [[region.get(value, 0) for value in range(CLASSES)] for region in found]
    np.testing.assert_array_equal(elements, counts)


# On the ellipsoid


def geodesic_area(polygon, crs, step):
    """Area on the ellipsoid by Karney's algorithm, the polygon's edges cut into steps in its CRS.

    Straight edges in the raster's coordinates are no geodesics, so they are cut finely first: the
    difference falls with the square of the step.
    """
    fine = shapely.orient_polygons(shapely.segmentize(polygon, step))
    to_degrees = Transformer.from_crs(crs, 4326, always_xy=True).transform
    lonlat = shapely.transform(fine, lambda xy: np.column_stack(to_degrees(xy[:, 0], xy[:, 1])))
    return Geod(ellps="WGS84").geometry_area_perimeter(lonlat)[0]


@pytest.mark.parametrize("latitude", range(-80, 81, 10))
@pytest.mark.parametrize("rows_down", [True, False])
def test_geodesic_areas_by_latitude(tmp_path, latitude, rows_down):
    """Any polygons on a grid of 0.0005°: within 1e-6 of the area on the ellipsoid."""
    size, pixel = 400, 0.0005
    extent = size * pixel
    south = latitude - extent / 2
    transform = (pixel, 0, 10, 0, -pixel, south + extent) if rows_down else (pixel, 0, 10, 0, pixel, south)
    shapes = [shapely.box(*(pixel * np.array([31, 47, 351, 391])))]  # on the graticule of pixels
    shapes += [shapely.box(*(pixel * np.array([31.3, 47, 351.8, 391])))]  # pixels cut along meridians
    shapes += stars(4, extent)
    polygons = [translate(p, 10, south) for p in shapes]
    path = write_polygons(tmp_path / "zones.gpkg", polygons, "EPSG:4326")
    geometry = RasterGeometry((size, size), transform, CRS(4326).to_wkt())
    _, areas, _ = tallied(geometry, patches((size, size)), path)
    expected = [geodesic_area(p, 4326, pixel / 10) for p in polygons]
    np.testing.assert_allclose(areas.sum(axis=1), expected, rtol=1e-6)


@pytest.mark.parametrize("latitude", [0, 30, 60, 80])
def test_web_mercator_areas_are_those_on_the_ellipsoid(tmp_path, latitude):
    """Not 100 m² an element: at 60° a quarter of it."""
    size = 300
    _, middle = Transformer.from_crs(4326, 3857, always_xy=True).transform(0, latitude)
    top = round(middle, -1) + 10 * size / 2
    polygons = [translate(p, 1e6, top - 10 * size) for p in stars(5, 10 * size)]
    path = write_polygons(tmp_path / "zones.gpkg", polygons, "EPSG:3857")
    geometry = RasterGeometry((size, size), (10, 0, 1e6, 0, -10, top), CRS(3857).to_wkt())
    _, areas, _ = tallied(geometry, patches((size, size)), path)
    expected = [geodesic_area(p, 3857, 20) for p in polygons]
    np.testing.assert_allclose(areas.sum(axis=1), expected, rtol=1e-6)
    nominal = shapely.area(polygons)
    np.testing.assert_allclose(areas.sum(axis=1) / nominal, np.cos(np.radians(latitude)) ** 2, rtol=0.01)


# The same areas on any grid


TWINS = {
    "south-up": (lambda t, n: t @ Affine(1, 0, 0, 0, -1, n), np.flipud),
    "rows eastwards": (lambda t, n: t @ Affine(0, 1, 0, 1, 0, 0), np.transpose),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_with_other_axes_has_the_same_areas(zones, twin):
    """The same ground, its array flipped or transposed."""
    geometry, labels = geometry_of(zones[0])
    _, expected, _ = tallied(geometry, labels, zones[1])
    turn, arrange = TWINS[twin]
    transform = turn(geometry.affine, labels.shape[0])
    other = RasterGeometry(labels.shape, transform[:6], geometry.crs)
    _, areas, _ = tallied(other, arrange(labels), zones[1])
    np.testing.assert_allclose(areas, expected, rtol=0, atol=0.5)  # rounding of cover: 2⁻¹⁷ of 100 m²


def test_a_rotated_twin_has_the_same_areas(tmp_path, zones):
    """Raster and polygons turned together about a point by 33 degrees."""
    geometry, labels = geometry_of(zones[0])
    _, expected, _ = tallied(geometry, labels, zones[1])
    turn = Affine.rotation(33, pivot=(502000, 3998000))
    other = RasterGeometry(labels.shape, (turn @ geometry.affine)[:6], geometry.crs)
    turned = geopandas.read_file(zones[1]).affine_transform(turn.to_shapely())
    _, areas, _ = tallied(other, labels, write_polygons(tmp_path / "turned.gpkg", turned, UTM))
    np.testing.assert_allclose(areas, expected, rtol=0, atol=0.5)


@pytest.mark.filterwarnings("ignore:'crs' was not provided")
def test_a_twin_without_crs_counts_pixels(tmp_path, zones):
    geometry, labels = geometry_of(zones[0])
    elements, areas, _ = tallied(geometry, labels, zones[1])
    bare = RasterGeometry(geometry.shape, geometry.transform, None)
    path = write_polygons(tmp_path / "bare.gpkg", geopandas.read_file(zones[1]).geometry.values, None)
    assert bare.size_unit == "px"
    in_pixels, pixels, _ = tallied(bare, labels, path)
    np.testing.assert_array_equal(in_pixels, elements)
    np.testing.assert_array_equal(pixels * 100, areas)


# SpaceNet: 43 footprints of 8,459.4 m²


@pytest.fixture(scope="module")
def spacenet():
    if not SPACENET.exists():
        pytest.skip(f"{SPACENET} is not there")
    geometry, image = geometry_of(SPACENET / "image.tif")
    labels = np.digitize(image, np.quantile(image, [0.25, 0.5, 0.75])).astype(np.uint8)
    footprints = geopandas.read_file(SPACENET / "buildings.geojson")
    return geometry, labels, footprints


@pytest.mark.parametrize("crs", [UTM, "EPSG:4326", "EPSG:3857"])
@pytest.mark.parametrize("suffix", ["gpkg", "shp"])
def test_footprints_have_their_area_in_any_crs(tmp_path, spacenet, crs, suffix):
    """By fraction of cover 8,459.4 m², of which a little lies beyond the scene's border."""
    geometry, labels, footprints = spacenet
    path = tmp_path / f"footprints.{suffix}"
    footprints.to_crs(crs).to_file(path)
    _, areas, regions = tallied(geometry, labels, path)
    beyond = np.array([regions.outside(i) for i in range(len(regions.names))]) / FULL
    whole = areas.sum(axis=1) + beyond * geometry.element_sizes()[0]
    assert len(whole) == 43
    assert whole.sum() == pytest.approx(8459.4, rel=1e-4)
    np.testing.assert_allclose(whole, footprints.area, rtol=1e-4)
    frame = shapely.box(*rasterio.transform.array_bounds(*geometry.shape, geometry.affine))
    np.testing.assert_allclose(areas.sum(axis=1), footprints.intersection(frame).area, rtol=1e-4)


def test_footprints_on_grids_of_other_axes(tmp_path, spacenet):
    """South-up, and turned by 12 degrees with the footprints: class by class the same square metres."""
    geometry, labels, footprints = spacenet
    path = tmp_path / "footprints.gpkg"
    footprints.to_file(path)
    _, expected, _ = tallied(geometry, labels, path)
    up = RasterGeometry(
        geometry.shape, (geometry.affine @ Affine(1, 0, 0, 0, -1, labels.shape[0]))[:6], geometry.crs
    )
    _, areas, _ = tallied(up, labels[::-1], path)
    np.testing.assert_allclose(areas, expected, rtol=0, atol=1e-3)
    turn = Affine.rotation(12, pivot=geometry.affine @ (450, 450))
    turned = RasterGeometry(geometry.shape, (turn @ geometry.affine)[:6], geometry.crs)
    frame = footprints.set_geometry(footprints.affine_transform(turn.to_shapely()))
    _, areas, _ = tallied(turned, labels, write_polygons(tmp_path / "turned.gpkg", frame.geometry, UTM))
    np.testing.assert_allclose(areas, expected, rtol=0, atol=1e-3)
