"""Batches for losses, what a loss answers, and a term of every kind."""

import pytest
import torch

from segpipe.config.losses import IGNORE, LossTerm
from segpipe.training.losses import build_loss

SMOOTH = 1e-3
TERMS = [
    LossTerm(name="cross_entropy"),
    LossTerm(name="cross_entropy", class_weights=[0.5, 2, 0]),
    LossTerm(name="focal"),
    LossTerm(name="focal", gamma=0.5, class_weights=[1, 3, 2]),
    LossTerm(name="border", class_weights=[0.2, 1, 1]),
    LossTerm(name="bce"),
    LossTerm(name="dice"),
    LossTerm(name="dice", batch=False, background=True),
    LossTerm(name="jaccard"),
    LossTerm(name="jaccard", batch=False),
    LossTerm(name="tversky"),
    LossTerm(name="tversky", batch=False, background=True, alpha=1.5),
    LossTerm(name="lovasz"),
]


def title(term):
    return "-".join(
        [term.name.value, *(f"{k}={getattr(term, k)}" for k in sorted(term.model_fields_set - {"name"}))]
    )


every_term = pytest.mark.parametrize("term", TERMS, ids=title)


def for_two(term):
    """The same term for background and foreground."""
    return term.model_copy(update={"class_weights": term.class_weights[:2]})


def batch(seed=0, channels=3, shape=(6, 7), n=2, dtype=torch.float32):
    """Logits (n, channel, …), target (n, …) with every class in every sample and some IGNORE, map (n, …)."""
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, channels, *shape, generator=rng, dtype=dtype)
    target = torch.randint(-1, max(2, channels), (n, *shape), generator=rng)
    target.flatten(1)[:, : max(2, channels)] = torch.arange(max(2, channels))
    return logits, target, 5 * torch.rand(n, *shape, generator=rng, dtype=dtype)


def rows(logits, target):
    """What takes part, as numpy: logits (element, channel) in float64 and classes (element,)."""
    keep = target != IGNORE
    return logits.movedim(1, -1)[keep].double().numpy(), target[keep].numpy()


def value(term, logits, target, *rest, classes=3):
    return build_loss([term], classes)(logits, target, *rest)


def value_and_gradient(term, logits, *rest, classes=3):
    logits = logits.clone().requires_grad_()
    loss = value(term, logits, *rest, classes=classes)
    return loss.detach(), torch.autograd.grad(loss, logits)[0]
