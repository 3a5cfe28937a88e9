"""Files of objects, opened by the programs they are for: GDAL, geopandas, nibabel, pycocotools."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import geopandas
import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import rasterio
from affine import Affine
from pycocotools.coco import COCO
from rasterio.features import rasterize

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.export.cog import write_cog_ids
from segpipe.export.nifti import write_nifti_ids
from segpipe.export.objects import write_coco, write_object_polygons
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.objects.scene_objects import SceneObjects
from tests.instances.scene import Oracle, by_first, discs, scene_ids, square_lattice

UTM = RasterGeometry((300, 420), (10.0, 0.0, 5e5, 0.0, -10.0, 5e6), rasterio.CRS.from_epsg(32633).to_wkt())
CLASSES = [
    Class(value=0, name="ground", color="#000000", background=True),
    Class(value=1, name="café", color="#ff0000"),
    Class(value=7, name="sky", color="#0000ff", thing=False),
]


def reader(array: np.ndarray) -> Callable[[Box], np.ndarray]:
    return lambda box: array[box.slices]


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return by_first(discs(UTM.shape, 200, seed=4, radius=(3, 12)))


@pytest.mark.parametrize(("dtype", "first"), [("uint32", 2**24 + 1), ("uint64", 2**40 + 1)])
def test_ids_as_a_cog(dtype: str, first: int, tmp_path: Path) -> None:
    """Ids that float32 cannot hold; cells of overviews have the id of one of their pixels."""
    shape = (1100, 1300)
    ids = discs(shape, 400, seed=1, radius=(1, 40))
    ids = np.where(ids > 0, ids + first, 0).astype(dtype)
    place = RasterGeometry(shape, (10.0, 1.0, 5e5, 1.0, -10.0, 5e6), UTM.crs)
    path = tmp_path / "instances.tif"
    write_cog_ids(reader(ids), place, np.dtype(dtype), path, {"MODEL": "m"})
    with rasterio.open(path) as file:
        np.testing.assert_array_equal(file.read(1), ids)
        assert (file.dtypes, file.nodata, file.descriptions) == ((dtype,), 0, ("object",))
        assert file.transform == Affine(*place.transform) and file.crs == rasterio.CRS.from_epsg(32633)
        assert file.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and file.tags()["MODEL"] == "m"
        assert file.overviews(1) == [2, 4]
    with rasterio.open(path, overview_level=0) as file:
        small = file.read(1)
    cells = ids.reshape(550, 2, 650, 2).swapaxes(1, 2).reshape(550, 650, 4)
    assert (cells == small[..., None]).any(-1).all()
    assert ((small > 0) == (cells > 0).any(-1)).all()  # 0 is no data: no object is lost in the ground
    write_cog_ids(reader(ids), place, np.dtype(dtype), tmp_path / "again.tif", {"MODEL": "m"})
    assert (tmp_path / "again.tif").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.tif", "instances.tif"]


def test_a_crs_that_geotiff_keys_cannot_hold_lies_beside_the_ids(ids: np.ndarray, tmp_path: Path) -> None:
    wkt = rasterio.CRS.from_proj4("+proj=ob_tran +o_proj=longlat +o_lat_p=40 +o_lon_p=10 +lon_0=5").to_wkt()
    place = RasterGeometry(UTM.shape, (0.1, 0.0, 0.0, 0.0, -0.1, 10.0), wkt)
    write_cog_ids(reader(ids.astype(np.uint32)), place, np.dtype(np.uint32), tmp_path / "i.tif")
    text = (tmp_path / "i.tif.aux.xml").read_text()
    assert "<SRS" in text and "PAMRasterBand" not in text  # ids have no names
    with rasterio.open(tmp_path / "i.tif") as file:
        assert place.projection is not None and file.crs.to_proj4() == rasterio.CRS.from_wkt(wkt).to_proj4()


def test_ids_of_a_volume(tmp_path: Path) -> None:
    shape = (13, 17, 19)
    ids = np.random.default_rng(2).integers(0, 2**32, shape, dtype=np.uint32)
    affine = np.array([[-1.2, 0.1, 0, 5], [0.1, 1.5, 0, -3], [0, 0.1, 2, 7], [0, 0, 0, 1]])
    place = volume_geometry(shape, affine)
    for name in ("a.nii.gz", "b.nii.gz"):
        write_nifti_ids(reader(ids), place, None, np.dtype(np.uint32), tmp_path / name)
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == np.uint32
    np.testing.assert_array_equal(np.asarray(image.dataobj).T, ids)
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)
    assert image.header.get_intent()[0] == "label"
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def table(ids: np.ndarray) -> pd.DataFrame:
    """Of instances, as far as the GeoPackage needs it; some columns are not its."""
    known, count = np.unique(ids[ids > 0], return_counts=True)
    return pd.DataFrame(
        {
            "scene": "s",
            "id": known,
            "class": "café",
            "value": 1,
            "score": np.where(known % 2, 0.5 + known / 1000, np.nan),
            "count": count,
            "area_m2": count * 100.0,
            "touches_edge": known % 3 == 0,
            "region": np.where(known % 2, "Süd", ""),
            "centre_x": 0.0,
            "partner": pd.Series(known, dtype="Int64").mask(known % 5 == 0),
            "iou": np.where(known % 5, 0.75, np.nan),
        }
    )


def test_polygons_are_the_objects(ids: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "instances.gpkg"
    rows = table(ids)
    write_object_polygons(reader(ids), UTM, rows, path)
    found = geopandas.read_file(path, layer="instances")
    assert found.crs.to_epsg() == 32633
    expected = [
        "id",
        "class",
        "value",
        "score",
        "count",
        "area_m2",
        "touches_edge",
        "region",
        "partner",
        "iou",
    ]
    assert [c for c in found.columns if c != "geometry"] == expected
    assert found.geometry.area.tolist() == rows["area_m2"].tolist()  # of squares of 10 m, exact
    back = rasterize(
        zip(found.geometry, found["id"], strict=True), ids.shape, transform=UTM.affine, dtype="int32"
    )
    np.testing.assert_array_equal(back, ids)
    for name in expected:
        want = rows[name].astype(object).where(rows[name].notna(), None).tolist()
        got = found[name].astype(object).where(found[name].notna(), None).tolist()
        assert got == want, name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["instances.gpkg"]
    with pytest.raises(SceneError, match="objects in the scene, 1 in its table"):
        write_object_polygons(reader(ids), UTM, rows.head(1), tmp_path / "other.gpkg")
    assert not (tmp_path / "other.gpkg").exists()


def test_polygons_without_a_crs_and_without_objects(tmp_path: Path) -> None:
    ids = np.zeros((20, 30), np.uint32)
    place = RasterGeometry(ids.shape, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
    write_object_polygons(reader(ids), place, table(ids), tmp_path / "none.gpkg")
    none = geopandas.read_file(tmp_path / "none.gpkg")
    assert len(none) == 0 and none.crs is None and "touches_edge" in none
    ids[3:5, 4:9] = 1
    write_object_polygons(reader(ids), place, table(ids), tmp_path / "one.gpkg")
    assert geopandas.read_file(tmp_path / "one.gpkg").total_bounds.tolist() == [4, 3, 9, 5]


def scene(ids: np.ndarray) -> tuple[np.ndarray, SceneObjects]:
    lattice = square_lattice(ids.shape, 128, 32)
    classes = {int(k): 7 if k == 3 else 1 for k in np.unique(ids)}
    found, objects, _ = scene_ids(Oracle(ids, lattice, classes, {5: float("nan")}), lattice)
    return found, objects


def test_a_coco_data_set(ids: np.ndarray, tmp_path: Path) -> None:
    found, objects = scene(ids)
    path = tmp_path / "instances.json"
    write_coco(reader(found), (300, 420), objects, CLASSES, "a scène.tif", path)
    read = COCO(str(path))
    assert read.loadImgs(1) == [{"id": 1, "file_name": "a scène.tif", "height": 300, "width": 420}]
    assert [(c["id"], c["name"], c["isthing"]) for c in read.loadCats([1, 7])] == [
        (1, "café", 1),
        (7, "sky", 0),
    ]
    assert 0 not in read.cats
    assert sorted(read.anns) == np.unique(ids[ids > 0]).tolist()
    for number, annotation in read.anns.items():
        np.testing.assert_array_equal(read.annToMask(annotation), found == number)
        assert annotation["category_id"] == (7 if number == 3 else 1)
        assert ("score" in annotation) == (number != 5)
    assert [p.name for p in tmp_path.iterdir()] == ["instances.json"]


def test_a_coco_data_set_without_objects(tmp_path: Path) -> None:
    found, objects = scene(np.zeros((20, 30), int))
    write_coco(reader(found), (20, 30), objects, CLASSES, "x.tif", tmp_path / "none.json")
    assert json.loads((tmp_path / "none.json").read_text())["annotations"] == []
