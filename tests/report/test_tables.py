"""Tables: every row and value of small results written out, and what is left empty and why."""

import io
import math
import random

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS
from sklearn.metrics import accuracy_score, f1_score, jaccard_score

from segpipe.boxes import grid_boxes
from segpipe.geometry import RasterGeometry, volume_geometry
from segpipe.metrics.tally import FULL, IGNORED, SizeScale, Tally, add, measure_tile
from segpipe.models.card import Class
from segpipe.regions import load_regions
from segpipe.report.tables import (
    SceneResult,
    csv_bytes,
    metric_table,
    parquet_bytes,
    region_table,
    summary_table,
    write_table,
)

CLASSES = [
    Class(value=0, name="background", color="#000000", background=True),
    Class(value=1, name="water", color="#0000ff"),
    Class(value=7, name="forest", color="#00ff00"),
]
NAMES = ("tp", "fp", "fn", "iou", "dice", "precision", "recall")


def result(name, labels, reference=None, spacing=2.0, tile=None, **more):
    """A scene of 2 m pixels in UTM (or 2 mm voxels), measured tile by tile."""
    labels = np.asarray(labels, dtype=np.uint8)
    if labels.ndim == 2:
        wkt = CRS(32616).to_wkt()
        geometry = RasterGeometry(labels.shape, (spacing, 0, 0, 0, -spacing, 0), wkt)
    else:
        geometry = volume_geometry(labels.shape, np.diag([spacing] * 3 + [1]))
    regions, scale = load_regions(None, geometry), SizeScale.of(geometry)
    truth = None if reference is None else np.asarray(reference)
    tally = add(
        measure_tile(
            labels[b.slices],
            255,
            None if truth is None else truth[b.slices],
            regions,
            b,
            geometry.box,
            scale,
        )
        for b in grid_boxes(labels.shape, tile or labels.shape)
    )
    return SceneResult(name, regions.names, 1, tally, scale, **more)


def rows(table, *columns):
    return [tuple(row) for row in table[list(columns)].itertuples(index=False)]


INNER = [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 255, 0], [0, 0, 0, 0, 0]]


def test_regions_of_one_scene():
    """20 pixels of 4 m²: 3 water, 1 without data, 16 background; forest is absent, so 0."""
    table = region_table([result("a", INNER)], CLASSES)
    assert list(table.columns) == [
        "scene", "region", "class", "value", "count", "area_m2", "share", "state", "seen",
        "touches_edge", "attempts",
    ]  # fmt: skip
    assert rows(table, "scene", "region", "class", "value", "count", "area_m2") == [
        ("a", "scene", "background", 0, 16.0, 64.0),
        ("a", "scene", "water", 1, 3.0, 12.0),
        ("a", "scene", "forest", 7, 0.0, 0.0),
    ]
    assert rows(table, "share", "state", "seen", "touches_edge", "attempts") == [
        (16 / 19, "measured", 0.95, True, 1),
        (3 / 19, "measured", 0.95, False, 1),
        (0.0, "measured", 0.95, False, 1),
    ]


def test_failed_and_unseen_scenes_have_rows_without_numbers():
    failed = SceneResult("broken", ("scene",), 3, reason="no such file")
    table = region_table([result("empty", [[255, 255]]), failed], CLASSES)
    assert list(table["state"]) == ["no_data"] * 3 + ["failed"] * 3
    assert table[["count", "area_m2", "share", "touches_edge"]].isna().all().all()
    assert list(table["seen"][:3]) == [0, 0, 0]
    assert table["seen"][3:].isna().all()
    assert list(table["attempts"]) == [1] * 3 + [3] * 3
    metrics = metric_table([failed], CLASSES)
    assert list(metrics["reason"]) == ["no such file"] * 3
    assert metrics[list(NAMES)].isna().all().all()


def test_failed_alone_still_has_rows():
    table = region_table([SceneResult("x", (), 1, reason="?")], CLASSES)
    assert rows(table, "scene", "region", "value", "state") == [
        ("x", "", 0, "failed"), ("x", "", 1, "failed"), ("x", "", 7, "failed"),
    ]  # fmt: skip


def test_volumes_and_rasters_in_one_table():
    table = region_table([result("a", INNER), result("v", [[[1, 1], [0, 1]]])], CLASSES)
    water = table[table["class"] == "water"]
    assert rows(water, "count", "area_m2")[0] == (3, 12)
    assert rows(water, "count", "volume_mm3")[1] == (3, 24)
    assert water["volume_mm3"].isna().tolist() == [True, False]


def test_seen_counts_what_is_beyond_the_scene():
    one = result("a", [[1, 1, 255, 255]], outside=(4 * FULL,))
    assert set(region_table([one], CLASSES)["seen"]) == {0.25}


