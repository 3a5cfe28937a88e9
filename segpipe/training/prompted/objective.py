"""The objective of promptable segmentation: the best of several masks is learned, and how good each is.

Kirillov et al., Segment Anything, ICCV 2023: 20 · focal loss + dice loss of the candidate of the lowest sum,
and the squared error of predicted against true IoU; here of every candidate, as in SAM 2 (Ravi et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional

FOCAL_WEIGHT, DICE_WEIGHT, IOU_WEIGHT = 20.0, 1.0, 1.0
GAMMA, ALPHA = 2.0, 0.6
"""Of the focal loss (Lin et al., ICCV 2017). With SAM's α of 0.25 masks of small objects shrink at first."""


@dataclass(frozen=True, eq=False)
class Judged:
    """What a set of candidates is worth."""

    loss: torch.Tensor
    """Scalar."""
    best: torch.Tensor
    """(n,) the candidate that was learned."""
    iou: torch.Tensor
    """(n, k) true IoU of each candidate at the window's size."""


def judge(low: torch.Tensor, predicted: torch.Tensor, masks: torch.Tensor, every: float = 0.0) -> Judged:
    """Loss of candidates.

    Args:
        low: (n, k, y, x) logits as the network gives them.
        predicted: (n, k) IoU as the network predicts it.
        masks: (n, Y, X) bool at the window's size, a multiple of the logits'.
        every: weight of the mean over all candidates, beside the best: where a prompt is hardly ambiguous
            none may drift, for the network has yet to learn which it should hold for the best.
    """
    cover = functional.adaptive_avg_pool2d(masks[:, None].float(), (low.shape[-2], low.shape[-1]))
    sums = FOCAL_WEIGHT * focal_loss(low, cover) + DICE_WEIGHT * dice_loss(low, cover)
    best = sums.detach().argmin(1)
    true = iou(low.detach(), masks)
    learned = (sums.gather(1, best[:, None]).mean() + every * sums.mean()) / (1 + every)
    return Judged(learned + IOU_WEIGHT * functional.mse_loss(predicted, true), best, true)


def focal_loss(logits: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """(n, k): mean over elements of the focal loss of logits (n, k, y, x) against cover (n, 1, y, x), 0 to 1.

    A covered share counts as as many elements inside, the rest as elements outside.
    """
    p = logits.sigmoid()
    inside = ALPHA * (1 - p) ** GAMMA * functional.softplus(-logits)
    outside = (1 - ALPHA) * p**GAMMA * functional.softplus(logits)
    return (cover * inside + (1 - cover) * outside).mean((-2, -1))


def dice_loss(logits: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """(n, k): 1 − (2 Σ p·t + 1) / (Σ p + Σ t + 1), as SAM's."""
    p = logits.sigmoid()
    shared = (p * cover).sum((-2, -1))
    return 1 - (2 * shared + 1) / (p.sum((-2, -1)) + cover.sum((-2, -1)) + 1)


@torch.no_grad()
def iou(low: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(n, k): IoU of masks from logits (n, k, y, x), enlarged as they are in use, with masks (n, Y, X)."""
    found = functional.interpolate(low, masks.shape[-2:], mode="bilinear", align_corners=False) > 0
    both = (found & masks[:, None]).sum((-2, -1))
    either = (found | masks[:, None]).sum((-2, -1))
    return both / either.clamp(min=1)
