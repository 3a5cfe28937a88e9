"""Agreement of prediction and reference over all classes at once: accuracy, kappa, confusion.

Everything here is of one confusion matrix over *all* values of the compared elements: background
and reference values that are no class of the model are in it like any other, and a value that
neither map has is not. The four numbers follow from its margins and diagonal, so from tp, fp and fn.
"""

from __future__ import annotations

import numpy as np

from segpipe.metrics.overlap import ClassCounts, grouped_mean, is_compared, ratio, totals
from segpipe.metrics.tally import Tally

ONE_CLASS = "kappa: one and the same class everywhere"


def pixel_accuracy(cells: ClassCounts) -> np.ndarray:
    """Share of the compared elements that are right: Σ tp / Σ (tp + fn), float64, (groups,).

    NaN where nothing was compared, as in all functions here.
    """
    counts = cells.counts
    right = totals(cells.group, counts.tp, cells.groups)
    return ratio(right, totals(cells.group, counts.actual, cells.groups))


def balanced_accuracy(cells: ClassCounts) -> np.ndarray:
    """Mean recall over the classes that the reference has (Brodersen et al. 2010), (groups,)."""
    return grouped_mean(cells.counts.recall, cells.group, cells.groups)


def cohen_kappa(cells: ClassCounts) -> np.ndarray:
    """Cohen's kappa (1960), (groups,): agreement beyond what the margins alone would give.

    κ = 1 − (1 − p_o) / (1 − p_e), and 1 − p_e = Σ_k predicted_k (n − actual_k) / n², a sum without
    cancellation. NaN where it is 0: both maps are one and the same class.
    """
    group, groups = cells.group, cells.groups
    predicted, actual = (
        np.asarray(v, dtype=np.float64) for v in (cells.counts.predicted, cells.counts.actual)
    )
    n = np.bincount(group, actual, groups)
    wrong = np.bincount(group, np.asarray(cells.counts.fp, dtype=np.float64), groups)
    by_chance = np.bincount(group, predicted * (n[group] - actual), groups)
    return 1 - ratio(n * wrong, by_chance)


def frequency_weighted_iou(cells: ClassCounts) -> np.ndarray:
    """Mean IoU weighted by the classes' share of the reference (Long et al. 2015), (groups,)."""
    group, groups = cells.group, cells.groups
    actual = np.asarray(cells.counts.actual, dtype=np.float64)
    weighted = np.where(actual > 0, actual * cells.counts.iou, 0.0)
    return ratio(np.bincount(group, weighted, groups), np.bincount(group, actual, groups))


def confusion_matrix(tally: Tally, region: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The whole matrix of one region; for all regions as a long table see `confusion_table`.

    Returns:
        Class values that occur, ascending, (class,); and compared elements in 1/65536, int64,
        (reference class, predicted class).
    """
    kept = is_compared(tally) & (tally.region == region)
    truth, label = tally.reference[kept], tally.label[kept]
    values = np.union1d(truth, label)
    matrix = np.zeros((len(values), len(values)), dtype=np.int64)
    matrix[np.searchsorted(values, truth), np.searchsorted(values, label)] = tally.cover[kept]
    return values, matrix
