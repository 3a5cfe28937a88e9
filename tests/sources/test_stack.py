"""Files of one grid as bands of one scene: the same pixels as in a file that holds them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import rasterio

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.sources import Scaling, open_source
from segpipe.sources.gdal import CACHE_LIMIT, cache_for_strips

Write = Callable[..., Path]
Noise = Callable[..., np.ndarray]

ORIGIN = rasterio.Affine(30.0, 0.0, 500_000.0, 0.0, -30.0, 4_000_000.0)


def test_a_stack_reads_as_one_file_with_all_bands(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    array = noise((3, 70, 90))
    write_tif(tmp_path / "all.tif", array, nodata=7)
    files = [str(write_tif(tmp_path / f"b{n}.tif", array[n : n + 1], nodata=7)) for n in range(3)]
    box = Box((10, 20), (65, 90))
    with open_source("stack:" + "|".join(files), band_names=["red", "green", "nir"]) as stack:
        assert (stack.count, stack.bands, stack.dtype) == (3, ("red", "green", "nir"), np.uint16)
        with open_source(str(tmp_path / "all.tif")) as one:
            assert stack.geometry == one.geometry
            for channels in (None, (2,), (2, 0), (1, 1)):
                ours, theirs = stack.read(box, channels), one.read(box, channels)
                np.testing.assert_array_equal(ours.values, theirs.values)
                np.testing.assert_array_equal(ours.valid, theirs.valid)
        assert stack.read(Box((3, 3), (3, 9))).values.shape == (3, 0, 6)
        told = [part["files"][0]["uri"] for part in stack.identity["files"]]
    assert told == files


def test_every_file_keeps_its_nodata_mask_scale_and_dtype(
    tmp_path: Path, write_tif: Write, noise: Noise
) -> None:
    first, second, third = noise((1, 20, 30)), noise((1, 20, 30), "int16", 1), noise((1, 20, 30), "uint8", 2)
    first[0, :5], second[0, :, :4] = 0, -999
    write_tif(tmp_path / "a.tif", first, nodata=0, names=["blue"])
    write_tif(tmp_path / "b.tif", second, nodata=-999, names=["heat"])
    write_tif(tmp_path / "c.tif", third, names=["qa"])
    mask = np.full((20, 30), 255, np.uint8)
    mask[12:] = 0
    with rasterio.open(tmp_path / "c.tif", "r+") as dataset:
        dataset.write_mask(mask)
        dataset.scales, dataset.offsets = (0.1,), (-5.0,)
    with open_source(f"stack:{tmp_path}/a.tif|{tmp_path}/b.tif|{tmp_path}/c.tif") as source:
        pixels = source.read(source.geometry.box)
        assert source.dtype == np.int32  # holds uint16 and int16
        assert source.bands == ("blue", "heat", "qa")
        assert source.scaling == (Scaling(), Scaling(), Scaling(0.1, -5.0))
        only_first = source.read(source.geometry.box, (source.bands.index("blue"),))
    np.testing.assert_array_equal(pixels.values, np.concatenate([first, second, third], dtype=np.int32))
    np.testing.assert_array_equal(pixels.valid, (first[0] != 0) & (second[0] != -999) & (mask > 0))
    np.testing.assert_array_equal(only_first.valid, first[0] != 0)


def test_another_file_is_another_identity(tmp_path: Path, write_tif: Write, noise: Noise) -> None:
    files = [write_tif(tmp_path / f"{n}.tif", noise((1, 8, 8), seed=n)) for n in range(2)]
    uri = f"stack:{files[0]}|{files[1]}"
    with open_source(uri) as source, open_source(f"stack:{files[1]}|{files[0]}") as swapped:
        before = source.identity
        assert swapped.identity != before
    write_tif(files[1], noise((1, 8, 8), seed=9), compress="deflate")
    with open_source(uri) as source:
        assert source.identity["uri"] == before["uri"]
        assert source.identity != before


def test_gdal_keeps_rows_of_all_files_in_strips(tmp_path: Path, write_tif: Write) -> None:
    wide = np.zeros((1, 2, 20_000), np.uint16)
    files = [str(write_tif(tmp_path / f"{n}.tif", wide)) for n in range(3)]
    with open_source("stack:" + "|".join(files)) as source:
        assert source.cache_bytes == min(CACHE_LIMIT, 3 * cache_for_strips(2 * 20_000))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (1, 8, 9)}, r"b.tif: cannot join the stack, it has 8 x 9 pixels, not 8 x 8 as .*a.tif"),
        ({"transform": ORIGIN @ rasterio.Affine.translation(0.5, 0)}, r"b.tif: .* lie 0.5 pixels beside"),
        ({"transform": ORIGIN @ rasterio.Affine.scale(1.01)}, r"b.tif: .* lie 0.08 pixels beside"),
        ({"crs": "EPSG:32617"}, r"b.tif: .* CRS is WGS 84 / UTM zone 17N, not WGS 84 / UTM zone 16N as of"),
    ],
)  # fmt: skip
def test_a_file_of_another_grid_is_refused_by_name(
    tmp_path: Path, write_tif: Write, change: dict[str, object], message: str
) -> None:
    shape = change.pop("shape", (1, 8, 8))
    write_tif(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8))
    write_tif(tmp_path / "b.tif", np.ones(shape, np.uint8), **change)  # type: ignore[arg-type]
    with pytest.raises(SceneError, match=message):
        open_source(f"stack:{tmp_path}/a.tif|{tmp_path}/b.tif")


def test_what_is_missing_or_misnamed(tmp_path: Path, write_tif: Write) -> None:
    write_tif(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8))
    with pytest.raises(SceneError, match=r"gone\.tif: no such file"):
        open_source(f"stack:{tmp_path}/a.tif|{tmp_path}/gone.tif")
    with pytest.raises(RequestError, match="1 band names given"):
        open_source(f"stack:{tmp_path}/a.tif|{tmp_path}/a.tif", band_names=["red"])
    with pytest.raises(RequestError, match="two files or more"):
        open_source(f"stack:{tmp_path}/a.tif")
