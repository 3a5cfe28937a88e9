"""Objects of a training window: from ids and classes per element to masks."""

from __future__ import annotations

import numpy as np
import torch

from segpipe.config.card import Card
from segpipe.config.losses import IGNORE
from segpipe.models.base import Truth


def number_pairs(target: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes and ids as one small number an element, which augmentation can move about.

    Args:
        target: channels (…); `IGNORE` where nothing is said.
        ids: like target, 0 no object; ids of a file may be too large for float32, which numbers are not.

    Returns:
        Numbers 0…n − 1 like target, int64, `IGNORE` where the target is; and a table (n, 2), int64: the
        channel and the id of each number.
    """
    said = target != IGNORE
    pairs = np.stack([target[said].astype(np.int64), ids[said]], -1)
    table, number = np.unique(pairs, axis=0, return_inverse=True)
    numbers = np.full(target.shape, IGNORE, np.int64)
    numbers[said] = number.ravel()
    return numbers, table


def pairs_of(numbers: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `number_pairs`; ids are 0 where nothing is said."""
    rows = np.concatenate([table, [[IGNORE, 0]]])[np.where(numbers == IGNORE, len(table), numbers)]
    return rows[..., 0], rows[..., 1]


def window_truth(target: np.ndarray, ids: np.ndarray, card: Card) -> Truth:
    """The masks that an instance or panoptic network should find in a window.

    Each id of a class of things is an object; for panoptic cards each class of stuff is one. An id under two
    classes is two objects. Background is none.

    Args:
        target: channels (…), `IGNORE` where nothing is said.
        ids: like target; 0: no object.
        card: says which classes are what.
    """
    masks, classes = [], []
    for channel, c in enumerate(card.classes):
        here = target == channel
        if c.background or not here.any():
            continue
        if c.thing:
            parts = [here & (ids == i) for i in np.unique(ids[here]).tolist() if i > 0]
        else:
            parts = [here] if card.output.kind == "panoptic" else []
        masks += parts
        classes += [c.value] * len(parts)
    stacked = np.stack(masks) if masks else np.zeros((0, *target.shape), bool)
    return Truth(torch.from_numpy(stacked), torch.tensor(classes, dtype=torch.int64))
