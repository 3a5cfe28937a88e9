"""Grids as regions: squares against arithmetic, H3 cells against the h3 library and geodesics."""

import sys

import h3
import numpy as np
import pytest
from affine import Affine
from pyproj import CRS, Geod, Transformer

from segpipe.config.job import Regions
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.regions import load_regions
from segpipe.regions.base import FULL, is_grid
from tests.regions.tools import UTM, fixed

WGS84 = CRS(4326).to_wkt()


def raster(crs, transform, shape=(100, 100)):
    return RasterGeometry(shape, transform[:6], crs)


def grid(path, geometry):
    return load_regions(Regions(path=path), geometry)


def by_name(regions, geometry):
    """Elements of each region, by its name."""
    return {
        n: c / FULL
        for n, c in zip(regions.names, fixed(regions, geometry.shape, geometry.shape), strict=True)
    }


def total(regions, geometry):
    """Cover of every element by all regions together, in elements."""
    result = np.zeros(geometry.shape, dtype=np.int64)
    for cover in regions.cover(geometry.box):
        result[cover.box.slices] += FULL if cover.fraction is None else cover.fraction
    return result / FULL


# squares


def test_squares_lie_on_multiples_of_their_size():
    """A scene of 1 × 1 km, 300 m east and 200 m south of a multiple of 500 m: three by three squares."""
    geometry = raster(UTM, (10, 0, 500300, 0, -10, 3999800))
    regions = grid("grid:500", geometry)
    width = {"E500000": 20, "E500500": 50, "E501000": 30}  # elements of the scene in each column
    height = {"N3998500": 20, "N3999000": 50, "N3999500": 30}
    assert by_name(regions, geometry) == {
        e + n: columns * rows for e, columns in width.items() for n, rows in height.items()
    }
    assert (total(regions, geometry) == 1).all()
    beyond = {n: regions.outside(i) / FULL for i, n in enumerate(regions.names)}
    assert beyond["E500000N3998500"] == 2500 - 400
    assert beyond["E500500N3999000"] == 0
    assert "500 metre of WGS 84 / UTM zone 16N" in regions.notes[0]


def test_squares_of_neighbouring_scenes_coincide():
    """A square that two scenes share has one name, and its parts add up to the whole."""
    one, two = (raster(UTM, (10, 0, x, 0, -10, 4e6)) for x in (499700, 500700))
    first, second = (by_name(grid("grid:1000", g), g) for g in (one, two))
    assert set(first) & set(second) == {"E500000N3999000"}
    assert first["E500000N3999000"] + second["E500000N3999000"] == 10_000


def test_only_squares_that_meet_a_turned_scene():
    """A scene on its corner, four squares high and wide: those in the corners of its bounds are left out."""
    turned = Affine.translation(500000, 3998000) @ Affine.rotation(45) @ Affine.scale(20 * np.sqrt(2))
    geometry = raster(UTM, turned)
    regions = grid("grid:1000", geometry)
    assert len(regions.names) == 12
    corners = {x + y for x in ("E498000", "E501000") for y in ("N3998000", "N4001000")}
    assert not corners & set(regions.names)
    assert np.abs(total(regions, geometry) - 1).max() < 8 / FULL


def test_squares_in_degrees_and_without_a_crs():
    geometry = raster(WGS84, (0.01, 0, -0.2, 0, -0.01, 0.1), (30, 40))
    regions = grid("grid:0.10", geometry)
    assert len(regions.names) == 4 * 3
    assert {"W0.2N0", "W0.1S0.1", "E0S0.2", "E0.1N0"} < set(regions.names)
    assert all(n == pytest.approx(100, abs=1e-3) for n in by_name(regions, geometry).values())
    bare = raster(None, (1, 0, 0, 0, 1, 0), (30, 40))
    assert by_name(grid("grid:25", bare), bare) == {
        "E0N0": 625, "E25N0": 375, "E0N25": 125, "E25N25": 75
    }  # fmt: skip


# H3


def h3_geodesic_area(cell):
    """m² on the ellipsoid between the cell's vertices, by Karney's algorithm."""
    lat, lon = np.array(h3.cell_to_boundary(cell)).T
    return abs(Geod(ellps="WGS84").polygon_area_perimeter(lon, lat)[0])


def test_h3_cells_over_a_geographic_scene():
    """The cells that h3 itself finds to overlap the scene, and each with its area on the ellipsoid."""
    geometry = raster(WGS84, (0.0005, 0, 11.0, 0, -0.0005, 48.0), (300, 400))
    regions = grid("h3:7", geometry)
    outline = h3.LatLngPoly([(48, 11), (48, 11.2), (47.85, 11.2), (47.85, 11)])
    assert set(regions.names) == set(h3.h3shape_to_cells_experimental(outline, 7, "overlap"))
    assert np.abs(total(regions, geometry) - 1).max() <= 2 / FULL
    sizes = geometry.element_sizes()
    whole = [cover for cover in regions.cover(geometry.box) if regions.outside(cover.region) == 0]
    assert len(whole) > 20
    for cover in whole:
        area = sizes[cover.box.slices[0]] @ cover.fraction.sum(axis=1) / FULL
        # edges of 1.4 km: great circles of H3's sphere and geodesics are a millimetre apart
        assert area == pytest.approx(h3_geodesic_area(regions.names[cover.region]), rel=1e-5)


