"""U-Net's weights for the gaps between objects that nearly touch."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np
from scipy import ndimage

REACH = 6.0
"""Distances above this many sigma are not looked at: at d1 + d2 = 6 sigma the weight is 1.5e-8 of w0."""


def border_weights(
    ids: np.ndarray, w0: float = 10.0, sigma: float = 5.0, spacing: Sequence[float] | None = None
) -> np.ndarray:
    """w0·exp(−(d1 + d2)² / 2σ²) outside objects, 0 inside (Ronneberger et al. 2015, arXiv:1505.04597, eq. 2).

    d1 and d2 are the distances from an element's centre to the nearest element of the nearest and of the
    second nearest object. The first summand of eq. 2, w_c, is no part of it: it is the `class_weights`
    of the loss. Objects without an element between them have no gap to weigh; labels are made with one.
    An object that a crop cuts away is not seen: make the map before cropping, or with a margin.

    Args:
        ids: (y, x) or (z, y, x), whole numbers; above 0: the object that the element belongs to.
        w0: weight where both distances are 0.
        sigma: in the unit of spacing.
        spacing: edge lengths of an element along the axes of ids; None: 1 each.

    Returns:
        Weights like ids, float32. Fewer than two objects: 0 everywhere.

    Raises:
        ValueError: not 2 or 3 axes, not whole numbers, or a parameter that is not positive and finite.
    """
    ids = np.asarray(ids)
    steps = np.ones(ids.ndim) if spacing is None else np.asarray(spacing, dtype=float)
    _check(ids, w0, sigma, steps)
    inside = ids > 0
    labels = np.zeros(ids.shape, dtype=np.int32)
    labels[inside] = np.unique(ids[inside], return_inverse=True)[1] + 1
    first = np.full(ids.shape, np.inf, dtype=np.float32)
    second = first.copy()
    margin = [ceil(REACH * sigma / step) for step in steps]
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        window = tuple(slice(max(0, s.start - m), s.stop + m) for s, m in zip(box, margin, strict=True))
        distance = ndimage.distance_transform_edt(labels[window] != label, sampling=steps)
        np.minimum(second[window], np.maximum(first[window], distance), out=second[window])
        np.minimum(first[window], distance, out=first[window])
    weights: np.ndarray = w0 * np.exp(-((first + second) ** 2) / (2 * sigma**2))
    weights[inside] = 0
    return weights


def _check(ids: np.ndarray, w0: float, sigma: float, steps: np.ndarray) -> None:
    if ids.ndim not in (2, 3) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids: found {ids.ndim} axes of {ids.dtype}; 2 or 3 axes of whole numbers")
    if steps.shape != (ids.ndim,):
        raise ValueError(f"spacing: found {steps.tolist()}; one number for each of {ids.ndim} axes")
    numbers = np.array([w0, sigma, *steps])
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise ValueError(
            f"w0 {w0:g}, sigma {sigma:g}, spacing {steps.tolist()}: each must be positive and finite"
        )
