"""From the points of two surfaces to the numbers of one definition: pure functions on arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from segpipe.metrics.surface_points import SLACK

QUERY_POINTS = 1 << 20
"""Points whose nearest neighbours are looked up at once."""
SHARE_SLACK = 1e-6
"""A share of a surface counts as reached this much before it: MONAI's areas are float32."""


@dataclass(frozen=True)
class Distances:
    """Distances between the predicted and the reference surface under one definition.

    In the unit of the spacing; NaN where either surface is empty.
    """

    hausdorff: float
    """Greatest distance of any point of one surface to the other surface."""
    hausdorff95: float
    """The greater of the two directed 95th percentiles."""
    to_reference: float
    """Average distance of the predicted surface to the reference surface."""
    to_prediction: float
    """Average distance of the reference surface to the predicted surface."""
    symmetric: float
    """Average symmetric surface distance: over the points of both surfaces together."""
    dice: float
    """Normalised surface Dice: the share of both surfaces within the tolerance of the other. 0 where
    one is empty, NaN where both are."""
    predicted: int
    """Points of the predicted surface."""
    actual: int
    """Points of the reference surface."""


def nearest(points: np.ndarray, others: np.ndarray, spacing: Sequence[float], workers: int = 1) -> np.ndarray:
    """Distance of each point to the nearest of the others, float64; inf where there are no others.

    From whole differences, as a distance transform has it: the same wherever in the scene it is.

    Args:
        points: grid positions (point, axis), integers.
        others: likewise.
        spacing: edge lengths of an element.
        workers: threads of the search.
    """
    out = np.full(len(points), np.inf)
    if not len(others):
        return out
    scale = np.array(spacing)
    tree = cKDTree(others * scale, balanced_tree=False)  # several times faster to build on a grid
    for start in range(0, len(points), QUERY_POINTS):
        some = points[start : start + QUERY_POINTS]
        _, found = tree.query(some * scale, workers=workers)
        out[start : start + QUERY_POINTS] = np.sqrt((((others[found] - some) * scale) ** 2).sum(axis=1))
    return out


def percentile95(distances: np.ndarray, weights: np.ndarray) -> float:
    """The 95th percentile, interpolated between values as numpy does; weights are all alike."""
    return float(np.percentile(distances, 95))


def weighted_percentile95(distances: np.ndarray, weights: np.ndarray) -> float:
    """The least distance that 95 % of the weight does not exceed (surface-distance, robust Hausdorff)."""
    order = np.argsort(distances, kind="stable")
    share = np.cumsum(weights[order])
    reached = np.searchsorted(share, (0.95 - SHARE_SLACK) * share[-1])
    return float(distances[order[reached]])


def summarise(
    far: Sequence[np.ndarray],
    weights: Sequence[np.ndarray],
    percentile: Callable[[np.ndarray, np.ndarray], float],
    tolerance: float,
) -> Distances:
    """The numbers of one definition.

    Args:
        far: distance of each point to the other surface, of the prediction and of the reference.
        weights: of the same points.
        percentile: of distances and weights.
        tolerance: of the surface Dice.
    """
    sizes = [float(w.sum()) for w in weights]
    near = sum(float(w[d <= tolerance * SLACK].sum()) for d, w in zip(far, weights, strict=True))
    dice = near / sum(sizes) if any(sizes) else math.nan
    predicted, actual = map(len, far)
    if not (predicted and actual):
        nan = math.nan
        return Distances(nan, nan, nan, nan, nan, dice, predicted, actual)
    sums = [float((d * w).sum()) for d, w in zip(far, weights, strict=True)]
    return Distances(
        hausdorff=float(max(d.max() for d in far)),
        hausdorff95=max(percentile(d, w) for d, w in zip(far, weights, strict=True)),
        to_reference=sums[0] / sizes[0],
        to_prediction=sums[1] / sizes[1],
        symmetric=sum(sums) / sum(sizes),
        dice=dice,
        predicted=predicted,
        actual=actual,
    )
