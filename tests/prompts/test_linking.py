"""Linking finds solids of known shape, with a model that knows their sections; and a plain loop's masks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from segpipe.config.prompts import Choice, Volume
from segpipe.errors import RequestError
from segpipe.prompts.masks.decode import window_prompt
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.segment_scene import RECENT
from segpipe.prompts.segmenters.base import Prompt
from segpipe.prompts.segmenters.registry import load_segmenter
from segpipe.prompts.volumes.propagate import Direction, StopReason, propagate
from segpipe.prompts.volumes.propagate_prompts import GROW, Linker
from segpipe.prompts.volumes.slices import placed
from segpipe.tiling.pyramid import Pyramid, Window
from tests.prompts.solids import Truth, ball, collect, cone, embedder, said, slanted, slice_box, torus
from tests.prompts.tiny_sams import card_for, picture, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
ANY = Volume(least_iou=0, least_overlap=0, change=1e30)
WHATEVER = Volume.model_construct(least_iou=-np.inf, least_overlap=0, change=1e30)
"""What no request may say: random weights predict an IoU below 0."""
SHAPE = (26, 30, 34)


def run(labels, prompts, axis=0, rules=ANY, window=64, choice=Choice.box, margin=0.25):
    """Solids, answers, stops, embeddings asked for."""
    plane = tuple(n for i, n in enumerate(labels.shape) if i != axis)
    pyramid, truth = Pyramid(plane, window, margin), Truth(window)
    embed, asked = embedder(labels, axis, pyramid, truth.encode)
    linker = Linker(axis, pyramid, truth, lru_cache(RECENT)(embed), choice)
    events = propagate(prompts, axis, labels.shape, pyramid, linker, rules)
    return *collect(events, labels.shape), asked


SOLIDS = {
    "ball": ball(SHAPE, (12, 14, 17), 9),
    "torus": torus(SHAPE, (12, 14, 17), 9, 3.2),
    "cone": cone(SHAPE, (4, 14, 17), 16, 0.7),
}


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("name", SOLIDS)
def test_solid_from_one_box(name: str, axis: int) -> None:
    """Both ways to its ends, each slice encoded once, beside another object that would be taken with it."""
    solid = SOLIDS[name]
    labels = solid.astype(int)
    labels[:, :2, :2] = labels[:2, :, :2] = labels[:2, :2, :] = 2
    assert ((labels == 1) == solid).all()
    there = np.flatnonzero(solid.any(axis=tuple(i for i in range(3) if i != axis)))
    index = int(there[len(there) // 3])
    solids, answers, stops, asked = run(labels, said(boxes=[slice_box(solid, axis, index)]), axis)
    np.testing.assert_array_equal(solids[1], solid)
    assert sorted(a.index for a in answers) == there.tolist()
    assert {a.how for a in answers if a.index > index} == {Direction.forward}
    assert {a.how for a in answers if a.index < index} == {Direction.backward}
    assert [a.how for a in answers if a.index == index] == [Direction.prompted]
    ends = {"forward": there[-1], "backward": there[0]}
    for how, last in ends.items():
        assert (stops[1, index, how].last, stops[1, index, how].why) == (last, StopReason.empty)
    assert len(asked) == len(set(asked)) == len(there) + 2


def test_overlap_and_change_stop_a_cone() -> None:
    """Where the areas of its discs say so; IoU of concentric discs is their areas' ratio."""
    solid = SOLIDS["cone"]
    areas = solid.sum(axis=(1, 2))
    box = said(boxes=[slice_box(solid, 0, 20)])
    for rules, why, ratio in (
        (Volume(change=1.4, least_overlap=0), StopReason.change, 1 / 1.4),
        (Volume(least_overlap=0.6, change=1e30), StopReason.overlap, 0.6),
    ):
        stop = run(solid.astype(int), box, rules=rules)[2][1, 20, "backward"]
        last = next(i for i in range(20, 4, -1) if areas[i - 1] / areas[i] < ratio)
        assert 4 < last < 20
        assert (stop.last, stop.why) == (last, why)
        assert stop.value == pytest.approx(areas[last - 1] / areas[last])


