"""Prompts drawn for known objects: what is asked, what is to be found, what a correction adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes

from segpipe.prompts.segmenters.looknet import LOOK, laid
from segpipe.training.promptable import (
    Looks,
    ObjectPrompts,
    jitter_boxes,
    mask_box,
    sample_corrections,
    sample_looks,
    sample_point,
    sample_prompts,
)

EDGE = 128
DISCS = ((40, 40, 9), (30, 95, 14), (90, 20, 5), (95, 70, 25), (64, 64, 12), (20, 60, 7), (110, 115, 8))


@pytest.fixture
def prompts() -> ObjectPrompts:
    y, x = np.mgrid[:EDGE, :EDGE]
    masks = [np.hypot(y - cy, x - cx) < radius for cy, cx, radius in DISCS]
    return sample_prompts(np.random.default_rng(0), masks, [i // 3 for i in range(len(masks))], 0.1, 0.5)


@pytest.fixture
def looks(prompts: ObjectPrompts) -> Looks:
    return sample_looks(prompts, np.random.default_rng(0))


def test_cover_is_the_object_under_the_look(prompts: ObjectPrompts, looks: Looks) -> None:
    window = (EDGE, EDGE)
    found = laid(looks.cover - 0.5, looks.edges, window, -1.0) > 0
    fine = 0
    for i, mask in enumerate(torch.from_numpy(prompts.masks)):
        y, x = np.indices(window)
        x0, y0, x1, y1 = looks.edges[i].tolist()
        inside = torch.from_numpy((x > x0) & (x < x1) & (y > y0) & (y < y1))
        cells = float(((looks.edges[i, 2:] - looks.edges[i, :2]) / LOOK).prod())
        assert float(looks.total[i]) * cells == pytest.approx(float(mask.sum()), rel=1e-4)
        if cells <= 1:  # as fine as the window: every element comes back, but for corners
            fine += 1
            wrong = (found[i] != mask) & inside
            assert wrong.sum() <= 0.05 * (mask & inside).sum() + 1
    assert fine > 2


def test_every_third_object_is_asked_for_by_a_point(prompts: ObjectPrompts, looks: Looks) -> None:
    assert looks.windows.tolist() == [0, 0, 0, 1, 1, 1, 2]
    by_point = looks.asked.boxes.isnan().any(1)
    assert by_point.tolist() == [i % 3 == 2 for i in range(len(DISCS))]
    assert ((looks.asked.labels[:, 0] == 1) == by_point).all()
    maps = looks.maps
    assert (maps[by_point, 0] == 0).all() and (maps[by_point, 1].amax((1, 2)) > 0.8).all()
    assert (maps[~by_point, 1] == 0).all() and (maps[~by_point, 0].amax((1, 2)) > 0.99).all()


def test_a_coarse_mask_agrees_with_the_object_mostly(prompts: ObjectPrompts) -> None:
    seen = []
    for seed in range(8):
        looks = sample_looks(prompts, np.random.default_rng(seed))
        for given, cover in zip(looks.given, looks.cover, strict=True):
            if given.any() and cover.mean() > 0.02:
                truth, found = cover > 0.5, given > 0
                seen.append(float((truth & found).sum() / (truth | found).sum()))
    assert len(seen) > 5 and 0.4 < np.mean(seen) < 0.95


def test_a_correction_points_at_what_was_wrong(looks: Looks) -> None:
    truth = looks.cover > 0.5
    answer = torch.where(truth.roll(5, 2), 3.0, -3.0)
    after = sample_corrections(looks, answer, np.random.default_rng(1))
    assert after.asked.points.shape[1] == 2
    low, high = looks.edges[:, :2], looks.edges[:, 2:]
    cells = ((after.asked.points[:, 1] - low) / (high - low) * LOOK).floor().long()
    for i, (x, y) in enumerate(cells.tolist()):
        assert bool(truth[i, y, x]) != bool(answer[i, y, x] > 0) or not (truth[i] != (answer[i] > 0)).any()
        assert int(after.asked.labels[i, 1]) == int(truth[i, y, x])
    answered = [(a == b).all() for a, b in zip(after.given, answer, strict=True)]
    assert 0 < sum(map(bool, answered)) < len(answered)


def test_boxes_are_torchvisions_and_jitter_is_bounded() -> None:
    rng = np.random.default_rng(2)
    masks = np.zeros((6, 50, 60), bool)
    for mask in masks:
        y, x = rng.integers(0, 30, 2)
        mask[y : y + rng.integers(1, 20), x : x + rng.integers(1, 20)] = True
    boxes = np.stack([mask_box(m) for m in masks])
    assert (boxes == masks_to_boxes(torch.from_numpy(masks)).numpy()).all()
    large = np.tile(np.array([[10, 20, 200, 230]], np.float32), (4000, 1))
    moved = jitter_boxes(rng, large, 0.1, 256) - large
    assert np.abs(moved).max() <= 20
    assert (moved[:, 0] == -10).any()  # stopped by the window's border
    assert moved[:, 1].std() == pytest.approx(15.3, abs=1)  # normal of 21.1, cut at 20: 20·√(…) by simulation
    assert (jitter_boxes(rng, boxes, 0.0, 60) == boxes).all()


def test_a_share_of_boxes_is_exact() -> None:
    mask = np.zeros((64, 64), bool)
    mask[20:40, 10:50] = True
    found = sample_prompts(np.random.default_rng(4), [mask] * 400, [0] * 400, 0.1, 0.25).boxes
    assert (found == mask_box(mask)).all(1).mean() == pytest.approx(0.25, abs=0.06)


def test_points_lie_in_the_object() -> None:
    rng = np.random.default_rng(3)
    mask = np.zeros((20, 30), bool)
    mask[5:10, 5:15] = True
    for _ in range(50):
        x, y = sample_point(rng, mask).astype(int)
        assert mask[y, x]
