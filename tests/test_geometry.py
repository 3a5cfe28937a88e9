"""Element sizes against pyproj's geodesics, and properties of the geometry's value types."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS, Geod, Transformer

from segpipe.errors import SceneError
from segpipe.geometry.geometry import RasterGeometry, geometry_from_dict, is_mercator, volume_geometry


def raster(code, transform, shape=(3, 4)):
    return RasterGeometry(shape, transform, None if code is None else CRS(code).to_wkt())


def geodesic_cell(geometry, row, points=2000):
    """Area of the cell (row, 0) on the ellipsoid, by pyproj, its edges cut into short geodesics."""
    crs = geometry.projection
    steps = np.linspace(0, 1, points)[:-1]
    one, nil = np.ones_like(steps), np.zeros_like(steps)
    column = np.concatenate([steps, one, 1 - steps, nil])
    line = np.concatenate([nil, steps, one, 1 - steps]) + row
    a, b, c, d, e, f = geometry.transform
    x, y = a * column + b * line + c, d * column + e * line + f
    lon, lat = Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True).transform(x, y)
    to_degrees = np.degrees(crs.geodetic_crs.axis_info[0].unit_conversion_factor)
    ellipsoid = crs.ellipsoid
    flattening = 1 / ellipsoid.inverse_flattening if ellipsoid.inverse_flattening else 0.0
    geod = Geod(a=ellipsoid.semi_major_metre, f=flattening)
    area, _ = geod.polygon_area_perimeter(np.asarray(lon) * to_degrees, np.asarray(lat) * to_degrees)
    return abs(area)


@pytest.mark.parametrize("latitude", [-89.0, -45.0, -1.0, 0.5, 30.0, 60.0, 89.0])
@pytest.mark.parametrize("code", ["EPSG:4326", "EPSG:4269", "EPSG:4979", "EPSG:4326+5773"])
def test_a_degree_is_as_large_as_on_the_ellipsoid(code, latitude):
    geometry = raster(code, (1.0, 0, 10.0, 0, -1.0, latitude + 0.5))
    assert geometry.element_sizes()[0] == pytest.approx(geodesic_cell(geometry, 0), rel=1e-6)
    assert geometry.size_unit == "m2"


def test_grads_of_paris():
    geometry = raster("EPSG:4807", (0.5, 0, 2.0, 0, -0.5, 52.0))
    assert geometry.element_sizes()[1] == pytest.approx(geodesic_cell(geometry, 1), rel=1e-6)


def test_the_globe_adds_up_to_the_ellipsoid():
    geometry = RasterGeometry((180, 360), (1.0, 0, -180.0, 0, -1.0, 90.0), CRS(4326).to_wkt())
    whole = geometry.element_sizes().sum() * 360
    assert whole == pytest.approx(510065621724088.44, rel=1e-12)  # WGS 84, Moritz (2000)


def test_rows_beyond_the_pole_have_no_area():
    geometry = raster("EPSG:4326", (1.0, 0, 0.0, 0, -1.0, 91.0))
    assert geometry.element_sizes()[0] == 0
    assert geometry.element_sizes()[1] > 0


MERCATORS = ["EPSG:3857", "ESRI:102100", "EPSG:3395", "EPSG:3832", "EPSG:3994", "EPSG:3388"]


@pytest.mark.parametrize("northing", [-8e6, -1000.0, 1000.0, 5e6, 9e6])
@pytest.mark.parametrize("code", [*MERCATORS, "EPSG:3857+5773", "EPSG:3785"])
def test_mercator_is_as_large_as_on_the_ellipsoid(code, northing):
    geometry = raster(code, (1000.0, 0, 2e5, 0, -1000.0, northing))
    assert geometry.element_sizes()[0] == pytest.approx(geodesic_cell(geometry, 0), rel=1e-6)


@pytest.mark.parametrize("latitude", [0.0, 45.0, 60.0])
def test_web_mercator_is_not_taken_as_metres(latitude):
    _, y = Transformer.from_crs(4326, 3857, always_xy=True).transform(0, latitude)
    geometry = raster("EPSG:3857", (10.0, 0, 0.0, 0, -10.0, y + 5))
    scale = np.cos(np.radians(latitude)) ** 2
    assert geometry.element_sizes()[0] == pytest.approx(100 * scale, rel=0.01)


def test_web_mercator_south_up_and_as_gdal_writes_it():
    import rasterio

    wkt = rasterio.crs.CRS.from_epsg(3857).to_wkt()
    down = RasterGeometry((3, 4), (10.0, 0, 0.0, 0, -10.0, 5e6), wkt)
    up = RasterGeometry((3, 4), (10.0, 0, 0.0, 0, 10.0, 5e6 - 30), wkt)
    np.testing.assert_allclose(up.element_sizes()[::-1], down.element_sizes(), rtol=1e-9)


@pytest.mark.parametrize("code", ["EPSG:32616", "EPSG:2193", "EPSG:3358", "EPSG:2056"])
def test_transverse_and_conic_are_taken_as_metres(code):
    assert not is_mercator(CRS(code))
    sizes = raster(code, (28.5, 0, 630534.0, 0, -28.5, 228114.0)).element_sizes()
    np.testing.assert_array_equal(sizes, [812.25] * 3)


def test_utm_is_near_the_ellipsoid():
    geometry = raster("EPSG:32616", (30.0, 0, 500000.0, 0, -30.0, 3.7e6))
    nominal, true = geometry.element_sizes()[0], geodesic_cell(geometry, 0)
    assert nominal == pytest.approx(true * 0.9996**2, rel=1e-6)


def test_survey_feet():
    """EPSG:2264, North Carolina in US survey feet of 1200/3937 m."""
    geometry = raster("EPSG:2264", (100.0, 0, 2.0e6, 0, -100.0, 6.5e5))
    exact = (100 * 1200 / 3937) ** 2
    np.testing.assert_allclose(geometry.element_sizes(), exact, rtol=1e-12)
    assert geometry.element_sizes()[0] == pytest.approx(geodesic_cell(geometry, 0), rel=4e-4)


@given(st.floats(0, 360), st.floats(0.1, 100), st.floats(0.1, 100), st.booleans())
def test_rotated_projected_pixels(angle, width, height, flipped):
    turn = np.radians(angle)
    e = height if flipped else -height
    a, d = width * np.cos(turn), width * np.sin(turn)
    b, e = -e * np.sin(turn), e * np.cos(turn)
    geometry = raster("EPSG:32616", (a, b, 4e5, d, e, 4e6))
    np.testing.assert_allclose(geometry.element_sizes(), width * height, rtol=1e-9)
    np.testing.assert_allclose(geometry.spacing, (height, width), rtol=1e-9)


def test_bound_crs_is_looked_through():
    crs = CRS("+proj=merc +lon_0=0 +ellps=WGS84 +towgs84=1,2,3 +type=crs")
    assert crs.is_bound
    plain = raster("EPSG:3395", (10.0, 0, 0.0, 0, -10.0, 5e6))
    bound = RasterGeometry((3, 4), plain.transform, crs.to_wkt())
    np.testing.assert_allclose(bound.element_sizes(), plain.element_sizes(), rtol=1e-9)


def test_no_crs_counts_pixels():
    geometry = raster(None, (30.0, 0, 0.0, 0, -30.0, 0.0))
    assert (geometry.size_unit, geometry.spacing) == ("px", None)
    np.testing.assert_array_equal(geometry.element_sizes(), [1, 1, 1])


@pytest.mark.parametrize("code", ["EPSG:4326", "EPSG:3857"])
def test_rotated_geographic_is_refused(code):
    with pytest.raises(SceneError, match="rotated"):
        raster(code, (1.0, 0.1, 0.0, 0.1, -1.0, 0.0)).element_sizes()


def test_shifted_poles_and_geocentric_are_refused():
    pole = "+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39 +lon_0=18 +R=6371229 +type=crs"
    with pytest.raises(SceneError, match="poles"):
        raster(pole, (1.0, 0, 0.0, 0, -1.0, 0.0)).element_sizes()
    with pytest.raises(SceneError, match="neither geographic nor projected"):
        raster("EPSG:4978", (1.0, 0, 0.0, 0, -1.0, 0.0)).element_sizes()


spacings = st.tuples(*[st.floats(0.1, 10)] * 3)


@settings(max_examples=50)
@given(spacings, st.integers(0, 2**32 - 1), st.booleans())
def test_oblique_volumes_keep_spacing_and_volume(spacing, seed, mirrored):
    """A random rotation of the axes changes neither; spacing is in array order (z, y, x)."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(spacing) @ np.diag([-1 if mirrored else 1, 1, 1])
    geometry = volume_geometry((2, 3, 4), affine)
    np.testing.assert_allclose(geometry.element_sizes(), [np.prod(spacing)] * 2, rtol=1e-9)
    np.testing.assert_allclose(geometry.spacing, spacing[::-1], rtol=1e-9)
    assert geometry.size_unit == "mm3"


