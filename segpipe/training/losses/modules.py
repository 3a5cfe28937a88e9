"""The losses named in `losses` as torch modules, in 2D and 3D.

Overlap losses are MONAI's. Others are written here because no library's is right for us: smp's focal
loss is one of each class against the rest; MONAI's divides by the number of classes and has no gradient
at certainty for γ < 1; smp's Lovász takes float32 differences of ratios that differ by one element (6 %
of the gradient's norm at 4 million elements) and returns no scalar where all elements are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.losses.dice import DiceLoss
from monai.losses.tversky import TverskyLoss
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from segpipe.config.losses import IGNORE, LossName, LossTerm


class WeightedSum(nn.Module):
    """The sum of terms: see `losses.build_loss`."""

    def __init__(self, terms: Sequence[LossTerm], classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.factors = [term.weight for term in terms]
        self.terms = nn.ModuleList(_MODULES[term.name](term, classes) for term in terms)

    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        self._check(logits, target, weight_map)
        with torch.autocast(logits.device.type, enabled=False):
            valid = target != IGNORE
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            # Zero times infinity would not be zero: what is ignored goes before anything is computed.
            logits = torch.where(valid[:, None], logits, 0.0)
            if weight_map is not None:
                weight_map = torch.where(valid, weight_map.to(logits), 0.0)
            values = [term(logits, target, weight_map) for term in self.terms]
            return torch.stack([f * value for f, value in zip(self.factors, values, strict=True)]).sum()

    def _check(self, logits: Tensor, target: Tensor, weight_map: Tensor | None) -> None:
        channels = (self.classes, 1) if self.classes == 2 else (self.classes,)
        if logits.shape[1] not in channels:
            raise ValueError(
                f"logits have {logits.shape[1]} channels; {self.classes} classes need "
                + " or ".join(map(str, channels))
            )
        expected = (logits.shape[0], *logits.shape[2:])
        if tuple(target.shape) != expected:
            raise ValueError(f"target of shape {tuple(target.shape)}; the logits need {expected}")
        if weight_map is not None and weight_map.shape != target.shape:
            raise ValueError(f"weight_map of shape {tuple(weight_map.shape)}; the logits need {expected}")


class _ElementLoss(nn.Module):
    """A loss of elements with a weight for each class."""

    class_weights: Tensor

    def __init__(self, term: LossTerm, classes: int) -> None:
        super().__init__()
        self.gamma = term.gamma
        weights = torch.tensor(term.class_weights or [1.0] * classes, dtype=torch.float64)
        self.register_buffer("class_weights", weights, persistent=False)

    def weights(self, logits: Tensor, target: Tensor) -> Tensor:
        """Weight of each element's class, 0 where ignored."""
        return self.class_weights.to(logits)[target.clamp_min(0)] * (target != IGNORE)


class _CrossEntropy(_ElementLoss):
    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        return _mean(_cross_entropy(logits, target), self.weights(logits, target))


class _Focal(_ElementLoss):
    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        cross_entropy = _cross_entropy(logits, target)
        # 1 − p of the true class. Where it is 0, powers below 1 have no derivative: the least number has.
        wrong = (-torch.expm1(-cross_entropy)).clamp_min(torch.finfo(logits.dtype).tiny)
        return _mean(wrong.pow(self.gamma) * cross_entropy, self.weights(logits, target))


class _Border(_ElementLoss):
    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        if weight_map is None:
            raise ValueError("the border loss needs weight_map, made by border_weights from ids of objects")
        weights = self.weights(logits, target) + weight_map
        return _mean(weights * _cross_entropy(logits, target), target != IGNORE)


