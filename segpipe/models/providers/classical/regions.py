"""Thresholds, region growing and watershed: from one number per element to a class per element.

Every function takes ``feature`` (float32, any number of axes) and ``known`` (bool, the same shape):
what is not known has no say, and its class means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skimage.filters import apply_hysteresis_threshold, sobel, threshold_multiotsu, threshold_otsu
from skimage.segmentation import watershed as flood_from_markers

from segpipe.errors import SceneError


def known_values(feature: np.ndarray, known: np.ndarray) -> np.ndarray:
    """The known elements' feature, (n,).

    Raises:
        SceneError: there is none.
    """
    if not known.any():
        raise SceneError("every element is 0 in every band: nothing can be told apart")
    return np.asarray(feature[known])


def otsu_thresholds(values: np.ndarray, classes: int, bins: int) -> list[float]:
    """The thresholds that part values into classes of least variance; rising, one less than classes.

    Otsu (1979), IEEE Transactions on Systems, Man and Cybernetics 9(1), 62-66; for more than two classes
    Liao, Chen and Chung (2001), Journal of Information Science and Engineering 17(5), 713-727.

    Args:
        values: (n,), the known elements.

    Raises:
        SceneError: too few different values for that many classes.
    """
    if values.min() == values.max():
        raise SceneError(f"Otsu's threshold parts {classes} classes; the scene has one value, {values[0]:g}")
    if classes == 2:
        return [float(threshold_otsu(values, nbins=bins))]
    try:
        return [float(t) for t in threshold_multiotsu(values, classes, nbins=bins)]
    except ValueError as error:
        raise SceneError(
            f"Otsu's thresholds part {classes} classes; the scene has fewer different values "
            f"in a histogram of {bins} bins"
        ) from error


def by_thresholds(feature: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Class of each element: how many thresholds it is above.

    One threshold belongs to the class below it, of several each to the class above it, as
    scikit-image's documentation of the two kinds has it.
    """
    return np.asarray(np.digitize(feature, thresholds, right=len(thresholds) == 1))


def region_growing(feature: np.ndarray, known: np.ndarray, seed: float, grow: float) -> np.ndarray:
    """1 where a chain of face neighbours above the `grow` quantile leads to one above the `seed` quantile.

    Also known as hysteresis thresholding: Canny (1986), IEEE Transactions on Pattern Analysis and Machine
    Intelligence 8(6), 679-698.
    """
    low, high = np.quantile(known_values(feature, known), [grow, seed])
    above = np.where(known, feature, np.float32(-np.inf))
    return np.asarray(apply_hysteresis_threshold(above, low, high), dtype=np.intp)


def watershed(feature: np.ndarray, known: np.ndarray, markers: Sequence[tuple[float, float]]) -> np.ndarray:
    """Class of each element: the marker that floods it first, over the gradient (Sobel) of the feature.

    Meyer (1991), Un algorithme optimal de ligne de partage des eaux. A part of the scene that no marker
    reaches, as an island among elements without value, goes by the nearest marker's values.

    Raises:
        SceneError: the markers of two classes meet at one value.
    """
    limits = np.quantile(known_values(feature, known), np.asarray(markers))
    if (limits[1:, 0] <= limits[:-1, 1]).any():
        at = limits[1:, 0][limits[1:, 0] <= limits[:-1, 1]][0]
        raise SceneError(f"the markers of two classes meet at {at:g}: too many elements have that value")
    places = np.zeros(feature.shape, dtype=np.int32)
    for number, (low, high) in enumerate(limits, start=1):
        places[known & (feature >= low) & (feature <= high)] = number
    flooded = flood_from_markers(sobel(feature), places, mask=known)
    nearest = np.digitize(feature, (limits[1:, 0] + limits[:-1, 1]) / 2)
    return np.asarray(np.where(flooded > 0, flooded - 1, nearest))
