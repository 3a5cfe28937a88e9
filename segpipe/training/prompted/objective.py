"""The objective of promptable segmentation: masks are learned, and how good each of them is.

Cross-entropy and the soft Jaccard loss of a mask, and the squared error of its predicted against its true IoU
(the last as Kirillov et al., Segment Anything, ICCV 2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, eq=False)
class Judged:
    """What masks are worth."""

    loss: torch.Tensor
    """Scalar."""
    iou: torch.Tensor
    """(n,) true IoU of each mask with its whole object."""


def judge(logits: torch.Tensor, predicted: torch.Tensor, cover: torch.Tensor, total: torch.Tensor) -> Judged:
    """Loss of masks, one a look.

    Args:
        logits: (n, y, x) of the cells of each look.
        predicted: (n,) IoU as the network predicts it.
        cover: (n, y, x) which share of each cell the object covers.
        total: (n,) cells that the whole object would take, in the look and beyond it.
    """
    entropy = functional.binary_cross_entropy_with_logits(logits, cover, reduction="none").mean((1, 2))
    true = iou(logits.detach(), cover, total)
    loss = (entropy + jaccard_loss(logits, cover)).mean() + functional.mse_loss(predicted, true)
    return Judged(loss, true)


def jaccard_loss(logits: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """(n,): 1 − (Σ p·t + 1) / (Σ p + Σ t − Σ p·t + 1) of logits (n, y, x) and cover (n, y, x)."""
    p = logits.sigmoid()
    shared = (p * cover).sum((1, 2))
    return 1 - (shared + 1) / (p.sum((1, 2)) + cover.sum((1, 2)) - shared + 1)


@torch.no_grad()
def iou(logits: torch.Tensor, cover: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """(n,): IoU of masks with whole objects; a cell is the object's where it covers more than half of it."""
    found, truth = logits > 0, cover > 0.5
    both = (found & truth).sum((1, 2))
    return both / (found.sum((1, 2)) + torch.maximum(total, truth.sum((1, 2))) - both).clamp(min=1)
