"""Networks of segmentation_models_pytorch: an architecture name, an encoder name, our weights."""

from __future__ import annotations

import inspect
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from segpipe.config.card import Card
from segpipe.models.base import Network
from segpipe.models.card_checks import check_stride, construct, known, only_arguments

if TYPE_CHECKING:
    import torch

if find_spec("segmentation_models_pytorch") is None:  # it is imported later, but missed now, before work
    raise ModuleNotFoundError(name="segmentation_models_pytorch")

ARCHITECTURES = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet"),
    *("DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet", "Segformer", "DPT"),
)
"""All of the library, which takes seconds to import: it is asked only for networks."""


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
    import segmentation_models_pytorch as library

    factory = getattr(library, known(card, ARCHITECTURES))
    if not str(card.arguments.get("encoder_name")).startswith("tu-"):
        # Only timm's encoders ("tu-…") take more; elsewhere smp ignores what it does not know.
        only_arguments(card, set(inspect.signature(factory).parameters) - {"kwargs"})
    arguments = {
        **card.arguments,
        # Weights come from the card, so the encoder's are never fetched.
        "encoder_weights": None,
        "in_channels": card.channels,
        "classes": card.output_channels,
    }
    network: torch.nn.Module = construct(card, factory, arguments)
    _check_window(card, network)
    return network


def _check_window(card: Card, network: Any) -> None:
    """The card's stride and window, held against the network's."""
    stride = int(network.encoder.output_stride)
    if card.architecture == "DPT":  # its decoder goes on to 1/32 from the encoder's patches
        stride *= max(1, 2 ** (len(network.encoder.output_strides) + 1) // stride)
    check_stride(card, stride)
    patches: Any = getattr(getattr(network.encoder, "model", None), "patch_embed", None)
    if not getattr(patches, "strict_img_size", False):
        return
    size = tuple(patches.img_size)
    if card.window_shape != size or not card.window.fixed:
        raise card.error(
            "window.size",
            f"found {card.window.size}, fixed {str(card.window.fixed).lower()}; this encoder takes "
            f"{list(size)} alone: valid: that size with fixed: true, or another img_size in `arguments`",
        )


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The network with the card's weights.

    Raises:
        RequestError: architecture, arguments or weights do not fit one another.
    """
    from segpipe.models.network import with_weights  # loads torch, which a check does without

    return with_weights(card, module(card), device, channels_last=True)
