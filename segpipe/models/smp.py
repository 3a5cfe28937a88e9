"""Networks of segmentation_models_pytorch: an architecture name, an encoder name, our weights."""

from __future__ import annotations

import inspect

import segmentation_models_pytorch as library
import torch

from segpipe.models.card import Card
from segpipe.models.naming import construct, known, only_arguments
from segpipe.models.network import Network, TorchNetwork, fill, output_channels
from segpipe.models.weights import card_error, load_state, resolve_weights

ARCHITECTURES = {c.__name__: c for c in library.MODEL_ARCHITECTURES_MAPPING.values()}


def check(card: Card) -> None:
    """Whether the architecture exists.

    Raises:
        RequestError: it does not; names those that come close.
    """
    known(card, ARCHITECTURES)


def module(card: Card) -> torch.nn.Module:
    """The network with random weights.

    Raises:
        RequestError: architecture, arguments and window do not fit one another.
    """
    check(card)
    factory = ARCHITECTURES[str(card.architecture)]
    if not str(card.arguments.get("encoder_name")).startswith("tu-"):
        # Only timm's encoders ("tu-…") take more; elsewhere smp ignores what it does not know.
        only_arguments(card, set(inspect.signature(factory).parameters) - {"kwargs"})
    arguments = {
        **card.arguments,
        # Weights come from the card, so the encoder's are never fetched.
        "encoder_weights": None,
        "in_channels": card.channels,
        "classes": output_channels(card),
    }
    network = construct(card, factory, arguments)
    stride = int(network.encoder.output_stride)
    if card.window.stride % stride:
        raise card_error(
            card,
            "window.stride",
            f"found {card.window.stride}; this network's total stride is {stride}: give a multiple",
        )
    assert isinstance(network, torch.nn.Module)
    return network


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The network with the card's weights.

    Raises:
        RequestError: architecture, arguments or weights do not fit one another.
    """
    network = module(card)
    fill(card, network, load_state(resolve_weights(card)))
    return TorchNetwork(network, device, channels_last=True)
