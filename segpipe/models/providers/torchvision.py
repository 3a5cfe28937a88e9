"""Segmentation networks of torchvision, for any number of bands; nothing is downloaded.

Mask R-CNN gets windows as the engine made them: its own ImageNet normalisation and its resizing are taken
out, because the card says how values are normalised and the window is the size. Its labels are the card's
classes in their order, the first of which is background. Windows that are no multiple of 32 it pads with 0.

`MaskRCNN` is the same network on any of torchvision's ResNets, with anchors of any size: the library's
own begin at 32 pixels, which is more than a house, a tree or a cell has.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torchvision.models import detection, segmentation
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.mask_rcnn import MaskRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import masks_to_boxes

from segpipe.config.card import Card
from segpipe.models.base import MaskCandidates, Network, ObjectNetwork, Truth
from segpipe.models.card_checks import check_stride, construct, known, only_arguments
from segpipe.models.network import OneOutput, TorchNetwork, fill
from segpipe.models.weights import load_state, resolve_weights

SEMANTIC = {
    "fcn_resnet50": 8,
    "fcn_resnet101": 8,
    "deeplabv3_resnet50": 8,
    "deeplabv3_resnet101": 8,
    "deeplabv3_mobilenet_v3_large": 16,
    "lraspp_mobilenet_v3_large": 16,
}
"""Total stride of each network that gives scores per class."""

INSTANCE = {"MaskRCNN": 32, "maskrcnn_resnet50_fpn": 32, "maskrcnn_resnet50_fpn_v2": 32}
"""The same of those that find objects."""

DETECTION_ARGUMENTS = frozenset(
    name
    for name, parameter in inspect.signature(MaskRCNN.__init__).parameters.items()
    if name.startswith(("rpn_", "box_")) and isinstance(parameter.default, int | float)
)
"""Numbers that Mask R-CNN's stages take, such as `box_nms_thresh`."""
BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
"""What `MaskRCNN` takes as `backbone`; resnet50 if not said."""
LEVELS = 5
"""Of its feature pyramid, each with one of `anchor_sizes`: edges in pixels, ascending."""
ANCHORS = (32, 64, 128, 256, 512)
"""The library's."""


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
        self._network = network
        self._values = np.array(card.values, np.int64)
        self.parameters = sum(p.numel() for p in network.parameters())

    def candidates(self, batch: torch.Tensor) -> list[MaskCandidates]:
        """The network's detections, masks pasted into the window."""
        return [
            MaskCandidates(
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
        raise card.error("kind", f"found {card.kind}; {name} has two axes: valid: raster")
    kind = "semantic" if name in SEMANTIC else "instance"
    if card.output.kind != kind:
        raise card.error("output.kind", f"found {card.output.kind}; valid for {name}: {kind}")
    if name in INSTANCE and not card.classes[0].background:
        raise card.error(
            "classes.0",
            f"found {card.classes[0].name}; {name} counts from a background: valid: background: true",
        )
    check_stride(card, (SEMANTIC | INSTANCE)[name])


def module(card: Card) -> nn.Module:
    """The library's network with random weights; it answers as the library's does.

    Raises:
        RequestError: architecture and arguments do not fit one another.
    """
    check(card)
    name = str(card.architecture)
    arguments: dict[str, Any] = {**card.arguments, "weights": None, "weights_backbone": None}
    if name in INSTANCE:
        network = _mask_rcnn(card, name, arguments)
        network.transform = _AsGiven(1, 1, [0.0], [1.0])
    else:
        # Without weights torchvision makes no auxiliary classifier unless told; LR-ASPP has none.
        auxiliary = {} if name.startswith("lraspp") else {"aux_loss": False}
        only_arguments(card, auxiliary)
        arguments = {**auxiliary, **arguments, "num_classes": card.output_channels}
        network = construct(card, getattr(segmentation, name), arguments)
    widen(network, card.channels)
    assert isinstance(network, nn.Module)
    return network


def _mask_rcnn(card: Card, name: str, arguments: dict[str, Any]) -> Any:
    classes = {"num_classes": len(card.classes)}
    if name != "MaskRCNN":
        only_arguments(card, DETECTION_ARGUMENTS)
        return construct(card, getattr(detection, name), {**arguments, **classes})
    only_arguments(card, {*DETECTION_ARGUMENTS, "backbone", "anchor_sizes"})
    given = dict(card.arguments)
    backbone, sizes = given.pop("backbone", "resnet50"), given.pop("anchor_sizes", list(ANCHORS))
    if backbone not in BACKBONES:
        raise card.error("arguments.backbone", f"found {backbone!r}; valid: {', '.join(BACKBONES)}")
    if not _ascending(sizes):
        raise card.error(
            "arguments.anchor_sizes", f"found {sizes!r}; valid: {LEVELS} ascending sizes in pixels"
        )
    # From random weights every layer learns, as everywhere here; frozen norms are for ImageNet's weights.
    body = resnet_fpn_backbone(
        backbone_name=backbone, weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    anchors = AnchorGenerator(tuple((n,) for n in sizes), ((0.5, 1.0, 2.0),) * LEVELS)
    whole = partial(MaskRCNN, body, rpn_anchor_generator=anchors)
    return construct(card, whole, {**given, **classes})


def _ascending(sizes: Any) -> bool:
    plain = isinstance(sizes, list) and len(sizes) == LEVELS and all(type(n) is int and n > 0 for n in sizes)
    return plain and sizes == sorted(sizes)


def finder(card: Card, network: nn.Module, device: torch.device) -> ObjectNetwork:
    """A network that is already on the device, e.g. one in training, as what finds objects."""
    return MaskRCNNObjects(card, network, device)


class MaskRCNNLoss:
    """The sum of the network's own losses: of boxes that may be objects, classes, boxes and masks.

    He et al., Mask R-CNN, ICCV 2017, section 3, and Ren et al., Faster R-CNN, NeurIPS 2015.
    """

    def __init__(self, card: Card) -> None:
        self._values = torch.tensor(card.values)

    def __call__(self, network: nn.Module, images: torch.Tensor, truths: Sequence[Truth]) -> torch.Tensor:
        """Loss of a batch, as `Objective` says."""
        total: torch.Tensor = sum(network(list(images), [self._target(t) for t in truths]).values())
        return total

    def _target(self, truth: Truth) -> dict[str, torch.Tensor]:
        # A box reaches from the first pixel's edge to the last one's: a line of pixels has an area.
        boxes = masks_to_boxes(truth.masks).to(torch.float32)
        boxes[:, 2:] += 1
        labels = (truth.classes[:, None] == self._values.to(truth.classes.device)).int().argmax(1)
        return {"boxes": boxes, "labels": labels, "masks": truth.masks.to(torch.uint8)}


def objective(card: Card) -> MaskRCNNLoss | None:
    """The library's own loss; None where networks are trained by losses of ours."""
    return MaskRCNNLoss(card) if card.architecture in INSTANCE else None


def build(card: Card, device: torch.device, threads: int) -> Network | ObjectNetwork:
    """The network with the card's weights.

    Raises:
        RequestError: architecture, arguments or weights do not fit one another.
    """
    network = module(card)
    fill(card, network, load_state(resolve_weights(card)))
    if card.output.kind == "instance":
        return finder(card, network.eval().requires_grad_(False).to(device), device)
    return TorchNetwork(OneOutput(network, "out"), device, channels_last=True)


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
