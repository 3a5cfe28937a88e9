"""For every kind of source: read(box) is whole[box], values and validity, for any box."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.geometry.box import Box, grid_boxes
from segpipe.sources import Source, open_source

Write = Callable[..., Path]
Noise = Callable[..., np.ndarray]
Case = tuple[Source, np.ndarray, np.ndarray]
"""A source, and its values and validity known from elsewhere."""

KINDS = (
    "striped", "tiled", "rotated", "nodata", "floats", "masked", "alpha", "mosaic",
    "nifti", "nifti gz", "nifti 4D gz", "nifti NaN", "dicom", "dicom rescaled",
)  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """One source of each kind."""
    folder = tmp_path_factory.mktemp("case")
    names = ("write_tif", "write_series", "slice_file", "noise")
    tools = {name: request.getfixturevalue(name) for name in names}
    makers = dict.fromkeys(KINDS[:7], _raster) | {"mosaic": _mosaic, "dicom": _dicom}
    makers["dicom rescaled"] = _dicom
    uri, values, valid = makers.get(request.param, _nifti)(request.param, folder, tools)
    with open_source(uri) as source:
        yield source, values, valid


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_part_is_the_part_of_the_whole(case: Case, data: st.DataObject) -> None:
    source, values, valid = case
    spans = [data.draw(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)) for n in valid.shape]
    box = Box(tuple(a for a, _ in spans), tuple(b for _, b in spans))
    indices = st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=4).map(tuple)
    channels = data.draw(st.none() | indices)
    pixels = source.read(box, channels)
    wanted = values if channels is None else values[list(channels)]
    assert pixels.values.dtype == source.dtype == values.dtype
    np.testing.assert_array_equal(pixels.values, wanted[(slice(None), *box.slices)])
    if channels is None:
        np.testing.assert_array_equal(pixels.valid, valid[box.slices])
    else:  # fewer bands can only have fewer holes
        assert (pixels.valid | ~valid[box.slices]).all()


@pytest.mark.parametrize("step", [7, 16, 1000])
def test_blocks_of_any_size_make_up_the_whole(case: Case, step: int) -> None:
    source, values, valid = case
    found, seen = np.zeros_like(values), np.zeros_like(valid)
    for box in grid_boxes(valid.shape, (step,) * valid.ndim):
        pixels = source.read(box)
        found[(slice(None), *box.slices)] = pixels.values
        seen[box.slices] = pixels.valid
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(seen, valid)


def _raster(kind: str, folder: Path, tools: dict[str, Callable[..., object]]) -> tuple:  # type: ignore[type-arg]
    write, noise = tools["write_tif"], tools["noise"]
    array = np.asarray(noise((3, 75, 61), "float32" if kind == "floats" else "uint16"))
    valid = np.ones((75, 61), dtype=bool)
    profile: dict[str, object] = {}
    if kind == "tiled":
        profile = {"tiled": True, "blockxsize": 16, "blockysize": 32, "compress": "deflate"}
    if kind == "rotated":
        profile = {"transform": rasterio.Affine(8.5, 2.25, 5e5, 2.25, -8.5, 4e6)}
    if kind == "nodata":
        array[array < 5000] = 17
        profile, valid = {"nodata": 17}, (array != 17).all(axis=0)
    if kind == "floats":
        array[array > 1.5], array[array < -1.5] = np.nan, -99999
        profile = {"nodata": -99999.0}
        valid = (np.isfinite(array) & (array != -99999)).all(axis=0)
    if kind in ("masked", "alpha"):
        valid = np.hypot(*np.mgrid[-37:38, -30:31]) < 28
    path = folder / "a.tif"
    if kind == "alpha":
        stored = np.concatenate([array, 65535 * valid[np.newaxis].astype("uint16")])
        write(path, stored, photometric="RGB", alpha="YES")
    else:
        write(path, array, **profile)
    if kind == "masked":
        with rasterio.open(path, "r+") as dataset:
            dataset.write_mask(valid)
    return str(path), array, valid


def _mosaic(kind: str, folder: Path, tools: dict[str, Callable[..., object]]) -> tuple:  # type: ignore[type-arg]
    """Tiles of 20 pixels, of which one is missing and one lies over its neighbours."""
    array = np.asarray(tools["noise"]((2, 60, 60), "int16"))
    valid = np.ones((60, 60), dtype=bool)
    for box in grid_boxes((60, 60), (20, 20)):
        if box.start == (20, 40):
            valid[box.slices] = False
            continue
        _write_at(tools["write_tif"], folder / f"b{box.start}.tif", array, box)
    top = Box((35, 10), (58, 33))
    array[(slice(None), *top.slices)] += 1
    _write_at(tools["write_tif"], folder / "c_top.tif", array, top)
    return f"mosaic:{folder}/*.tif", np.where(valid, array, 0), valid


def _write_at(write: Callable[..., object], path: Path, array: np.ndarray, box: Box) -> None:
    row, column = box.start
    place = rasterio.Affine(30.0, 0.0, 5e5 + 30 * column, 0.0, -30.0, 4e6 - 30 * row)
    write(path, array[(slice(None), *box.slices)], transform=place)


def _nifti(kind: str, folder: Path, tools: dict[str, Callable[..., object]]) -> tuple:  # type: ignore[type-arg]
    frames = (2,) if "4D" in kind else ()
    array = np.asarray(tools["noise"]((23, 17, 29, *frames), "float32" if "NaN" in kind else "int16"))
    if "NaN" in kind:
        array[array > 1] = np.nan
    path = folder / ("a.nii.gz" if "gz" in kind else "a.nii")
    nib.save(nib.Nifti1Image(array, np.diag([1.0, 2.0, 3.0, 1.0])), path)
    if frames:
        return f"{path}#frame=1", array[..., 1].T[np.newaxis], np.ones((29, 17, 23), bool)
    return str(path), array.T[np.newaxis], np.isfinite(array.T)


def _dicom(kind: str, folder: Path, tools: dict[str, Callable[..., object]]) -> tuple:  # type: ignore[type-arg]
    volume = np.asarray(tools["noise"]((11, 40, 35), "int16"))
    valid = np.ones(volume.shape, dtype=bool)
    if kind == "dicom":
        tools["write_series"](folder, volume, jpeg2000=True)
        return str(folder), volume[np.newaxis], valid
    for k, plane in enumerate(volume):
        place = [0, 0, 2 * k]
        slope = 0.5 + k
        tools["slice_file"](folder / f"{k}.dcm", plane, ImagePositionPatient=place, RescaleSlope=slope)
    real = volume * (0.5 + np.arange(11.0))[:, None, None] - 1024
    return str(folder), real.astype("float32")[np.newaxis], valid
