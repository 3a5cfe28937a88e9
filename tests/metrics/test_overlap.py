"""Overlap against scikit-learn and MONAI on random maps, and the conventions of empty masks."""

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS
from sklearn.metrics import (
    f1_score,
    jaccard_score,
    multilabel_confusion_matrix,
    precision_score,
    recall_score,
)

from segpipe.geometry.geometry import RasterGeometry
from segpipe.metrics.overlap import (
    CaseCounts,
    Counts,
    class_counts,
    grouped_mean,
    mean,
    ratio,
    reasons,
    totals,
)
from segpipe.metrics.tally import NODATA, SizeScale, Tally, add, measure_tile
from segpipe.regions import load_regions
from segpipe.regions.base import FULL
from segpipe.sources.labels import IGNORED


def tally_of(labels, reference, nodata=255, geometry=None):
    geometry = geometry or RasterGeometry(labels.shape, (1, 0, 0, 0, 1, 0), None)
    return measure_tile(
        labels, nodata, reference, load_regions(None, geometry), geometry.box, geometry.box,
        SizeScale.of(geometry),
    )  # fmt: skip


def counts_of(labels, reference):
    return class_counts(tally_of(labels, reference))


def plain(found):
    """Value → (tp, fp, fn) of a tally of one region."""
    c = found.counts
    return dict(
        zip(found.value.tolist(), zip(c.tp.tolist(), c.fp.tolist(), c.fn.tolist(), strict=True), strict=True)
    )


def random_maps(seed, shape, classes):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, shape).astype(np.uint8)
    labels[rng.random(shape) < 0.1] = 255
    return labels, rng.integers(-1, classes, shape)


def array(*values):
    return np.array(values, dtype=np.int64)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.integers(1, 6))
def test_equals_scikit_learn(seed, height, width, classes):
    labels, reference = random_maps(seed, (height, width), classes)
    found = counts_of(labels, reference)
    kept = (labels != 255) & (reference != IGNORED)
    y_pred, y_true = labels[kept].astype(int), reference[kept]
    if not kept.any():
        assert len(found.value) == 0
        return
    present = np.union1d(y_true, y_pred)
    assert found.value.tolist() == present.tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matrices = multilabel_confusion_matrix(y_true, y_pred, labels=present)  # [[tn, fp], [fn, tp]]
        options = {"labels": present, "average": None}
        oracle = {
            "iou": jaccard_score(y_true, y_pred, **options),
            "dice": f1_score(y_true, y_pred, **options, zero_division=np.nan),
            "precision": precision_score(y_true, y_pred, **options, zero_division=np.nan),
            "recall": recall_score(y_true, y_pred, **options, zero_division=np.nan),
        }
    mine = np.array([[found.tn, found.counts.fp], [found.counts.fn, found.counts.tp]])
    np.testing.assert_array_equal(mine.transpose(2, 0, 1), FULL * matrices)
    for name, values in oracle.items():
        np.testing.assert_allclose(getattr(found.counts, name), values, rtol=1e-14, err_msg=name)


