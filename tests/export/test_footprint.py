"""Outlines of rasters in WGS 84, held against pyproj's bounds and points of the scene."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from pyproj import CRS, Transformer

from segpipe.errors import SceneError
from segpipe.export.footprint import outline, why_no_place
from segpipe.geometry.geometry import RasterGeometry


def raster(crs: str, shape: tuple[int, int], *transform: float) -> RasterGeometry:
    return RasterGeometry(shape, transform, CRS.from_user_input(crs).to_wkt())  # type: ignore[arg-type]


def holds(shape: shapely.Geometry, geometry: RasterGeometry) -> tuple[float, float]:
    """Shares of points inside and of points outside the raster that the outline has in it."""
    rng = np.random.default_rng(5)
    rows, columns = geometry.shape
    back = Transformer.from_crs(geometry.crs, "OGC:CRS84", always_xy=True)
    shares = []
    for low, high, keep in ((0.01, 0.99, "in"), (-0.3, 1.3, "out")):
        uv = rng.uniform(low, high, (2000, 2))
        if keep == "out":
            uv = uv[((uv < -0.01) | (uv > 1.01)).any(axis=1)]
        a, b, c, d, e, f = geometry.transform
        x, y = uv[:, 0] * columns, uv[:, 1] * rows
        lon, lat = back.transform(a * x + b * y + c, d * x + e * y + f)
        shares.append(float(shapely.contains_xy(shape, lon, lat).mean()))
    return shares[0], shares[1]


@pytest.mark.parametrize(
    ("crs", "shape", "transform"),
    [
        ("EPSG:32617", (7000, 7600), (30.0, 0.0, 199_000.0, 0.0, -30.0, 4_260_000.0)),
        ("EPSG:32617", (700, 900), (21.0, 9.0, 500_000.0, 9.0, -21.0, 4_000_000.0)),  # rotated
        ("EPSG:4326", (100, 200), (0.01, 0.0, 10.0, 0.0, 0.01, 45.0)),  # south up
        ("EPSG:3035", (4000, 4000), (1000.0, 0.0, 2_600_000.0, 0.0, -1000.0, 5_400_000.0)),
    ],
)
def test_it_is_where_the_raster_is(crs: str, shape: tuple[int, int], transform: tuple[float, ...]) -> None:
    geometry = raster(crs, shape, *transform)
    found, bounds = outline(geometry)
    corners = np.array([[0, 0], [shape[1], 0], [shape[1], shape[0]], [0, shape[0]]]) @ np.array(
        [[transform[0], transform[3]], [transform[1], transform[4]]]
    ) + [transform[2], transform[5]]
    project = Transformer.from_crs(crs, "OGC:CRS84", always_xy=True)
    polygon = shapely.geometry.shape(found)
    assert found["type"] == "Polygon"
    assert polygon.exterior.is_ccw
    if transform[1] == 0:
        box = project.transform_bounds(*corners.min(axis=0), *corners.max(axis=0), densify_pts=2001)
        assert np.allclose(bounds, box, atol=2e-3 if crs == "EPSG:3035" else 1e-6)
    assert np.allclose(polygon.bounds, bounds, atol=1e-6)
    for lon, lat in zip(*project.transform(corners[:, 0], corners[:, 1]), strict=True):
        assert polygon.exterior.distance(shapely.Point(lon, lat)) < 1e-6
    inside, outside = holds(polygon, geometry)
    assert (inside, outside) == (1.0, 0.0)


def test_a_straight_line_between_corners_would_be_wrong() -> None:
    """The northern edge of a UTM raster bends by more than a hundred metres."""
    geometry = raster("EPSG:32617", (7000, 7600), 30.0, 0.0, 199_000.0, 0.0, -30.0, 4_260_000.0)
    polygon = shapely.geometry.shape(outline(geometry)[0])
    project = Transformer.from_crs("EPSG:32617", "OGC:CRS84", always_xy=True)
    ends = project.transform([199_000.0, 427_000.0], [4_260_000.0] * 2)
    middle = project.transform(313_000.0, 4_260_000.0)
    straight = shapely.LineString(list(zip(*ends, strict=True)))
    assert straight.distance(shapely.Point(middle)) > 1e-3
    assert polygon.exterior.distance(shapely.Point(middle)) < 1e-6


def test_over_the_antimeridian_it_has_two_parts_and_west_is_greater() -> None:
    geometry = raster("EPSG:32601", (1000, 1000), 300.0, 0.0, 200_000.0, 0.0, -300.0, 7_000_000.0)
    found, (west, south, east, north) = outline(geometry)
    assert found["type"] == "MultiPolygon"
    assert west > 170
    assert east < -160
    assert south < north
    box = Transformer.from_crs("EPSG:32601", "OGC:CRS84", always_xy=True).transform_bounds(
        200_000.0, 6_700_000.0, 500_000.0, 7_000_000.0, densify_pts=2001
    )
    assert np.allclose((west, south, east, north), box, atol=1e-4)
    assert holds(shapely.geometry.shape(found), geometry) == (1.0, 0.0)


@pytest.mark.parametrize(("crs", "pole"), [("EPSG:3413", 90.0), ("EPSG:3031", -90.0)])
def test_around_a_pole(crs: str, pole: float) -> None:
    geometry = raster(crs, (1000, 1200), 1000.0, 0.0, -500_000.0, 0.0, -1000.0, 600_000.0)
    found, bounds = outline(geometry)
    assert (bounds[0], bounds[2]) == (-180.0, 180.0)
    shape = shapely.geometry.shape(found)
    assert shape.bounds[1 if pole < 0 else 3] == pole
    inside, outside = holds(shape, geometry)
    assert inside > 0.998  # chords between vertices cut a little off near the ring's straight edges
    assert outside < 0.002


def test_the_whole_world_from_0_to_360_degrees() -> None:
    found, bounds = outline(raster("EPSG:4326", (721, 1440), 0.25, 0.0, 0.0, 0.0, -0.25, 90.125))
    assert bounds == [-180.0, -90.0, 180.0, 90.0]
    assert np.isclose(shapely.geometry.shape(found).area, 360 * 180)


def test_where_there_is_no_place_it_says_why() -> None:
    nowhere = RasterGeometry((10, 10), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
    moon = raster("IAU_2015:30100", (10, 10), 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
    assert why_no_place(nowhere) == "it has no CRS"
    assert "WGS 84" in why_no_place(moon)
    with pytest.raises(SceneError, match="no CRS"):
        outline(nowhere)
