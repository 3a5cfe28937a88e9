"""Networks for training, of the providers that have some: untrained, with their library's own loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import torch

from segpipe.config.card import Card
from segpipe.models.base import Objective, ObjectModel, ObjectNetwork
from segpipe.models.card_checks import check_input, check_objects, check_window
from segpipe.models.network import ReadyObjects, TorchNetwork
from segpipe.models.plugins import Adapter, load_adapter
from segpipe.models.registry import build_network


class Trainable(Adapter, Protocol):
    """What a provider's module offers beside where its networks can be trained here."""

    module: Callable[[Card], torch.nn.Module]
    """The network with random weights."""
    objective: Callable[[Card], Objective | None]
    """Of networks that find objects, their library's own loss; None: the card's has none."""
    finder: Callable[[Card, torch.nn.Module, torch.device], ObjectNetwork]
    """Likewise: a network on its device as what finds objects, its weights as they are at each call."""


def untrained(card: Card) -> torch.nn.Module:
    """The card's network with random weights, for training.

    Raises:
        RequestError: the card does not fit its provider, or the provider's networks are not trained here.
    """
    check_window(card)
    check_input(card)
    adapter = load_adapter(card)
    if not hasattr(adapter, "module"):
        raise card.error("provider", f"{card.provider} models run here, but are not trained here")
    return cast(Trainable, adapter).module(card)


def objective(card: Card) -> Objective | None:
    """The loss with which an instance or panoptic network is trained; None for scores per class.

    Raises:
        RequestError: the card does not fit its provider, or the provider's are not trained here.
    """
    if card.output.kind == "semantic":
        return None
    check_objects(card)
    adapter = load_adapter(card)
    found = cast(Trainable, adapter).objective(card) if hasattr(adapter, "objective") else None
    if found is None:
        raise card.error(
            "provider",
            f"{card.provider} models that find objects are not trained here: valid: torchvision's "
            "Mask R-CNN, or networks of transformers",
        )
    return found


def finder(
    card: Card, network: torch.nn.Module, device: torch.device, precision: str, threads: int
) -> ObjectModel:
    """A network in training, whose `objective` there is, as what finds objects in windows."""
    return ReadyObjects(
        card, cast(Trainable, load_adapter(card)).finder(card, network, device), precision, threads
    )


def built_state(card: Card) -> dict[str, torch.Tensor]:
    """Tensors by name of a card's network, whatever its weights are stored as.

    Raises:
        RequestError: the card cannot be built, or is no PyTorch network.
    """
    network = build_network(card, torch.device("cpu"), 1)
    if not isinstance(network, TorchNetwork):
        raise card.error("provider", f"{card.provider} has no tensors by name")
    return dict(network.module.state_dict())
