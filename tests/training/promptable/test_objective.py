"""The objective against other libraries' losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from sklearn.metrics import jaccard_score
from torch.nn import functional

from segpipe.training.promptable import jaccard_loss, mask_iou, mask_loss


@pytest.fixture
def answers() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 4 * torch.randn(5, 8, 8), (torch.rand(5, 8, 8) < 0.4).float()


def test_jaccard_loss_is_monais(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, cover = answers
    oracle = DiceLoss(sigmoid=True, jaccard=True, smooth_nr=0, smooth_dr=0, reduction="none")
    wanted = oracle(logits[:, None], cover[:, None])[:, 0, 0, 0]
    # MONAI's own smoothing terms go to double the sums: a difference of one element in many.
    large = [x.repeat_interleave(16, 1).repeat_interleave(16, 2) for x in (logits, cover)]
    torch.testing.assert_close(jaccard_loss(*large), wanted, atol=5e-4, rtol=0)


def test_iou_is_scikit_learns(answers: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, cover = answers
    found = mask_iou(logits, cover, cover.sum((1, 2))).numpy()
    for i in range(5):
        wanted = jaccard_score(cover[i].ravel().numpy(), (logits[i] > 0).ravel().numpy())
        assert found[i] == pytest.approx(wanted, abs=1e-6)


def test_what_lies_beyond_a_look_is_missed() -> None:
    cover = torch.zeros(1, 8, 8)
    cover[:, 2:6] = 1  # 32 of the object's 64 cells
    logits = torch.where(cover > 0, 6.0, -6.0)
    assert float(mask_iou(logits, cover, torch.tensor([64.0]))) == 0.5


def test_the_loss_is_entropy_jaccard_and_the_error_of_the_iou(
    answers: tuple[torch.Tensor, torch.Tensor],
) -> None:
    logits, cover = answers
    predicted = torch.rand(5)
    loss, iou = mask_loss(logits, predicted, cover, cover.sum((1, 2)))
    wanted = (
        functional.binary_cross_entropy_with_logits(logits, cover)
        + jaccard_loss(logits, cover).mean()
        + ((predicted - iou) ** 2).mean()
    )
    torch.testing.assert_close(loss, wanted)
    loss, iou = mask_loss(torch.where(cover > 0, 20.0, -20.0), torch.ones(5), cover, cover.sum((1, 2)))
    assert float(loss) < 1e-3 and np.allclose(iou, 1)
