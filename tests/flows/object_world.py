"""A scene of known objects, a network that knows them, and jobs of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cc3d
import geopandas
import numpy as np
import onnx
import rasterio
import shapely
import yaml
from onnx import TensorProto, helper, numpy_helper

from tests.instances.scene import discs

SHAPE = (256, 320)
PIXEL = 10.0
PLACE = rasterio.Affine(PIXEL, 0, 500_000, 0, -PIXEL, 5_000_000)
NODATA = 65535
GROUND, EVEN, ODD = 0, 4, 9
CLASSES = [
    {"value": GROUND, "name": "ground", "color": "#000000", "background": True},
    {"value": EVEN, "name": "even", "color": "#00ff00"},
    {"value": ODD, "name": "odd", "color": "#0000ff"},
]


def truth() -> np.ndarray:
    """Ids over the scene, in no order; `NODATA` in a corner.

    Two squares that touch, one of them over a corner of four blocks of 32; a ring around a block; a snake
    over twenty; discs, some of them cut by these.
    """
    ids = discs(SHAPE, 70, seed=8, radius=(3, 9))
    top = int(ids.max())
    ids[122:166, 26:70] = np.where(ids[122:166, 26:70] > 0, 0, ids[122:166, 26:70])
    ids[122:166, 26:70] = top + 1
    ids[127:161, 31:65] = 0
    ids[108:148, 108:126], ids[108:148, 126:148] = top + 2, top + 3
    ids[200:206, 5:315] = ids[240:246, 5:315] = ids[200:246, 309:315] = top + 4
    ids[:40, 280:] = 0
    ids = cc3d.connected_components(ids.astype(np.uint32), connectivity=8).astype(np.int64)
    number = 1 + np.random.default_rng(5).permutation(ids.max())
    ids = np.r_[0, number][ids]
    ids[:40, 280:] = NODATA
    return ids


def class_of(ids: np.ndarray) -> np.ndarray:
    return np.select([(ids == 0) | (ids == NODATA), ids % 2 == 1], [GROUND, ODD], EVEN)


def oracle(path: Path, divisor: int | None = None) -> None:
    """An ONNX file that answers with a mask for every id in its window, the largest id first.

    Class 1 + id mod 2 of the card, or id // ``divisor``; score 0.6 + (id mod 10) / 50.
    """
    constants = {
        "flat": np.array([-1]), "zero": np.float32(0), "two": np.float32(2), "ten": np.float32(10),
        "one": np.float32(1), "fifty": np.float32(50), "least": np.float32(0.6), "spatial": np.array([1, 2]),
        "batch": np.array([0, 1]), "last": np.array([-1]), "end": np.array([-(2**31)]), "axis": np.array([0]),
        "divisor": np.float32(divisor or 1),
    }  # fmt: skip
    place = [
        helper.make_node("Mod", ["ids", "two"], ["odd"], fmod=1),
        helper.make_node("Add", ["odd", "one"], ["place"]),
    ]
    if divisor:
        place = [
            helper.make_node("Div", ["ids", "divisor"], ["share"]),
            helper.make_node("Floor", ["share"], ["place"]),
        ]
    nodes = [
        helper.make_node("Reshape", ["image", "flat"], ["line"]),
        helper.make_node("Unique", ["line"], ["values"]),
        helper.make_node("Greater", ["values", "zero"], ["above"]),
        helper.make_node("Compress", ["values", "above"], ["rising"], axis=0),
        helper.make_node("Slice", ["rising", "last", "end", "axis", "last"], ["ids"]),
        helper.make_node("Squeeze", ["image", "batch"], ["window"]),
        helper.make_node("Unsqueeze", ["ids", "spatial"], ["each"]),
        helper.make_node("Equal", ["window", "each"], ["there"]),
        helper.make_node("Cast", ["there"], ["masks"], to=TensorProto.FLOAT),
        *place,
        helper.make_node("Cast", ["place"], ["classes"], to=TensorProto.INT64),
        helper.make_node("Mod", ["ids", "ten"], ["rest"], fmod=1),
        helper.make_node("Div", ["rest", "fifty"], ["more"]),
        helper.make_node("Add", ["more", "least"], ["scores"]),
    ]
    outputs = [
        helper.make_tensor_value_info("masks", TensorProto.FLOAT, ["n", "h", "w"]),
        helper.make_tensor_value_info("classes", TensorProto.INT64, ["n"]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n"]),
    ]
    graph = helper.make_graph(
        nodes,
        "oracle",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, "h", "w"])],
        outputs,
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, path)


def write_raster(path: Path, values: np.ndarray, **profile: Any) -> None:
    settings = {"crs": "EPSG:32633", "transform": PLACE, "height": SHAPE[0], "width": SHAPE[1], **profile}
    with rasterio.open(path, "w", driver="GTiff", count=1, dtype=values.dtype.name, **settings) as target:
        target.write(values, 1)


CARD: dict[str, Any] = {
    "name": "oracle",
    "kind": "raster",
    "provider": "onnx",
    "weights": "oracle.onnx",
    "arguments": {"decode": "masks"},
    "input": {"bands": ["ids"]},
    "window": {"size": [64], "halo": [16]},
    "output": {"kind": "instance"},
    "classes": CLASSES,
}


def districts() -> geopandas.GeoDataFrame:
    """Three slanted polygons, which leave some of the scene out, in pixels made metres."""
    corners = {
        "west": [(0, 0), (95.3, 10.2), (130.7, 256), (0, 250.4)],
        "north": [(95.3, 10.2), (230.5, 4.5), (220.1, 120.6), (114.2, 140.9)],
        "south": [(114.2, 140.9), (220.1, 120.6), (316.6, 251.2), (130.7, 256)],
    }
    polygons = [shapely.Polygon([PLACE @ xy for xy in ring]) for ring in corners.values()]
    return geopandas.GeoDataFrame({"district": [*corners]}, geometry=polygons, crs="EPSG:32633")


def write_world(folder: Path) -> Path:
    """Scene, card, reference and districts; the folder."""
    ids = truth()
    write_raster(folder / "scene.tif", ids.astype(np.uint16), nodata=NODATA)
    numbered = np.where((ids > 0) & (ids < NODATA), class_of(ids) * 1000 + ids, 0)
    write_raster(folder / "truth.tif", numbered.astype(np.uint16))
    districts().to_file(folder / "districts.gpkg")
    oracle(folder / "oracle.onnx")
    (folder / "oracle.yaml").write_text(yaml.safe_dump(CARD))
    return folder


def write_job(folder: Path, out: Path, **changes: Any) -> Path:
    """A job's file in its output folder's parent; ``changes`` replace keys, None removes them."""
    job = {
        "name": "objects",
        "scenes": [str(folder / "scene.tif")],
        "model": str(folder / "oracle.yaml"),
        "bands": ["ids"],
        "reference": {"path": str(folder / "truth.tif"), "divisor": 1000},
        "regions": {"path": str(folder / "districts.gpkg"), "name": "district"},
        "compute": {"device": "cpu", "threads": 1, "batch_minutes": 0.04},
        "outputs": {"dir": str(out)},
        **changes,
    }
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in job.items() if value is not None}))
    return path
