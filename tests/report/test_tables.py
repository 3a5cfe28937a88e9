"""Tables: every row and value of small results written out, and what is left empty and why."""

import io
import json
import math
import random
import warnings

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    confusion_matrix,
    jaccard_score,
    recall_score,
)

from segpipe.regions.base import FULL
from segpipe.sources.labels import IGNORED
from segpipe.tables.frames import Piece, table_of_pieces
from segpipe.tables.overlap_tables import (
    SceneTallies,
    agreement_table,
    confusion_table,
    metric_table,
    region_table,
)
from segpipe.tables.summary import summary_table
from segpipe.tables.table_files import MOST_ROWS, csv_bytes, parquet_bytes, results_json, write_table
from tests.report.scenes import CLASSES, NAMES, SIZES, result, rows

INNER = [[0, 0, 0, 0, 0], [0, 1, 1, 1, 0], [0, 0, 0, 255, 0], [0, 0, 0, 0, 0]]


def test_a_column_that_the_dictionary_lacks_is_refused():
    with pytest.raises(ValueError, match=r"that it lacks: \['extra'\]"):
        table_of_pieces([Piece(1, {"n": 1.0, "extra": 2.0})], {"n": "float64"})


def test_a_listed_column_that_nobody_fills_is_refused():
    with pytest.raises(ValueError, match=r"that rows lack, .*: \['why'\]"):
        table_of_pieces([Piece(1, {"n": 1.0})], {"n": "float64", "why": "str"})


def test_regions_of_one_scene():
    """20 pixels of 4 m²: 3 water, 1 without data, 16 background; forest is absent, so 0."""
    table = region_table([result("a", INNER)], CLASSES)
    assert list(table.columns) == [
        "scene", "region", "class", "value", "count", "area_m2", "share", "state", "seen",
        "touches_edge",
    ]  # fmt: skip
    assert rows(table, "scene", "region", "class", "value", "count", "area_m2") == [
        ("a", "scene", "background", 0, 16.0, 64.0),
        ("a", "scene", "water", 1, 3.0, 12.0),
        ("a", "scene", "forest", 7, 0.0, 0.0),
    ]
    assert rows(table, "share", "state", "seen", "touches_edge") == [
        (16 / 19, "measured", 0.95, True),
        (3 / 19, "measured", 0.95, False),
        (0.0, "measured", 0.95, False),
    ]


def test_failed_and_unseen_scenes_have_rows_without_numbers():
    failed = SceneTallies("broken", regions=("scene",), reason="no such file")
    table = region_table([result("empty", [[255, 255]]), failed], CLASSES)
    assert list(table["state"]) == ["no_data"] * 3 + ["failed"] * 3
    assert table[["count", "area_m2", "share", "touches_edge"]].isna().all().all()
    assert list(table["seen"][:3]) == [0, 0, 0]
    assert table["seen"][3:].isna().all()
    metrics = metric_table([failed], CLASSES)
    assert list(metrics["reason"]) == ["no such file"] * 3
    assert metrics[list(NAMES)].isna().all().all()
    agreement = agreement_table(metrics)
    assert rows(agreement, "scene", "region", "state", "reason", "classes") == [
        ("broken", "scene", "failed", "no such file", "")
    ]
    assert agreement[["count", "pixel_accuracy", "kappa"]].isna().all(axis=None)
    assert len(confusion_table([failed], CLASSES)) == 0


def test_failed_alone_still_has_rows():
    table = region_table([SceneTallies("x", regions=(), reason="?")], CLASSES)
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


def test_true_negatives_and_sizes_of_one_scene():
    """Of the same 7 pixels of 4 m²; forest: nothing to be wrong about, so specificity is 1."""
    table = metric_table([result("a", PREDICTED, REFERENCE)], CLASSES)
    assert rows(table, "tn", "specificity") == [(3, 3 / 4), (2, 2 / 4), (7, 1), (6, 1)]
    assert rows(table, *SIZES)[:2] == [(12, 12, 0, 1), (16, 12, 4, 4 / 3)]
    assert rows(table, *SIZES)[3] == (0, 4, -4, 0)
    assert rows(table, *SIZES[:3])[2] == (0, 0, 0)
    assert math.isnan(table["size_ratio"][2])
    assert "predicted_mm3" not in table
    voxels = metric_table([result("v", [[[1, 1], [0, 1]]], [[[1, 0], [0, 0]]])], CLASSES)
    assert rows(voxels, "predicted_mm3", "reference_mm3", "difference_mm3")[1] == (24, 8, 16)


def test_confusion_of_one_scene():
    """The 7 pixels again: reference class → predicted class; pairs that do not occur have no row."""
    scenes = [result("a", PREDICTED, REFERENCE)]
    table = confusion_table(scenes, CLASSES)
    assert rows(table, "region", "reference", "reference_value", "predicted", "predicted_value", "count") == [
        ("scene", "background", 0, "background", 0, 2),
        ("scene", "background", 0, "water", 1, 1),
        ("scene", "water", 1, "background", 0, 1),
        ("scene", "water", 1, "water", 1, 2),
        ("scene", "9", 9, "water", 1, 1),
    ]
    assert list(table["area_m2"]) == [8, 4, 4, 8, 4]
    agreement = agreement_table(metric_table(scenes, CLASSES))
    assert rows(agreement, "count", "pixel_accuracy", "classes", "n_classes", "n_reference_classes") == [
        (7, 4 / 7, "background, water, 9", 3, 3)
    ]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_agreement_and_confusion_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth, labels = rng.choice([0, 1, 7, 9], (6, 7)), rng.choice([0, 1, 7, 42], (6, 7))
    scenes = [result("a", labels, truth)]
    found = agreement_table(metric_table(scenes, CLASSES)).iloc[0]
    r, p = truth.ravel(), labels.ravel()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(r, p))
    assert found["pixel_accuracy"] == pytest.approx(accuracy_score(r, p))
    assert found["kappa"] == pytest.approx(cohen_kappa_score(r, p))
    assert found["frequency_weighted_iou"] == pytest.approx(jaccard_score(r, p, average="weighted"))
    values = [0, 1, 7, 9, 42]
    matrix = confusion_table(scenes, CLASSES).pivot(
        index="reference_value", columns="predicted_value", values="count"
    )
    matrix = matrix.reindex(index=values, columns=values).fillna(0)
    np.testing.assert_array_equal(matrix, confusion_matrix(r, p, labels=values))
    metrics = metric_table(scenes, CLASSES).set_index("value")
    for value in (0, 1, 7):  # specificity is the recall of everything else
        assert metrics["specificity"][value] == pytest.approx(recall_score(r != value, p != value))


