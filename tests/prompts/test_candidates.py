"""Which candidate is taken, against other libraries' boxes and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops
from torchvision.ops import box_iou as torchvision_box_iou

from segpipe.config.prompts import Choice
from segpipe.prompts.masks.decode import CandidateStats, box_iou, choose_candidate, measure

FIVE = st.tuples(*(st.integers(0, 6) for _ in range(4)))


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_bounding_boxes_are_those_of_skimage(seed: int) -> None:
    random = np.random.default_rng(seed)
    masks = random.random((5, 6, 9)) > random.choice([0.5, 0.9, 0.98, 1.0], (5, 1, 1))
    stats = measure(np.where(masks, np.float32(1), np.float32(-1)), np.ones(len(masks)))
    start, stop = stats.start, stats.stop
    for i, mask in enumerate(masks):
        if mask.any():
            [found] = regionprops(mask.astype(int))
            np.testing.assert_array_equal([*start[i] + 0.5, *stop[i] + 0.5], found.bbox)
        else:
            assert np.isnan([start[i], stop[i]]).all()


@settings(max_examples=30)
@given(st.lists(FIVE, min_size=1, max_size=6))
def test_overlap_of_boxes_is_that_of_torchvision(boxes: list[tuple[int, ...]]) -> None:
    start = np.array([[y, x] for y, x, _, _ in boxes], float)
    stop = start + np.array([[h, w] for _, _, h, w in boxes])
    found = box_iou(start[:, None], stop[:, None], start, stop)
    xyxy = torch.from_numpy(np.concatenate((start[:, ::-1], stop[:, ::-1]), axis=1))
    expected = torchvision_box_iou(xyxy, xyxy).nan_to_num()  # 0 of 0
    np.testing.assert_allclose(found, expected, atol=1e-12)


def squares(*edges: int) -> np.ndarray:
    """Logits (k, 16, 16) of squares that begin at (2, 3)."""
    logits = np.full((len(edges), 16, 16), -5.0, np.float32)
    for k, edge in enumerate(edges):
        logits[k, 2 : 2 + edge, 3 : 3 + edge] = 4.0
    return logits


BOX = np.array([[1.5, 2.5], [6.5, 7.5]])
"""Around the square of 5."""
FOUND = measure(squares(9, 2, 5), np.array([0.5, 0.4, 0.3], np.float32))


@pytest.mark.parametrize(
    ("choice", "box", "index", "reason"),
    [
        (Choice.score, BOX, 0, "highest predicted IoU, of 3"),
        (Choice.small, None, 1, "small by elements, of 3"),
        (Choice.medium, None, 2, "medium by elements, of 3"),
        (Choice.large, None, 0, "large by elements, of 3"),
        (Choice.box, BOX, 2, "box agrees best, IoU 1.00, of 3"),
        (Choice.box, np.array([[1.5, 2.5], [3.5, 4.5]]), 1, "box agrees best, IoU 1.00, of 3"),
        (Choice.box, None, 0, "no box to agree with: highest predicted IoU, of 3"),
    ],
)
def test_every_rule(choice: Choice, box: np.ndarray | None, index: int, reason: str) -> None:
    np.testing.assert_array_equal(FOUND.elements, [81, 4, 25])
    np.testing.assert_array_equal(FOUND.stability, [1, 1, 1])
    assert choose_candidate(choice, FOUND, box) == (index, reason)


def test_an_empty_mask_is_taken_only_where_all_are() -> None:
    some = measure(squares(0, 3, 4), np.array([0.9, 0.2, 0.3]))
    assert np.isnan(some.start[0]).all() and np.isnan(some.stability[0])
    assert choose_candidate(Choice.score, some) == (2, "highest predicted IoU, of 2 that are not empty")
    assert [
        choose_candidate(c, some, BOX)[0] for c in (Choice.small, Choice.medium, Choice.large, Choice.box)
    ] == [
        1,
        1,
        2,
        2,
    ]
    none = measure(squares(0, 0, 0), np.array([0.1, 0.3, 0.2]))
    assert choose_candidate(Choice.small, none) == (1, "no element in any of 3")


@pytest.mark.parametrize("choice", list(Choice))
def test_of_equals_it_is_the_first(choice: Choice) -> None:
    same = measure(squares(4, 4, 4), np.array([0.5, 0.5, 0.5]))
    assert choose_candidate(choice, same, BOX)[0] == 0


def test_one_candidate_is_every_size() -> None:
    one = measure(squares(4), np.array([0.5]))
    assert isinstance(one, CandidateStats)
    assert {choose_candidate(choice, one, BOX)[0] for choice in Choice} == {0}
