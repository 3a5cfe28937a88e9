"""What the architectures share: VGG-16's widths, filters to start from, sizes that fit."""

from __future__ import annotations

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
