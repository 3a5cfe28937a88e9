"""Points of surfaces, and the distances between them: pure functions on arrays.

A tile comes as a *frame*: an array of class codes (0: no class that was asked for, i + 1: the i-th
class) that covers the tile's box and a margin on every side, the scene's outside filled with 0. All
classes are found in the same passes, so the cost of another class follows its surface.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from segpipe.process.extras import require

QUERY_POINTS = 1 << 20
"""Points whose nearest neighbours are looked up at once."""
SHARE_SLACK = 1e-6
"""A share of a surface counts as reached this much before it: MONAI's areas are float32."""
SLACK = 1 + 1e-9
"""A distance counts as within a limit up to this factor: 3 × 0.7 is within 2.1 in any rounding."""
MOST_SHIFTS = 1500
"""Offsets up to which comparing shifted arrays, all classes at once, beats a distance transform of each."""


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


# ------------------------------------------------------------------ points


@cache
def element_table(spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Size of the surface element of each neighbour code, and the bits of a code.

    The code of a corner of the grid has one bit for each of the 2**ndim elements that meet there.
    MONAI's tables, which are those of DeepMind's surface-distance (Nikolov et al. 2018,
    arXiv:1809.04430): marching squares in 2D, marching cubes in 3D.

    Args:
        spacing: edge lengths of an element, 2 or 3 of them.

    Returns:
        Length (2D) or area (3D) by code, float64, in the unit of spacing (3D: its square); and the
        bit of each neighbour in C order, uint8.
    """
    library = require("monai.metrics.utils", "measure.surface")  # here: it loads torch
    sizes, bits = library.get_code_to_measure_table(spacing)
    return sizes.numpy().astype(np.float64), bits.numpy().ravel().astype(np.uint8)


def surface_elements(
    frame: np.ndarray, margin: Sequence[int], last: Sequence[bool], bits: np.ndarray
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Surface elements of each class: grid corners whose neighbours are partly of the class.

    Corner i lies between elements i - 1 and i, so a scene of n elements has n + 1 corners along an
    axis; a tile owns those before its elements, and the scene's last one where it ends with it.

    Args:
        frame: class codes of the tile and its margin.
        margin: elements around the tile along each axis, at least 1.
        last: along which axes the tile ends where the scene does.
        bits: of each neighbour (`element_table`).

    Yields:
        Class code, positions of its corners (axis, point) relative to the tile, neighbour codes.
    """
    shape = tuple(n - 2 * m for n, m in zip(frame.shape, margin, strict=True))
    corners = tuple(n + int(end) for n, end in zip(shape, last, strict=True))
    views = [
        frame[tuple(slice(m - 1 + d, m - 1 + d + n) for m, d, n in zip(margin, delta, corners, strict=True))]
        for delta in product((0, 1), repeat=frame.ndim)
    ]
    mixed = np.zeros(corners, dtype=bool)
    for view in views[1:]:
        mixed |= view != views[0]
    at = np.stack(np.nonzero(mixed))
    around = np.stack([view[mixed] for view in views], axis=1)
    for code in np.unique(around[around > 0]):
        hit = around == code
        some = hit.any(axis=1)
        yield int(code), at[:, some], hit[some] @ bits


def edge_elements(frame: np.ndarray, margin: Sequence[int]) -> np.ndarray:
    """Elements of the tile with a face neighbour of another code: ``mask & ~binary_erosion(mask)``
    of every class at once, bool."""
    return _differs(frame, margin, _faces(frame.ndim))


def boundary_band(
    frame: np.ndarray, margin: Sequence[int], spacing: Sequence[float], width: float
) -> np.ndarray:
    """Elements of the tile that lie within `width` of their own class's boundary, bool.

    The distance is from an element's centre to the nearest centre outside its class, so a width of
    k elements is a band of k elements along a straight boundary (as k erosions in the code of Cheng
    et al. 2021). Edge elements belong to the band however small the width, as there.

    Args:
        frame: class codes of the tile and its margin.
        margin: elements around the tile, at least `band_margin`.
        spacing: edge lengths of an element.
        width: in the unit of spacing.
    """
    reach = band_margin(spacing, width)
    if math.prod(2 * r + 1 for r in reach) <= MOST_SHIFTS:
        return _differs(frame, margin, _ball(reach, spacing, width))
    band = edge_elements(frame, margin)
    inner = _shifted(frame, margin, (0,) * frame.ndim)
    for code in np.unique(inner[inner > 0]):
        mask = frame == code
        if not mask.all():  # without an outside there is no distance to it
            near = ndimage.distance_transform_edt(mask, sampling=spacing) <= width * SLACK
            band |= _shifted(mask & near, margin, (0,) * frame.ndim)
    return band


def band_margin(spacing: Sequence[float], width: float) -> tuple[int, ...]:
    """Elements around a tile that decide its band and its surface: at least 1 along each axis."""
    return tuple(max(1, int(width * SLACK / s)) for s in spacing)


def _ball(reach: Sequence[int], spacing: Sequence[float], width: float) -> list[tuple[int, ...]]:
    """Offsets no longer than `width`, and the faces."""
    limit = (width * SLACK) ** 2
    offsets = product(*(range(-r, r + 1) for r in reach))
    inside = {o for o in offsets if sum((k * s) ** 2 for k, s in zip(o, spacing, strict=True)) <= limit}
    return sorted(inside.union(_faces(len(reach))))


def _faces(ndim: int) -> list[tuple[int, ...]]:
    """Offsets of the 2·ndim face neighbours."""
    return [tuple(sign * (a == axis) for a in range(ndim)) for axis in range(ndim) for sign in (-1, 1)]


def _shifted(frame: np.ndarray, margin: Sequence[int], offset: Sequence[int]) -> np.ndarray:
    """The tile's part of a frame, moved by an offset; a view."""
    return frame[tuple(slice(m + k, n - m + k) for n, m, k in zip(frame.shape, margin, offset, strict=True))]


def _differs(frame: np.ndarray, margin: Sequence[int], offsets: Sequence[Sequence[int]]) -> np.ndarray:
    """Elements of the tile that have another code at any of the offsets."""
    inner = _shifted(frame, margin, (0,) * frame.ndim)
    out = np.zeros(inner.shape, dtype=bool)
    for offset in offsets:
        out |= inner != _shifted(frame, margin, offset)
    return out
