"""Duplicates as torchvision and MONAI suppress boxes, where masks are boxes; COCO's IoU of masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data.box_utils import box_iou as monai_iou
from monai.data.box_utils import non_max_suppression
from pycocotools import mask as coco
from torchvision.ops import box_iou, nms

from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.masks.scene_masks import MaskMerge, PromptSource, SceneMasks, merge_masks
from tests.prompts.patches import placed, random_patch, rectangle

NAN = float("nan")


def found(
    patches: Sequence[tuple[Patch, ...]],
    score: Sequence[float] | np.ndarray,
    iou: Sequence[float] | None = None,
    phrase: Sequence[int] | None = None,
    source: Sequence[PromptSource] | None = None,
    number: Sequence[int] | None = None,
) -> SceneMasks:
    count = len(patches)
    nothing, integers = np.full(count, NAN), np.zeros(count, np.int64)
    return SceneMasks(
        number=np.array(number if number is not None else range(1, count + 1), np.int64),
        value=np.array(phrase if phrase is not None else [0] * count, np.int64),
        source=np.array(source if source is not None else [PromptSource.TEXT] * count, np.int64),
        score=np.array(score, np.float64),
        iou=np.array(iou if iou is not None else [NAN] * count, np.float64),
        patches=tuple(patches),
        candidate=integers,
        stability=nothing,
        all_iou=np.full((count, 3), NAN),
        all_stability=np.full((count, 3), NAN),
        level=integers,
        cut=np.zeros(count, bool),
        point=np.full((count, 2), NAN),
        reason=("",) * count,
    )


def random_boxes(
    rng: np.random.Generator, count: int, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Corners of boxes around few places, so that many are nearly the same."""
    centres = rng.integers(8, np.array(shape) - 8, (5, len(shape)))
    start = centres[rng.integers(0, 5, count)] - rng.integers(1, 5, (count, len(shape)))
    return start, start + rng.integers(4, 9, start.shape)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([0.31415, 0.5772, 0.7071]))
def test_rectangles_are_merged_as_torchvision_suppresses_boxes(seed: int, same: float) -> None:
    rng = np.random.default_rng(seed)
    start, stop = random_boxes(rng, 40, (60, 70))
    score = rng.permutation(40) / 40
    objects = found([(rectangle(a, b),) for a, b in zip(start, stop, strict=True)], score)
    joined = merge_masks(objects, (60, 70), same)
    boxes = torch.from_numpy(np.column_stack([start[:, ::-1], stop[:, ::-1]])).double()
    kept = nms(boxes, torch.from_numpy(score), same)
    assert joined.kept.tolist() == sorted(kept.tolist())
    iou = box_iou(boxes, boxes).numpy()
    best = kept.numpy()  # by descending score
    for number, into, share in zip(joined.merged - 1, joined.into - 1, joined.iou, strict=True):
        assert into == best[iou[number, best] >= same][0]
        assert share == pytest.approx(iou[number, into], rel=1e-12)
    check_order(objects, joined, (60, 70), same)


def check_order(objects: SceneMasks, joined: MaskMerge, shape: tuple[int, ...], same: float) -> None:
    """The order in which objects are listed changes nothing."""
    order = np.random.default_rng(1).permutation(len(objects))
    again = merge_masks(objects.take(order), shape, same)
    assert sorted(objects.number[order][again.kept]) == objects.number[joined.kept].tolist()
    for name in ("merged", "into", "iou"):
        np.testing.assert_array_equal(getattr(again, name), getattr(joined, name))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 2))
def test_boxes_of_slices_are_merged_as_monai_suppresses_them(seed: int, axis: int) -> None:
    rng = np.random.default_rng(seed)
    shape, same = (40, 45, 50), 0.41421
    start, stop = random_boxes(rng, 25, shape)
    score = rng.permutation(25) / 25
    flat = [a for a in range(3) if a != axis]
    patches = [
        tuple(rectangle(a[flat], b[flat], (axis, k)) for k in range(a[axis], b[axis]))
        for a, b in zip(start, stop, strict=True)
    ]
    joined = merge_masks(found(patches, score), shape, same)
    boxes = np.column_stack([start, stop]).astype(np.float64)
    kept = non_max_suppression(boxes, score, same)
    assert joined.kept.tolist() == sorted(np.asarray(kept).tolist())
    iou = np.asarray(monai_iou(boxes, boxes))
    np.testing.assert_allclose(joined.iou, iou[joined.merged - 1, joined.into - 1], rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999))
