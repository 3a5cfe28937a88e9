"""Intervals against scipy.stats.bootstrap, against resamples written out, and their coverage."""

import numpy as np
import pytest
from scipy import stats

from segpipe.metrics.bootstrap import RESAMPLES, mean_intervals, pooled_intervals
from segpipe.metrics.overlap import ClassCounts, Counts

METHOD = {"method": "percentile", "n_resamples": 9999, "rng": 1}


def one_each(values):
    """Every unit a cluster; one number."""
    column = np.asarray(values, dtype=float)[:, None]
    found = mean_intervals(column, np.arange(len(column)), len(column))
    return found.low[0], found.high[0]


def pooled(tp, union, statistic=None):
    """Of Σ tp / Σ union, clusters of one class."""
    n = len(tp)
    counts = Counts(np.asarray(tp), np.asarray(union) - np.asarray(tp), np.zeros(n, dtype=np.int64))
    cells = ClassCounts(np.arange(n), np.ones(n, dtype=np.int64), counts, n)
    found = pooled_intervals(cells, [statistic or (lambda sums: sums.counts.iou)], [n])
    return found.low[0], found.high[0]


def assert_close(mine, theirs):
    """Within Monte-Carlo error: about 1.5 % of the width each, one standard deviation."""
    width = theirs[1] - theirs[0]
    np.testing.assert_allclose(mine, theirs, atol=0.05 * width, rtol=0)


def test_means_equal_scipy():
    values = np.random.default_rng(0).beta(5, 2, 40)
    assert_close(one_each(values), stats.bootstrap((values,), np.mean, **METHOD).confidence_interval)


def test_means_of_what_is_defined_equal_scipy():
    values = np.random.default_rng(1).beta(5, 2, 30)
    values[::4] = np.nan
    assert_close(one_each(values), stats.bootstrap((values,), np.nanmean, **METHOD).confidence_interval)


def test_pooled_ratios_equal_scipy():
    rng = np.random.default_rng(2)
    union = rng.integers(1000, 90_000, 35)
    tp = rng.binomial(union, rng.beta(6, 3, 35))

    def iou(tp, union, axis):
        return tp.sum(axis=axis) / union.sum(axis=axis)

    theirs = stats.bootstrap((tp, union), iou, paired=True, **METHOD)
    assert_close(pooled(tp, union), theirs.confidence_interval)


def test_what_does_not_vary_has_no_width():
    """The same in every cluster: both ends are the number itself, as scipy's."""
    assert one_each([0.5] * 7) == (0.5, 0.5)
    assert one_each([1 / 3] * 7) == pytest.approx((1 / 3, 1 / 3), abs=1e-16)
    assert pooled([3] * 5, [7] * 5) == (3 / 7, 3 / 7)
    theirs = stats.bootstrap((np.full(7, 0.5),), np.mean, **METHOD).confidence_interval
    assert tuple(theirs) == (0.5, 0.5)


def test_few_clusters_written_out():
    """Of two, 1/4 of the resamples has the least alone, of three 1/27: over 2.5 %, so it is the end."""
    assert one_each([0.25, 0.75]) == (0.25, 0.75)
    assert one_each([0.25, 0.5, 1.0]) == pytest.approx((0.25, 1.0), rel=1e-15)
    theirs = stats.bootstrap((np.array([0.25, 0.5, 1.0]),), np.mean, **METHOD).confidence_interval
    assert tuple(theirs) == (0.25, 1.0)
    assert pooled([1, 3], [4, 4]) == (0.25, 0.75)


def test_one_cluster_has_no_interval():
    assert np.isnan(one_each([0.5])).all()
    assert np.isnan(one_each([0.5, np.nan, np.nan])).all()


def test_clones_in_a_group_tell_nothing_new():
    """Each scene three times in its group: the interval of the groups is the one of the scenes alone."""
    values = np.random.default_rng(3).beta(5, 2, 12)
    group = np.random.default_rng(4).permutation(np.repeat(np.arange(12), 3))
    many = values[group][:, None]
    grouped = mean_intervals(many, group, 12)
    assert (grouped.low[0], grouped.high[0]) == pytest.approx(one_each(values), rel=1e-12)
    naive = one_each(many[:, 0])
    assert (naive[1] - naive[0]) / (grouped.high[0] - grouped.low[0]) == pytest.approx(3**-0.5, abs=0.06)


def test_undefined_resamples_are_counted():
    """Two of three scenes have it: a resample has neither with probability 1/27."""
    found = mean_intervals(np.array([[0.2], [0.6], [np.nan]]), np.arange(3), 3)
    expected, spread = RESAMPLES / 27, np.sqrt(RESAMPLES * 26) / 27
    assert abs(found.undefined[0] - expected) < 4 * spread
    assert (found.low[0], found.high[0]) == pytest.approx((0.2, 0.6), rel=1e-15)
    assert found.clusters.tolist() == [2]


def test_intervals_cover():
    """Of 200 samples of 40 from a known distribution, about 95 % of the intervals hold its mean."""
    rng = np.random.default_rng(4)
    samples = rng.beta(5, 2, (40, 200))
    found = mean_intervals(samples, np.arange(40), 40)
    assert np.mean((found.low <= 5 / 7) & (found.high >= 5 / 7)) == pytest.approx(0.94, abs=0.04)


def test_the_same_bits_again():
    values = np.random.default_rng(5).random((50, 3))
    one, two = (mean_intervals(values, np.arange(50), 50) for _ in range(2))
    np.testing.assert_array_equal(one.low, two.low)
    np.testing.assert_array_equal(one.high, two.high)


def test_memory_follows_neither_clusters_nor_classes(monkeypatch):
    """In pieces as at once: other draws, the same interval within Monte-Carlo error."""
    rng = np.random.default_rng(6)
    union = rng.integers(1000, 90_000, 60)
    tp = rng.binomial(union, rng.beta(6, 3, 60))
    at_once = pooled(tp, union)
    monkeypatch.setattr("segpipe.metrics.bootstrap._CHUNK", 6000)
    assert_close(pooled(tp, union), at_once)
