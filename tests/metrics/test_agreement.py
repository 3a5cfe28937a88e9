"""Accuracy, balanced accuracy, kappa, frequency-weighted IoU and confusion against scikit-learn."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    cohen_kappa_score,
    jaccard_score,
)

from segpipe.metrics import overlap as agreement
from segpipe.metrics.overlap import class_counts
from segpipe.metrics.tally import Tally
from segpipe.regions.base import FULL

NUMBERS = (
    agreement.pixel_accuracy,
    agreement.balanced_accuracy,
    agreement.cohen_kappa,
    agreement.frequency_weighted_iou,
)


def tally(truth, label, region=None):
    count = [FULL] * len(truth)
    region = [0] * len(truth) if region is None else region
    return Tally.from_columns(
        region=region, label=label, reference=truth, cover=count, size=count, edge=[0] * len(truth)
    )


def scores(truth, label):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            accuracy_score(truth, label),
            balanced_accuracy_score(truth, label),
            cohen_kappa_score(truth, label),
            jaccard_score(truth, label, average="weighted"),
        ]


maps = st.lists(
    st.tuples(st.sampled_from([0, 1, 7, 900]), st.sampled_from([0, 1, 7, 8])), min_size=1, max_size=60
)


@settings(deadline=None, max_examples=60)
@given(maps)
def test_equals_scikit_learn(pairs):
    """Also with values that only one of the maps has, and with a single class (kappa: NaN in both)."""
    truth, label = map(list, zip(*pairs, strict=True))
    cells = class_counts(tally(truth, label))
    found = [number(cells)[0] for number in NUMBERS]
    np.testing.assert_allclose(found, scores(truth, label), rtol=1e-12, atol=1e-14)


@settings(deadline=None, max_examples=25)
@given(maps, maps)
def test_regions_are_apart(first, second):
    """Two regions at once give what each gives alone; a region without pixels between them gives NaN."""
    pairs = first + second
    truth, label = map(list, zip(*pairs, strict=True))
    both = tally(truth, label, [0] * len(first) + [2] * len(second))
    for number in NUMBERS:
        alone = [number(class_counts(tally(*map(list, zip(*p, strict=True)))))[0] for p in (first, second)]
        found = number(class_counts(both))
        np.testing.assert_array_equal(found, [alone[0], np.nan, alone[1]])


@settings(deadline=None, max_examples=25)
@given(maps, st.permutations([0, 1, 7, 8, 900]))
def test_names_of_classes_do_not_matter(pairs, order):
    renamed = dict(zip([0, 1, 7, 8, 900], order, strict=True))
    other = [(renamed[a], renamed[b]) for a, b in pairs]
    for number in NUMBERS:
        one, two = (number(class_counts(tally(*map(list, zip(*p, strict=True))))) for p in (pairs, other))
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-14)


def test_kappa_of_a_published_table():
    """Cohen 1960's own definition on 20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: p_o 0.7, p_e 0.5, κ 0.4."""
    truth, label = [1] * 25 + [0] * 25, [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert agreement.cohen_kappa(class_counts(tally(truth, label)))[0] == pytest.approx(0.4, rel=1e-15)


def test_kappa_where_nearly_all_is_one_class():
    """10¹⁰ pixels of background and two that differ: no digits are lost to 1 − p_e."""
    n = 10**10
    one = Tally.from_columns(
        region=[0] * 3,
        label=[0, 1, 0],
        reference=[0, 0, 1],
        cover=[n * FULL, FULL, FULL],
        size=[1] * 3,
        edge=[0] * 3,
    )
    # Both margins are (n + 1, 1) of n + 2: 1 − p_e = 2 (n + 1) / (n + 2)², 1 − p_o = 2 / (n + 2).
    assert agreement.cohen_kappa(class_counts(one))[0] == pytest.approx(-1 / (n + 1), rel=1e-4)