def test_plain_voxels_are_not_rounded():
    geometry = volume_geometry((2, 1, 1), np.diag([-2.0, 2, 2, 1]))
    np.testing.assert_array_equal(geometry.element_sizes(), [8.0, 8.0])


def test_sheared_volume_has_the_parallelepiped_s_volume():
    affine = np.array([[1, 0.5, 0, 0], [0, 2, 0.3, 0], [0, 0, 3, 0], [0, 0, 0, 1]], dtype=float)
    a, b, c = affine[:3, :3].T
    triple = abs(np.dot(a, np.cross(b, c)))
    np.testing.assert_allclose(volume_geometry((1, 1, 1), affine).element_sizes(), [triple])


def test_orientation_of_nibabels_oblique_file():
    from pathlib import Path

    import nibabel

    path = Path(nibabel.__file__).parent / "tests" / "data" / "example4d.nii.gz"
    if not path.exists():
        pytest.skip("nibabel came without its test files")
    image = nibabel.load(path)
    geometry = volume_geometry(image.shape[2::-1], image.affine)
    zooms = [float(z) for z in image.header.get_zooms()[2::-1]]
    np.testing.assert_allclose(geometry.spacing, zooms, rtol=1e-5)
    np.testing.assert_allclose(geometry.element_sizes(), np.prod(zooms), rtol=1e-5)
    assert geometry.orientation == "".join(nibabel.aff2axcodes(image.affine))


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(st.tuples(*[numbers] * 6), st.sampled_from([None, "EPSG:32616", "EPSG:4326"]))
def test_rasters_survive_json(transform, code):
    geometry = raster(code, transform)
    assert geometry_from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry


@given(st.lists(numbers, min_size=12, max_size=12))
def test_volumes_survive_json(values):
    affine = np.vstack([np.reshape(values, (3, 4)), [0, 0, 0, 1]])
    geometry = volume_geometry((5, 6, 7), affine)
    assert geometry_from_dict(json.loads(json.dumps(geometry.to_dict()))) == geometry
