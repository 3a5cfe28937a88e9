"""Objects end to end: a network that knows the truth, through the real flow, to files, tables and page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import cc3d
import geopandas
import numpy as np
import onnx
import pandas as pd
import pytest
import rasterio
import shapely
import torch
import yaml
from onnx import TensorProto, helper, numpy_helper
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from pycocotools.coco import COCO
from pyproj import Geod
from rasterio.features import shapes
from torchmetrics.detection import PanopticQuality

from flows.segment import segment
from segpipe.blocks import SceneBlocks
from segpipe.deliver import done_record, export_scene
from segpipe.inference.engine import Engine
from segpipe.inference.labels import nodata_value
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.instances.window import WindowObjects
from segpipe.measure import measure_scene
from segpipe.run import Run, finish_run
from segpipe.scene import pending_blocks
from segpipe.steps import finish_labels
from tests.flows.conftest import load, run_folder
from tests.inference.lab import Lab, prepared
from tests.instances.scene import by_first, discs
from tests.test_resume import kill, start, wait_for
from tests.world import Ended, command

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
BLOCKS = ("32", "100x128", "auto")
"""80 blocks, 9 blocks whose ends fall into windows, and one."""
ANSWERS = ("instances.csv", "regions.csv", "panoptic.csv")


# ------------------------------------------------------------------ the truth, and who knows it


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


def oracle(path: Path) -> None:
    """An ONNX file that answers with a mask for every id in its window, the largest id first.

    Class 1 + id mod 2 of the card, score 0.6 + (id mod 10) / 50.
    """
    constants = {
        "flat": np.array([-1]), "zero": np.float32(0), "two": np.float32(2), "ten": np.float32(10),
        "one": np.float32(1), "fifty": np.float32(50), "least": np.float32(0.6), "spatial": np.array([1, 2]),
        "batch": np.array([0, 1]), "last": np.array([-1]), "end": np.array([-(2**31)]), "axis": np.array([0]),
    }  # fmt: skip
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
        helper.make_node("Mod", ["ids", "two"], ["odd"], fmod=1),
        helper.make_node("Add", ["odd", "one"], ["place"]),
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scene, card, reference and districts."""
    folder = tmp_path_factory.mktemp("objects")
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


@pytest.fixture(scope="module")
def on_our_server(flow_server: str, flow_home: Path) -> Iterator[None]:
    with temporary_settings({PREFECT_API_URL: flow_server, PREFECT_HOME: flow_home}):
        yield


@pytest.fixture(scope="module")
def runs(folder: Path, on_our_server: None) -> dict[str, Path]:
    """The run's folder by the size of its blocks."""
    found = {}
    for block in BLOCKS:
        job = load(write_job(folder, folder / f"out-{block}", tiling={"block": block}))
        state = segment(job, return_state=True)
        assert state.is_completed(), state.message
        found[block] = run_folder(job)
    return found


@pytest.fixture(scope="module")
def run(runs: dict[str, Path]) -> Path:
    return runs["32"]


def answers(run: Path) -> dict[str, bytes]:
    """Everything that must be the same bytes; only how often a batch was tried is left out."""
    tables = {
        name: pd.read_csv(run / name, dtype=str).drop(columns="attempts", errors="ignore") for name in ANSWERS
    }
    files = {name: table.to_csv(index=False).encode() for name, table in tables.items()}
    scene = run / "scenes" / "scene"
    return files | {
        name: (scene / name).read_bytes() for name in ("instances.tif", "instances.json", "labels.tif")
    }


# ------------------------------------------------------------------ what comes out


def test_blocks_change_no_byte(runs: dict[str, Path]) -> None:
    first, *others = (answers(run) for run in runs.values())
    for other in others:
        assert other == first
    polygons = [geopandas.read_file(run / "scenes/scene/instances.gpkg") for run in runs.values()]
    for other in polygons[1:]:
        pd.testing.assert_frame_equal(pd.DataFrame(other), pd.DataFrame(polygons[0]))


