"""SegNet and the first two DeepLabs, and what all architectures here share. DeepLab V3 and V3+ are in smp."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from torch import nn
from torch.nn import functional

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of VGG-16's convolutions, stage by stage (Simonyan and Zisserman, ICLR 2015, configuration D)."""


def vgg16_channels(width: float) -> list[list[int]]:
    """`VGG16` with ``width`` times the channels.

    Raises:
        ValueError: the width is not above 0.
    """
    if not width > 0:
        raise ValueError(f"width: found {width}; valid: above 0, 1 for the paper's")
    return [[max(1, round(width * n)) for n in stage] for stage in VGG16]


def positive(**numbers: int) -> None:
    """Refuse counts below 1.

    Raises:
        ValueError: names the first.
    """
    for name, n in numbers.items():
        if n < 1:
            raise ValueError(f"{name}: found {n}; valid: 1 or more")


def check_size(x: torch.Tensor, stride: int) -> None:
    """Whether a batch's edges are multiples of the stride.

    Raises:
        ValueError: they are not.
    """
    rows, columns = x.shape[-2:]
    if rows % stride or columns % stride:
        raise ValueError(f"input of {rows} × {columns}; valid: multiples of the stride {stride}")


def upsample(x: torch.Tensor, factor: int) -> torch.Tensor:
    """(n, c, y, x) to (n, c, factor·y, factor·x), bilinear between the centres of elements."""
    return functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)