@pytest.mark.parametrize("code", [32632, 3857, 3035])
def test_h3_cells_hold_the_elements_that_h3_puts_there(code):
    """Of a scene in any CRS, every element that one cell covers wholly: h3 finds the same cell for it."""
    x, y = Transformer.from_crs(4326, code, always_xy=True).transform(9.5, 52.5)
    geometry = raster(CRS(code).to_wkt(), (50, 0, x, 0, -50, y), (60, 80))
    regions = grid("h3:8", geometry)
    column, row = np.meshgrid(np.arange(80) + 0.5, np.arange(60) + 0.5)
    lon, lat = Transformer.from_crs(code, 4326, always_xy=True).transform(x + 50 * column, y - 50 * row)
    expected = np.vectorize(lambda a, b: h3.latlng_to_cell(a, b, 8))(lat, lon)
    seen = 0
    for cover in regions.cover(geometry.box):
        inside = cover.fraction == FULL
        assert (expected[cover.box.slices][inside] == regions.names[cover.region]).all()
        seen += inside.sum()
    assert seen > 0.8 * 60 * 80
    assert np.abs(total(regions, geometry) - 1).max() <= 2 / FULL


AWKWARD = {
    "globe": (0, 4326, (2, 0, -180, 0, -2, 90), (90, 180)),
    "globe from 0 to 360": (0, 4326, (2, 0, 0, 0, -2, 90), (90, 180)),
    "globe, half a pixel beyond the antimeridian": (0, 4326, (2, 0, -181, 0, -2, 90), (90, 180)),
    "north pole": (4, 3995, (2000, 0, -1e5, 0, -2000, 1e5), (100, 100)),
    "south pole": (4, 3031, (2000, 0, -1e5, 0, -2000, 1e5), (100, 100)),
    "antimeridian in UTM": (5, 32760, (1000, 0, 750000, 0, -1000, 8050000), (100, 100)),
    "antimeridian in degrees": (5, 4326, (0.01, 0, 179.5, 0, -0.01, 10), (100, 100)),
    "one cell larger than the scene": (0, 32632, (10, 0, 3e5, 0, -10, 5e6), (50, 50)),
}


@pytest.mark.parametrize("place", AWKWARD)
def test_h3_cells_partition_any_place(place):
    """Poles, the antimeridian, the whole Earth: each element is covered once."""
    resolution, code, transform, shape = AWKWARD[place]
    geometry = raster(CRS(code).to_wkt(), transform, shape)
    regions = grid(f"h3:{resolution}", geometry)
    assert np.abs(total(regions, geometry) - 1).max() <= 3 / FULL
    assert all(h3.is_valid_cell(name) for name in regions.names)
    if place.startswith("globe"):
        assert len(regions.names) == h3.get_num_cells(resolution)
    if place.endswith("pole"):
        assert h3.latlng_to_cell(90 if code == 3995 else -90, 0, resolution) in regions.names


# what cannot be


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"path": "grid:big"}, r"found 'grid:big'; valid: grid:SIZE, above 0"),
        ({"path": "grid:-5"}, "above 0"),
        ({"path": "grid:0"}, "above 0"),
        ({"path": "grid:inf"}, "above 0"),
        ({"path": "grid:nan"}, "above 0"),
        ({"path": "grid:"}, "above 0"),
        ({"path": "h3:16"}, r"found 'h3:16'; valid: h3:RESOLUTION, 0 .* to 15"),
        ({"path": "h3:7.5"}, "valid: h3:RESOLUTION"),
        ({"path": "grid:1000", "name": "id"}, r"regions.name: found 'id'; grid:1000 names its own cells"),
        ({"path": "h3:7", "layer": "a"}, r"regions.layer: found 'a'"),
    ],
)
def test_grids_that_are_none(config, message):
    assert is_grid(config["path"])
    with pytest.raises(RequestError, match=message):
        load_regions(Regions(**config), raster(UTM, (10, 0, 500000, 0, -10, 4e6)))


def test_grids_that_do_not_suit_the_scene(monkeypatch):
    scene = raster(UTM, (10, 0, 500000, 0, -10, 4e6))
    with pytest.raises(SceneError, match=r"grid:2 makes 250000 cells .* at most 100000: give a larger SIZE"):
        grid("grid:2", scene)
    with pytest.raises(SceneError, match=r"the scene has no CRS; valid: grid:SIZE"):
        grid("h3:7", raster(None, (1, 0, 0, 0, 1, 0)))
    for path in ("grid:10", "h3:7"):
        with pytest.raises(RequestError, match="the scene is a volume; give a label atlas"):
            grid(path, volume_geometry((3, 3, 3), np.eye(4)))
    monkeypatch.setitem(sys.modules, "h3", None)  # what an import finds where it is not installed
    with pytest.raises(RequestError, match=r"needs h3, .*: pip install 'segpipe\[h3\]'"):
        grid("h3:7", scene)
    assert len(grid("grid:1000", scene).names) == 1  # squares need no h3


def test_identity_follows_the_grid_and_the_scene():
    scene = raster(UTM, (10, 0, 500000, 0, -10, 4e6))
    assert grid("grid:500", scene).identity() == grid("grid:500.0", scene).identity()
    assert grid("grid:500", scene).identity() != grid("grid:250", scene).identity()
