"""Losses by name: what a training job may ask for. The arithmetic is in `loss_modules`, which loads torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from segpipe.config.losses import LossTerm
from segpipe.errors import RequestError

if TYPE_CHECKING:
    import torch


def build_loss(terms: Sequence[LossTerm], classes: int) -> torch.nn.Module:
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
    from segpipe.training.losses.modules import WeightedSum  # loads torch

    return WeightedSum(terms, classes)
