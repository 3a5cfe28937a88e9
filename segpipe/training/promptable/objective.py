"""The objective of promptable segmentation: a network learns masks, and how good each of them is.

It sums the cross-entropy and the soft Jaccard loss of a mask, and the squared error of its predicted against
its true IoU (the last as Kirillov et al., Segment Anything, ICCV 2023).
"""

from __future__ import annotations

import torch
from torch.nn import functional


def mask_loss(
    logits: torch.Tensor, predicted: torch.Tensor, cover: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of n masks and their true IoU.

    Args:
        logits: (n, y, x) of each cell.
        predicted: (n,) IoU as the network predicts it.
        cover: (n, y, x) share of each cell that the object covers.
        total: (n,) cells that the whole object would take, inside these cells and beyond them.

    Returns:
        The loss, a scalar, and the IoU (n,) of each mask with its whole object, which has no gradient.
    """
    entropy = functional.binary_cross_entropy_with_logits(logits, cover, reduction="none").mean((1, 2))
    true = mask_iou(logits.detach(), cover, total)
    return (entropy + jaccard_loss(logits, cover)).mean() + functional.mse_loss(predicted, true), true


def jaccard_loss(logits: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Return 1 − (Σ p·t + 1) / (Σ p + Σ t − Σ p·t + 1) of each mask, (n,).

    Args:
        logits: (n, y, x), whose sigmoid is p.
        cover: (n, y, x), t.
    """
    p = logits.sigmoid()
    shared = (p * cover).sum((1, 2))
    return 1 - (shared + 1) / (p.sum((1, 2)) + cover.sum((1, 2)) - shared + 1)


@torch.no_grad()
def mask_iou(logits: torch.Tensor, cover: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return the IoU (n,) of masks with whole objects, as `mask_loss` takes them.

    A cell is the object's where the object covers more than half of it.
    """
    found, truth = logits > 0, cover > 0.5
    both = (found & truth).sum((1, 2))
    return both / (found.sum((1, 2)) + torch.maximum(total, truth.sum((1, 2))) - both).clamp(min=1)
