"""The objective against other libraries' losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from sklearn.metrics import jaccard_score
from torchvision.ops import sigmoid_focal_loss

from segpipe.training.prompted.objective import ALPHA, dice_loss, focal_loss, iou, judge


@pytest.fixture
def candidates() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 4 * torch.randn(5, 3, 8, 8), torch.rand(5, 8, 8) < 0.4


def test_focal_loss_is_torchvisions(candidates: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, masks = candidates
    cover = masks[:, None].float()
    wanted = sigmoid_focal_loss(logits, cover.expand_as(logits), alpha=ALPHA, gamma=2).mean((-2, -1))
    torch.testing.assert_close(focal_loss(logits, cover), wanted)


def test_focal_loss_of_a_covered_share_is_that_of_its_elements(
    candidates: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, masks = candidates
    # Four elements of the window under each logit, which they share.
    fine = torch.rand(5, 16, 16) < 0.5
    cover = torch.nn.functional.avg_pool2d(fine[:, None].float(), 2)
    large = logits.repeat_interleave(2, -1).repeat_interleave(2, -2)
    wanted = sigmoid_focal_loss(large, fine[:, None].float().expand_as(large), alpha=ALPHA, gamma=2)
    torch.testing.assert_close(focal_loss(logits, cover), wanted.mean((-2, -1)))
    assert masks.shape == (5, 8, 8)


def test_dice_loss_is_monais(candidates: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, masks = candidates
    oracle = DiceLoss(sigmoid=True, smooth_nr=1, smooth_dr=1, reduction="none")
    for k in range(3):
        wanted = oracle(logits[:, k : k + 1], masks[:, None].float())[:, 0, 0, 0]
        torch.testing.assert_close(dice_loss(logits, masks[:, None].float())[:, k], wanted)


def test_iou_is_scikit_learns(candidates: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, masks = candidates
    found = iou(logits, masks).numpy()
    for i, k in np.ndindex(5, 3):
        wanted = jaccard_score(masks[i].ravel().numpy(), (logits[i, k] > 0).ravel().numpy())
        assert found[i, k] == pytest.approx(wanted, abs=1e-6)


def test_only_the_best_candidate_is_learned_and_every_iou() -> None:
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    good = torch.where(mask, 6.0, -6.0)
    low = torch.stack([-good, good, torch.full_like(good, -3.0)], 1).requires_grad_()
    predicted = torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)
    judged = judge(low, predicted, mask)
    judged.loss.backward()
    assert judged.best.tolist() == [1]
    assert judged.iou[0].tolist() == [0.0, 1.0, 0.0]
    assert low.grad is not None and (low.grad[0, 1] != 0).any()
    assert (low.grad[0, [0, 2]] == 0).all()
    # The predicted IoU is right everywhere: what is left is the masks' loss.
    wanted = 20 * focal_loss(good[:, None], mask[:, None].float()) + dice_loss(
        good[:, None], mask[:, None].float()
    )
    assert float(judged.loss) == pytest.approx(float(wanted), rel=1e-5)
