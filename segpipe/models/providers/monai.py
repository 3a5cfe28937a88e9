"""Segmentation networks of monai.networks.nets, from a closed list: bundles are never evaluated."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from segpipe.config.card import Card
from segpipe.models.base import Network
from segpipe.models.card_checks import construct, known

if TYPE_CHECKING:
    import torch

if find_spec("monai") is None:  # it is imported later, but missed now, before work
    raise ModuleNotFoundError(name="monai")

ARCHITECTURES = (
    *("AttentionUnet", "BasicUNet", "BasicUNetPlusPlus", "DynUNet", "FlexibleUNet", "HighResNet", "MedNeXt"),
    *("SegResNet", "SegResNetDS", "SwinUNETR", "UNETR", "UNet", "VNet"),
)
"""Those that map an image to scores per class and are built from plain values alone."""


def check(card: Card) -> None:
    """Whether the architecture is on the list.

    Raises:
        RequestError: it is not; names those that come close.
    """
    known(card, ARCHITECTURES)


def module(card: Card) -> torch.nn.Module:
    """The network with random weights, in as many dimensions as the card's kind has.

    Raises:
        RequestError: architecture and arguments do not fit one another.
    """
    import monai.networks.nets as library

    factory = getattr(library, known(card, ARCHITECTURES))
    accepted = inspect.signature(factory).parameters
    arguments: dict[str, Any] = {
        **card.arguments,
        "in_channels": card.channels,
        "out_channels": card.output_channels,
    }
    if "spatial_dims" in accepted:
        arguments["spatial_dims"] = card.ndim
    if "pretrained" in accepted:
        arguments["pretrained"] = False  # weights come from the card: nothing is fetched
    network: torch.nn.Module = construct(card, factory, arguments)
    return network


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The network with the card's weights.

    Raises:
        RequestError: architecture, arguments or weights do not fit one another.
    """
    from segpipe.models.network import with_weights  # loads torch, which a check does without

    return with_weights(card, module(card), device)
