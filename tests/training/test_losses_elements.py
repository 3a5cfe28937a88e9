"""Losses of elements against torch, torchvision, smp, MONAI, scikit-learn and the paper's formula."""

import numpy as np
import pytest
import torch
from monai.losses import FocalLoss
from scipy.special import expit, log_softmax, softmax
from segmentation_models_pytorch.losses._functional import softmax_focal_loss_with_logits
from sklearn.metrics import log_loss
from torch.nn import functional as F  # noqa: N812
from torchvision.ops import sigmoid_focal_loss

from segpipe.config.losses import IGNORE, LossTerm
from tests.training.loss_values import batch, rows, value, value_and_gradient

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cross_entropy_is_sklearns_log_loss():
    logits, target, _ = batch()
    x, t = rows(logits, target)
    expected = log_loss(t, softmax(x, axis=1))
    found = value(LossTerm(name="cross_entropy"), logits, target)
    assert float(found) == pytest.approx(float(expected), rel=2e-6)


def test_weighted_cross_entropy_is_torchs():
    logits, target, _ = batch()
    expected = F.cross_entropy(logits, target, torch.tensor([0.5, 2, 0]), ignore_index=IGNORE)
    found = value(LossTerm(name="cross_entropy", class_weights=[0.5, 2, 0]), logits, target)
    assert float(found) == pytest.approx(float(expected), rel=2e-6)


def test_cross_entropy_of_one_channel_is_sklearns_log_loss_of_the_foreground():
    logits, target, _ = batch(channels=1)
    x, t = rows(logits, target)
    expected = log_loss(t, expit(x[:, 0]))
    for name in ("cross_entropy", "bce"):
        found = value(LossTerm(name=name), logits, target, classes=2)
        assert float(found) == pytest.approx(float(expected), rel=2e-6)
    term = LossTerm(name="cross_entropy", class_weights=[1, 4])
    expected = log_loss(t, expit(x[:, 0]), sample_weight=np.where(t == 1, 4, 1))
    assert float(value(term, logits, target, classes=2)) == pytest.approx(float(expected), rel=2e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.5])
def test_focal_is_smps_softmax_focal_and_monais_times_the_classes(gamma):
    logits, target, _ = batch()
    found = value(LossTerm(name="focal", gamma=gamma), logits, target)
    x, t = (torch.from_numpy(a) for a in rows(logits, target))
    assert float(found) == pytest.approx(float(softmax_focal_loss_with_logits(x, t, gamma=gamma)), rel=2e-6)
    monai = FocalLoss(gamma=gamma, use_softmax=True, to_onehot_y=True)  # a mean over (element, class)
    assert float(found) == pytest.approx(float(3 * monai(x, t[:, None])), rel=2e-6)


def test_focal_of_one_channel_is_torchvisions():
    logits, target, _ = batch(channels=1)
    x, t = (torch.from_numpy(a) for a in rows(logits, target))
    expected = sigmoid_focal_loss(x[:, 0], t.double(), alpha=-1, gamma=1.5, reduction="mean")
    found = value(LossTerm(name="focal", gamma=1.5), logits, target, classes=2)
    assert float(found) == pytest.approx(float(expected), rel=2e-6)


def test_focal_without_focus_is_torchs_weighted_cross_entropy():
    logits, target, _ = batch()
    expected = F.cross_entropy(logits, target, torch.tensor([1.0, 3, 2]), ignore_index=IGNORE)
    found = value(LossTerm(name="focal", gamma=0, class_weights=[1, 3, 2]), logits, target)
    assert float(found) == pytest.approx(float(expected), rel=2e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
def test_focal_has_a_gradient_where_the_network_is_certain(gamma):
    """p = 1 in float32: (1 − p)^(γ − 1) alone would be infinite, and times 0 not a number."""
    logits = torch.tensor([[300.0, 0, 0], [0, 300, 0]]).T.reshape(1, 3, 1, 2)
    target = torch.tensor([[[0, 2]]])  # one certain and right, one certain and wrong
    loss, gradient = value_and_gradient(LossTerm(name="focal", gamma=gamma), logits, target)
    assert float(loss) == pytest.approx(150, rel=2e-6)
    np.testing.assert_allclose(gradient[0, :, 0].T, [[0, 0, 0], [0, 0.5, -0.5]], atol=1e-6)


def test_bce_is_torchs_over_classes_against_the_rest():
    logits, target, _ = batch()
    x, t = rows(logits, target)
    expected = np.mean([log_loss(t == c, expit(x[:, c])) for c in range(3)])
    assert float(value(LossTerm(name="bce"), logits, target)) == pytest.approx(float(expected), rel=2e-6)


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_border_is_the_papers_energy_over_the_elements(channels):
    """Ronneberger et al. 2015, eq. 1 and 2: the sum of (w_c + map)·(−log p)."""
    logits, target, weight_map = batch(channels=channels)
    weights = [0.2, 1.0, 3.0][: max(2, channels)]
    x, t = rows(logits, target)
    x = np.insert(x, 0, 0, axis=1) if channels == 1 else x
    surprise = -log_softmax(x, axis=1)[np.arange(len(t)), t]
    expected = np.mean((np.array(weights)[t] + weight_map[target != IGNORE].numpy()) * surprise)
    term = LossTerm(name="border", class_weights=weights)
    found = value(term, logits, target, weight_map, classes=len(weights))
    assert float(found) == pytest.approx(float(expected), rel=2e-6)


def test_border_without_gaps_is_cross_entropy():
    logits, target, weight_map = batch()
    expected = F.cross_entropy(logits, target, ignore_index=IGNORE)
    found = value(LossTerm(name="border"), logits, target, 0 * weight_map)
    assert float(found) == pytest.approx(float(expected), rel=2e-6)
