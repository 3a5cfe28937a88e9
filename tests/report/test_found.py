"""Tables of objects: centroids of scikit-image, counts by hand, quality by the paper's formula."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import rasterio
import torch
from affine import Affine
from skimage.measure import regionprops
from torchmetrics.detection import PanopticQuality

from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry, volume_geometry
from segpipe.metrics.tally import SizeScale
from segpipe.objects.overlap_table import overlap_tile
from segpipe.objects.table import Members, ObjectTable
from segpipe.sources.labels import IdRule
from segpipe.tables.object_tables import SceneDetections, detections_table, panoptic_table, with_counts
from segpipe.tables.record import ClassInfo
from tests.instances.scene import Oracle, discs, scene_ids, square_lattice

CLASSES = [
    ClassInfo(0, "ground", "#000000", background=True),
    ClassInfo(4, "even", "#00ff00"),
    ClassInfo(9, "odd", "#0000ff"),
    ClassInfo(2, "sea", "#00ffff", stuff=True),
]
UTM = rasterio.CRS.from_epsg(32633).to_wkt()


def found(truth: np.ndarray, geometry: Geometry, classes: dict[int, int], **more: object) -> SceneDetections:
    """A scene whose model found these objects, under ids by their first element."""
    lattice = square_lattice(truth.shape, 32, 8)
    ids, objects, _ = scene_ids(Oracle(truth, lattice, classes), lattice, stuff=[2])
    where = np.argwhere(ids)
    sums, size = np.zeros((len(objects), truth.ndim), np.int64), np.zeros(len(objects), np.int64)
    scale = SizeScale.of(geometry)
    np.add.at(sums, ids[ids > 0] - 1, where)
    np.add.at(size, ids[ids > 0] - 1, scale.rows[where[:, 0]])
    return SceneDetections(
        "s", table=ObjectTable(objects, size, sums), scale=scale, geometry=geometry, **more
    )


def by_parity(truth: np.ndarray) -> dict[int, int]:
    return {int(i): 9 if i % 2 else 4 for i in np.unique(truth[truth > 0])}


def test_centroids_boxes_and_sizes_are_those_of_scikit_image() -> None:
    truth = discs((90, 110), 40, seed=3, radius=(2, 9))
    place = RasterGeometry(truth.shape, (9.0, 2.0, 5e5, 3.0, -10.0, 5e6), UTM)  # turned and sheared
    table = detections_table([found(truth, place, by_parity(truth))], CLASSES, 1)
    first = {tuple(np.argwhere(truth == p.label)[0]): p for p in regionprops(truth)}
    props = [first[key] for key in sorted(first)]
    assert table["id"].tolist() == list(range(1, len(props) + 1))
    xy = np.array([Affine(*place.transform) @ (x + 0.5, y + 0.5) for y, x in (p.centroid for p in props)])
    np.testing.assert_allclose(table[["centre_x", "centre_y"]], xy, rtol=1e-14)
    corners = table[["first_y", "first_x", "end_y", "end_x"]].to_numpy()
    assert corners.tolist() == [list(p.bbox) for p in props]
    assert table["count"].tolist() == [p.area for p in props]
    assert table["area_m2"].tolist() == pytest.approx([p.area * 96 for p in props])
    assert table["class"].tolist() == ["odd" if p.label % 2 else "even" for p in props]
    assert table["region"].tolist() == [""] * len(props)
    edge = [0 in p.bbox[:2] or p.bbox[2] == 90 or p.bbox[3] == 110 for p in props]
    assert table["touches_edge"].tolist() == edge


def test_centroids_of_a_volume_are_in_millimetres() -> None:
    truth = np.zeros((8, 9, 10), int)
    truth[1:4, 2:5, 3:8] = 7
    affine = np.array([[-1.0, 0.2, 0, 10], [0.1, 2, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1]])
    [row] = detections_table(
        [found(truth, volume_geometry(truth.shape, affine), {7: 9})], CLASSES, 1
    ).to_dict("records")
    centre = affine @ [5, 3, 2, 1]  # i, j, k
    assert [row["centre_x"], row["centre_y"], row["centre_z"]] == pytest.approx(centre[:3].tolist())
    assert row["volume_mm3"] == pytest.approx(45 * abs(np.linalg.det(affine[:3, :3])))
    assert [row[f"{side}_{a}"] for side in ("first", "end") for a in "zyx"] == [1, 2, 3, 4, 5, 8]


def members(*rows: tuple[int, int, int]) -> Members:
    region, object_, cover = zip(*rows, strict=True)
    return Members.from_columns(region=region, object=object_, cover=cover)


def test_counts_of_objects_by_the_region_that_has_most_of_them() -> None:
    truth = np.zeros((20, 60), int)
    for number, x in enumerate((2, 12, 22, 32, 42), start=1):
        truth[5:10, x : x + 5] = number
    classes = {1: 4, 2: 4, 3: 9, 4: 2, 5: 9}
    parts = members((0, 1, 9), (0, 2, 9), (0, 3, 9), (0, 4, 9), (0, 5, 9),
                    (1, 1, 6), (2, 1, 3), (1, 2, 4), (2, 2, 5), (2, 3, 9), (1, 4, 9))  # fmt: skip
    place = RasterGeometry(truth.shape, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
    scene = found(truth, place, classes, members=parts, regions=("scene", "a", "b"))
    rows = [("s", r, v) for r in ("scene", "a", "b") for v in (0, 4, 9, 2, 77)]
    regions = pd.DataFrame(rows, columns=["scene", "region", "value"]).astype({"value": "Int64"})
    regions = regions.assign(count=1.0, share=0.5, state="measured")
    regions.loc[len(regions)] = ["gone", "scene", 4, np.nan, np.nan, "failed"]
    table = with_counts(regions, [scene, SceneDetections("gone", reason="broken")], [4, 9])
    assert list(table.columns) == ["scene", "region", "value", "count", "objects", "share", "state"]
    counts = {(r.scene, r.region, r.value): r.objects for r in table.itertuples() if not pd.isna(r.objects)}
    assert counts == {
        ("s", "scene", 4): 2, ("s", "scene", 9): 2,
        ("s", "a", 4): 1, ("s", "a", 9): 0,
        ("s", "b", 4): 1, ("s", "b", 9): 1,
    }  # fmt: skip
    assert detections_table([scene], CLASSES, 1)["region"].tolist() == ["a", "b", "b", "a", ""]
    assert detections_table([scene], CLASSES, 1, [2])["region"].tolist() == [
        "a",
        "b",
        "b",
        "",
        "",
    ]  # 2 is stuff


def compared(
    predicted: np.ndarray, truth: np.ndarray, classes: dict[int, int], **more: object
) -> SceneDetections:
    """A scene with a reference whose values are class × 1000 + number."""
    place = RasterGeometry(truth.shape, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
    scene = found(predicted, place, classes)
    lattice = square_lattice(truth.shape, 32, 8)
    ids, _, _ = scene_ids(Oracle(predicted, lattice, classes), lattice, stuff=[2])
    table = overlap_tile(ids, truth, Box.whole(truth.shape), SizeScale.of(place))
    return SceneDetections(
        "s", table=scene.table, scale=scene.scale, geometry=place, overlaps=table, rule=IdRule(1000), **more
    )


def test_quality_of_a_scene_by_hand() -> None:
    """Class 4: IoU 0.8 and a miss; 9: wrong class at one, a false positive; stuff in two pieces each."""
    predicted, truth = np.zeros((2, 10, 60), int)
    predicted[:8, :10], truth[:, :10] = 1, 4001  # 80 of 100
    truth[:, 12:18] = 4002
    predicted[:, 20:26], truth[:, 20:26] = 2, 4003  # as class 9
    predicted[:, 30:33], truth[:, 30:32] = 3, 2001  # 20 of …
    predicted[:, 40:44], truth[:, 40:44] = 4, 2002  # … and 40: 60 of 70 as one segment
    scene = compared(predicted, truth, {1: 4, 2: 9, 3: 2, 4: 2})
    table = panoptic_table([scene, SceneDetections("t", reason="broken")], CLASSES, [2], 1)
    rows = table[table["scene"] == "s"].set_index("class")
    assert rows.loc[["even", "odd", "sea"], ["tp", "fp", "fn"]].to_numpy().tolist() == [
        [1, 0, 2], [0, 1, 0], [1, 0, 0],
    ]  # fmt: skip
    pq = {"even": 0.8 / (1 + 2 / 2), "odd": 0.0, "sea": 60 / 70}
    assert rows["pq"].to_dict() == pytest.approx(
        pq | {"things": pq["even"] / 2, "stuff": pq["sea"], "all": sum(pq.values()) / 3}
    )
    assert rows.loc["even", "sq"] == pytest.approx(0.8) and rows.loc["even", "rq"] == pytest.approx(0.5)
    assert math.isnan(rows.loc["odd", "sq"]) and rows.loc["odd", "reason"] == "SQ: nothing matched"
    # one of three true objects found, at an IoU of 0.8: in 7 of COCO's 10 thresholds 34 of 101 recalls
    assert rows.loc["even", "ap50"] == pytest.approx(34 / 101)
    assert rows.loc["even", "ap"] == pytest.approx(0.7 * 34 / 101)
    assert math.isnan(rows.loc["sea", "ap"])
    [failed] = table[table["scene"] == "t"].to_dict("records")
    assert (failed["class"], failed["state"], failed["reason"]) == ("all", "failed", "broken")
    objects = detections_table([scene], CLASSES, 1).set_index("class")
    assert objects.loc["even", ["partner", "iou"]].tolist() == [4001, 0.8]
    assert objects.loc["odd", ["partner", "iou"]].isna().all()


@pytest.mark.parametrize("seed", range(3))
def test_quality_is_that_of_torchmetrics(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = discs((80, 90), 40, seed, (3, 8)), discs((80, 90), 40, seed, (3, 8))
    predicted = np.roll(predicted, (1, int(rng.integers(0, 3))), (0, 1))
    kinds = np.array([4, 9, 2])
    classes = {int(i): int(kinds[i % 3 if rng.random() < 0.9 else 0]) for i in np.unique(predicted) if i}
    true_class = np.where(truth > 0, kinds[truth % 3], 0)
    scene = compared(predicted, np.where(truth > 0, true_class * 1000 + truth, 0), classes)
    table = panoptic_table([scene], CLASSES, [2], 1).set_index("class")
    oracle = PanopticQuality({4, 9}, {0, 2}, return_sq_and_rq=True, return_per_class=True)
    classed = np.vectorize(lambda i: classes.get(int(i), 0))(predicted)
    sides = [
        np.stack([c, np.where(np.isin(c, [0, 2]), 0, i)], -1)
        for c, i in ((classed, predicted), (true_class, truth))
    ]
    oracle.update(*(torch.from_numpy(side.astype(np.int64))[None] for side in sides))
    want = dict(zip(("even", "odd", "ground", "sea"), oracle.compute().squeeze().tolist(), strict=True))
    for name in ("even", "odd", "sea"):
        row = table.loc[name]
        assert [row["pq"], row["rq"]] == pytest.approx(want[name][::2])
        assert row["sq"] == pytest.approx(want[name][1] if row["tp"] else math.nan, nan_ok=True)  # theirs: 0
    assert table.loc["all", "pq"] == pytest.approx(np.mean([want[n][0] for n in ("even", "odd", "sea")]))


def test_the_reference_may_call_its_classes_otherwise() -> None:
    """40 is 4 and 41 is 4 too: objects with the same number stay two."""
    predicted, truth = np.zeros((2, 10, 30), int)
    for number, (x, value) in enumerate([(2, 40_001), (12, 41_001), (22, 9_001)], start=1):
        predicted[2:8, x : x + 5], truth[2:8, x : x + 5] = number, value
    scene = compared(predicted, truth, {1: 4, 2: 4, 3: 9}, values={40: 4, 41: 4, 5: None})
    table = panoptic_table([scene], CLASSES[:3], [], 1).set_index("class")
    assert table.loc[["even", "odd"], ["tp", "fp", "fn", "pq"]].to_numpy().tolist() == [
        [2, 0, 0, 1],
        [1, 0, 0, 1],
    ]


def test_small_objects_are_left_out_on_both_sides() -> None:
    predicted, truth = np.zeros((2, 10, 30), int)
    predicted[0:6, 0:6], truth[0:6, 0:6] = 1, 9001
    predicted[8, 8], truth[8, 20] = 2, 9002
    table = panoptic_table([compared(predicted, truth, {1: 9, 2: 9})], CLASSES[:3], [], 2).set_index("class")
    assert table.loc["odd", ["tp", "fp", "fn", "smallest"]].tolist() == [1, 0, 0, 2]


def test_no_objects_and_failed_scenes() -> None:
    place = RasterGeometry((10, 12), (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
    empty = found(np.zeros((10, 12), int), place, {})
    assert len(detections_table([empty], CLASSES, 1)) == 0
    columns = ["scene", "id", "class", "value", "score", "count", "touches_edge", "region"]
    assert list(detections_table([SceneDetections("x", reason="broken")], CLASSES, 1).columns) == columns
