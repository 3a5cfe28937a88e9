"""Percentile bootstrap intervals, resampling whole clusters: scenes, patients, spatial blocks.

What lies in one cluster is not independent, so clusters are drawn with replacement, as many as
there are, and every number is made again of the sums over those drawn (Efron & Tibshirani 1993,
ch. 13; Field & Welsh 2007 for clusters). Seeded: the same clusters in the same order give the same
bits. With few clusters, say fewer than ten, percentile intervals are too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from segpipe.metrics.overlap import ClassCounts, Counts, mean

RESAMPLES = 2000
LEVEL = 0.95
SEED = 20260101
_CHUNK = 1 << 22
"""Numbers held at once, so that memory follows neither clusters nor classes."""

Statistic = Callable[[ClassCounts], np.ndarray]
"""One number per group, float64, NaN where undefined."""


@dataclass(frozen=True, eq=False)
class Intervals:
    """Intervals of several numbers: arrays of one length."""

    low: np.ndarray
    """NaN where fewer than two clusters have the number: nothing would vary."""
    high: np.ndarray
    clusters: np.ndarray
    """How many clusters have it."""
    undefined: np.ndarray
    """Resamples in which it is undefined; the percentiles leave them out."""

    @classmethod
    def none(cls, length: int) -> Intervals:
        """Of numbers that no cluster has."""
        nan, zero = np.full(length, np.nan), np.zeros(length, dtype=np.int64)
        return cls(nan, nan.copy(), zero, zero.copy())

    def __setitem__(self, where: np.ndarray, part: Intervals) -> None:
        for name in ("low", "high", "clusters", "undefined"):
            getattr(self, name)[where] = getattr(part, name)


def mean_intervals(values: np.ndarray, cluster: np.ndarray, clusters: int) -> Intervals:
    """Of the mean over units (scenes) of what is defined.

    Args:
        values: float64, (unit, number); NaN where undefined.
        cluster: index of the cluster of each unit, int, (unit,).
        clusters: how many there are.
    """
    defined = ~np.isnan(values)
    centre = np.nan_to_num([mean(column) for column in values.T.tolist()])
    # Sums of deviations, so that what is the same in all clusters keeps its bits.
    deviation = np.where(defined, values - centre, 0.0)
    members = sparse.csr_array(
        (np.ones(len(cluster)), (cluster, np.arange(len(cluster)))), (clusters, len(cluster))
    )
    sums = np.hstack([members @ deviation, members @ defined.astype(np.float64)])
    drawn = np.concatenate([*_resampled(sparse.csr_array(sums))])
    parts, counts = np.hsplit(drawn, 2)
    means = centre + np.divide(parts, counts, out=np.full(parts.shape, np.nan), where=counts > 0)
    return _percentiles(means, (sums[:, values.shape[1] :] > 0).sum(axis=0))


def pooled_intervals(
    cells: ClassCounts, statistics: Sequence[Statistic], clusters: Sequence[int]
) -> Intervals:
    """Of numbers made of the sums over clusters.

    Args:
        cells: counts by cluster (the group) and class value.
        statistics: make the numbers of the summed counts; each resample is a group.
        clusters: for each statistic, how many clusters have it.
    """
    values, code = np.unique(cells.value, return_inverse=True)
    columns = [
        sparse.csr_array(
            (np.asarray(sums, dtype=np.float64), (cells.group, code)), (cells.groups, len(values))
        )
        for sums in (cells.counts.tp, cells.counts.fp, cells.counts.fn)
    ]
    found = []
    for drawn in _resampled(sparse.csr_array(sparse.hstack(columns))):
        count = len(drawn)
        tp, fp, fn = (part.ravel() for part in np.hsplit(drawn, 3))
        group, value = np.repeat(np.arange(count), len(values)), np.tile(values, count)
        sums = ClassCounts(group, value, Counts(tp, fp, fn), count)
        found.append(np.stack([statistic(sums) for statistic in statistics], axis=1))
    return _percentiles(np.concatenate(found), np.asarray(clusters))


def _resampled(columns: sparse.csr_array) -> Iterator[np.ndarray]:
    """Sums over the clusters drawn, float64, (some resamples, column), until all are made.

    Args:
        columns: what a cluster adds, float64, (cluster, column).
    """
    clusters = columns.shape[0]
    rng = np.random.default_rng(SEED)
    most = max(1, _CHUNK // max(clusters, *columns.shape, 1))
    by_column = sparse.csr_array(columns.T)  # sparse products add in one order, whatever the machine's cores
    for begin in range(0, RESAMPLES, most):
        count = min(most, RESAMPLES - begin)
        drawn = rng.integers(0, clusters, (count, clusters)) + clusters * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * clusters).reshape(count, clusters)
        yield (by_column @ np.ascontiguousarray(times.T, dtype=np.float64)).T


def _percentiles(found: np.ndarray, clusters: np.ndarray) -> Intervals:
    """The middle `LEVEL` of each column of (resample, number)."""
    undefined = np.isnan(found).sum(axis=0)
    ends = np.full((2, found.shape[1]), np.nan)
    enough = clusters >= 2
    asked = [50 * (1 - LEVEL), 50 * (1 + LEVEL)]
    for i in np.flatnonzero(enough & (undefined < len(found))).tolist():
        column = found[:, i]
        ends[:, i] = np.percentile(column[~np.isnan(column)], asked)
    return Intervals(ends[0], ends[1], clusters, undefined)
