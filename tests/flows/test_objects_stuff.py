"""Things and stuff on a geographic grid: quality, counts and areas in the files of a run."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
import torch
import yaml
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from pycocotools.coco import COCO
from pyproj import Geod
from skimage.measure import regionprops_table
from torchmetrics.detection import PanopticQuality

from segpipe.config.card import read_card
from segpipe.export.run_folder import RunFolder
from segpipe.export.scene_files import done_record, export_scene
from segpipe.inference.engine import Engine
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.objects.window import WindowObjects
from segpipe.pipeline.measure import measure_scene
from segpipe.pipeline.model_scene import pending_blocks
from segpipe.pipeline.predict import finish_labels
from segpipe.runs.check import ResolvedJob
from segpipe.runs.finish import finish_run
from segpipe_flows.segment import segment
from tests.flows.conftest import load, run_folder
from tests.flows.object_world import (
    CARD,
    CLASSES,
    EVEN,
    GROUND,
    ODD,
    PIXEL,
    PLACE,
    SHAPE,
    oracle,
    write_job,
    write_raster,
)
from tests.inference.lab import Lab, prepared
from tests.instances.scene import by_first, discs
from tests.report.pages import Reader

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


def panoptic_maps(shape: tuple[int, int] = (120, 100), count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth as class × 1000 + number: discs, one of another class, and a sea in two parts."""
    discs_true = discs(shape, count, seed=6, radius=(4, 9))
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
    with scene.open_blocks() as store:
        normaliser = Normaliser(scene.card, scene.pixels.scaling, Statistics())
        engine = Engine(scene.plan, scene.card, normaliser, Panoptic(), store)
        engine.run(pending_blocks(scene))
    finish_labels(scene)
    measured, done = measure_scene(scene)
    run = RunFolder(job.outputs.dir, job.name, "run", "2024-05-06T07:08:09+00:00")
    files = export_scene(scene, measured, run)
    finish_run(
        run,
        ResolvedJob(job=job, card=read_card(job.model), settings=scene.settings),
        [done_record(scene, measured, files, {"measure": done})],
    )
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


DISTRICTS = {"west": (0, 0, 120, 200), "north": (120, 0, 320, 90), "south": (120, 90, 300, 250)}
"""Columns and rows from, columns and rows to: edges of pixels, so that a region's elements are counted."""


@pytest.fixture(scope="module")
def maps() -> tuple[np.ndarray, np.ndarray]:
    """Prediction and truth of the scene that goes through the flow."""
    return panoptic_maps(SHAPE, 120)


