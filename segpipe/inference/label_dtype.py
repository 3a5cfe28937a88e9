"""How label maps are stored: the smallest unsigned type, its greatest value for nodata."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from segpipe.config.card import Card


def label_dtype(card: Card) -> str:
    """uint8 where all values and the nodata value 255 fit, else uint16 with 65535."""
    return "uint8" if max(card.values) < 255 else "uint16"


def nodata_value(card: Card) -> int:
    """The label of elements where the scene is not valid."""
    return int(np.iinfo(label_dtype(card)).max)


def no_data_value(values: Iterable[int]) -> int:
    """What stands for no data in a file of labels with these classes."""
    return 255 if max(values) < 255 else 65535
