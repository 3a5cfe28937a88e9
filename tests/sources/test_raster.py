"""A raster is read by windows exactly as GDAL reads it whole; valid means data in every band."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyproj
import pytest
import rasterio
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry
from segpipe.sources import Scaling, open_source
from segpipe.sources.raster import differs

Write = Callable[..., Path]
Noise = Callable[..., np.ndarray]


def test_landsat_scene_reads_as_rasterio_reads_it(shared: Callable[[str], Path]) -> None:
    path = shared("nc_landsat/landsat_multiband.tif")
    with rasterio.open(path) as dataset:
        whole, mask = dataset.read(), dataset.dataset_mask() > 0
        crs, transform = dataset.crs, tuple(dataset.transform)[:6]
    with open_source(str(path)) as source:
        assert (source.count, source.dtype, source.geometry.shape) == (5, np.float32, (443, 489))
        pixels = source.read(source.geometry.box)
        assert isinstance(source.geometry, RasterGeometry)
        assert source.geometry.transform == transform
        assert source.geometry.crs is not None
        assert CRS.from_wkt(source.geometry.crs) == crs
        assert pyproj.CRS.from_wkt(source.geometry.crs).is_projected
    np.testing.assert_array_equal(pixels.values, whole)
    # rasterio's dataset mask asks for data in any band, ours in all; here the frames coincide.
    np.testing.assert_array_equal(pixels.valid, (whole != -99999).all(axis=0))
    np.testing.assert_array_equal(pixels.valid, mask)
    assert 0.5 < pixels.valid.mean() < 1


def test_cloud_scene_has_names_tiles_and_no_crs(shared: Callable[[str], Path]) -> None:
    with open_source(str(shared("cloud_scenes/sentinel2_toa.tif"))) as source:
        assert source.bands == ("blue", "green", "red", "nir", "swir16", "swir22")
        assert isinstance(source.geometry, RasterGeometry)
        assert source.geometry.crs is None
        assert "no CRS: sizes are in pixels" in source.notes


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:3358", "EPSG:32616", "EPSG:2056"])
def test_crs_survives_source_and_file(crs: str, tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    path = write_tif(tmp_path / "a.tif", noise((1, 4, 5)), crs=crs)
    geometry = open_source(str(path)).geometry
    assert isinstance(geometry, RasterGeometry)
    assert geometry.crs is not None
    assert CRS.from_wkt(geometry.crs) == CRS.from_string(crs)
    again = write_tif(tmp_path / "b.tif", noise((1, 4, 5)), crs=geometry.crs)
    assert open_source(str(again)).geometry == geometry


def test_engineering_crs_is_kept(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    local = 'LOCAL_CS["site grid",UNIT["metre",1],AXIS["X",EAST],AXIS["Y",NORTH]]'
    geometry = open_source(str(write_tif(tmp_path / "a.tif", noise((1, 4, 5)), crs=local))).geometry
    assert isinstance(geometry, RasterGeometry)
    assert geometry.crs is not None
    assert geometry.crs.startswith('ENGCRS["site grid"')


@pytest.mark.parametrize(
    "transform",
    [
        rasterio.Affine(10, 0, 5e5, 0, 10, 4e6),
        rasterio.Affine(8.5, 2.25, 5e5, 2.25, -8.5, 4e6),
        rasterio.Affine(0, 30, 5e5, 30, 0, 4e6),
    ],
    ids=["south-up", "rotated", "transposed"],
)
def test_unusual_affine_is_read_as_it_is(
    transform: rasterio.Affine, tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    array = noise((2, 9, 7))
    with open_source(str(write_tif(tmp_path / "a.tif", array, transform=transform))) as source:
        assert isinstance(source.geometry, RasterGeometry)
        assert source.geometry.transform == tuple(transform)[:6]
        np.testing.assert_array_equal(source.read(source.geometry.box).values, array)


@pytest.mark.parametrize(
    "dtype",
    [
        "uint8",
        "int8",
        "uint16",
        "int16",
        "uint32",
        "int32",
        "uint64",
        "int64",
        "float32",
        "float64",
    ],
)
def test_every_real_dtype_is_read_bit_for_bit(
    dtype: str, tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    array = noise((2, 33, 21), dtype)
    with open_source(str(write_tif(tmp_path / "a.tif", array))) as source:
        pixels = source.read(Box((3, 4), (30, 20)), (1, 0))
        assert source.dtype == pixels.values.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(pixels.values, array[::-1, 3:30, 4:20])
    assert pixels.valid.all()


def test_a_pixel_is_invalid_where_any_band_read_is_nodata(tmp_path: Path, write_tif: Write) -> None:
    array = np.ones((3, 4, 4), dtype="int16")
    array[0, 0, 0] = array[2, 3, 3] = -9
    with open_source(str(write_tif(tmp_path / "a.tif", array, nodata=-9))) as source:
        everything = source.read(source.geometry.box).valid
        assert np.argwhere(~everything).tolist() == [[0, 0], [3, 3]]
        first_two = source.read(source.geometry.box, (0, 1)).valid
        assert np.argwhere(~first_two).tolist() == [[0, 0]]


def test_nan_and_infinity_are_invalid_beside_nodata(tmp_path: Path, write_tif: Write) -> None:
    array = np.arange(6, dtype="float32").reshape(1, 2, 3)
    array[0, 0, :2] = np.nan, np.inf
    array[0, 1, 2] = -99999
    path = write_tif(tmp_path / "a.tif", array, nodata=-99999)
    valid = open_source(str(path)).read(Box((0, 0), (2, 3))).valid
    assert valid.tolist() == [[False, False, True], [True, True, False]]


@pytest.mark.parametrize("nodata", [-3.4028234663852886e38, float("nan"), 0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float_nodata_agrees_with_gdal(
    nodata: float, dtype: str, tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    array = noise((1, 20, 20), dtype)
    array[0, 5:9] = nodata
    path = write_tif(tmp_path / "a.tif", array, nodata=nodata)
    with rasterio.open(path) as dataset:
        expected = dataset.read_masks(1) > 0
    np.testing.assert_array_equal(open_source(str(path)).read(Box((0, 0), (20, 20))).valid, expected)
    assert not expected[5:9].any()


def test_nodata_of_64_bit_integers_is_compared_exactly(tmp_path: Path) -> None:
    """2**63 - 1 and its neighbour are one number as a float."""
    array = np.array([[2**63 - 1, 2**63 - 2]], dtype="int64")
    path = tmp_path / "wide.vrt"
    with rasterio.open(
        tmp_path / "wide.tif", "w", driver="GTiff", width=2, height=1, count=1, dtype="int64"
    ) as dataset:
        dataset.write(array, 1)
    path.write_text(
        '<VRTDataset rasterXSize="2" rasterYSize="1"><VRTRasterBand dataType="Int64" band="1">'
        "<NoDataValue>9223372036854775807</NoDataValue><SimpleSource>"
        '<SourceFilename relativeToVRT="1">wide.tif</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )
    assert open_source(str(path)).read(Box((0, 0), (1, 2))).valid.tolist() == [[False, True]]


def test_nodata_outside_the_dtype_matches_nothing() -> None:
    values = np.array([0, 255], dtype="uint8")
    for nodata in (-9999.0, 300.0, 0.5, float("inf")):
        assert differs(values, nodata).all()


def test_rounded_maximum_of_a_text_tag_is_the_nodata_meant() -> None:
    values = np.array([-1.7976931348623157e308, 1.0])
    assert differs(values, -1.79769313486231e308).tolist() == [False, True]


@pytest.mark.parametrize("internal", [True, False], ids=["internal", ".msk"])
def test_dataset_mask_is_validity(internal: bool, tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    path, array = tmp_path / "a.tif", noise((3, 40, 50), "uint8")
    mask = np.zeros((40, 50), dtype=bool)
    mask[5:30, 7:45] = True
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        write_tif(path, array)
        with rasterio.open(path, "r+") as dataset:
            dataset.write_mask(mask)
    assert (tmp_path / "a.tif.msk").exists() is not internal
    with open_source(str(path)) as source:
        assert source.count == 3
        box = Box((2, 3), (33, 48))
        np.testing.assert_array_equal(source.read(box).valid, mask[box.slices])


def test_alpha_is_validity_and_no_channel(tmp_path: Path, noise: Noise) -> None:
    array = noise((4, 12, 10), "uint16")
    array[3] = 1  # barely opaque: a mask scaled to 8 bits would lose it
    array[3, :4] = 0
    path, rgba = tmp_path / "rgba.tif", {"photometric": "RGB", "alpha": "YES"}
    with rasterio.open(
        path, "w", driver="GTiff", width=10, height=12, count=4, dtype="uint16", **rgba
    ) as dataset:
        dataset.write(array)
        assert dataset.colorinterp[3] is ColorInterp.alpha
    with open_source(str(path)) as source:
        pixels = source.read(source.geometry.box)
    assert source.count == 3
    np.testing.assert_array_equal(pixels.values, array[:3])
    np.testing.assert_array_equal(pixels.valid, array[3] > 0)


def test_scale_and_offset_are_declared_not_applied(tmp_path: Path, write_tif: Write) -> None:
    array = np.arange(12, dtype="uint16").reshape(2, 2, 3)
    path = write_tif(tmp_path / "a.tif", array)
    with rasterio.open(path, "r+") as dataset:
        dataset.scales, dataset.offsets = (0.0001, 2.0), (-0.1, 0.0)
    with open_source(str(path)) as source:
        assert source.scaling == (Scaling(0.0001, -0.1), Scaling(2.0, 0.0))
        np.testing.assert_array_equal(source.read(source.geometry.box).values, array)


def test_colour_table_yields_indices(tmp_path: Path, write_tif: Write) -> None:
    array = np.array([[[0, 1, 2]]], dtype="uint8")
    path = write_tif(tmp_path / "a.tif", array)
    with rasterio.open(path, "r+") as dataset:
        dataset.write_colormap(1, {0: (0, 0, 0, 255), 1: (255, 0, 0, 255), 2: (0, 255, 0, 255)})
    with open_source(str(path)) as source:
        np.testing.assert_array_equal(source.read(source.geometry.box).values, array)
        assert any("colour table" in note for note in source.notes)


def test_bands_of_several_dtypes_are_read_in_one_that_holds_all(tmp_path: Path, write_tif: Write) -> None:
    a = write_tif(tmp_path / "a.tif", np.array([[[250]]], dtype="uint8"))
    b = write_tif(tmp_path / "b.tif", np.array([[[-7]]], dtype="int16"))
    with open_source(str(_stack(tmp_path / "ab.vrt", (a, "Byte"), (b, "Int16")))) as source:
        assert source.dtype == np.int16
        assert source.read(source.geometry.box).values.ravel().tolist() == [250, -7]
    c = write_tif(tmp_path / "c.tif", np.array([[[2**60 + 1]]], dtype="int64"))
    d = write_tif(tmp_path / "d.tif", np.array([[[0.5]]], dtype="float32"))
    with pytest.raises(SceneError, match="no dtype holds bands of int64, float32 exactly"):
        open_source(str(_stack(tmp_path / "cd.vrt", (c, "Int64"), (d, "Float32"))))


def test_complex_values_are_refused(tmp_path: Path, write_tif: Write) -> None:
    path = write_tif(tmp_path / "sar.tif", np.ones((1, 3, 3), dtype="complex64"))
    with pytest.raises(SceneError, match=r"sar\.tif: complex values \(complex64\); convert"):
        open_source(str(path))


def test_a_file_without_position_is_noted(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    path = write_tif(tmp_path / "scan.tif", noise((1, 5, 5)), crs=None, transform=rasterio.Affine.identity())
    with open_source(str(path)) as source:
        assert source.geometry == RasterGeometry((5, 5), (1, 0, 0, 0, 1, 0), None)
        assert "no CRS: sizes are in pixels" in source.notes


def test_ground_control_points_alone_are_noted(tmp_path: Path, noise: Noise) -> None:
    path = tmp_path / "gcp.tif"
    gcps = [GroundControlPoint(row, col, 1e5 + col, 2e5 - row) for row, col in ((0, 0), (0, 5), (5, 0))]
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        width=5,
        height=5,
        count=1,
        dtype="uint16",
        gcps=gcps,
        crs="EPSG:32616",
    ) as dataset:
        dataset.write(noise((1, 5, 5)))
    with open_source(str(path)) as source:
        assert isinstance(source.geometry, RasterGeometry)
        assert source.geometry.crs is None, "one metre per pixel would be made up"
        assert any("ground control points only" in note for note in source.notes)


def test_band_names_given_go_over_those_of_the_file(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    path = str(write_tif(tmp_path / "a.tif", noise((3, 5, 5)), names=["B4", "B3"]))
    assert open_source(path).bands == ("B4", "B3", "band_3")
    assert open_source(path, band_names=["red", "green", "blue"]).bands == ("red", "green", "blue")
    with pytest.raises(RequestError, match=r"2 band names given .* the scene has 3 bands"):
        open_source(path, band_names=["red", "green"])


def test_threads_read_side_by_side(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    array = noise((2, 256, 256), "uint16")
    path = write_tif(tmp_path / "a.tif", array, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    start = threading.Barrier(8)

    def check(source: object, n: int) -> bool:
        start.wait()
        box = Box((n * 16, n * 9), (n * 16 + 100, n * 9 + 130))
        read = source.read(box).values  # type: ignore[attr-defined]
        return bool((read == array[(slice(None), *box.slices)]).all())

    with open_source(str(path)) as source, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: check(source, n), range(8)))


def test_identity_changes_with_the_content_and_not_with_a_viewer(
    tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    path = write_tif(tmp_path / "a.tif", noise((1, 64, 64)), nodata=0)
    before = open_source(str(path)).identity
    (tmp_path / "a.tif.aux.xml").write_text(
        "<PAMDataset><PAMRasterBand band='1'><Metadata><MDI key='STATISTICS_MEAN'>3</MDI>"
        "</Metadata></PAMRasterBand></PAMDataset>"
    )
    assert open_source(str(path)).identity == before, "QGIS writes statistics beside a file"
    write_tif(path, noise((1, 64, 64), seed=1), nodata=0)
    assert open_source(str(path)).identity != before


def test_a_box_outside_the_scene_is_the_callers_mistake(
    tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    with open_source(str(write_tif(tmp_path / "a.tif", noise((1, 5, 5))))) as source:
        with pytest.raises(ValueError, match="does not lie inside"):
            source.read(Box((0, 0), (6, 5)))
        with pytest.raises(ValueError, match="channels"):
            source.read(Box((0, 0), (5, 5)), (1,))
        assert source.read(Box((2, 2), (2, 4))).values.shape == (1, 0, 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a\.tif: no such file"),
        (b"", r"a\.tif: the file is empty \(0 bytes\)"),
        (b"not a raster" * 99, r"a\.tif: cannot be opened: .*not recognized"),
    ],
    ids=["missing", "empty", "junk"],
)
def test_a_file_that_is_no_raster_fails_in_one_line(
    content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SceneError, match=message) as caught:
        open_source(str(path))
    assert "\n" not in str(caught.value)


def test_a_truncated_raster_fails_where_it_ends_saying_what_gdal_said(
    tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    path, array = tmp_path / "a.tif", noise((1, 256, 256), "uint8")
    write_tif(path, array, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    path.write_bytes(path.read_bytes()[:40_000])
    with open_source(str(path)) as source:
        top = Box((0, 0), (64, 64))
        np.testing.assert_array_equal(source.read(top).values[0], array[0, :64, :64])
        with pytest.raises(SceneError, match=r"a\.tif: cannot be read: TIFFFillTile") as caught:
            source.read(source.geometry.box)
        assert "\n" not in str(caught.value)


def _stack(path: Path, *bands: tuple[Path, str]) -> Path:
    """A VRT of one band of each file."""
    parts = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{n}"><SimpleSource>'
        f"<SourceFilename>{file}</SourceFilename><SourceBand>1</SourceBand>"
        "</SimpleSource></VRTRasterBand>"
        for n, (file, kind) in enumerate(bands, start=1)
    )
    path.write_text(f'<VRTDataset rasterXSize="1" rasterYSize="1">{parts}</VRTDataset>')
    return path
