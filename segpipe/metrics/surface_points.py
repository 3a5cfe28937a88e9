"""Surface points and boundary bands of every class in one tile: pure functions on integer arrays.

A tile comes as a *frame*: an array of class codes (0: no class that was asked for, i + 1: the i-th
class) that covers the tile's box and a margin on every side, the scene's outside filled with 0. All
classes are found in the same passes, so the cost of another class follows its surface.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from math import prod

import numpy as np
from scipy import ndimage

from segpipe.process.extras import require

SLACK = 1 + 1e-9
"""A distance counts as within a limit up to this factor: 3 × 0.7 is within 2.1 in any rounding."""
MOST_SHIFTS = 1500
"""Offsets up to which comparing shifted arrays, all classes at once, beats a distance transform of each."""


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
    if prod(2 * r + 1 for r in reach) <= MOST_SHIFTS:
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
