"""Merging over scenes: a detector that is always right, asked window by window, tells every true box once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.ops import nms

from segpipe.prompts.grounding.base import Detections, Outcome, PhraseAccount
from segpipe.prompts.grounding.merge_boxes import (
    MergedDetections,
    add_accounts,
    detection_windows,
    merge_detections,
    to_scene,
)
from segpipe.prompts.masks.nms import GroupedBoxes, suppress
from segpipe.tiling.pyramid import Pyramid, Window


@dataclass(frozen=True)
class Truth:
    """Boxes of whole elements [start, stop) that have no element in common, each with its phrases."""

    shape: tuple[int, int]
    boxes: list[tuple[int, int, int, int]]
    phrases: list[tuple[int, ...]]

    def rows(self) -> list[tuple[tuple[float, ...], set[int]]]:
        """As positions, by first corner."""
        return sorted(
            (tuple(v - 0.5 for v in b), set(p)) for b, p in zip(self.boxes, self.phrases, strict=True)
        )


@st.composite
def truths(draw: st.DrawFn) -> Truth:
    shape = draw(st.tuples(st.integers(1, 130), st.integers(1, 130)))
    taken = np.zeros(shape, bool)
    boxes, phrases = [], []
    for _ in range(draw(st.integers(0, 9))):
        y, x = (draw(st.integers(0, n - 1)) for n in shape)
        end = [draw(st.integers(a + 1, n)) for a, n in zip((y, x), shape, strict=True)]
        part = np.s_[y : end[0], x : end[1]]
        if not taken[part].any():
            taken[part] = True
            boxes.append((y, x, *end))
            phrases.append(tuple(sorted(draw(st.sets(st.integers(0, 2), min_size=1)))))
    return Truth(shape, boxes, phrases)


def seen_in(truth: Truth, window: Window, pyramid: Pyramid, rng: np.random.Generator) -> Detections:
    """What a perfect detector says of a window: each box cut at the window, in any order, with any score."""
    view = pyramid.box(window)
    rows = []
    for (y0, x0, y1, x1), phrases in zip(truth.boxes, truth.phrases, strict=True):
        start, stop = np.maximum((y0, x0), view.start), np.minimum((y1, x1), view.stop)
        if (start < stop).all():
            rows += [(*start, *stop, phrase) for phrase in phrases]
    table = np.array(rows, float).reshape(-1, 5)[rng.permutation(len(rows))]
    edges = [pyramid.to_window(table[:, k : k + 2] - 0.5, window) for k in (0, 2)]
    points = pyramid.to_window((table[:, :2] + table[:, 2:4] - 1) / 2, window)
    words = tuple(f"p{int(p)}" for p in table[:, 4])
    return Detections(
        start=edges[0],
        stop=edges[1],
        point=points,
        phrase=table[:, 4].astype(np.int64),
        score=rng.random(len(table)),
        label=words,
    )


def detect(truth: Truth, window: int, levels: Sequence[int], seed: int) -> tuple[MergedDetections, int]:
    """The merged answer, and how many boxes were seen."""
    rng = np.random.default_rng(seed)
    pyramid = Pyramid(truth.shape, window, 0.0)
    parts = [
        to_scene(seen_in(truth, w, pyramid, rng), w, pyramid) for w in detection_windows(pyramid, levels)
    ]
    order = rng.permutation(len(parts))
    return merge_detections([parts[i] for i in order], pyramid, 3), sum(len(p.row) for p in parts)


def told(merged: MergedDetections) -> list[tuple[tuple[float, ...], set[int]]]:
    d = merged.detections
    corners = np.column_stack((d.start, d.stop)).tolist()
    return [(tuple(c), {int(p), *also}) for c, p, also in zip(corners, d.phrase, merged.also, strict=True)]


@settings(max_examples=60)
@given(truths(), st.integers(2, 24), st.sets(st.integers(0, 7), min_size=1), st.integers(0, 2**32 - 1))
def test_a_perfect_detector_tells_every_box_once(
    truth: Truth, half: int, levels: set[int], seed: int
) -> None:
    merged, seen = detect(truth, 2 * half, sorted(levels), seed)
    assert told(merged) == truth.rows()
    assert not merged.cut.any()
    for k, count in enumerate(merged.counts):
        assert count.found == sum(k in phrases for phrases in truth.phrases)
        assert count.seen == count.cut + count.joined + count.repeated + count.also + count.best
    assert sum(count.seen for count in merged.counts) == seen
    inside = (merged.detections.point >= merged.detections.start).all(axis=1)
    assert (inside & (merged.detections.point <= merged.detections.stop).all(axis=1)).all()


def test_an_object_of_many_windows_is_one_and_its_neighbour_another() -> None:
    # 300 × 3 elements between two of 20 × 20, on windows of 32 alone
    truth = Truth((64, 320), [(2, 40, 22, 60), (22, 10, 25, 310), (25, 100, 45, 120)], [(0,)] * 3)
    merged, _ = detect(truth, 32, [0], 1)
    assert told(merged) == truth.rows()
    longest = np.argmax(merged.detections.stop[:, 1] - merged.detections.start[:, 1])
    assert merged.pieces[longest] > 10 and merged.pieces[0] == 1


@settings(max_examples=15)
@example(52592)
@given(st.integers(0, 2**32 - 1))
def test_a_detector_that_is_a_little_wrong(seed: int) -> None:
    """Edges off by half an element of the window; nothing thinner than ten of its elements is seen."""
    rng = np.random.default_rng(seed)
    pyramid = Pyramid((500, 700), 64, 0.0)
    # One box in each cell of 100², of 12 to 60 elements, and two far larger than a window.
    sizes = rng.integers(12, 61, (35, 2))
    corners = np.stack(np.divmod(np.arange(35), 7), 1) * 100 + rng.integers(0, 40, (35, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1)[np.arange(35) // 7 < 3]
    boxes = np.concatenate([boxes, [[310, 20, 480, 330], [305, 380, 490, 690]]])
    truth = Truth((500, 700), [tuple(b) for b in boxes.tolist()], [(0,)] * len(boxes))
    parts = []
    for window in detection_windows(pyramid, range(8)):
        d = seen_in(truth, window, pyramid, rng)
        start, stop = (e + rng.uniform(-0.5, 0.5, e.shape) for e in (d.start, d.stop))
        large = (d.stop - d.start >= 10).all(axis=1)
        found = replace(d, start=start, stop=stop).take(large)
        parts.append(to_scene(found, window, pyramid))
    merged = merge_detections(parts, pyramid, 1)
    d = merged.detections
    edges = np.minimum(d.stop[:, None], boxes[:, 2:] - 0.5) - np.maximum(d.start[:, None], boxes[:, :2] - 0.5)
    common = np.clip(edges, 0, None).prod(axis=2)
    areas = (d.stop - d.start).prod(axis=1)[:, None], (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    good = common / (areas[0] + areas[1] - common) > 0.5
    assert good.sum(axis=0).tolist() == [1] * len(boxes) and good.sum() == len(merged)
    assert not merged.cut.any()


def account_of(phrase: str, found: int, below: int, best: float, small: int = 0) -> PhraseAccount:
    return PhraseAccount(phrase=phrase, found=found, below=below, best=best, small=small)


def _one(y0: float, x0: float, y1: float, x1: float, score: float = 0.5, phrase: int = 0) -> Detections:
    return Detections(
        start=np.array([[y0, x0]]),
        stop=np.array([[y1, x1]]),
        point=np.full((1, 2), np.nan),
        phrase=np.array([phrase]),
        score=np.array([score]),
        label=("it",),
    )


def test_what_no_window_completes_stays_and_says_so() -> None:
    """A box at a border, that only one window sees."""
    pyramid = Pyramid((64, 64), 32, 0.0)
    seen = [to_scene(_one(4.5, 20.5, 9.5, 31.5), Window(0, (0, 0)), pyramid)]
    merged = merge_detections(seen, pyramid, 1)
    assert merged.cut.tolist() == [True] and merged.pieces.tolist() == [1]
    assert np.isnan(merged.detections.point).all()
    # At the scene's own border nothing is cut.
    edge = [to_scene(_one(4.5, 20.5, 9.5, 31.5), Window(0, (0, 2)), pyramid)]
    assert merge_detections(edge, pyramid, 1).cut.tolist() == [False]


def test_boxes_reach_beyond_window_and_scene() -> None:
    pyramid = Pyramid((40, 40), 32, 0.0)
    window = Window(0, (1, 1))  # 16 … 48, of which 40 … 48 is beyond the scene
    part = to_scene(_one(10.5, -3.0, 40.0, 50.0), window, pyramid)
    np.testing.assert_array_equal(part.detections.start, [[26.5, 15.5]])
    np.testing.assert_array_equal(part.detections.stop, [[39.5, 39.5]])
    assert part.cut.tolist() == [[[False, True], [False, False]]]
    out = to_scene(_one(25.0, 25.0, 30.0, 30.0), window, pyramid)
    count = merge_detections([out], pyramid, 1).counts[0]
    assert (count.seen, count.beyond, count.found) == (1, 1, 0)


def test_nested_boxes_are_two() -> None:
    pyramid = Pyramid((32, 32), 32, 0.0)
    window = Window(0, (0, 0))
    lake, pond = _one(1, 1, 30, 30, 0.9), _one(4, 4, 9, 9, 0.8)
    parts = [to_scene(d, window, pyramid) for d in (lake, pond)]
    assert len(merge_detections(parts, pyramid, 1)) == 2


def test_two_phrases_of_one_box_are_one_object() -> None:
    pyramid = Pyramid((32, 32), 32, 0.0)
    window = Window(0, (0, 0))
    parts = [to_scene(_one(4, 4, 20, 20, s, p), window, pyramid) for p, s in ((0, 0.4), (1, 0.7), (2, 0.6))]
    merged = merge_detections(parts, pyramid, 3)
    assert merged.detections.phrase.tolist() == [1] and merged.also == ((0, 2),)
    assert [c.found for c in merged.counts] == [1, 1, 1] and [c.also for c in merged.counts] == [1, 0, 1]


def test_nothing_found_anywhere() -> None:
    pyramid = Pyramid((70, 40), 32, 0.0)
    merged, _ = detect(Truth((70, 40), [], []), 32, [0], 0)
    assert len(merged) == 0 and merged.detections.start.shape == (0, 2) and not merged.also
    empty = [[account_of("lake", 0, 4, 0.2)], [account_of("lake", 0, 3, 0.1)]]
    account = add_accounts(empty, merged.counts[:1])[0]
    assert (account.below, account.best, account.outcome) == (7, 0.2, Outcome.below)
    assert len(merge_detections([], pyramid, 1)) == 0


def test_accounts_add_up() -> None:
    pyramid = Pyramid((32, 64), 32, 0.0)
    # Elements 18 … 27 of the scene: whole in both of the first two windows.
    parts = [
        to_scene(_one(4, 17.5, 9, 27.5, 0.6), Window(0, (0, 0)), pyramid),
        to_scene(_one(4, 1.5, 9, 11.5, 0.7), Window(0, (0, 1)), pyramid),
    ]
    merged = merge_detections(parts, pyramid, 2)
    rows = [
        (account_of("dock", 1, 2, 0.6, small=1), account_of("pier", 0, 0, math.nan)),
        (account_of("dock", 1, 1, 0.7), account_of("pier", 0, 0, math.nan)),
    ]
    dock, pier = add_accounts(rows, merged.counts)
    assert (dock.found, dock.below, dock.small, dock.best) == (1, 3, 1, 0.7)
    assert str(dock) == "1 found, 3 below the threshold, 1 too small"
    assert pier.outcome is Outcome.absent and math.isnan(pier.best)
    with pytest.raises(ValueError, match="different phrases"):
        add_accounts([rows[0], rows[1][::-1]], merged.counts)


def test_windows_of_levels() -> None:
    pyramid = Pyramid((100, 40), 32, 0.0)
    levels = [w.level for w in detection_windows(pyramid, [9, 0, 1])]
    # ⌈(100 − 32) / 16⌉ + 1 = 6 by 2; ⌈(100 − 64) / 32⌉ + 1 = 3 by 1; the coarsest is one window
    assert levels == [0] * 12 + [1] * 3 + [2]


@settings(max_examples=20)
@given(st.integers(0, 2**32 - 1), st.floats(0.2, 0.9))
def test_suppression_is_that_of_torchvision(seed: int, iou: float) -> None:
    rng = np.random.default_rng(seed)
    start = rng.random((400, 2)) * 40
    boxes = GroupedBoxes(start, start + rng.random((400, 2)) * 20, rng.integers(0, 3, 400))
    scores = torch.arange(400, 0, -1, dtype=torch.float64)
    corners = torch.from_numpy(np.concatenate([boxes.start, boxes.stop], axis=1))
    expected = [nms(corners[boxes.group == g], scores[boxes.group == g], iou) for g in range(3)]
    places = [np.flatnonzero(boxes.group == g) for g in range(3)]
    kept = np.sort(np.concatenate([p[k.numpy()] for p, k in zip(places, expected, strict=True)]))
    np.testing.assert_array_equal(np.flatnonzero(suppress(boxes, iou) < 0), kept)