def test_score_end_and_reach_stop() -> None:
    column = np.zeros((12, 20, 20), int)
    column[:, 5:12, 6:15] = 1
    box = said(boxes=[slice_box(column == 1, 0, 4)])
    for rules, why, lasts in (
        (ANY, StopReason.end, (11, 0)),
        (Volume(reach=3), StopReason.reach, (7, 1)),
        (Volume(reach=1), StopReason.reach, (5, 3)),
        (Volume(least_iou=0.97), StopReason.iou, (4, 4)),
    ):
        solids, _, stops, _ = run(column, box, rules=rules)
        assert [(s.why, s.last) for s in stops.values()] == [(why, n) for n in lasts]
        assert np.flatnonzero(solids[1].any(axis=(1, 2))).tolist() == [*range(lasts[1], lasts[0] + 1)]
    assert stops[1, 4, "forward"].value == pytest.approx(0.95)


def test_thick_box_bounds_the_object() -> None:
    """It is on its middle slice, or where a point says that the object is."""
    column = np.zeros((12, 20, 20), int)
    column[:, 5:12, 6:15] = 1
    box = (1, (1.5, 4.5, 5.5), (8.5, 11.5, 14.5))
    for points, origin, expected in (
        ([], 5, range(2, 9)),
        ([(1, (7, 8, 8), True)], 7, range(2, 9)),
        ([(1, (7, 8, 8), False)], 5, range(2, 7)),  # a place beside it: the oracle stops there
    ):
        _, answers, stops, _ = run(column, said(points, [box]))
        assert sorted(a.index for a in answers) == [*expected]
        assert {k[1] for k in stops} == {origin}
        assert stops[1, origin, "backward"].why is StopReason.box


def test_corrections_take_over_half_way() -> None:
    """The same object is said to be another column on a later slice."""
    labels = np.zeros((20, 24, 24), int)
    labels[:, 2:9, 3:9], labels[:, 14:22, 12:20] = 1, 2
    boxes = [slice_box(labels == 1, 0, 4), slice_box(labels == 2, 0, 13)]
    solids, answers, stops, _ = run(labels, said(boxes=boxes))
    expected = np.concatenate((labels[:9] == 1, labels[9:] == 2))
    np.testing.assert_array_equal(solids[1], expected)
    assert (stops[1, 4, "forward"].why, stops[1, 4, "forward"].last) == (StopReason.met, 8)
    assert (stops[1, 13, "backward"].why, stops[1, 13, "backward"].last) == (StopReason.met, 9)
    assert {a.origin for a in answers if a.index < 9} == {4}


@given(st.sets(st.integers(0, 11), min_size=1))
@settings(max_examples=25)
def test_nearest_prompted_slice_answers(prompted: set[int]) -> None:
    labels = np.zeros((12, 8, 8), int)
    labels[:, 2:6, 2:6] = 1
    points = [(1, (i, 3, 3), True) for i in prompted]
    _, answers, stops, _ = run(labels, said(points), window=8, choice=Choice.medium)
    assert sorted(a.index for a in answers) == [*range(12)]
    for a in answers:
        assert a.origin == min(prompted, key=lambda p: (abs(p - a.index), p))
    assert len(stops) == 2 * len(prompted)


