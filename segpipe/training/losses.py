"""Losses by name as torch modules, in 2D and 3D, and U-Net's weights for gaps between objects.

Overlap losses are MONAI's. Others are written here because no library's is right for us: smp's focal
loss is one of each class against the rest; MONAI's divides by the number of classes and has no gradient
at certainty for γ < 1; smp's Lovász takes float32 differences of ratios that differ by one element (6 %
of the gradient's norm at 4 million elements) and returns no scalar where all elements are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from monai.losses.dice import DiceLoss
from monai.losses.tversky import TverskyLoss
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from segpipe.config.losses import IGNORE, LossName, LossTerm
from segpipe.errors import RequestError


def build_loss(terms: Sequence[LossTerm], classes: int) -> nn.Module:
    """The weighted sum of terms, a module called as ``loss(logits, target, weight_map=None)``.

    - logits: (n, k, y, x) or (n, k, z, y, x), floating point, a channel for each class; or k = 1 for
      two classes: the logit of the foreground. They are taken as float32 at least, also under autocast.
    - target: (n, y, x) or (n, z, y, x), int64, 0 … classes − 1, or IGNORE: such an element changes
      neither value nor gradient, whatever its logits are. Where all are ignored, the loss is 0.
    - weight_map: like target, floating point; `border` needs it, other losses don't look at it.

    The module returns a scalar, and raises ValueError for shapes that don't go together.

    Args:
        terms: at least one.
        classes: the background and the others, at least 2.

    Raises:
        RequestError: no terms, fewer than two classes, or class weights for another number of them.
    """
    if not terms:
        raise RequestError("loss: found no terms; give at least one, e.g. {name: cross_entropy}")
    if classes < 2:
        raise RequestError(f"loss: found {classes} classes; at least 2, the background is one of them")
    for term in terms:
        if term.class_weights and len(term.class_weights) != classes:
            raise RequestError(
                f"loss: {term.name.value}: found {len(term.class_weights)} class_weights; "
                f"{classes} classes need {classes}, background first"
            )
    return WeightedSum(terms, classes)


class WeightedSum(nn.Module):
    """The sum of terms: see `build_loss`."""

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


class _Loss(nn.Module):
    """A term of the sum."""

    def __init__(self, term: LossTerm, classes: int) -> None:
        super().__init__()
        self.term = term
        self.classes = classes


class _ElementLoss(_Loss):
    """A loss of elements with a weight for each class."""

    class_weights: Tensor

    def __init__(self, term: LossTerm, classes: int) -> None:
        super().__init__(term, classes)
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
        return _mean(wrong.pow(self.term.gamma) * cross_entropy, self.weights(logits, target))


class _Border(_ElementLoss):
    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        if weight_map is None:
            raise ValueError("the border loss needs weight_map, made by border_weights from ids of objects")
        weights = self.weights(logits, target) + weight_map
        return _mean(weights * _cross_entropy(logits, target), target != IGNORE)


class _BinaryCrossEntropy(_Loss):
    def forward(self, logits: Tensor, target: Tensor, weight_map: Tensor | None = None) -> Tensor:
        members = _members(target, self.classes)[:, -logits.shape[1] :]  # one channel: the foreground
        loss = F.binary_cross_entropy_with_logits(logits, members.to(logits), reduction="none")
        return _mean(loss.mean(1), target != IGNORE)


class _Overlap(_Loss):
    """Dice, Jaccard and Tversky by MONAI, on probabilities that are 0 where ignored."""

    def __init__(self, term: LossTerm, classes: int) -> None:
        super().__init__(term, classes)
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
        scores = of_all_classes(logits).softmax(1) * valid[:, None]
        loss: Tensor = self.loss(scores, _members(target, self.classes).to(scores))
        if self.term.batch:
            return loss.mean()
        # A sample without valid elements has no ratio, and takes no part in the mean.
        return _mean(loss.flatten(1).mean(1), valid.flatten(1).any(1))


class _Lovasz(_Loss):
    """Berman et al. 2018: Lovász-softmax of the classes present (section 2.2); one channel: hinge."""

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
    return F.cross_entropy(of_all_classes(logits), target, ignore_index=IGNORE, reduction="none")


def of_all_classes(logits: Tensor) -> Tensor:
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


REACH = 6.0
"""Distances above this many sigma are not looked at: at d1 + d2 = 6 sigma the weight is 1.5e-8 of w0."""


def border_weights(
    ids: np.ndarray, w0: float = 10.0, sigma: float = 5.0, spacing: Sequence[float] | None = None
) -> np.ndarray:
    """w0·exp(−(d1 + d2)² / 2σ²) outside objects, 0 inside (Ronneberger et al. 2015, arXiv:1505.04597, eq. 2).

    d1 and d2 are the distances from an element's centre to the nearest element of the nearest and of the
    second nearest object. The first summand of eq. 2, w_c, is no part of it: it is the `class_weights`
    of the loss. Objects without an element between them have no gap to weigh; labels are made with one.
    An object that a crop cuts away is not seen: make the map before cropping, or with a margin.

    Args:
        ids: (y, x) or (z, y, x), whole numbers; above 0: the object that the element belongs to.
        w0: weight where both distances are 0.
        sigma: in the unit of spacing.
        spacing: edge lengths of an element along the axes of ids; None: 1 each.

    Returns:
        Weights like ids, float32. Fewer than two objects: 0 everywhere.

    Raises:
        ValueError: not 2 or 3 axes, not whole numbers, or a parameter that is not positive and finite.
    """
    ids = np.asarray(ids)
    steps = np.ones(ids.ndim) if spacing is None else np.asarray(spacing, dtype=float)
    _check(ids, w0, sigma, steps)
    inside = ids > 0
    labels = np.zeros(ids.shape, dtype=np.int32)
    labels[inside] = np.unique(ids[inside], return_inverse=True)[1] + 1
    first = np.full(ids.shape, np.inf, dtype=np.float32)
    second = first.copy()
    margin = [ceil(REACH * sigma / step) for step in steps]
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        window = tuple(slice(max(0, s.start - m), s.stop + m) for s, m in zip(box, margin, strict=True))
        distance = ndimage.distance_transform_edt(labels[window] != label, sampling=steps)
        np.minimum(second[window], np.maximum(first[window], distance), out=second[window])
        np.minimum(first[window], distance, out=first[window])
    weights: np.ndarray = w0 * np.exp(-((first + second) ** 2) / (2 * sigma**2))
    weights[inside] = 0
    return weights


def _check(ids: np.ndarray, w0: float, sigma: float, steps: np.ndarray) -> None:
    if ids.ndim not in (2, 3) or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids: found {ids.ndim} axes of {ids.dtype}; 2 or 3 axes of whole numbers")
    if steps.shape != (ids.ndim,):
        raise ValueError(f"spacing: found {steps.tolist()}; one number for each of {ids.ndim} axes")
    numbers = np.array([w0, sigma, *steps])
    if not (np.isfinite(numbers).all() and (numbers > 0).all()):
        raise ValueError(
            f"w0 {w0:g}, sigma {sigma:g}, spacing {steps.tolist()}: each must be positive and finite"
        )
