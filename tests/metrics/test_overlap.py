"""Overlap against scikit-learn on random maps, and the conventions of empty masks."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    jaccard_score,
    precision_score,
    recall_score,
)

from segpipe.geometry import RasterGeometry
from segpipe.metrics.overlap import Case, CaseCounts, Counts, accuracy, class_counts, mean
from segpipe.metrics.tally import FULL, IGNORED, NODATA, SizeScale, measure_tile
from segpipe.regions import load_regions


def counts_of(labels, reference, nodata=255):
    geometry = RasterGeometry(labels.shape, (1, 0, 0, 0, 1, 0), None)
    tally = measure_tile(
        labels, nodata, reference, load_regions(None, geometry), geometry.box, geometry.box,
        SizeScale.of(geometry),
    )  # fmt: skip
    return {value: counts for (_, value), counts in class_counts(tally).items()}


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_equals_scikit_learn(seed, height, width, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, (height, width)).astype(np.uint8)
    labels[rng.random(labels.shape) < 0.1] = 255
    reference = rng.integers(-1, classes, (height, width))
    counts = counts_of(labels, reference)
    kept = (labels != 255) & (reference != IGNORED)
    y_pred, y_true = labels[kept].astype(int), reference[kept]
    if not kept.any():
        assert counts == {}
        return
    matrix = confusion_matrix(y_true, y_pred, labels=range(classes))
    present = np.union1d(y_true, y_pred)
    assert sorted(counts) == list(present)
    options = {"labels": range(classes), "average": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = {
            "iou": jaccard_score(y_true, y_pred, **options, zero_division=0),
            "dice": f1_score(y_true, y_pred, **options, zero_division=np.nan),
            "precision": precision_score(y_true, y_pred, **options, zero_division=np.nan),
            "recall": recall_score(y_true, y_pred, **options, zero_division=np.nan),
        }
    oracle["iou"][~np.isin(range(classes), present)] = np.nan  # it knows 0 and 1 only
    for value in range(classes):
        c = counts.get(value, Counts())
        tp = matrix[value, value]
        assert (c.tp, c.fp, c.fn) == tuple(
            FULL * n for n in (tp, matrix[:, value].sum() - tp, matrix[value].sum() - tp)
        )
        got = {name: getattr(c, name) for name in oracle}
        for name, values in oracle.items():
            assert got[name] == pytest.approx(values[value], nan_ok=True), name
    assert accuracy(counts.values()) == pytest.approx(accuracy_score(y_true, y_pred))


def test_empty_masks():
    """Both empty: not defined. One empty: 0, and it is said which."""
    both, missed, made_up = Counts(), Counts(fn=5), Counts(fp=5)
    assert (both.case, missed.case, made_up.case) == (
        Case.undefined, Case.missed, Case.hallucinated,
    )  # fmt: skip
    assert math.isnan(both.iou)
    assert math.isnan(both.dice)
    assert both.reason == "absent in both"
    assert (missed.iou, missed.dice, missed.recall) == (0, 0, 0)
    assert math.isnan(missed.precision)
    assert missed.reason == "precision: not predicted"
    assert (made_up.iou, made_up.dice, made_up.precision) == (0, 0, 0)
    assert math.isnan(made_up.recall)
    assert made_up.reason == "recall: not in the reference"
    assert CaseCounts.of([both, missed, made_up, Counts(1, 1, 1)]) == CaseCounts(3, 1, 1, 1)
    assert mean([both.iou, missed.iou, 1.0]) == 0.5
    assert math.isnan(mean([both.iou]))
    assert math.isnan(accuracy([]))


def test_pixels_without_data_or_reference_are_not_compared():
    """Row by row: right, wrong, no data, ignored."""
    labels = np.array([[1, 1], [1, 0], [255, 255], [1, 0]], dtype=np.uint8)
    reference = np.array([[1, 1], [0, 1], [1, 0], [IGNORED, IGNORED]])
    assert counts_of(labels, reference) == {
        0: Counts(0, FULL, FULL),
        1: Counts(2 * FULL, FULL, FULL),
    }
    assert NODATA == IGNORED == -1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.randoms())
def test_means_do_not_depend_on_the_order(values, rng):
    assert mean(rng.sample(values, len(values))) == mean(values)
