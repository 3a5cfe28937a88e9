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
import torch
from pycocotools.coco import COCO
from pyproj import Geod
from torchmetrics.detection import PanopticQuality

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
from tests.flows.object_world import CLASSES, EVEN, GROUND, ODD
from tests.inference.lab import Lab, prepared
from tests.instances.scene import by_first, discs

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