def test_touching_objects_in_any_order() -> None:
    """Neither the other nor the order changes a bit of one; a slice is asked for thrice at most."""
    labels = np.zeros(SHAPE, int)
    labels[ball(SHAPE, (10, 13, 12), 8.4)] = 1
    labels[ball(SHAPE, (15, 13, 20), 7.4) & (labels == 0)] = 2
    boxes = [slice_box(labels == 1, 0, 9, 1), slice_box(labels == 2, 0, 16, 2)]
    points = [(1, (9, 13, 10), True), (1, (9, 3, 3), False), (2, (16, 13, 22), True)]
    # Where one ends the other goes on: its section lies elsewhere.
    rules = Volume(least_iou=0, least_overlap=0.2, change=5)
    solids, answers, stops, asked = run(labels, said(points, boxes), rules=rules)
    for number in (1, 2):
        np.testing.assert_array_equal(solids[number], labels == number)
    again = run(labels, said(points[::-1], boxes[::-1]), rules=rules)
    alone = [run(labels, said([p for p in points if p[0] == n], [boxes[n - 1]]), rules=rules) for n in (1, 2)]
    assert {**alone[0][2], **alone[1][2]}.keys() == again[2].keys() == stops.keys()
    everything = sorted(answers, key=lambda a: (a.mask.object, a.index))
    for others in (again[1], alone[0][1] + alone[1][1]):
        others = sorted(others, key=lambda a: (a.mask.object, a.index))
        for a, b in zip(everything, others, strict=True):
            assert (a.index, a.origin, a.how, a.mask.patch.origin) == (
                b.index, b.origin, b.how, b.mask.patch.origin,
            )  # fmt: skip
            np.testing.assert_array_equal(a.mask.patch.logits, b.mask.patch.logits)
    assert max(asked.count(a) for a in asked) <= 3


def test_negative_point_on_a_later_slice() -> None:
    """It is no prompted slice: the object is followed to there, and heeds it."""
    solid = SOLIDS["ball"]
    prompts = said([(1, (16, 14, 17), False)], [slice_box(solid, 0, 10)])
    solids, _, stops, _ = run(solid.astype(int), prompts)
    np.testing.assert_array_equal(solids[1][:16], solid[:16])
    assert not solids[1][16:].any()
    assert (stops[1, 10, "forward"].last, stops[1, 10, "forward"].why) == (15, StopReason.empty)


def test_nothing_on_the_prompted_slice() -> None:
    labels = SOLIDS["ball"].astype(int)
    _, answers, stops, asked = run(labels, said([(1, (12, 1, 1), True)]))
    assert [a.mask.patch for a in answers] == [None]
    assert {(s.why, s.last) for s in stops.values()} == {(StopReason.empty, 12)}
    assert len(stops) == 2
    assert len(asked) == 1


def test_windows_follow_a_drifting_object() -> None:
    """It leaves its window, and is found whole on the same level in those that follow."""
    solid = slanted((34, 100, 100), (9, 12), 2.0, 5)
    labels = solid.astype(int)
    solids, answers, _, asked = run(labels, said(boxes=[slice_box(solid, 0, 2)]), window=32, margin=0.1)
    np.testing.assert_array_equal(solids[1], solid)
    assert {w.level for _, w in asked} == {0}
    assert len({w for _, w in asked}) > 3
    assert not any(a.mask.cut for a in answers)


