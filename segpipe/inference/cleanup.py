"""What a card does to the finished label map of a scene: largest component, filled holes."""

from __future__ import annotations

import cc3d
import numpy as np
from scipy import ndimage

from segpipe.config.card import Card


def clean_labels(labels: np.ndarray, card: Card) -> np.ndarray:
    """The label map (y, x) or (z, y, x) after the card's clean-up; nodata is never touched.

    Classes are cleaned in the card's order, each against the background (the card's first class).
    Components are 8- or 26-connected; holes are background not reached from the border by faces.
    """
    out = labels.copy()
    background = card.classes[0].value
    for item in card.classes[1:]:
        mask = out == item.value
        if not mask.any():
            continue
        if card.cleanup.largest_component:
            components = cc3d.connected_components(mask, connectivity=26 if mask.ndim == 3 else 8)
            counts = cc3d.statistics(components, no_slice_conversion=True)["voxel_counts"]
            counts[0] = 0
            largest = int(counts.argmax())
            out[mask & (components != largest)] = background
            mask = out == item.value
        if card.cleanup.fill_holes:
            filled = ndimage.binary_fill_holes(mask)
            out[filled & (out == background)] = item.value
    return out