def test_iou_is_that_of_coco(seed: int) -> None:
    """Of ragged masks at several scales; a pair at a time, so that every IoU is told."""
    rng = np.random.default_rng(seed)
    shape = (60, 60)
    patches = [random_patch(rng, (20, 20)) for _ in range(12)]
    masks = [np.asfortranarray(placed([p], shape), np.uint8) for p in patches]
    for k in range(0, 12, 2):
        runs = [coco.encode(m) for m in masks[k : k + 2]]
        [[want]] = coco.iou(runs[:1], runs[1:], [0])
        joined = merge_masks(found([(p,) for p in patches[k : k + 2]], [0.5, 0.4]), shape, 1e-9)
        assert joined.iou.tolist() == ([want] if want else [])


SQUARE = (rectangle((10, 10), (20, 20)),)
ALIKE = (rectangle((10, 10), (20, 19)),)
APART = (rectangle((40, 40), (50, 50)),)


def test_what_a_person_gave_is_kept_and_wins() -> None:
    objects = found(
        [SQUARE, SQUARE, ALIKE, ALIKE, SQUARE, APART, ()],
        [0.9, NAN, NAN, 0.8, NAN, NAN, 0.99],
        [0.2, 0.1, 0.5, 0.5, 0.9, 0.5, 0.5],
        phrase=[2, -1, 3, 0, -1, -1, 1],
        source=[PromptSource.TEXT, PromptSource.DRAWN, PromptSource.EARLIER, PromptSource.TEXT]
        + [PromptSource.AUTOMATIC] * 2
        + [PromptSource.TEXT],
        number=[70, 60, 50, 40, 30, 20, 10],
    )
    joined = merge_masks(objects, (60, 60))
    assert objects.number[joined.kept].tolist() == [60, 50, 20, 10]  # the empty one is nobody's duplicate
    assert joined.also == ((0, 2), (), (), ())
    assert joined.merged.tolist() == [30, 40, 70]
    assert joined.into.tolist() == [60, 60, 60]
    assert joined.iou.tolist() == [1.0, 0.9, 1.0]


def test_ties_go_to_the_predicted_iou_and_then_to_the_smaller_number() -> None:
    objects = found(
        [SQUARE] * 4, [0.5, 0.5, 0.5, NAN], [0.3, 0.6, 0.6, 0.9], [0, 1, 1, 2], number=[1, 9, 4, 2]
    )
    joined = merge_masks(objects, (30, 30))
    assert objects.number[joined.kept].tolist() == [4]
    assert joined.also == ((0, 2),)  # its own phrase is not another one


def test_likeness_is_not_handed_on() -> None:
    """b is like a and c is like b, but not like a: b goes into a, and c stays."""
    a, b, c = ((rectangle((10, 10 + k), (20, 20 + k)),) for k in (0, 2, 4))
    joined = merge_masks(found([a, b, c], [0.9, 0.8, 0.7]), (60, 60), 2 / 3)
    assert (joined.kept.tolist(), joined.merged.tolist(), joined.into.tolist()) == ([0, 2], [2], [1])
    assert joined.iou.tolist() == [80 / 120]  # at the threshold is one


def test_nothing_is_joined_to_nothing() -> None:
    joined = merge_masks(found([], []), (9, 9))
    assert (len(joined.kept), joined.also, len(joined.merged)) == (0, (), 0)
    with pytest.raises(ValueError, match="same: found 0"):
        merge_masks(found([], []), (9, 9), 0)
    with pytest.raises(ValueError, match="a number twice"):
        found([SQUARE, APART], [1, 1], number=[3, 3])
    with pytest.raises(ValueError, match="one a slice"):
        found([SQUARE + APART], [1])