def test_the_truth_comes_back(run: Path) -> None:
    ids = truth()
    expected = by_first(np.where(ids == NODATA, 0, ids))
    with rasterio.open(run / "scenes/scene/instances.tif") as file:
        np.testing.assert_array_equal(file.read(1), expected)
        assert (file.dtypes, file.nodata, file.crs.to_epsg()) == (("uint32",), 0, 32633)
    with rasterio.open(run / "scenes/scene/labels.tif") as file:
        np.testing.assert_array_equal(file.read(1), np.where(ids == NODATA, 255, class_of(ids)))
    table = pd.read_csv(run / "instances.csv", keep_default_na=False, na_values=[""])
    assert table["id"].tolist() == list(range(1, expected.max() + 1))
    for row in table.itertuples():
        true = int(ids[expected == row.id][0])
        where = np.argwhere(ids == true)
        assert (row.count, row.value, row.partner) == (
            len(where),
            class_of(np.array(true)),
            row.value * 1000 + true,
        )
        assert (row.area_m2, row.iou) == (len(where) * PIXEL**2, 1)
        assert row.score == pytest.approx(0.6 + true % 10 / 50, abs=1e-6)
        centre = PLACE @ (where[:, 1].mean() + 0.5, where[:, 0].mean() + 0.5)
        assert (row.centre_x, row.centre_y) == pytest.approx(centre, rel=1e-12)
        assert row.touches_edge == bool((where == 0).any() or (where == [SHAPE[0] - 1, SHAPE[1] - 1]).any())
    # the shapes that are hard to join: a ring around a block, a snake over twenty, and one over a corner
    assert (expected[122:166, 26:70] == expected[124, 28]).sum() == 44 * 44 - 34 * 34
    snake = np.unique(np.argwhere(expected == expected[202, 100]) // 32, axis=0)
    assert len(snake) >= 20
    assert expected[120, 120] != expected[127, 127] == expected[128, 128] == expected[127, 128] != 0


def test_quality_against_class_and_number_is_one(run: Path) -> None:
    table = pd.read_csv(run / "panoptic.csv").set_index("class")
    ids = truth()
    for name, value in (("even", EVEN), ("odd", ODD)):
        row = table.loc[name]
        number = len(np.unique(ids[class_of(ids) == value]))
        assert row[["tp", "fp", "fn"]].tolist() == [number, 0, 0]
        assert row[["pq", "sq", "rq", "ap", "ap50"]].tolist() == [1] * 5
    assert table.loc["all", ["pq", "sq", "rq"]].tolist() == [1, 1, 1]


def test_counts_per_district_are_those_of_geopandas(run: Path) -> None:
    ids = truth()
    there = (ids > 0) & (ids < NODATA)
    rows = [
        {"properties": {"id": int(v)}, "geometry": g}
        for g, v in shapes(ids.astype(np.int32), mask=there, connectivity=4, transform=PLACE)
    ]
    objects = geopandas.GeoDataFrame.from_features(rows, crs="EPSG:32633").dissolve("id", as_index=False)
    parts = geopandas.overlay(objects, districts(), how="intersection")
    parts["area"] = parts.area
    homes = parts.sort_values("area").drop_duplicates("id", keep="last")
    homes["value"] = class_of(homes["id"].to_numpy())
    want = homes.groupby(["district", "value"]).size().to_dict()
    whole = {v: len(np.unique(ids[class_of(ids) == v])) for v in (EVEN, ODD)}
    assert 0 < len(homes) < sum(whole.values())  # some lie in no district
    regions = pd.read_csv(run / "regions.csv")
    found = {(r.region, r.value): r.objects for r in regions.itertuples() if not pd.isna(r.objects)}
    assert found == {("scene", v): n for v, n in whole.items()} | {
        (name, v): want.get((name, v), 0) for name in districts()["district"] for v in (EVEN, ODD)
    }
    assert regions.loc[regions["value"] == GROUND, "objects"].isna().all()
    # the same per object, in the table and in the GeoPackage
    table = pd.read_csv(run / "instances.csv", keep_default_na=False)
    number = dict(zip(homes["id"], homes["district"], strict=True))
    own = {
        int(partner) % 1000: region for partner, region in zip(table["partner"], table["region"], strict=True)
    }
    assert own == {int(i): number.get(i, "") for i in objects["id"]}
    layer = geopandas.read_file(run / "scenes/scene/instances.gpkg").set_index("partner")
    assert {i % 1000: r or "" for i, r in layer["region"].items()} == own
    order = [class_of(np.array(i)) * 1000 + i for i in objects["id"]]
    assert shapely.equals(layer.loc[order].geometry.to_numpy(), objects.geometry.to_numpy()).all()


def test_files_are_listed_and_linked(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    [scene] = record["scenes"]
    names = {"instances": "instances.tif", "objects": "instances.gpkg", "coco": "instances.json"}
    for key, name in names.items():
        assert scene["files"][key] == f"scenes/scene/{name}"
    page = (run / "report.html").read_text()
    assert all(
        f'href="scenes/scene/{name}"' in page or f'href="./scenes/scene/{name}"' in page
        for name in names.values()
    )
    assert "Panoptic quality" in page and 'id="def-pq"' in page
    coco = COCO(str(run / "scenes/scene/instances.json"))
    with rasterio.open(run / "scenes/scene/instances.tif") as file:
        ids = file.read(1)
    assert sorted(coco.anns) == np.unique(ids[ids > 0]).tolist()
    for number in (1, len(coco.anns)):
        np.testing.assert_array_equal(coco.annToMask(coco.anns[number]), ids == number)


def test_a_file_that_was_taken_away_is_made_again(
    runs: dict[str, Path], folder: Path, on_our_server: None
) -> None:
    run = runs["auto"]
    taken, kept = run / "scenes/scene/instances.json", run / "scenes/scene/instances.tif"
    data, before = taken.read_bytes(), kept.stat().st_mtime_ns
    taken.unlink()
    state = segment(load(folder / "out-auto.yaml"), return_state=True)
    assert state.is_completed() and taken.read_bytes() == data
    assert kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_dask_changes_no_byte(run: Path, folder: Path, on_our_server: None) -> None:
    compute = {"device": "cpu", "threads": 1, "runner": "dask", "workers": 2, "batch_minutes": 0.01}
    job = load(write_job(folder, folder / "dask", tiling={"block": "64"}, compute=compute))
    assert segment(job, return_state=True).is_completed()
    assert answers(run_folder(job)) == answers(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (".store/predict-*/receipts-*/*.json", 20),
        (".store/objects-*/*/instances/c/*/*", 30),
        ("objects/*/scenes/scene", 1),
    ],
    ids=["predicting", "joining", "exporting"],
)
def test_a_killed_run_ends_with_the_same_bytes(
    pattern: str, count: int, run: Path, folder: Path, flow_server: str, tmp_path: Path
) -> None:
    job = write_job(folder, tmp_path / "out", tiling={"block": "32"})
    process = start(job, flow_server)
    wait_for(process, pattern, tmp_path / "out", count)
    kill(process)
    ended: Ended = command("run", str(job), api=flow_server)
    assert ended.code == 0, ended
    assert answers(run_folder(load(job))) == answers(run)


# ------------------------------------------------------------------ stuff

SEA = 2
DEGREES = rasterio.Affine(0.02, 0, 11.0, 0, -0.02, 62.0)


class Panoptic:
    """Answers with the values of the image, class × 1000 + number, as objects."""

    device = torch.device("cpu")

    def objects(self, batch: torch.Tensor) -> Sequence[WindowObjects]:
        found = []
        for window in batch.numpy()[:, 0].astype(np.int64):
            known, ids = np.unique(window, return_inverse=True)
            classes = known[known > 0] // 1000
            ids = ids.reshape(window.shape) + (0 if known[0] == 0 else 1)
            found.append(
                WindowObjects(ids.astype(np.int32), classes, np.full(len(classes), 0.75, np.float32))
            )
        return found


def panoptic_maps() -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth as class × 1000 + number: discs, one of another class, and a sea in two parts."""
    discs_true = discs((120, 100), 40, seed=6, radius=(4, 9))
    moved = np.roll(discs_true, 1, 1)
    maps = []
    for ids, wrong in ((moved, 7), (discs_true, 0)):
        kind = np.where(ids % 2, ODD, EVEN)
        kind = np.where(ids == wrong, ODD + EVEN - kind, kind) if wrong else kind
        found = np.where(ids > 0, kind * 1000 + ids, 0)
        edge = 14 if wrong else 15
        found[:edge], found[-20:, 30:] = SEA * 1000, SEA * 1000
        maps.append(found)
    return maps[0], maps[1]


@pytest.fixture(scope="module")
def panoptic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run's folder of a panoptic card on a geographic grid."""
    lab = Lab(tmp_path_factory.mktemp("panoptic"))
    predicted, true = panoptic_maps()
    place = {"crs": "EPSG:4326", "transform": DEGREES}
    ref = lab.raster(predicted[None].astype(np.float32), **place)
    reference = lab.raster(true[None].astype(np.int32), **place)
    classes = [*CLASSES, {"value": SEA, "name": "sea", "color": "#00ffff", "thing": False}]
    card = lab.card(2, classes=classes, output={"kind": "panoptic", "activation": "none"})
    job = lab.job(
        ref, card, "out", tiling={"block": "48"}, reference={"path": reference.uri, "divisor": 1000}
    )
    scene = prepared(job, ref)
    with SceneBlocks.of(scene) as store:
        normaliser = Normaliser(scene.card, scene.scaling, Statistics())
        engine = Engine(scene.plan, scene.card, normaliser, Panoptic(), store, nodata_value(scene.card))
        engine.run(pending_blocks(scene), lambda: False)
    finish_labels(scene)
    measured, done = measure_scene(scene, "test")
    run = Run(job.outputs.dir, job.name, "run", "2024-05-06T07:08:09+00:00")
    files = export_scene(scene, measured, run)
    finish_run(run, job, scene.settings, [done_record(scene, measured, files, {"measure": done}, 1)])
    return Path(run.location)


def test_things_and_stuff_have_the_quality_of_torchmetrics(panoptic: Path) -> None:
    oracle = PanopticQuality({EVEN, ODD}, {GROUND, SEA}, return_sq_and_rq=True, return_per_class=True)
    sides = (np.stack([m // 1000, np.where(m // 1000 == SEA, 0, m)], -1)[None] for m in panoptic_maps())
    oracle.update(*(torch.from_numpy(side) for side in sides))
    want = dict(zip(("even", "odd", "ground", "sea"), oracle.compute().squeeze().tolist(), strict=True))
    table = pd.read_csv(panoptic / "panoptic.csv").set_index("class")
    for name in ("even", "odd", "sea"):
        assert 0 < want[name][0] < 1
        assert table.loc[name, ["pq", "sq", "rq"]].tolist() == pytest.approx(want[name])
    means = {"things": ["even", "odd"], "stuff": ["sea"], "all": ["even", "odd", "sea"]}
    for name, parts in means.items():
        assert table.loc[name, "pq"] == pytest.approx(np.mean([want[part][0] for part in parts]))


def test_stuff_is_one_segment_and_is_not_counted(panoptic: Path) -> None:
    predicted, _ = panoptic_maps()
    table = pd.read_csv(panoptic / "instances.csv")
    [sea] = table[table["value"] == SEA].to_dict("records")
    assert sea["count"] == (predicted == SEA * 1000).sum()
    with rasterio.open(panoptic / "scenes/scene/instances.tif") as file:
        ids = file.read(1)
    np.testing.assert_array_equal(ids == sea["id"], predicted == SEA * 1000)
    np.testing.assert_array_equal(ids, by_first(predicted))
    regions = pd.read_csv(panoptic / "regions.csv").set_index("value")["objects"]
    things = {v: len(np.unique(predicted[predicted // 1000 == v])) for v in (EVEN, ODD)}
    assert regions.dropna().to_dict() == things
    coco = COCO(str(panoptic / "scenes/scene/instances.json"))
    assert {i: c["isthing"] for i, c in coco.cats.items()} == {EVEN: 1, ODD: 1, SEA: 0}
    np.testing.assert_array_equal(coco.annToMask(coco.anns[sea["id"]]), predicted == SEA * 1000)


def test_areas_on_a_geographic_grid_are_those_of_geodesics(panoptic: Path) -> None:
    """Each row of pixels as a polygon on the ellipsoid, by GeographicLib."""
    predicted, _ = panoptic_maps()
    west, east = DEGREES.c, DEGREES.c + DEGREES.a
    edges = DEGREES.f + DEGREES.e * np.arange(121)
    ground = Geod(ellps="WGS84")
    rows = [
        abs(ground.polygon_area_perimeter([west, east, east, west], [top, top, low, low])[0])
        for top, low in pairwise(edges)
    ]
    assert rows[-1] > 1.05 * rows[0]
    sizes = np.broadcast_to(np.array(rows)[:, None], predicted.shape)
    table = pd.read_csv(panoptic / "instances.csv")
    ids = by_first(predicted)
    want = [sizes[ids == number].sum() for number in table["id"]]
    assert table["area_m2"].tolist() == pytest.approx(want, rel=1e-6)
    layer = geopandas.read_file(panoptic / "scenes/scene/instances.gpkg")
    assert layer.crs.to_epsg() == 4326 and layer["area_m2"].tolist() == table["area_m2"].tolist()


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("card", "job", "said"),
    [
        ({}, {"tiling": {"blend": "gaussian"}}, "tiling.blend: 'oracle' finds objects"),
        ({}, {"tiling": {"halo": "0"}}, "tiling.halo: found 0"),
        ({"window": {"size": [64], "halo": [0]}}, {}, "window.halo: found [0]"),
        ({"classes": [{**c, "background": False} for c in CLASSES]}, {}, "must have background: true"),
        (
            {},
            {"measure": {"objects": True}, "reference": {"path": "scene.tif"}},
            "measure.objects: ids alone do not say which of even, odd",
        ),
        (
            {"output": {"kind": "semantic"}, "arguments": {}},
            {},
            "reference.divisor: 'oracle' yields a class for every element",
        ),
    ],
    ids=["blend", "halo of the job", "halo of the card", "no background", "ids of classes", "semantic"],
)
def test_what_cannot_be_done_is_refused_in_a_line(
    card: dict[str, Any],
    job: dict[str, Any],
    said: str,
    folder: Path,
    tmp_path: Path,
    here: Callable[..., Ended],
) -> None:
    (tmp_path / "oracle.onnx").write_bytes((folder / "oracle.onnx").read_bytes())
    path = tmp_path / "oracle.yaml"
    path.write_text(yaml.safe_dump({**CARD, **card}))
    if "reference" in job:
        job = {**job, "reference": {"path": str(folder / "scene.tif")}}
    ended = here("run", str(write_job(folder, tmp_path / "out", model=str(path), **job)))
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1 and said in ended.err, ended.err
    assert not (tmp_path / "out" / "objects").exists()