def test_equals_monai():
    """tp, fp, tn, fn, specificity, IoU and Dice of classes that all occur, from one-hot maps."""
    torch = pytest.importorskip("torch")
    from monai.metrics import (
        compute_confusion_matrix_metric,
        compute_dice,
        compute_iou,
        get_confusion_matrix,
    )

    rng = np.random.default_rng(3)
    reference = rng.integers(0, 4, (9, 10, 11))
    labels = np.where(rng.random(reference.shape) < 0.6, reference, rng.integers(0, 4, reference.shape))
    found = counts_of(labels.reshape(9, -1).astype(np.uint8), reference.reshape(9, -1))
    predicted, true = (
        torch.from_numpy(np.stack([a == v for v in range(4)])[None].astype(np.float32))
        for a in (labels, reference)
    )
    matrix = get_confusion_matrix(predicted, true)[0]  # (class, [tp, fp, tn, fn])
    mine = np.stack([found.counts.tp, found.counts.fp, found.tn, found.counts.fn], axis=1)
    np.testing.assert_array_equal(mine, FULL * matrix.numpy())
    specificity = compute_confusion_matrix_metric("specificity", matrix)
    np.testing.assert_allclose(found.specificity, specificity.numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.counts.iou, compute_iou(predicted, true)[0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(found.counts.dice, compute_dice(predicted, true)[0].numpy(), rtol=1e-6)


def test_sizes_are_of_the_ground():
    """On a geographic grid the rows differ: sizes are sums of the elements' own areas."""
    labels, reference = random_maps(5, (40, 30), 3)
    geometry = RasterGeometry(labels.shape, (0.5, 0, 10, 0, -0.5, 60), CRS(4326).to_wkt())
    scale = SizeScale.of(geometry)
    found = class_counts(tally_of(labels, reference, geometry=geometry))
    areas = np.broadcast_to(np.asarray(geometry.element_sizes()).reshape(-1, 1), labels.shape)
    kept = (labels != 255) & (reference != IGNORED)
    for row, value in enumerate(found.value.tolist()):
        for sizes, mask in (
            (found.predicted_size, labels == value),
            (found.reference_size, reference == value),
        ):
            expected = math.fsum(areas[mask & kept].tolist())
            assert scale.size(int(sizes[row])) == pytest.approx(expected, rel=1e-6)
        assert found.size_ratio[row] == pytest.approx(
            areas[(labels == value) & kept].sum() / areas[(reference == value) & kept].sum(), rel=1e-6
        )


@given(*[st.integers(0, 2**55)] * 3)
def test_dice_follows_from_iou(tp, fp, fn):
    counts = Counts(array(tp), array(fp), array(fn))
    if tp + fp + fn == 0:
        assert np.isnan(counts.iou) and np.isnan(counts.dice)
    else:
        assert counts.dice == pytest.approx(2 * counts.iou / (1 + counts.iou), rel=1e-15)
        assert 0 <= counts.iou <= counts.dice <= 1


@given(st.integers(0, 2**62), st.integers(1, 2**62))
def test_ratios_are_rounded_once(part, whole):
    exact = float(Fraction(part, whole))
    assert ratio(array(part, part), array(whole, 0))[0] == exact
    assert math.isnan(ratio(array(part), array(0))[0])


def test_empty_masks():
    """Both empty: not defined. One empty: 0, and it is said which."""
    counts = Counts(array(0, 0, 0, 1), array(0, 0, 5, 1), array(0, 5, 0, 1))  # both, missed, made up, there
    assert counts.undefined.tolist() == [True, False, False, False]
    assert counts.missed.tolist() == [False, True, False, False]
    assert counts.hallucinated.tolist() == [False, False, True, False]
    nan = np.nan
    np.testing.assert_equal(counts.iou, [nan, 0, 0, 1 / 3])
    np.testing.assert_equal(counts.dice, [nan, 0, 0, 0.5])
    np.testing.assert_equal(counts.precision, [nan, nan, 0, 0.5])
    np.testing.assert_equal(counts.recall, [nan, 0, nan, 0.5])
    assert CaseCounts.of(counts) == CaseCounts(3, 1, 1, 1)
    assert mean([nan, 0.0, 1.0]) == 0.5
    assert math.isnan(mean([nan]))


def test_reasons_name_what_is_not_defined():
    """Everything is 1 in the reference: 2 is made up, and for 1 there is nothing else to be right about."""
    labels, reference = np.array([[1, 1], [2, 1]], dtype=np.uint8), np.array([[1, 1], [1, 1]])
    found = counts_of(labels, reference)
    assert reasons(found, found.value == 2, "stranger").tolist() == [
        "specificity: nothing else in the reference",
        "stranger; recall: not in the reference; size_ratio: not in the reference",
    ]
    np.testing.assert_equal(found.specificity, [np.nan, 3 / 4])
    np.testing.assert_equal(found.size_ratio, [3 / 4, np.nan])


def test_pixels_without_data_or_reference_are_not_compared():
    """Row by row: right, wrong, no data, ignored."""
    labels = np.array([[1, 1], [1, 0], [255, 255], [1, 0]], dtype=np.uint8)
    reference = np.array([[1, 1], [0, 1], [1, 0], [IGNORED, IGNORED]])
    found = counts_of(labels, reference)
    assert plain(found) == {0: (0, FULL, FULL), 1: (2 * FULL, FULL, FULL)}
    assert (found[0, 1].tp, found[0, 1].fp, found[0, 8].tp) == (2 * FULL, FULL, 0)
    assert NODATA == IGNORED == -1


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.permutations(range(5)))
def test_permuting_class_ids_permutes_rows(seed, order):
    labels, reference = random_maps(seed, (8, 9), 5)
    table = np.array(order)
    renamed = np.where(labels == 255, 255, table[labels % 5]).astype(np.uint8)
    truth = np.where(reference == IGNORED, IGNORED, table[reference])
    before, after = plain(counts_of(labels, reference)), plain(counts_of(renamed, truth))
    assert {order[value]: counts for value, counts in before.items()} == after


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7))
def test_any_partition_adds_up(seed, parts):
    """Pixels dealt out to parts at random: the sum of the parts' tallies is the tally of all."""
    labels, reference = random_maps(seed, (7, 8), 4)
    owner = np.random.default_rng(seed).integers(0, parts, labels.shape)
    tallies = [
        Tally.from_columns(
            region=[0] * n, label=np.where(labels == 255, -1, labels.astype(int))[owner == p],
            reference=reference[owner == p], cover=[FULL] * n, size=[FULL] * n, edge=[0] * n,
        )
        for p in range(parts)
        for n in [int((owner == p).sum())]
    ]  # fmt: skip
    one, whole = class_counts(add(tallies)), counts_of(labels, reference)
    assert plain(one) == plain(whole)
    np.testing.assert_array_equal(one.tn, whole.tn)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.randoms())
def test_means_do_not_depend_on_the_order(values, rng):
    assert mean(rng.sample(values, len(values))) == mean(values)


@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 1) | st.just(math.nan)), max_size=30))
def test_grouped_means(pairs):
    pairs.sort(key=lambda p: p[0])
    groups, values = array(*(p[0] for p in pairs)), np.array([p[1] for p in pairs], dtype=float)
    for group, found in enumerate(grouped_mean(values, groups, 5)):
        there = values[(groups == group) & ~np.isnan(values)]
        np.testing.assert_allclose(found, there.mean() if len(there) else np.nan, rtol=1e-14)


def test_sums_beyond_64_bits_are_exact():
    big = array(2**61, 2**61, 2**61, 2**61, 3)
    assert totals(array(0, 0, 0, 0, 1), big, 2).tolist() == [2**63, 3]
    assert ratio(totals(array(0, 0, 0, 0, 1), big, 2), np.array([2**64, 4], dtype=object)).tolist() == [
        0.5,
        0.75,
    ]