def test_larger_windows_for_larger_sections() -> None:
    """A section that does not fit is asked for again one level coarser; so is one that a point begins in."""
    solid = ball((70, 90, 90), (35, 45, 45), 33)
    for prompts in (
        said(boxes=[slice_box(solid, 0, 4)]),
        said([(1, (35, 45, 45), True)]),
    ):
        choice = Choice.box if len(prompts.boxes) else Choice.medium
        solids, answers, _, asked = run(solid.astype(int), prompts, window=32, choice=choice)
        assert not any(a.mask.cut for a in answers)
        assert sorted(a.index for a in answers) == np.flatnonzero(solid.any(axis=(1, 2))).tolist()
        iou = (solids[1] & solid).sum() / (solids[1] | solid).sum()
        assert iou > 0.93  # cells of up to 4 elements
        assert max(w.level for _, w in asked) == 2
        last = max(a.mask.patch.scale for a in answers)
        assert last == 4


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_placed_masks(scale: int) -> None:
    """On their own level cell by cell, also where they hang over the window."""
    pyramid = Pyramid((64, 64), 8, 0.0)
    rng = np.random.default_rng(scale)
    cells = rng.random((64 // scale, 64 // scale)) > 0.5
    level = scale.bit_length() - 1
    a, b = 3, 2
    patch = Patch(scale, (a * scale, b * scale), np.where(cells[a:, b:], 1.0, -1.0).astype(np.float16))
    cells[:a], cells[:, :b] = False, False
    for index in ((0, 0), (1, 0), (2, 1)):
        window = Window(level, index)
        expected = cells[4 * index[0] :, 4 * index[1] :][:8, :8]
        np.testing.assert_array_equal(placed(patch, window, pyramid), expected)


def test_plain_loop_over_a_real_network(tmp_path: Path) -> None:
    """A SAM of random weights, asked slice by slice without any of this, in one window."""
    tiny("sam").save_pretrained(tmp_path / "net")
    segmenter = load_segmenter(card_for(tmp_path), torch.device("cpu"))
    image = np.moveaxis(picture(64), -1, 0).astype(np.float32) / 255
    slices = [np.roll(image, (3 * i, i), (1, 2)) - 0.5 for i in range(6)]
    pyramid = Pyramid((64, 64), 64, 0.25)
    prompts = said([(1, (2, 20, 30), True)])
    linker = Linker(0, pyramid, segmenter, lambda i, _: segmenter.encode(slices[i]), Choice.score)
    events = propagate(prompts, 0, (6, 64, 64), pyramid, linker, WHATEVER)
    solids, answers, _ = collect(events, (6, 64, 64))
    first = segmenter.decode(
        segmenter.encode(slices[2]), [Prompt(np.array([[30, 20]], np.float32), np.array([1]))]
    )
    begin = first.logits[0, first.iou[0].argmax()] > 0
    np.testing.assert_array_equal(solids[1][2], begin)
    for order in ((3, 4, 5), (1, 0)):
        before = begin
        for index in order:
            found = segmenter.decode(segmenter.encode(slices[index]), [loop_prompt(before, GROW)])
            masks = found.logits[0] > 0
            before = max(masks, key=lambda m: (m & before).sum() / (m | before).sum())
            np.testing.assert_array_equal(solids[1][index], before)
    assert {a.index for a in answers} == {*range(6)}


def loop_prompt(mask: np.ndarray, grow: float) -> Prompt:
    """Box grown on each side, and deepest element."""
    y, x = np.nonzero(mask)
    corners = []
    for at in (x, y):
        low, high = at.min() - 0.5, at.max() + 0.5
        more = grow * (high - low)
        corners.append((max(low - more, -0.5) + 0.5, min(high + more, 63.5) - 0.5))
    depth = distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    (x0, x1), (y0, y1) = corners
    return Prompt(
        np.array([[column, row]], np.float32), np.array([1]), np.array([x0, y0, x1, y1], np.float32)
    )


def test_prompts_in_windows() -> None:
    """On level 1, whose cell i of a window from 8 on is elements 8 + 2i and 9 + 2i."""
    pyramid, window = Pyramid((64, 64), 8, 0.0), Window(1, (1, 0))
    points = np.array([[8.5, 2.5], [11, 4.5], [30, 0]])
    box = np.array([[9.5, 1.5], [15.5, 11.5]])  # elements 10…15 and 2…11: cells 1…3 and 1…5
    prompt = window_prompt(window, pyramid, points, np.array([True, False, False]), box)
    np.testing.assert_array_equal(prompt.points_xy, [[1, 0], [2, 1.25]])
    np.testing.assert_array_equal(prompt.labels, [1, 0])
    np.testing.assert_array_equal(prompt.box_xyxy, [1, 1, 5, 3])
    tiny_box = window_prompt(window, pyramid, points[:1], np.array([True]), np.array([[8, 2], [9, 3.0]]))
    np.testing.assert_array_equal(tiny_box.box_xyxy, [1, 0, 1, 0])


@pytest.mark.parametrize(
    ("boxes", "axis", "message"),
    [
        ([(1, (3, 2, 2), (3, 8, 8))], 1, "object 1 has a box on a slice across another axis than 1"),
        ([(1, (3, 2, 2), (3, 8, 8)), (1, (3, 4, 4), (3, 9, 9))], 0, "object 1 has 2 boxes on slice 3"),
    ],
)
def test_refused(boxes: list, axis: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(np.zeros((10, 10, 10), int), said(boxes=boxes), axis)
