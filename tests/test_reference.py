"""References: found by name, held against the scene's grid, read as whole numbers."""

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import rasterio
from affine import Affine
from pyproj import CRS

from segpipe.config.job import Reference
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.sources import open_source
from segpipe.sources.labels import find_reference, open_reference

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TRANSFORM = (10.0, 0.0, 500000.0, 0.0, -10.0, 4000000.0)


def tif(path, values, transform=TRANSFORM, crs="EPSG:32616", **more):
    values = np.atleast_3d(values.T).T
    profile = {
        "driver": "GTiff", "dtype": values.dtype, "count": values.shape[0], "crs": crs,
        "height": values.shape[1], "width": values.shape[2], "transform": Affine(*transform),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile, **more) as file:
        file.write(values)
    return str(path)


def scene(shape=(4, 5), transform=TRANSFORM, crs="EPSG:32616"):
    return RasterGeometry(shape, transform, None if crs is None else CRS(crs).to_wkt())


@pytest.mark.parametrize(
    ("files", "name", "expected"),
    [
        (["a.tif", "a_mask.tif"], "a", "a.tif"),
        (["a.nii.gz", "b.nii.gz"], "a", "a.nii.gz"),
        (["a_seg.tif", "ab.tif", "a.txt"], "a", "a_seg.tif"),
        (["tile_1_gt.tif", "tile_10_gt.tif"], "tile_1", "tile_1_gt.tif"),
        (["case_001.nii.gz", "case_002.nii.gz"], "case_001_0000", "case_001.nii.gz"),
        (["sub-01_dseg.nii.gz", "sub-02_dseg.nii.gz"], "sub-01_T1w", "sub-01_dseg.nii.gz"),
        (["sentinel2_mask.tif", "sentinel2_toa.tif", ".a.tif"], "sentinel2_rgb", "sentinel2_mask.tif"),
        (["a.b.tif"], "a.b", "a.b.tif"),
    ],
)  # fmt: skip
def test_found_by_name(tmp_path, files, name, expected):
    for file in files:
        (tmp_path / file).touch()
    assert Path(find_reference(Reference(path=str(tmp_path)), name)).name == expected
    assert Path(find_reference(Reference(path=f"{tmp_path}/*"), name)).name == expected


def test_a_file_is_just_that(tmp_path):
    path = tmp_path / "truth.tif"
    path.touch()
    assert find_reference(Reference(path=str(path)), "anything") == str(path)
    assert find_reference(Reference(path="https://a.b/c.tif"), "x") == "https://a.b/c.tif"


def test_none_or_several_are_named(tmp_path):
    (tmp_path / "b_2.tif").touch()
    with pytest.raises(SceneError, match=r"no reference fits its name; found b_2.tif"):
        find_reference(Reference(path=str(tmp_path)), "b_1")
    (tmp_path / "b_1_x.tif").touch()
    (tmp_path / "b_1_y.tif").touch()
    with pytest.raises(SceneError, match=r"several references fit: b_1_x.tif, b_1_y.tif"):
        find_reference(Reference(path=str(tmp_path)), "b_1")
    with pytest.raises(RequestError, match="does not exist"):
        find_reference(Reference(path=str(tmp_path / "absent")), "b")
    with pytest.raises(RequestError, match="holds no label file"):
        find_reference(Reference(path=f"{tmp_path}/*.doc"), "b")


def test_values_are_mapped_and_nodata_ignored(tmp_path):
    """2 → 5, 3 ignored, 4 stays, 9 is nodata."""
    values = np.array([[2, 3, 4, 9, 0]] * 4, dtype=np.uint8)
    path = tif(tmp_path / "r.tif", values, nodata=9)
    with open_reference(Reference(path=path, values={2: 5, 3: None}), path, scene()) as reference:
        got = reference.read(Box((1, 0), (3, 5)))
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, [[5, -1, 4, -1, 0]] * 2)
        assert reference.notes == ()
        plain = open_reference(Reference(path=path), path, scene())
        assert json.loads(json.dumps(plain.identity)) != json.loads(json.dumps(reference.identity))


def test_swapped_values(tmp_path):
    values = np.array([[0, 1, 2, 1, 0]] * 4, dtype=np.int16)
    path = tif(tmp_path / "r.tif", values)
    with open_reference(Reference(path=path, values={1: 2, 2: 1, 7: 3}), path, scene()) as reference:
        np.testing.assert_array_equal(reference.read(Box((0, 0), (1, 5))), [[0, 2, 1, 2, 0]])


