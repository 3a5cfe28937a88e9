"""Objects of a training window: numbers that augmentation can move, and masks."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segpipe.config.card import Card
from segpipe.config.losses import IGNORE
from segpipe.training.sampler import number_pairs, pairs_of, window_truth

LARGE = 2**40 + 1
"""float32 does not hold it."""


def card(kind: str = "panoptic") -> Card:
    return Card.model_validate(
        {
            "name": "objects", "kind": "raster", "provider": "torchvision", "architecture": "MaskRCNN",
            "input": {"bands": ["red"]}, "window": {"size": [32], "halo": [8]}, "output": {"kind": kind},
            "classes": [
                {"value": 0, "name": "ground", "color": "#000000", "background": True},
                {"value": 7, "name": "house", "color": "#ff0000"},
                {"value": 3, "name": "field", "color": "#00ff00", "thing": False},
            ],
        }
    )  # fmt: skip


@given(
    hnp.arrays(np.int16, (5, 6), elements=st.sampled_from([IGNORE, 0, 1, 2])),
    hnp.arrays(np.int64, (5, 6), elements=st.sampled_from([0, 3, 5, LARGE])),
)
def test_numbers_are_few_and_come_back(target: np.ndarray, ids: np.ndarray) -> None:
    numbers, table = number_pairs(target, ids)
    pairs = {(t, i) for t, i in zip(target.ravel().tolist(), ids.ravel().tolist(), strict=True) if t >= 0}
    assert {tuple(row) for row in table.tolist()} == pairs
    assert numbers.max(initial=0) < max(1, len(pairs))
    classes, back = pairs_of(numbers, table)
    np.testing.assert_array_equal(classes, target)
    np.testing.assert_array_equal(back, np.where(target == IGNORE, 0, ids))


TARGET = np.array([
    [0, 1, 1, 0, 2, 2],
    [0, 1, 1, 0, 2, IGNORE],
    [2, 0, 1, 1, 0, 0],
])  # fmt: skip
IDS = np.array([
    [0, LARGE, LARGE, 0, 9, 8],
    [0, LARGE, 5, 0, 9, 9],
    [7, 0, 5, 0, 0, 0],
])  # fmt: skip
"""A thing without an id (last row, fourth column) is no object."""


def test_things_are_objects_by_id_and_stuff_is_one() -> None:
    truth = window_truth(TARGET, IDS, card())
    assert truth.classes.tolist() == [7, 7, 3]
    wanted = [TARGET * (IDS == 5) == 1, TARGET * (IDS == LARGE) == 1, TARGET == 2]
    np.testing.assert_array_equal(truth.masks.numpy(), np.stack(wanted))
    assert int(truth.masks.sum(0).max()) == 1


def test_instances_have_no_stuff() -> None:
    truth = window_truth(TARGET, IDS, card("instance"))
    assert truth.classes.tolist() == [7, 7]
    nothing = window_truth(np.zeros((4, 4), int), np.zeros((4, 4), int), card())
    assert nothing.masks.shape == (0, 4, 4)
    assert nothing.classes.dtype == torch.int64