@pytest.fixture(scope="module")
def flown(
    maps: tuple[np.ndarray, np.ndarray],
    tmp_path_factory: pytest.TempPathFactory,
    flow_server: str,
    flow_home: Path,
) -> Path:
    """The run's folder of a panoptic ONNX card and a panoptic reference, by the flow."""
    folder = tmp_path_factory.mktemp("flown")
    predicted, true = maps
    classes = [*CLASSES, {"value": SEA, "name": "sea", "color": "#00ffff", "thing": False}]
    place = np.zeros(10, np.int64)
    place[[c["value"] for c in classes]] = range(len(classes))
    coded = place[predicted // 1000] * 1000 + np.where(predicted // 1000 == SEA, 1, predicted % 1000)
    write_raster(folder / "scene.tif", np.where(predicted > 0, coded, 0).astype(np.uint16))
    write_raster(folder / "truth.tif", true.astype(np.uint16))
    oracle(folder / "oracle.onnx", 1000)
    card = {**CARD, "output": {"kind": "panoptic"}, "classes": classes}
    (folder / "oracle.yaml").write_text(yaml.safe_dump(card))
    corners = [shapely.box(*PLACE @ (x0, y1), *PLACE @ (x1, y0)) for x0, y0, x1, y1 in DISTRICTS.values()]
    districts = geopandas.GeoDataFrame({"district": [*DISTRICTS]}, geometry=corners, crs="EPSG:32633")
    districts.to_file(folder / "districts.gpkg")
    job = load(write_job(folder, folder / "out", tiling={"block": "96"}))
    with temporary_settings({PREFECT_API_URL: flow_server, PREFECT_HOME: flow_home}):
        state = segment(job, return_state=True)
    assert state.is_completed(), state.message
    return run_folder(job)


def inside(region: str) -> tuple[slice, slice]:
    """Rows and columns of a region."""
    x0, y0, x1, y1 = DISTRICTS.get(region, (0, 0, SHAPE[1], SHAPE[0]))
    return slice(y0, y1), slice(x0, x1)


def homes(panoptic: np.ndarray) -> dict[int, str]:
    """The district that holds most of each object, where one holds any."""
    found = {}
    for value in np.unique(panoptic[panoptic > 0]):
        shares = {name: np.count_nonzero(panoptic[inside(name)] == value) for name in DISTRICTS}
        most = max(shares, key=lambda name: shares[name])
        assert sorted(shares.values())[-2] < shares[most] or not shares[most]  # no ties, which have a rule
        if shares[most]:
            found[int(value)] = most
    return found


def quality(predicted: np.ndarray, true: np.ndarray, value: int) -> tuple[float, int, int, int]:
    """PQ, TP, FP and FN of a class by its definition (Kirillov et al. 2019): pairs with IoU above 1/2."""
    sides = [np.where(m // 1000 == value, m, 0) for m in (predicted, true)]
    ids = [np.unique(side[side > 0]) for side in sides]
    ious = []
    for i in ids[0]:
        for j in np.unique(sides[1][(sides[0] == i) & (sides[1] > 0)]):
            both, either = (sides[0] == i) & (sides[1] == j), (sides[0] == i) | (sides[1] == j)
            ious += [both.sum() / either.sum()]
    matched = [iou for iou in ious if iou > 0.5]
    fp, fn = len(ids[0]) - len(matched), len(ids[1]) - len(matched)
    return sum(matched) / (len(matched) + fp / 2 + fn / 2), len(matched), fp, fn


def test_the_flow_counts_and_measures_per_region_and_class(
    flown: Path, maps: tuple[np.ndarray, np.ndarray]
) -> None:
    predicted, _ = maps
    home = homes(predicted)
    regions = pd.read_csv(flown / "regions.csv").set_index(["region", "value"])
    assert len(regions) == 4 * 4
    for (region, value), row in regions.iterrows():
        here = predicted[inside(region)] // 1000 == value
        assert row["count"] == here.sum()
        assert row["area_m2"] == here.sum() * PIXEL**2
        things = {int(i) for i in np.unique(predicted[predicted // 1000 == value])}
        if value in (GROUND, SEA):
            assert np.isnan(row["objects"])
        else:
            assert row["objects"] == (
                len(things) if region == "scene" else sum(home.get(i) == region for i in things)
            )


def test_the_flow_compares_per_region_and_class(flown: Path, maps: tuple[np.ndarray, np.ndarray]) -> None:
    metrics = pd.read_csv(flown / "metrics.csv").set_index(["region", "value"])
    assert len(metrics) == 4 * 4
    for (region, value), row in metrics.iterrows():
        found, true = (m[inside(region)] // 1000 == value for m in maps)
        sums = (found & true).sum(), (found & ~true).sum(), (~found & true).sum()
        assert row[["tp", "fp", "fn"]].tolist() == [*sums]
        assert row["iou"] == pytest.approx(sums[0] / sum(sums))


def test_each_object_of_the_flow_is_as_scikit_image_measures_it(
    flown: Path, maps: tuple[np.ndarray, np.ndarray]
) -> None:
    predicted, _ = maps
    ids = by_first(predicted)
    want = regionprops_table(ids, predicted, properties=("label", "area", "centroid", "intensity_max"))
    table = pd.read_csv(flown / "instances.csv", keep_default_na=False).sort_values("id")
    assert table["id"].tolist() == want["label"].tolist()
    assert table["value"].tolist() == (want["intensity_max"] // 1000).tolist()
    assert table["area_m2"].tolist() == (want["area"] * PIXEL**2).tolist()
    x, y = PLACE @ (want["centroid-1"] + 0.5, want["centroid-0"] + 0.5)
    np.testing.assert_allclose(table["centre_x"], x, rtol=1e-12)
    np.testing.assert_allclose(table["centre_y"], y, rtol=1e-12)
    home = homes(predicted)
    things = [int(v) if v // 1000 != SEA else 0 for v in want["intensity_max"]]
    assert 0 in things  # the sea is at home nowhere
    assert table["region"].tolist() == [home.get(v, "") for v in things]


def test_the_flow_finds_the_quality_of_the_definition(
    flown: Path, maps: tuple[np.ndarray, np.ndarray]
) -> None:
    table = pd.read_csv(flown / "panoptic.csv").set_index("class")
    want = {name: quality(*maps, value) for name, value in (("even", EVEN), ("odd", ODD), ("sea", SEA))}
    for name, (pq, tp, fp, fn) in want.items():
        assert 0.5 < pq < 1
        assert table.loc[name, ["tp", "fp", "fn"]].tolist() == [tp, fp, fn]
        assert table.loc[name, "pq"] == pytest.approx(pq)
    assert want["even"][2] + want["odd"][2] > 0
    assert table.loc["all", "pq"] == pytest.approx(np.mean([pq for pq, *_ in want.values()]))


def test_the_report_of_the_flow_holds_the_numbers(flown: Path, maps: tuple[np.ndarray, np.ndarray]) -> None:
    shown = Reader((flown / "report.html").read_text()).rows
    predicted, _ = maps
    names = {GROUND: "ground", EVEN: "even", ODD: "odd", SEA: "sea"}
    home = homes(predicted)
    regions = {(row[0], row[1]): row for row in shown["regions-table"][1:]}
    assert shown["regions-table"][0][:6] == ["Region", "Class", "Value", "Count", "Objects", "Area (ha)"]
    for region in ("scene", *DISTRICTS):
        for value, name in names.items():
            number = np.count_nonzero(predicted[inside(region)] // 1000 == value)
            things = [int(i) for i in np.unique(predicted[predicted // 1000 == value])]
            own = [i for i in things if region in ("scene", home.get(i))]
            objects = "—" if value in (GROUND, SEA) else str(len(own))
            hectares = f"{number * PIXEL**2 / 10_000:.1f}"
            assert regions[region, name][2:6] == [str(value), f"{number:,}", objects, hectares]
    panoptic = {row[0]: row for row in shown["panoptic-table"][1:]}
    assert shown["panoptic-table"][0][:5] == ["Class", "TP", "FP", "FN", "PQ"]
    for value in (EVEN, ODD, SEA):
        pq, *counts = quality(*maps, value)
        assert panoptic[names[value]][1:5] == [*map(str, counts), f"{pq:.3f}"]
    assert len(shown["instances-table"]) - 1 == len(np.unique(predicted[predicted > 0]))
