"""Losses of regions against smp; Lovász against its definition, smp and scikit-learn."""

from itertools import pairwise

import numpy as np
import pytest
import segmentation_models_pytorch.losses as smp
import torch
from scipy.special import softmax
from sklearn.metrics import jaccard_score
from torch.nn import functional as F  # noqa: N812

from segpipe.config.losses import IGNORE, LossTerm
from tests.training.loss_values import SMOOTH, batch, rows, value, value_and_gradient

pytestmark = pytest.mark.usefixtures("one_thread")
OVERLAP = {  # smp's smooth is in units of tp, MONAI's Dice and Jaccard have 2tp
    "dice": lambda **kw: smp.DiceLoss(smooth=SMOOTH / 2, **kw),
    "jaccard": lambda **kw: smp.JaccardLoss(smooth=SMOOTH / 2, **kw),
    "tversky": lambda **kw: smp.TverskyLoss(smooth=SMOOTH, alpha=0.2, beta=1.1, **kw),
}


def overlap_term(name, **kw):
    return LossTerm(
        name=name, smooth=SMOOTH, **({"alpha": 0.2, "beta": 1.1} if name == "tversky" else {}), **kw
    )


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("name", OVERLAP)
def test_overlap_is_smps(name, background):
    logits, target, _ = batch(n=3)
    oracle = OVERLAP[name](
        mode="multiclass", ignore_index=IGNORE, classes=[0, 1, 2] if background else [1, 2]
    )
    expected = oracle(logits, target)
    found = value(overlap_term(name, background=background), logits, target)
    assert float(found) == pytest.approx(float(expected), rel=2e-6)
    alone = [oracle(logits[i : i + 1], target[i : i + 1]) for i in range(3)]
    expected = sum(alone) / 3
    found = value(overlap_term(name, background=background, batch=False), logits, target)
    assert float(found) == pytest.approx(float(expected), rel=2e-6)


@pytest.mark.parametrize("name", OVERLAP)
def test_overlap_of_one_channel_is_smps_of_the_foreground(name):
    logits, target, _ = batch(channels=1)
    oracle = OVERLAP[name](mode="binary", ignore_index=IGNORE)
    expected = oracle(logits, target)
    found = value(overlap_term(name), logits, target, classes=2)
    assert float(found) == pytest.approx(float(expected), rel=2e-6)


@pytest.mark.parametrize("name", ["dice", "jaccard", "tversky"])
def test_a_class_that_is_absent_and_not_predicted_costs_nothing(name):
    logits = torch.zeros(1, 3, 4, 4)
    logits[:, 1] = 300
    target = torch.ones(1, 4, 4, dtype=torch.long)
    assert float(value(LossTerm(name=name), logits, target)) == pytest.approx(0, abs=1e-6)


def test_a_sample_without_valid_elements_takes_no_part_in_the_mean():
    logits, target, _ = batch(n=2)
    target[1] = IGNORE
    for name in OVERLAP:
        term = overlap_term(name, batch=False)
        expected = value(term, logits[:1], target[:1])
        assert float(value(term, logits, target)) == pytest.approx(float(expected), rel=2e-6)


def extension(errors, inside):
    """Lovász extension by its definition: sets grow by the largest error, and count by what they add."""
    order = sorted(range(len(errors)), key=lambda i: -errors[i])
    sets = [set(order[:i]) for i in range(len(order) + 1)]
    truth = {i for i, t in enumerate(inside) if t}
    loss = [len(wrong) / len(truth | wrong) if truth | wrong else 0.0 for wrong in sets]  # 1 − Jaccard
    return sum(errors[i] * (after - before) for i, (before, after) in zip(order, pairwise(loss), strict=True))


def test_lovasz_is_the_extension_of_the_jaccard_loss():
    logits, target, _ = batch(shape=(3, 4))
    x, t = rows(logits, target)
    p = softmax(x, axis=1)
    expected = np.mean([extension(np.abs((t == c) - p[:, c]), t == c) for c in range(3)])
    assert float(value(LossTerm(name="lovasz"), logits, target)) == pytest.approx(float(expected), rel=2e-6)
    logits, target, _ = batch(channels=1, shape=(3, 4))
    x, t = rows(logits, target)
    hinge = np.maximum(0, 1 - x[:, 0] * np.where(t == 1, 1, -1))
    expected = extension(hinge, t == 1)
    found = value(LossTerm(name="lovasz"), logits, target, classes=2)
    assert float(found) == pytest.approx(float(expected), rel=2e-6)


@pytest.mark.parametrize(("mode", "channels"), [("multiclass", 3), ("binary", 1)])
def test_lovasz_is_smps(mode, channels):
    """Class 2 is absent, so no part of the mean. smp's float32 is good enough with so few elements."""
    logits, target, _ = batch(channels=channels)
    target = target.clamp(max=1)
    found = value_and_gradient(LossTerm(name="lovasz"), logits, target, classes=max(2, channels))
    inputs = logits.clone().requires_grad_()
    oracle = smp.LovaszLoss(mode, ignore_index=IGNORE)(inputs, target)
    assert float(found[0]) == pytest.approx(float(oracle.detach()), rel=1e-5)
    np.testing.assert_allclose(found[1], torch.autograd.grad(oracle, inputs)[0], rtol=1e-4, atol=1e-7)


def test_lovasz_of_certain_predictions_is_sklearns_jaccard():
    """At the corners of the unit cube the extension is the function (Berman et al. 2018, section 2)."""
    _, target, _ = batch(seed=1)
    predicted = batch(seed=2)[1].clamp_min(0)
    logits = 200 * F.one_hot(predicted, 3).movedim(-1, 1).float()
    keep = target != IGNORE
    expected = 1 - jaccard_score(target[keep], predicted[keep], average="macro")
    assert float(value(LossTerm(name="lovasz"), logits, target)) == pytest.approx(float(expected), rel=2e-6)


def test_lovasz_gradient_of_a_large_batch():
    """With p elements the differences are about 1/p: float32 ratios of 1 would leave errors of 2 %."""
    rng = np.random.default_rng(0)
    truth = rng.random(400_000) < 0.3
    x = rng.normal(size=truth.size) + truth
    logits = torch.from_numpy(x).float().reshape(1, 1, 500, 800)
    target = torch.from_numpy(truth).long().reshape(1, 500, 800)
    _, found = value_and_gradient(LossTerm(name="lovasz"), logits, target, classes=2)
    x = logits.double().numpy().ravel()
    errors = 1 - x * np.where(truth, 1, -1)
    order = np.argsort(-errors)
    n, wrong, union = truth.sum(), np.cumsum(truth[order]), truth.sum() + np.cumsum(~truth[order])
    # The exact difference of (n − wrong)/union: one element more is of the class, or beyond it.
    steps = np.where(truth[order], 1 / union, (n - wrong) / (union * (union - 1.0)))
    expected = np.zeros(truth.size)
    expected[order] = np.where(errors[order] > 0, steps * np.where(truth[order], -1, 1), 0)
    assert np.linalg.norm(found.numpy().ravel() - expected) < 1e-4 * np.linalg.norm(expected)
