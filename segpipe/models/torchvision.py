"""Segmentation networks of torchvision, for any number of bands; nothing is downloaded.

Mask R-CNN gets windows as the engine made them: its own ImageNet normalisation and its resizing are taken
out, because the card says how values are normalised and the window is the size. Its labels are the card's
classes in their order, the first of which is background. Windows that are no multiple of 32 it pads with 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torchvision.models import detection, segmentation
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from segpipe.models.base import Candidates, ObjectNetwork
from segpipe.models.card import Card
from segpipe.models.naming import construct, known, only_arguments
from segpipe.models.network import Network, TorchNetwork, fill, output_channels
from segpipe.models.weights import card_error, load_state, resolve_weights

SEMANTIC = {
    "fcn_resnet50": 8,
    "fcn_resnet101": 8,
    "deeplabv3_resnet50": 8,
    "deeplabv3_resnet101": 8,
    "deeplabv3_mobilenet_v3_large": 16,
    "lraspp_mobilenet_v3_large": 16,
}
"""Total stride of each network that gives scores per class."""

INSTANCE = {"maskrcnn_resnet50_fpn": 32, "maskrcnn_resnet50_fpn_v2": 32}
"""The same of those that find objects."""

DETECTION_ARGUMENTS = frozenset(
    name
    for name, parameter in inspect.signature(MaskRCNN.__init__).parameters.items()
    if name.startswith(("rpn_", "box_")) and isinstance(parameter.default, int | float)
)
"""Numbers that Mask R-CNN's stages take, such as `box_nms_thresh`."""


class _Scores(nn.Module):
    """The scores alone, at the input's resolution."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        scores = self.network(batch)["out"]
        assert isinstance(scores, torch.Tensor)
        return scores


class _AsGiven(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Images go in as they are: neither normalised nor resized."""

    def normalize(self, image: torch.Tensor) -> torch.Tensor:
        return image

    def resize(self, image: torch.Tensor, target: Any = None) -> tuple[torch.Tensor, Any]:
        return image, target


class MaskRCNNObjects:
    """Mask R-CNN as an `ObjectNetwork`."""

    rule: Literal["transformers", "paper"] = "paper"

    def __init__(self, card: Card, network: nn.Module, device: torch.device) -> None:
        self.device = device
        self._network = network.eval().requires_grad_(False).to(device)
        self._values = np.array(card.values, np.int64)

    @property
    def parameters(self) -> int | None:
        """Numbers learned in training."""
        return sum(p.numel() for p in self._network.parameters())

    def candidates(self, batch: torch.Tensor) -> list[Candidates]:
        """The network's detections, masks pasted into the window."""
        return [
            Candidates(
                found["masks"][:, 0].float().cpu().numpy(),
                self._values[found["labels"].cpu().numpy()],
                found["scores"].float().cpu().numpy(),
            )
            for found in self._network(list(batch))
        ]


def check(card: Card) -> None:
    """Whether the architecture exists and serves the card's kind of output.

    Raises:
        RequestError: it does not; names what was found and what would be valid.
    """
    name = known(card, {**SEMANTIC, **INSTANCE})
    if card.kind != "raster":
        raise card_error(card, "kind", f"found {card.kind}; {name} has two axes: valid: raster")
    kind = "semantic" if name in SEMANTIC else "instance"
    if card.output.kind != kind:
        raise card_error(card, "output.kind", f"found {card.output.kind}; valid for {name}: {kind}")
    if name in INSTANCE and not card.classes[0].background:
        raise card_error(
            card,
            "classes.0",
            f"found {card.classes[0].name}; {name} counts from a background: valid: background: true",
        )
    stride = (SEMANTIC | INSTANCE)[name]
    if card.window.stride % stride:
        raise card_error(
            card,
            "window.stride",
            f"found {card.window.stride}; this network's total stride is {stride}: give a multiple",
        )


def module(card: Card) -> nn.Module:
    """The library's network with random weights; it answers as the library's does.

    Raises:
        RequestError: architecture and arguments do not fit one another.
    """
    check(card)
    name = str(card.architecture)
    arguments: dict[str, Any] = {**card.arguments, "weights": None, "weights_backbone": None}
    if name in INSTANCE:
        only_arguments(card, DETECTION_ARGUMENTS)
        network = construct(card, getattr(detection, name), {**arguments, "num_classes": len(card.classes)})
        network.transform = _AsGiven(1, 1, [0.0], [1.0])
    else:
        only_arguments(card, () if name.startswith("lraspp") else ("aux_loss",))
        arguments["num_classes"] = output_channels(card)
        network = construct(card, getattr(segmentation, name), _plain(arguments, name))
    widen(network, card.channels)
    assert isinstance(network, nn.Module)
    return network


def _plain(arguments: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Without weights torchvision makes no auxiliary classifier unless told; LR-ASPP has none."""
    return dict(arguments) if name.startswith("lraspp") else {"aux_loss": False, **arguments}


def build(card: Card, device: torch.device, threads: int) -> Network | ObjectNetwork:
    """The network with the card's weights.

    Raises:
        RequestError: architecture, arguments or weights do not fit one another.
    """
    network = module(card)
    fill(card, network, load_state(resolve_weights(card)))
    if card.output.kind == "instance":
        return MaskRCNNObjects(card, network, device)
    return TorchNetwork(_Scores(network), device, channels_last=True)


def widen(network: nn.Module, bands: int) -> None:
    """Give the network's first convolution, made for 3 bands, another number of them; at random."""
    name, first = next((n, m) for n, m in network.named_modules() if isinstance(m, nn.Conv2d))
    if first.in_channels == bands:
        return
    parent, _, last = name.rpartition(".")
    wide = nn.Conv2d(
        bands,
        first.out_channels,
        kernel_size=first.kernel_size,  # type: ignore[arg-type]
        stride=first.stride,  # type: ignore[arg-type]
        padding=first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(wide.weight, mode="fan_out", nonlinearity="relu")
    setattr(network.get_submodule(parent), last, wide)