def test_floats_that_are_whole_numbers(tmp_path):
    values = np.array([[1, 2, np.nan, 16777216, 0]] * 4, dtype=np.float32)
    path = tif(tmp_path / "r.tif", values)
    with open_reference(Reference(path=path), path, scene()) as reference:
        np.testing.assert_array_equal(reference.read(Box((0, 0), (1, 5))), [[1, 2, -1, 16777216, 0]])
    path = tif(tmp_path / "h.tif", values + np.float32(0.5))
    with (
        open_reference(Reference(path=path), path, scene()) as reference,
        pytest.raises(SceneError, match=r"holds 1.5; labels are whole numbers"),
    ):
        reference.read(Box((0, 0), (1, 5)))


def test_negative_values_must_be_mapped(tmp_path):
    path = tif(tmp_path / "r.tif", np.full((4, 5), -7, dtype=np.int16))
    with (
        open_reference(Reference(path=path), path, scene()) as reference,
        pytest.raises(SceneError, match=r"holds -7; .*reference.values"),
    ):
        reference.read(Box((0, 0), (4, 5)))
    with open_reference(Reference(path=path, values={-7: None}), path, scene()) as reference:
        assert (reference.read(Box((0, 0), (4, 5))) == -1).all()


def test_another_grid_is_refused(tmp_path):
    path = tif(tmp_path / "r.tif", np.zeros((4, 5), np.uint8))
    config = Reference(path=path)
    with pytest.raises(SceneError, match=r"shape is \(4, 6\), the other's \(4, 5\)"):
        open_reference(config, path, scene((4, 6)))
    shifted = (10.0, 0.0, 500001.0, 0.0, -10.0, 4000000.0)
    with pytest.raises(SceneError, match=r"500001.0.*500000.0.*0.1 elements apart"):
        open_reference(config, path, scene(transform=shifted))
    nearly = (10.0, 0.0, 500000.005, 0.0, -10.0, 4000000.0)
    assert open_reference(config, path, scene(transform=nearly)).notes == ()
    up = (10.0, 0.0, 500000.0, 0.0, 10.0, 4000000.0)
    with pytest.raises(SceneError, match="elements apart"):
        open_reference(config, path, scene(transform=up))
    with pytest.raises(SceneError, match="the scene's CRS is"):
        open_reference(config, path, scene(crs="EPSG:32617"))
    with pytest.raises(SceneError, match="the scene is a volume"):
        open_reference(config, path, volume_geometry((4, 5, 1), np.eye(4)))
    bands = tif(tmp_path / "b.tif", np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(SceneError, match="has 3 bands"):
        open_reference(config, bands, scene())


def test_missing_crs_is_noted(tmp_path):
    path = tif(tmp_path / "r.tif", np.zeros((4, 5), np.uint8), crs=None)
    (note,) = open_reference(Reference(path=path), path, scene()).notes
    assert note.startswith("reference: the file has no CRS")


def test_nc_landsat_s_crs_is_written_in_two_ways():
    image, strata = DATA / "nc_landsat/landsat_multiband.tif", DATA / "nc_landsat/strata.tif"
    if not strata.exists():
        pytest.skip(f"{strata} is not there")
    with open_source(str(image)) as source:
        reference = open_reference(Reference(path=str(strata)), str(strata), source.geometry)
    assert any("is written differently" in note for note in reference.notes)
    labels = reference.read(source.geometry.box)
    assert set(np.unique(labels)) <= {-1, 1, 2, 3, 4, 5, 6, 7}


def test_volumes(tmp_path):
    """Array order is (z, y, x); an affine off by a thousandth of a voxel is still the same."""
    values = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    affine = np.array([[-1.5, 0.2, 0, 10], [0.2, 1.5, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
    nibabel.save(nibabel.Nifti1Image(values.T, affine), tmp_path / "r.nii.gz")
    path = str(tmp_path / "r.nii.gz")
    near = affine.copy()
    near[0, 3] += 1e-4
    with open_reference(Reference(path=path), path, volume_geometry((2, 3, 4), near)) as reference:
        np.testing.assert_array_equal(reference.read(Box.whole((2, 3, 4))), values)
    far = affine @ np.diag([-1, 1, 1, 1])
    with pytest.raises(SceneError, match="elements apart"):
        open_reference(Reference(path=path), path, volume_geometry((2, 3, 4), far))
