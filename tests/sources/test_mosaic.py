"""``mosaic:GLOB``: files laid on one grid, the last by path on top, nothing copied."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.merge import merge
from rasterio.windows import Window

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry
from segpipe.sources import Scaling, open_source

Write = Callable[..., Path]
Noise = Callable[..., np.ndarray]

NORTH_UP = rasterio.Affine(30.0, 0.0, 500_000.1, 0.0, -30.0, 4_000_000.7)
ROTATED = rasterio.Affine(8.5, 2.25, 5e5, 2.25, -8.5, 4e6)


def _cut(write_tif: Write, folder: Path, array: np.ndarray, name: str, window: Window, **kw) -> Path:  # type: ignore[no-untyped-def]
    """A part of an array as a file of its own, where the part lies."""
    origin = kw.pop("transform", NORTH_UP)
    moved = origin @ rasterio.Affine.translation(window.col_off, window.row_off)
    rows, columns = window.toslices()
    return write_tif(folder / name, array[:, rows, columns], transform=moved, **kw)


@pytest.mark.parametrize("transform", [NORTH_UP, ROTATED], ids=["north-up", "rotated"])
def test_a_scene_cut_to_pieces_comes_together_again(
    transform: rasterio.Affine, tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    array = noise((3, 50, 40))
    windows = [Window(0, 0, 25, 30), Window(25, 0, 15, 30), Window(0, 30, 40, 20)]
    for n, window in enumerate(windows):
        _cut(write_tif, tmp_path, array, f"{n}.tif", window, transform=transform, names="abc")
    with open_source(f"mosaic:{tmp_path}/*.tif") as source:
        pixels = source.read(source.geometry.box)
        assert isinstance(source.geometry, RasterGeometry)
        assert source.geometry.shape == (50, 40)
        assert source.geometry.transform == tuple(transform)[:6]
        assert source.bands == ("a", "b", "c")
        assert len(source.identity["files"]) == 3
    np.testing.assert_array_equal(pixels.values, array)
    assert pixels.valid.all()


def test_the_landsat_scene_in_overlapping_quarters_is_the_landsat_scene(
    shared: Callable[[str], Path], tmp_path: Path
) -> None:
    path = shared("nc_landsat/landsat_multiband.tif")
    with rasterio.open(path) as dataset:
        for n, (row, column) in enumerate(((0, 0), (0, 200), (200, 0), (200, 200))):
            window = Window(column, row, 289, 243)
            profile = dataset.profile | {
                "width": 289,
                "height": 243,
                "transform": dataset.window_transform(window),
            }
            with rasterio.open(tmp_path / f"q{n}.tif", "w", **profile) as part:
                part.write(dataset.read(window=window))
    with open_source(str(path)) as whole, open_source(f"mosaic:{tmp_path}/q*.tif") as source:
        assert source.geometry == whole.geometry
        a, b = whole.read(whole.geometry.box), source.read(whole.geometry.box)
    np.testing.assert_array_equal(b.values, a.values)
    np.testing.assert_array_equal(b.valid, a.valid)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "uint32", "float32", "float64"])
def test_where_files_overlap_the_last_with_data_wins(
    dtype: str, tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    array, other = noise((2, 20, 20), dtype), noise((2, 20, 20), dtype, 1)
    array[array == 7], other[other == 7] = 8, 8
    other[:, 5:9, 5:9] = 7  # a hole, through which the first shows
    paths = [
        _cut(write_tif, tmp_path, array, "1.tif", Window(0, 0, 12, 12), nodata=7),
        _cut(write_tif, tmp_path, other, "2.tif", Window(4, 4, 12, 12), nodata=7),
    ]
    # rasterio's own merge, told to let the last win, with its own idea of nodata.
    expected, _ = merge(paths, method="last", nodata=7)
    with open_source(f"mosaic:{tmp_path}/*.tif") as source:
        pixels = source.read(source.geometry.box)
    np.testing.assert_array_equal(pixels.values, expected)
    np.testing.assert_array_equal(pixels.valid, (expected != 7).all(axis=0))
    assert not pixels.valid[0, 15], "a gap between the files is no data"
    assert (pixels.values[:, 6, 6] == array[:, 6, 6]).all(), "a hole lets the earlier file through"


def test_64_bit_integers_are_exact_or_refused(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    array = noise((1, 20, 20), "int64")
    for n, window in enumerate((Window(0, 0, 11, 20), Window(9, 0, 11, 20))):
        _cut(write_tif, tmp_path, array, f"plain{n}.tif", window)
        _cut(write_tif, tmp_path, array, f"nodata{n}.tif", window, nodata=0)
    with open_source(f"mosaic:{tmp_path}/plain*.tif") as source:
        np.testing.assert_array_equal(source.read(source.geometry.box).values, array)
    with pytest.raises(SceneError, match=r"64-bit integers with nodata .* cannot join"):
        open_source(f"mosaic:{tmp_path}/nodata*.tif")


def test_gaps_without_a_nodata_value_are_invalid_and_zeros_are_not(tmp_path: Path, write_tif: Write) -> None:
    zeros = np.zeros((1, 10, 10), dtype="uint8")
    _cut(write_tif, tmp_path, zeros, "1.tif", Window(0, 0, 3, 10))
    _cut(write_tif, tmp_path, zeros, "2.tif", Window(5, 0, 5, 10))
    with open_source(f"mosaic:{tmp_path}/*.tif") as source:
        valid = source.read(source.geometry.box).valid
    assert valid[0].tolist() == [True] * 3 + [False] * 2 + [True] * 5
    assert (valid == valid[0]).all()


def test_masked_pixels_let_the_earlier_file_through(tmp_path: Path, write_tif: Write) -> None:
    below = _cut(write_tif, tmp_path, np.full((1, 6, 6), 5, "uint8"), "1.tif", Window(0, 0, 6, 3))
    above = _cut(write_tif, tmp_path, np.full((1, 6, 6), 9, "uint8"), "2.tif", Window(0, 0, 6, 6))
    for path, mask in ((below, np.ones((3, 6), bool)), (above, np.eye(6, dtype=bool))):
        with rasterio.open(path, "r+") as dataset:
            dataset.write_mask(mask)
    with open_source(f"mosaic:{tmp_path}/*.tif") as source:
        pixels = source.read(source.geometry.box)
    eye = np.eye(6, dtype=bool)
    expected = np.where(eye, 9, 5)
    np.testing.assert_array_equal(pixels.valid, eye | (np.arange(6)[:, None] < 3))
    np.testing.assert_array_equal(pixels.values[0][pixels.valid], expected[pixels.valid])
    with rasterio.open(above, "r+") as dataset:
        dataset.nodata = 0
    with pytest.raises(SceneError, match=r"2\.tif: has both a nodata value and a mask"):
        open_source(f"mosaic:{tmp_path}/*.tif")


def test_alpha_bands_become_validity(tmp_path: Path, noise: Noise) -> None:
    array = noise((4, 8, 8), "uint8")
    array[3] = np.where(np.arange(8) < 3, 0, 255)
    for name, first in (("1.tif", 0), ("2.tif", 4)):
        with rasterio.open(
            tmp_path / name, "w", driver="GTiff", width=8, height=4, count=4, dtype="uint8",
            photometric="RGB", alpha="YES", crs="EPSG:32616",
            transform=NORTH_UP @ rasterio.Affine.translation(0, first),
        ) as dataset:  # fmt: skip
            dataset.write(array[:, first : first + 4])
    with open_source(f"mosaic:{tmp_path}/*.tif") as source:
        pixels = source.read(source.geometry.box)
    assert source.count == 3
    np.testing.assert_array_equal(pixels.valid, array[3] > 0)
    np.testing.assert_array_equal(pixels.values[:, pixels.valid], array[:3][:, pixels.valid])


def test_scale_and_offset_are_kept(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    array = noise((1, 10, 10), "uint16")
    for name, window in (("1.tif", Window(0, 0, 5, 10)), ("2.tif", Window(5, 0, 5, 10))):
        with rasterio.open(_cut(write_tif, tmp_path, array, name, window), "r+") as dataset:
            dataset.scales, dataset.offsets = (1e-4,), (-0.1,)
    with open_source(f"mosaic:{tmp_path}/*.tif") as source:
        assert source.scaling == (Scaling(1e-4, -0.1),)
        np.testing.assert_array_equal(source.read(Box((0, 0), (10, 10))).values, array)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crs": "EPSG:32617"}, r"2\.tif: cannot join the mosaic, its CRS differ: EPSG:32617, not"),
        ({"transform": rasterio.Affine(20, 0, 5e5, 0, -20, 4e6)}, "its pixel vectors differ"),
        ({"dtype": "float32"}, "its dtypes differ"),
        ({"nodata": 3}, "its nodata values differ"),
        ({"names": ["red"]}, "its band names differ"),
        (
            {"transform": NORTH_UP @ rasterio.Affine.translation(0.4, 0)},
            r"it lies 0\.4 pixels beside",
        ),
        ({"crs": None, "transform": rasterio.Affine.identity()}, r"2\.tif: has no geotransform"),
    ],
    ids=["crs", "pixel size", "dtype", "nodata", "names", "off the grid", "no position"],
)
def test_files_that_do_not_fit_are_refused_by_name(
    change: dict[str, object], message: str, tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    array = noise((1, 5, 5))
    write_tif(tmp_path / "1.tif", array, transform=NORTH_UP)
    write_tif(tmp_path / "2.tif", array, **{"transform": NORTH_UP, **change})
    with pytest.raises(SceneError, match=message) as caught:
        open_source(f"mosaic:{tmp_path}/*.tif")
    assert "\n" not in str(caught.value)


def test_a_mosaic_of_nothing_fails(tmp_path: Path) -> None:
    with pytest.raises(SceneError, match="no file matches"):
        open_source(f"mosaic:{tmp_path}/*.tif")