def test_label_values_that_are_no_class_have_rows():
    table = region_table([result("a", [[1, 42]])], CLASSES)
    assert rows(table, "class", "value", "count")[-1] == ("42", 42, 1.0)


PREDICTED = [[1, 1, 1, 0, 7], [255, 0, 1, 0, 7]]
REFERENCE = [[1, 1, 0, 1, IGNORED], [1, 0, 9, 0, IGNORED]]


def test_metrics_of_one_scene():
    """Compared are 7 pixels: water tp 2, fp 2 (a 0 and a 9), fn 1; forest nowhere compared."""
    table = metric_table([result("a", PREDICTED, REFERENCE)], CLASSES)
    assert rows(table, "class", "value", *NAMES[:3]) == [
        ("background", 0, 2, 1, 1),
        ("water", 1, 2, 2, 1),
        ("forest", 7, 0, 0, 0),
        ("9", 9, 0, 0, 1),
    ]
    assert rows(table, *NAMES[3:])[:2] == [
        (2 / 4, 4 / 6, 2 / 3, 2 / 3), (2 / 5, 4 / 7, 2 / 4, 2 / 3),
    ]  # fmt: skip
    assert table[list(NAMES[3:])].iloc[2].isna().all()
    assert list(table["reason"]) == [
        "", "", "absent in both", "no class of the model; precision: not predicted",
    ]  # fmt: skip
    assert set(table["state"]) == {"measured"}
    summary = summary_table(table, CLASSES)
    accuracy = summary[summary["metric"] == "pixel accuracy"]
    assert list(accuracy["value"]) == [4 / 7]


def test_states_of_metrics():
    scenes = [result("none", [[1, 0]]), result("blind", [[1, 0]], [[IGNORED, IGNORED]])]
    table = metric_table(scenes, CLASSES)
    assert list(table["state"]) == ["not_requested"] * 3 + ["no_data"] * 3
    assert list(table["reason"].unique()) == [
        "no reference", "no element with both a valid pixel and a reference",
    ]  # fmt: skip
    assert len(summary_table(metric_table(scenes[:1], CLASSES), CLASSES)) == 0


def test_summary_counts_missed_hallucinated_undefined_and_failed():
    """Water: right, missed, absent, absent. Forest: absent, made up, absent, half (IoU 1/2)."""
    scenes = [
        result("a", [[1, 0]], [[1, 0]]),
        result("b", [[7, 0]], [[1, 0]]),
        result("c", [[0, 0]], [[0, 0]]),
        result("d", [[7, 7]], [[7, 0]]),
        SceneResult("e", ("scene",), 2, reason="broken"),
    ]
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES, min_reference=1)
    counted = ("value", "n_defined", "n_missed", "n_hallucinated", "n_undefined", "n_failed")
    found = {(m, c): tuple(v) for m, c, *v in summary[["metric", "class", *counted]].itertuples(index=False)}
    # a: water 1. b: water 0, forest 0. d: forest 1/2. c has no class to average.
    assert found["mIoU", ""] == ((1 + 0 + 0.5) / 3, 4, 1, 1, 4, 1)
    assert found["mean Dice", ""] == (pytest.approx((1 + 0 + 2 / 3) / 3), 4, 1, 1, 4, 1)
    # water: tp 1, fn 1. forest: tp 1, fp 1 (b) + 1 (d).
    assert found["pooled mIoU", ""] == (pytest.approx((1 / 2 + 1 / 3) / 2), 2, 0, 0, 0, 1)
    assert found["pixel accuracy", ""][0] == 6 / 8
    assert found["mIoU of classes with reference ≥ 1", ""] == ((1 + 0 + 0.5) / 3, 3, 1, 0, 0, 1)
    assert found["mean IoU", "water"] == (0.5, 2, 1, 0, 2, 1)
    assert found["mean IoU", "forest"] == (0.25, 2, 0, 1, 2, 1)
    assert set(summary["region"]) == {"scene"}
    assert summary["over"][0] == "classes (without background), then scenes"


def test_all_failed_says_so():
    scenes = [SceneResult(n, ("scene",), 1, reason="x") for n in "ab"]
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES)
    assert summary["value"].isna().all()
    assert set(summary["n_failed"]) == {2}


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
def test_summary_equals_scikit_learn(seed, count):
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(count):
        reference = rng.choice([0, 1, 7], (9, 8))
        labels = np.where(rng.random((9, 8)) < 0.7, reference, rng.choice([0, 1, 7], (9, 8)))
        maps.append((labels, reference))
    scenes = [result(str(i), *pair) for i, pair in enumerate(maps)]
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES).set_index(["metric", "class"])
    oracle = {"labels": [1, 7], "average": None}
    each = [
        (
            jaccard_score(r.ravel(), p.ravel(), **oracle),
            f1_score(r.ravel(), p.ravel(), **oracle),
        )
        for p, r in maps
    ]
    assert summary["value"]["mIoU", ""] == pytest.approx(np.mean([iou.mean() for iou, _ in each]))
    assert summary["value"]["mean Dice", ""] == pytest.approx(np.mean([d.mean() for _, d in each]))
    p, r = (np.concatenate([m[k].ravel() for m in maps]) for k in (0, 1))
    assert summary["value"]["pooled mIoU", ""] == pytest.approx(jaccard_score(r, p, **oracle).mean())
    assert summary["value"]["pixel accuracy", ""] == pytest.approx(accuracy_score(r, p))
    assert summary["value"]["mean Dice", "forest"] == pytest.approx(np.mean([d[1] for _, d in each]))