class _BinaryCrossEntropy(nn.Module):
    def __init__(self, term: LossTerm, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        members = _members(target, self.classes)[:, -logits.shape[1] :]  # one channel: the foreground
        loss = F.binary_cross_entropy_with_logits(logits, members.to(logits), reduction="none")
        return _mean(loss.mean(1), target != IGNORE)


class _Overlap(nn.Module):
    """Dice, Jaccard and Tversky by MONAI, on probabilities that are 0 where ignored."""

    def __init__(self, term: LossTerm, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.batch = term.batch
        common: dict[str, Any] = {
            "include_background": term.background,
            "smooth_nr": term.smooth,
            "smooth_dr": term.smooth,
            "batch": term.batch,
            "reduction": "none",
        }
        self.loss = (
            TverskyLoss(alpha=term.alpha, beta=term.beta, **common)
            if term.name is LossName.tversky
            else DiceLoss(jaccard=term.name is LossName.jaccard, **common)
        )

    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        valid = target != IGNORE
        scores = _of_all_classes(logits).softmax(1) * valid[:, None]
        loss: Tensor = self.loss(scores, _members(target, self.classes).to(scores))
        if self.batch:
            return loss.mean()
        # A sample without valid elements has no ratio, and takes no part in the mean.
        return _mean(loss.flatten(1).mean(1), valid.flatten(1).any(1))


class _Lovasz(nn.Module):
    """Berman et al. 2018: Lovász-softmax of the classes present (section 2.2); one channel: hinge."""

    def __init__(self, term: LossTerm, classes: int) -> None:
        super().__init__()
        self.classes = classes

    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        valid = target != IGNORE
        target = target[valid]
        if not len(target):
            return logits.sum() * 0.0
        if logits.shape[1] == 1:
            margin = logits[:, 0][valid] * (2 * target - 1)
            return _lovasz_extension((1 - margin).relu(), target == 1).to(logits)
        scores = logits.softmax(1).movedim(1, 0)[:, valid]
        members = [(score, target == c) for c, score in enumerate(scores)]
        losses = [
            _lovasz_extension((inside.to(p) - p).abs(), inside) for p, inside in members if inside.any()
        ]
        return torch.stack(losses).mean().to(logits)


def _lovasz_extension(errors: Tensor, inside: Tensor) -> Tensor:
    """The Lovász extension of 1 − Jaccard at these errors (Berman et al. 2018, eq. 8 and 9), float64.

    Args:
        errors: (element,) 0 or more.
        inside: (element,) bool, whether it is of the class.
    """
    errors, order = errors.double().sort(descending=True)
    found = inside[order].double()
    missed = found.cumsum(0)
    loss = missed.new_zeros(len(missed) + 1)  # 1 − Jaccard when the first 0, 1, … elements are wrong
    loss[1:] = 1 - (missed[-1] - missed) / (missed[-1] + (1 - found).cumsum(0))
    return errors @ loss.diff()


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """−log p of each element's class, 0 where ignored."""
    return F.cross_entropy(_of_all_classes(logits), target, ignore_index=IGNORE, reduction="none")


def _of_all_classes(logits: Tensor) -> Tensor:
    """Logits with a channel for each class: the sigmoid of x is the softmax of (0, x)."""
    return logits if logits.shape[1] > 1 else torch.cat((torch.zeros_like(logits), logits), 1)


def _members(target: Tensor, classes: int) -> Tensor:
    """Whether an element is of a class: (n, class, …), bool; of none where ignored."""
    channels = torch.arange(classes, device=target.device)
    return target[:, None] == channels.view(-1, *[1] * (target.ndim - 1))


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean; 0, with gradient 0, where nothing has weight."""
    total = weights.sum().to(values)
    return (values * weights).sum() / torch.where(total > 0, total, 1.0)


_MODULES: dict[LossName, Callable[[LossTerm, int], nn.Module]] = {
    LossName.cross_entropy: _CrossEntropy,
    LossName.focal: _Focal,
    LossName.border: _Border,
    LossName.bce: _BinaryCrossEntropy,
    LossName.dice: _Overlap,
    LossName.jaccard: _Overlap,
    LossName.tversky: _Overlap,
    LossName.lovasz: _Lovasz,
}