def test_agreement_says_why_it_is_empty():
    scenes = [
        result("alike", [[1, 1]], [[1, 1]]),
        result("blind", [[1, 0]], [[IGNORED, IGNORED]]),
        result("none", [[1, 0]]),
    ]
    table = agreement_table(metric_table(scenes, CLASSES))
    assert rows(table, "scene", "state", "reason") == [
        ("alike", "measured", "kappa: one and the same class everywhere"),
        ("blind", "no_data", "no element with both a valid pixel and a reference"),
        ("none", "not_requested", "no reference"),
    ]
    assert table["pixel_accuracy"].tolist()[:1] == [1]
    numbers = ["count", "pixel_accuracy", "balanced_accuracy", "kappa", "frequency_weighted_iou"]
    assert table[numbers][1:].isna().all(axis=None)
    assert math.isnan(table["kappa"][0])


def test_states_of_metrics():
    scenes = [result("none", [[1, 0]]), result("blind", [[1, 0]], [[IGNORED, IGNORED]])]
    table = metric_table(scenes, CLASSES)
    assert list(table["state"]) == ["not_requested"] * 3 + ["no_data"] * 3
    assert list(table["reason"].unique()) == [
        "no reference", "no element with both a valid pixel and a reference",
    ]  # fmt: skip
    assert len(summary_table(metric_table(scenes[:1], CLASSES), CLASSES)) == 0


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_bytes_do_not_depend_on_tiles(seed, step):
    rng = np.random.default_rng(seed)
    maps = [(rng.choice([0, 1, 7, 255], (13, 11)), rng.choice([-1, 0, 1, 7], (13, 11))) for _ in range(3)]
    one = [result(str(i), *pair, spacing=0.7) for i, pair in enumerate(maps)]
    two = [result(str(i), *pair, spacing=0.7, tile=(step, step)) for i, pair in enumerate(maps)]
    for make in (
        region_table,
        metric_table,
        confusion_table,
        lambda r, c: agreement_table(metric_table(r, c)),
    ):
        a, b = make(one, CLASSES), make(two, CLASSES)
        assert csv_bytes(a) == csv_bytes(b)
        assert parquet_bytes(a) == parquet_bytes(b)
    shuffled = random.Random(seed).sample(one, 3)
    means = [summary_table(metric_table(s, CLASSES), CLASSES) for s in (one, shuffled)]
    assert csv_bytes(means[0]) == csv_bytes(means[1])


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.permutations([0, 1, 7]))
def test_permuting_class_ids_permutes_rows(seed, order):
    """Each class under another's value: the same numbers in the rows of the class's new value."""
    rng = np.random.default_rng(seed)
    maps = [rng.choice([0, 1, 7], (5, 6)) for _ in range(2)]
    names = dict(zip([0, 1, 7], order, strict=True))
    renamed = [np.vectorize(names.get)(m) for m in maps]
    one, two = (metric_table([result("a", *m)], CLASSES).set_index("value") for m in (maps, renamed))
    numbers = [*NAMES, "tn", "specificity", *SIZES, "reason"]
    for value, other in names.items():
        pd.testing.assert_series_equal(one.loc[value, numbers], two.loc[other, numbers], check_names=False)


def test_files_hold_the_table(tmp_path):
    scenes = [
        result('zoë, "a"', INNER, spacing=0.1),
        SceneTallies("b", regions=("scene",), reason="x"),
    ]
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


def test_text_beyond_ascii_is_announced_for_excel() -> None:
    plain, other = pd.DataFrame({"region": ["Koeln"]}), pd.DataFrame({"region": ["Köln"]})
    assert csv_bytes(plain) == b"region\nKoeln\n"
    assert csv_bytes(other) == b"\xef\xbb\xbf" + "region\nKöln\n".encode()
    assert pd.read_csv(io.BytesIO(csv_bytes(other))).equals(other)


def test_the_tables_as_json() -> None:
    table = pd.DataFrame(
        {
            "scene": ["a", "b"],
            "iou": [0.1, math.nan],
            "value": pd.Series([1, None], dtype="Int64"),
            "edge": pd.Series([True, None], dtype="boolean"),
        }
    )
    large = pd.concat([table] * MOST_ROWS)
    found = json.loads(results_json("job", "run", {"metrics": table, "regions": large}))
    assert found["tables"] == {
        "metrics": [
            {"scene": "a", "iou": 0.1, "value": 1, "edge": True},
            {"scene": "b", "iou": None, "value": None, "edge": None},
        ]
    }
    assert found["left_out"] == {"regions": "regions.parquet"}