def test_rare_classes_are_left_out_by_the_reference_s_count():
    """40 × 40: water has 1,200 reference pixels, forest 10: only water is averaged."""
    reference = np.zeros((40, 40), dtype=int)
    reference[:30] = 1
    reference[39, :10] = 7
    summary = summary_table(
        metric_table([result("a", np.where(reference == 7, 0, reference), reference)], CLASSES),
        CLASSES,
    ).set_index(["metric", "class"])
    assert summary["value"]["mIoU", ""] == 0.5
    assert summary["value"]["mIoU of classes with reference ≥ 1000", ""] == 1.0
    assert summary["n_defined"]["mIoU of classes with reference ≥ 1000", ""] == 1


def test_regions_are_averaged_before_scenes():
    """Scene a has two regions (IoU 1 and 0), scene b one (IoU 1): (0.5 + 1) / 2; and the scenes beside."""

    def tally(*pairs):
        region, label, truth = zip(*pairs, strict=True)
        ones = [FULL] * len(pairs)
        return Tally.from_columns(
            region=region, label=label, reference=truth, cover=ones, size=ones, edge=[0] * len(ones)
        )

    scale = SizeScale("px", 1.0, 16, np.array([1 << 16]))
    scenes = [
        SceneResult(
            "a", ("scene", "north", "south"), 1, tally((0, 1, 1), (0, 1, 0), (1, 1, 1), (2, 1, 0)), scale
        ),
        SceneResult("b", ("scene", "north"), 1, tally((0, 1, 1), (1, 1, 1)), scale),
    ]
    summary = summary_table(metric_table(scenes, CLASSES), CLASSES)
    first = summary.groupby("region").first()
    assert first.loc["regions", "value"] == 0.75
    assert first.loc["regions", "over"] == "classes (without background), then regions, then scenes"
    assert first.loc["scene", "value"] == 0.75  # the same by chance of the numbers: (1/2 + 1) / 2
    assert first.loc["scene", "over"] == "classes (without background), then scenes"
    table = region_table(scenes, CLASSES)
    assert list(table["area_px"]) == [0, 2, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_bytes_do_not_depend_on_tiles(seed, step):
    rng = np.random.default_rng(seed)
    maps = [(rng.choice([0, 1, 7, 255], (13, 11)), rng.choice([-1, 0, 1, 7], (13, 11))) for _ in range(3)]
    one = [result(str(i), *pair, spacing=0.7) for i, pair in enumerate(maps)]
    two = [result(str(i), *pair, spacing=0.7, tile=(step, step)) for i, pair in enumerate(maps)]
    for make in (region_table, metric_table):
        a, b = make(one, CLASSES), make(two, CLASSES)
        assert csv_bytes(a) == csv_bytes(b)
        assert parquet_bytes(a) == parquet_bytes(b)
    shuffled = random.Random(seed).sample(one, 3)
    means = [summary_table(metric_table(s, CLASSES), CLASSES) for s in (one, shuffled)]
    assert csv_bytes(means[0]) == csv_bytes(means[1])


def test_files_hold_the_table(tmp_path):
    scenes = [result('zoë, "a"', INNER, spacing=0.1), SceneResult("b", ("scene",), 2, reason="x")]
    table = region_table(scenes, CLASSES)
    csv, parquet = write_table(table, tmp_path / "out" / "regions")
    first = csv.read_bytes(), parquet.read_bytes()
    write_table(table, tmp_path / "out" / "regions")
    assert (csv.read_bytes(), parquet.read_bytes()) == first
    assert sorted(p.name for p in csv.parent.iterdir()) == ["regions.csv", "regions.parquet"]
    text = first[0].decode("utf-8")
    assert "\r" not in text
    assert text.splitlines()[1].startswith('"zoë, ""a""",scene,background,0,16.0,')
    back = pd.read_csv(io.StringIO(text), float_precision="round_trip", keep_default_na=False, na_values=[""])
    np.testing.assert_array_equal(back["area_m2"], table["area_m2"])
    again = pq.read_table(parquet).to_pandas()
    np.testing.assert_array_equal(again["share"], table["share"])
    assert list(again["scene"]) == list(table["scene"])
    assert math.isnan(again["area_m2"].iloc[-1])
