"""Label atlases, on the scene's grid and on others, against numpy, scipy and GDAL."""

import nibabel
import numpy as np
import pytest
import rasterio
from affine import Affine
from scipy.ndimage import map_coordinates

from segpipe.config.job import Regions
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.regions import load_regions
from segpipe.regions.base import FULL
from tests.regions.tools import UTM, dense, fixed


def save(path, array, affine):
    """``array`` is (z, y, x)."""
    nibabel.save(nibabel.Nifti1Image(np.ascontiguousarray(array.T), affine), path)
    return str(path)


def blocks(shape, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.choice([0, 3, 7, 117], size=tuple(-(-n // 4) for n in shape))
    for axis in range(len(shape)):
        coarse = np.repeat(coarse, 4, axis)
    return coarse[tuple(slice(n) for n in shape)].astype(np.int16)


@pytest.mark.parametrize("tile", [(128,) * 3, (8, 8, 8), (5, 7, 3)])
def test_atlas_on_the_same_grid_equals_numpy(tmp_path, tile):
    shape = (20, 17, 13)
    labels = blocks(shape)
    affine = np.diag([1.0, 2, 3, 1])
    (tmp_path / "n.csv").write_text("\ufeffvalue,name\n3,left\n7,right\n99,absent\n")
    regions = load_regions(
        Regions(path=save(tmp_path / "a.nii.gz", labels, affine), name=str(tmp_path / "n.csv")),
        volume_geometry(shape, affine),
    )
    assert regions.names == ("left", "right", "absent", "117")
    assert regions.notes == ()
    assert fixed(regions, shape, tile) == [int((labels == v).sum()) * FULL for v in (3, 7, 99, 117)]
    np.testing.assert_array_equal(dense(regions, shape, tile, 1) == FULL, labels == 7)
    assert [regions.outside(i) for i in range(4)] == [0] * 4


def test_atlas_on_another_grid_is_the_nearest_voxel(tmp_path):
    """An oblique scene over a straight atlas: as map_coordinates of order 0 has it."""
    labels = blocks((24, 20, 28), 1)
    atlas_affine = np.array([[-2.0, 0, 0, 20], [0, 2, 0, -30], [0, 0, 2.5, -10], [0, 0, 0, 1]])
    c, s = np.cos(0.3), np.sin(0.3)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    scene_affine = np.eye(4)
    scene_affine[:3, :3] = turn @ np.diag([1.1, 1.3, 1.7])
    scene_affine[:3, 3] = [-25.03, -20.07, -8.11]
    shape = (30, 25, 27)
    regions = load_regions(
        Regions(path=save(tmp_path / "a.nii", labels, atlas_affine)),
        volume_geometry(shape, scene_affine),
    )
    grid = np.stack([*np.mgrid[:27, :25, :30].reshape(3, -1), np.ones(27 * 25 * 30)])
    i, j, k, _ = np.linalg.inv(atlas_affine) @ scene_affine @ grid
    truth = map_coordinates(labels, [k, j, i], order=0, mode="grid-constant", cval=0)
    truth = truth.reshape(27, 25, 30).T
    for region, value in enumerate((3, 7, 117)):
        np.testing.assert_array_equal(dense(regions, shape, (8, 9, 10), region) > 0, truth == value)
        np.testing.assert_array_equal(dense(regions, shape, (128, 128, 128), region) > 0, truth == value)
    assert "resampled to the nearest" in regions.notes[0]
    # inside and outside together are about the atlas's own volume of the region
    inside = fixed(regions, shape, (128, 128, 128))
    element = 1.1 * 1.3 * 1.7
    for region, value in enumerate((3, 7, 117)):
        whole = (inside[region] + regions.outside(region)) / FULL * element
        assert whole == pytest.approx((labels == value).sum() * 10, rel=0.05)


def raster_file(path, array, transform, crs):
    profile = {
        "driver": "GTiff", "dtype": array.dtype, "count": 1, "crs": crs,
        "height": array.shape[0], "width": array.shape[1], "transform": Affine(*transform),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(array, 1)
    return str(path)


def test_raster_atlas_in_another_crs_equals_gdals_nearest(tmp_path):
    from rasterio.warp import reproject

    labels = np.repeat(np.repeat(blocks((60, 80), 2), 2, 0), 2, 1).astype(np.uint8)
    atlas_transform = (0.001, 0, -87.06, 0, -0.001, 36.15)
    path = raster_file(tmp_path / "a.tif", labels, atlas_transform, "EPSG:4326")
    shape, transform = (90, 110), (97.0, 0, 495000.0, 0, -97.0, 4000000.0)
    regions = load_regions(Regions(path=path), RasterGeometry(shape, transform, UTM))
    truth = np.zeros(shape, dtype=np.uint8)
    reproject(
        labels, truth, src_transform=Affine(*atlas_transform), src_crs="EPSG:4326",
        dst_transform=Affine(*transform), dst_crs="EPSG:32616", tolerance=0,
    )  # fmt: skip
    assert (truth > 0).any()
    assert (truth == 0).any()
    got = np.zeros(shape, dtype=np.uint8)
    for region, value in enumerate((3, 7, 117)):
        got[dense(regions, shape, (32, 64), region) > 0] = value
    assert (got == truth).mean() > 0.9999


def test_atlases_that_cannot_be(tmp_path):
    affine, shape = np.eye(4), (8, 8, 8)
    geometry = volume_geometry(shape, affine)
    path = save(tmp_path / "a.nii", blocks(shape), affine)
    with pytest.raises(RequestError, match=r"CSV with columns value,name"):
        load_regions(Regions(path=path, name="label"), geometry)
    (tmp_path / "n.csv").write_text("id,label\n1,x\n")
    with pytest.raises(RequestError, match="has columns id, label; needed: value, name"):
        load_regions(Regions(path=path, name=str(tmp_path / "n.csv")), geometry)
    with pytest.raises(RequestError, match="has no layers"):
        load_regions(Regions(path=path, layer="x"), geometry)
    empty = save(tmp_path / "e.nii", np.zeros(shape, np.int16), affine)
    with pytest.raises(SceneError, match="no region"):
        load_regions(Regions(path=empty), geometry)
    half = save(tmp_path / "h.nii", np.full(shape, 1.5, np.float32), affine)
    with pytest.raises(SceneError, match=r"1\.5; labels are whole numbers"):
        load_regions(Regions(path=half), geometry)
    with pytest.raises(SceneError, match="raster and a volume"):
        load_regions(Regions(path=path), RasterGeometry((8, 8), (1, 0, 0, 0, -1, 0), UTM))


def test_whole_scene():
    regions = load_regions(None, volume_geometry((5, 6, 7), np.eye(4)))
    assert regions.names == ("scene",)
    assert fixed(regions, (5, 6, 7), (2, 4, 4)) == [210 * FULL]
    assert regions.outside(0) == 0
