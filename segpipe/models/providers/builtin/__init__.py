"""The provider `literature`: small architectures that no kept library has, each with its paper.

Every class takes the keywords ``in_channels`` and ``classes`` and plain values beyond; maps (n, c, y, x) to
logits (n, classes, y, x); takes inputs whose edges are multiples of its ``stride``; and starts from random
weights: nothing is fetched. Without weights of one's own, the backbone's state dict can be filled with
torchvision's or timm's, whose names it has.
"""

from __future__ import annotations

import torch

from segpipe.config.card import Card
from segpipe.models.base import Network
from segpipe.models.card_checks import check_stride, construct, known
from segpipe.models.network import with_weights
from segpipe.models.providers.builtin.convolutional import DeepLabV1, DeepLabV2, SegNet
from segpipe.models.providers.builtin.setr import SETRPUP, SETRNaive

ARCHITECTURES: dict[str, type[torch.nn.Module]] = {
    cls.__name__: cls for cls in (SegNet, SETRNaive, SETRPUP, DeepLabV1, DeepLabV2)
}


def check(card: Card) -> None:
    """Whether the architecture exists.

    Raises:
        RequestError: it does not; names those that come close.
    """
    known(card, ARCHITECTURES)
    if card.kind != "raster":
        raise card.error("kind", f"found {card.kind}; {card.architecture} is for rasters")


def module(card: Card) -> torch.nn.Module:
    """The network with random weights.

    Raises:
        RequestError: architecture, arguments and window do not fit one another.
    """
    check(card)
    arguments = {**card.arguments, "in_channels": card.channels, "classes": card.output_channels}
    network = construct(card, ARCHITECTURES[str(card.architecture)], arguments)
    assert isinstance(network, torch.nn.Module)
    stride = network.stride
    assert isinstance(stride, int)
    check_stride(card, stride)
    return network


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The network with the card's weights.

    Raises:
        RequestError: architecture, arguments or weights do not fit one another.
    """
    return with_weights(card, module(card), device, channels_last=True)
