"""Looks at the objects of a batch: what is asked, what is to be found, what a correction adds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segpipe.prompts.segmenters.looknet import LOOK, laid
from segpipe.training.prompted.prompt_sampling import Looks, corrected, look
from segpipe.training.prompted.real import read_scenes
from segpipe.training.prompted.recipe import PromptedRecipe
from segpipe.training.prompted.samples import Batch, Samples


@pytest.fixture
def batch(recipe: PromptedRecipe) -> Batch:
    return Samples(recipe, read_scenes(recipe)).batch(0)


@pytest.fixture
def looks(batch: Batch) -> Looks:
    return look(batch, np.random.default_rng(0))


def test_cover_is_the_object_under_the_look(batch: Batch, looks: Looks) -> None:
    window = (batch.masks.shape[1], batch.masks.shape[2])
    found = laid(looks.cover - 0.5, looks.edges, window, -1.0) > 0
    for i, mask in enumerate(torch.from_numpy(batch.masks)):
        y, x = np.indices(window)
        x0, y0, x1, y1 = looks.edges[i].tolist()
        inside = torch.from_numpy((x > x0) & (x < x1) & (y > y0) & (y < y1))
        cells = float(((looks.edges[i, 2:] - looks.edges[i, :2]) / LOOK).prod())
        assert float(looks.total[i]) * cells == pytest.approx(float(mask.sum()), rel=1e-4)
        if cells <= 1:  # as fine as the window: every element comes back, but for corners
            wrong = (found[i] != mask) & inside
            assert wrong.sum() <= 0.05 * (mask & inside).sum() + 1


def test_every_third_object_is_asked_for_by_a_point(batch: Batch, looks: Looks) -> None:
    by_point = looks.asked.boxes.isnan().any(1)
    assert by_point.tolist() == [i % 3 == 2 for i in range(len(batch.of))]
    assert ((looks.asked.labels[:, 0] == 1) == by_point).all()
    maps = looks.maps
    assert (maps[by_point, 0] == 0).all() and (maps[by_point, 1].amax((1, 2)) > 0.8).all()
    assert (maps[~by_point, 1] == 0).all() and (maps[~by_point, 0].amax((1, 2)) > 0.99).all()


def test_a_coarse_mask_agrees_with_the_object_mostly(batch: Batch) -> None:
    seen = []
    for seed in range(8):
        looks = look(batch, np.random.default_rng(seed))
        for given, cover in zip(looks.given, looks.cover, strict=True):
            if given.any() and cover.mean() > 0.02:
                truth, found = cover > 0.5, given > 0
                seen.append(float((truth & found).sum() / (truth | found).sum()))
    assert len(seen) > 5 and 0.4 < np.mean(seen) < 0.95


def test_a_correction_points_at_what_was_wrong(looks: Looks) -> None:
    truth = looks.cover > 0.5
    answer = torch.where(truth.roll(5, 2), 3.0, -3.0)
    after = corrected(looks, answer, np.random.default_rng(1))
    assert after.asked.points.shape[1] == 2
    low, high = looks.edges[:, :2], looks.edges[:, 2:]
    cells = ((after.asked.points[:, 1] - low) / (high - low) * LOOK).floor().long()
    for i, (x, y) in enumerate(cells.tolist()):
        assert bool(truth[i, y, x]) != bool(answer[i, y, x] > 0) or not (truth[i] != (answer[i] > 0)).any()
        assert int(after.asked.labels[i, 1]) == int(truth[i, y, x])
    answered = [(a == b).all() for a, b in zip(after.given, answer, strict=True)]
    assert 0 < sum(map(bool, answered)) < len(answered)
