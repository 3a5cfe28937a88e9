"""What a prompt says of a mask before an image is looked at: an ellipse in its box, a disc at its points.

A small network that learns from little need not learn first where a box is: it is given this as its coarse
mask, and what it answers is added to it. So it begins with the floor that it is measured against (an ellipse
inscribed in the box), and learns to do better.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BOX_SLOPE, BOX_MOST = 6.0, 4.0
"""Logits from an ellipse's centre to its border, and at most: an edge is as soft as the box is large."""
POINT_SLOPE, POINT_MOST = 2.0, 2.0
"""The same of the disc at a point: its size says nothing."""
RADIUS = 4.0
"""Of that disc, in elements of the window."""


def prior_logits(
    box_xyxy: np.ndarray | None, points_xy: np.ndarray, labels: np.ndarray, edge: float, shape: Sequence[int]
) -> np.ndarray:
    """Logits (y, x) of a prompt's prior: of its box if it has one, else of its positive points.

    Args:
        box_xyxy: (4,) centres of the first and the last element, x and y.
        points_xy: (p, 2).
        labels: (p,) 1: of the object.
        edge: elements of the window for each of the prior, along an axis.
        shape: (y, x) of the prior.
    """
    y, x = ((np.arange(n) + 0.5) * edge - 0.5 for n in shape)
    y = y[:, None]
    if box_xyxy is not None:
        x0, y0, x1, y1 = (float(v) for v in box_xyxy)
        half_x, half_y = (x1 - x0 + 1) / 2, (y1 - y0 + 1) / 2
        rho = np.hypot((x - (x0 + x1) / 2) / half_x, (y - (y0 + y1) / 2) / half_y)
        return np.asarray(np.clip(BOX_SLOPE * (1 - rho), -BOX_MOST, BOX_MOST), np.float32)
    near = [np.hypot(x - px, y - py) for (px, py), label in zip(points_xy, labels, strict=True) if label]
    if not near:
        return np.full(tuple(shape), -POINT_MOST, np.float32)
    logits = POINT_SLOPE * (1 - np.min(near, axis=0) / RADIUS)
    return np.asarray(np.clip(logits, -POINT_MOST, POINT_MOST), np.float32)
