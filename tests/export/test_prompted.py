"""Files of prompted objects: GeoParquet beside the GeoPackage, and what COCO's JSON says of prompts."""

from __future__ import annotations

import json
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import rasterio
from geopandas.testing import assert_geodataframe_equal
from pycocotools.coco import COCO
from rasterio.features import rasterize

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.export.objects import coco_facts, write_coco, write_object_polygons
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.masks.scene_masks import PatchIndex, RasterisedMasks, rasterise_scene

NAN = float("nan")
SHAPE = (60, 80)
UTM = RasterGeometry(SHAPE, (10.0, 0.0, 5e5, 0.0, -10.0, 5e6), rasterio.CRS.from_epsg(32633).to_wkt())
CLASSES = [
    Class(value=0, name="ground", color="#000000", background=True),
    Class(value=1, name="étang", color="#ff0000"),
    Class(value=2, name="dock", color="#0000ff"),
]


@pytest.fixture(scope="module")
def painted() -> RasterisedMasks:
    """A pond with an islet in it, and two docks."""
    corners = (((5, 5), (40, 40)), ((10, 10), (16, 18)), ((50, 60), (60, 70)), ((50, 75), (52, 77)))
    patches = [Patch(1, a, np.ones((b[0] - a[0], b[1] - a[1]), np.float16)) for a, b in corners]
    masks = PatchIndex(SHAPE, tuple((p,) for p in patches))
    return rasterise_scene([Box.whole(SHAPE)], masks, np.array([1, 1, 2, 2]), np.array([0.9, 0.8, NAN, 0.6]))


def table(painted: RasterisedMasks) -> pd.DataFrame:
    count = painted.objects.elements
    return pd.DataFrame(
        {
            "scene": "s",
            "id": painted.objects.ids,
            "class": ["étang", "étang", "dock", "dock"],
            "also": ["lake", "", "", ""],
            "score": painted.objects.scores,
            "source": ["text", "drawn", "automatic", "text"],
            "candidate": [0, 2, 1, 1],
            "predicted_iou": [0.95, 0.5, NAN, 0.75],
            "stability": [0.875, NAN, 0.5, 1.0],
            "level": [1, 0, 0, 0],
            "count": count,
            "area_m2": count * 100.0,
            "cut": [True, False, False, False],
            "mask_area_m2": painted.whole.elements[painted.row] * 100.0,
            "touches_edge": painted.objects.touches_edge,
            "region": ["Süd", "", "Süd", "Nord"],
        }
    )


def test_geoparquet_is_the_geopackage(painted: RasterisedMasks, tmp_path: Path) -> None:
    rows, paths = table(painted), [tmp_path / f"instances.{suffix}" for suffix in ("gpkg", "parquet")]
    write_object_polygons(painted.ids, UTM, rows, *paths)
    package, parquet = geopandas.read_file(paths[0]), geopandas.read_parquet(paths[1])
    assert_geodataframe_equal(package, parquet, check_dtype=False)
    assert [c for c in parquet.columns if c != "geometry"] == [
        "id", "class", "also", "score", "source", "candidate", "predicted_iou", "stability", "level", "cut",
        "count", "area_m2", "mask_area_m2", "touches_edge", "region",
    ]  # fmt: skip
    assert parquet.crs.to_epsg() == 32633
    assert parquet.geometry.area.tolist() == rows["area_m2"].tolist()  # what is to be seen
    assert parquet["mask_area_m2"].tolist() == [122500, 4800, 10000, 400]
    assert parquet["also"].tolist() == ["lake", "", "", ""] and parquet["region"][0] == "Süd"
    back = rasterize(
        zip(parquet.geometry, parquet["id"], strict=True), SHAPE, transform=UTM.affine, dtype="int32"
    )
    np.testing.assert_array_equal(back, painted.ids(Box.whole(SHAPE)))
    described = json.loads(pq.read_schema(paths[1]).metadata[b"geo"])
    assert described["columns"]["geometry"]["encoding"] == "WKB"
    assert described["columns"]["geometry"]["bbox"] == parquet.total_bounds.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["instances.gpkg", "instances.parquet"]
    with pytest.raises(SceneError, match="4 objects in the scene, 3 in its table"):
        write_object_polygons(painted.ids, UTM, rows.head(3), tmp_path / "other.parquet")
    assert not (tmp_path / "other.parquet").exists()


def test_geoparquet_without_a_crs_and_without_objects(painted: RasterisedMasks, tmp_path: Path) -> None:
    place = RasterGeometry(SHAPE, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
    write_object_polygons(painted.ids, place, table(painted), tmp_path / "some.parquet")
    some = geopandas.read_parquet(tmp_path / "some.parquet")
    assert some.crs is None and some.total_bounds.tolist() == [5, 5, 77, 60]
    write_object_polygons(
        lambda box: np.zeros(box.shape, int), UTM, table(painted).head(0), tmp_path / "no.parquet"
    )
    none = geopandas.read_parquet(tmp_path / "no.parquet")
    assert len(none) == 0 and none.crs.to_epsg() == 32633 and "mask_area_m2" in none


def test_coco_says_what_is_known_of_prompted_objects(painted: RasterisedMasks, tmp_path: Path) -> None:
    points = {1: np.array([[20.0, 30.5], [8.0, 7.0]]), 4: np.zeros((0, 2))}
    facts = coco_facts(table(painted), points)
    path = tmp_path / "instances.json"
    write_coco(painted.ids, SHAPE, painted.objects, CLASSES, "s.tif", path, facts)
    read = COCO(str(path))
    assert [read.cats[k]["name"] for k in (1, 2)] == ["étang", "dock"]
    own = {"id", "image_id", "category_id", "segmentation", "bbox", "area", "iscrowd", "score"}
    more = {number: {k: v for k, v in a.items() if k not in own} for number, a in read.anns.items()}
    assert more == {
        1: {"also": "lake", "source": "text", "candidate": 0, "predicted_iou": 0.95, "stability_score": 0.875,
            "level": 1, "cut": True, "mask_area_m2": 122500.0, "point_coords": [[30.5, 20.0], [7.0, 8.0]]},
        2: {"source": "drawn", "candidate": 2, "predicted_iou": 0.5, "level": 0, "cut": False,
            "mask_area_m2": 4800.0},
        3: {"source": "automatic", "candidate": 1, "stability_score": 0.5, "level": 0, "cut": False,
            "mask_area_m2": 10000.0},
        4: {"source": "text", "candidate": 1, "predicted_iou": 0.75, "stability_score": 1.0, "level": 0,
            "cut": False, "mask_area_m2": 400.0},
    }  # fmt: skip
    ids = painted.ids(Box.whole(SHAPE))
    for number, annotation in read.anns.items():
        np.testing.assert_array_equal(read.annToMask(annotation), ids == number)
        assert annotation["area"] == np.count_nonzero(ids == number)
    assert [("score" in a) for _, a in sorted(read.anns.items())] == [True, True, False, True]