def start_convolutions(module: nn.Module) -> None:
    """Fill convolutions as torchvision's VGG does: He et al. 2015 (arXiv:1502.01852), fan out, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class SegNet(nn.Module):
    """SegNet on VGG-16.

    Badrinarayanan, Kendall and Cipolla, "SegNet: A Deep Convolutional Encoder-Decoder Architecture for Image
    Segmentation", IEEE TPAMI 39(12), 2017, arXiv:1511.00561.

    The encoder has VGG-16's thirteen convolutions, each with batch normalisation and ReLU; each of its five
    max-poolings remembers where the maxima were. The decoder mirrors it: maxima are put back where they came
    from (zeros elsewhere), then convolved. Its last convolution gives the logits. ``encoder`` is named and
    ordered like torchvision's ``vgg16_bn().features``, so that its state dict loads.

    Where we differ: the input is not normalised locally (LRN) first, that is the card's part; any number of
    channels; He initialisation with fan out (torchvision's VGG) instead of fan in.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits.
        width: times the paper's channels; 1 is the paper's network.
    """

    def __init__(self, *, in_channels: int, classes: int, width: float = 1.0) -> None:
        super().__init__()
        positive(in_channels=in_channels, classes=classes)
        stages = vgg16_channels(width)
        layers: list[nn.Module] = []
        before = in_channels
        for stage in stages:
            for channels in stage:
                layers += _convolution(before, channels)
                before = channels
            layers.append(nn.MaxPool2d(2, 2, return_indices=True))
        self.encoder = nn.Sequential(*layers)
        self.decoder = nn.ModuleList()
        for number in reversed(range(len(stages))):
            # Each stage ends with the channels that the next one's indices have.
            after = [*stages[number][1:], stages[number - 1][-1] if number else classes]
            layers = []
            for channels in after:
                layers += _convolution(before, channels)
                before = channels
            self.decoder.append(nn.Sequential(*(layers if number else layers[:-2])))
        start_convolutions(self)

    @property
    def stride(self) -> int:
        """Edges of the input are multiples of this: five poolings by 2."""
        return 32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes, y, x) of images (n, in_channels, y, x).

        Raises:
            ValueError: an edge is no multiple of the stride.
        """
        check_size(x, self.stride)
        positions = []
        for layer in self.encoder:
            if isinstance(layer, nn.MaxPool2d):
                x, indices = layer(x)
                positions.append(indices)
            else:
                x = layer(x)
        for stage in self.decoder:
            x = stage(functional.max_unpool2d(x, positions.pop(), [2, 2]))
        return x


def _convolution(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]


STRIDE = 8
"""Total stride of both versions."""


class DeepLab(nn.Module, ABC):
    """What both versions share: logits at 1/8 of the input's size, upsampled."""

    @property
    def stride(self) -> int:
        """Edges of the input are multiples of this."""
        return STRIDE

    @abstractmethod
    def coarse(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes, y / 8, x / 8) of images (n, in_channels, y, x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (n, classes, y, x) of images (n, in_channels, y, x).

        Raises:
            ValueError: an edge is no multiple of the stride.
        """
        check_size(x, self.stride)
        return upsample(self.coarse(x), STRIDE)


class DeepLabV1(DeepLab):
    """DeepLab-LargeFOV on VGG-16.

    Chen, Papandreou, Kokkinos, Murphy and Yuille, "Semantic Image Segmentation with Deep Convolutional Nets
    and Fully Connected CRFs", ICLR 2015, arXiv:1412.7062. The CRF is `segpipe.inference.dense_crf`.

    VGG-16 whose last two poolings have stride 1; the last three convolutions have dilation 2. ``fc6`` is a
    3 × 3 convolution with dilation 12, ``fc7`` and ``fc8`` are 1 × 1. ``features`` has the names of
    torchvision's ``vgg16().features``, so that its state dict loads.

    Field of view: the paper's 224 px are those of fc6 on VGG's own last map, whose elements are 32 px:
    2 · 12 · 8 + 32. What a logit can depend on at all is 412 px wide, all layers before counted.

    Where we differ: the first three poolings are 2 × 2 as in VGG, so that an answer stands for a square of
    8 × 8 px (the released model pools 3 × 3, for inputs of 8n + 1 px); pool4 and pool5 are 3 × 3 as released,
    without the average pooling after them; logits are upsampled by 8 here, bilinear.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits.
        width: times the paper's channels; 1 is the paper's network.
        dilation: of fc6.
        dropout: after fc6 and fc7.
    """

    def __init__(
        self, *, in_channels: int, classes: int, width: float = 1.0, dilation: int = 12, dropout: float = 0.5
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, classes=classes, dilation=dilation)
        layers: list[nn.Module] = []
        before = in_channels
        for number, stage in enumerate(vgg16_channels(width)):
            rate = 2 if number == 4 else 1
            for channels in stage:
                layers.append(nn.Conv2d(before, channels, 3, padding=rate, dilation=rate))
                layers.append(nn.ReLU(inplace=True))
                before = channels
            layers.append(nn.MaxPool2d(2, 2) if number < 3 else nn.MaxPool2d(3, 1, padding=1))
        self.features = nn.Sequential(*layers)
        hidden = max(1, round(1024 * width))
        self.fc6 = nn.Conv2d(before, hidden, 3, padding=dilation, dilation=dilation)
        self.fc7 = nn.Conv2d(hidden, hidden, 1)
        self.fc8 = nn.Conv2d(hidden, classes, 1)
        self.dropout = nn.Dropout(dropout)
        start_convolutions(self)
        nn.init.normal_(self.fc8.weight, std=0.01)

    def coarse(self, x: torch.Tensor) -> torch.Tensor:
        """Logits at 1/8 of the input's size."""
        x = self.features(x)
        x = self.dropout(self.fc6(x).relu())
        x = self.dropout(self.fc7(x).relu())
        logits: torch.Tensor = self.fc8(x)
        return logits


class DeepLabV2(DeepLab):
    """DeepLab with atrous spatial pyramid pooling (ASPP-L) on a ResNet.

    Chen, Papandreou, Kokkinos, Murphy and Yuille, "DeepLab: Semantic Image Segmentation with Deep
    Convolutional Nets, Atrous Convolution, and Fully Connected CRFs", IEEE TPAMI 40(4), 2018,
    arXiv:1606.00915. The CRF is `segpipe.inference.dense_crf`.

    A ResNet whose last two stages have dilation 2 and 4 instead of a stride; from its last map four 3 × 3
    convolutions with different dilations give logits, which are summed. ``backbone`` has the names of
    torchvision's ResNet, so that its state dict, less ``fc``, loads.

    Where we differ: timm's ResNet has its strides in the 3 × 3 convolutions, and the first block of a dilated
    stage keeps the dilation before it (both as torchvision's ``replace_stride_with_dilation``); one scale
    instead of the maximum over three; logits are upsampled by 8 here, bilinear.

    Args:
        in_channels: channels of the image.
        classes: channels of the logits.
        depth: layers of the ResNet: 18, 34, 50, 101 or 152.
        rates: dilations of the pyramid.
    """

    backbone: Any
    """timm's ResNet; timm has no types."""

    def __init__(
        self, *, in_channels: int, classes: int, depth: int = 101, rates: Sequence[int] = (6, 12, 18, 24)
    ) -> None:
        super().__init__()
        positive(in_channels=in_channels, classes=classes)
        if depth not in (18, 34, 50, 101, 152):
            raise ValueError(f"depth: found {depth}; valid: 18, 34, 50, 101, 152")
        if not rates or min(rates) < 1:
            raise ValueError(
                f"rates: found {list(rates)}; valid: dilations of 1 or more, e.g. [6, 12, 18, 24]"
            )
        self.backbone = timm.create_model(
            f"resnet{depth}",
            pretrained=False,
            in_chans=in_channels,
            num_classes=0,
            global_pool="",
            output_stride=STRIDE,
        )
        self.aspp = nn.ModuleList()
        for rate in rates:
            branch = nn.Conv2d(self.backbone.num_features, classes, 3, padding=rate, dilation=rate)
            nn.init.normal_(branch.weight, std=0.01)
            nn.init.zeros_(cast(nn.Parameter, branch.bias))
            self.aspp.append(branch)

    def coarse(self, x: torch.Tensor) -> torch.Tensor:
        """Logits at 1/8 of the input's size."""
        features = self.backbone.forward_features(x)
        return torch.stack([branch(features) for branch in self.aspp]).sum(0)
