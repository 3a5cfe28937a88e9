"""Layers whose reach is integer arithmetic, and small networks made of such layers."""

from __future__ import annotations

from collections.abc import Sequence

import monai
import segmentation_models_pytorch as smp
import torch
from torch import nn

Interval = tuple[int, int]
"""First and last element along one axis."""
Layer = tuple[str, int, int, int]
"""conv: kernel, stride, dilation. pool, up: factor twice, and 1."""


def seen_through(layer: Layer, out: Interval) -> Interval:
    """The inputs that an interval of a layer's outputs reads; convolutions padded by d·(k − 1)//2."""
    kind, size, stride, dilation = layer
    lo, hi = out
    if kind == "up":
        return lo // size, hi // size
    if kind == "pool":
        return lo * size, hi * size + size - 1
    pad = dilation * (size - 1) // 2
    return lo * stride - pad, hi * stride - pad + dilation * (size - 1)


def beyond_cell(seen: Interval, stride: int) -> int:
    """Most elements outside of the stride cell [0, stride) that began it."""
    return max(-seen[0], seen[1] - (stride - 1))


def stack(layers: Sequence[Layer], ndim: int, channels: int = 1) -> nn.Sequential:
    """The layers with four channels, random weights, a ReLU after each convolution."""
    torch.manual_seed(3)
    conv, pool = (nn.Conv2d, nn.MaxPool2d) if ndim == 2 else (nn.Conv3d, nn.MaxPool3d)
    parts: list[nn.Module] = []
    for kind, size, stride, dilation in layers:
        if kind == "up":
            parts.append(nn.Upsample(scale_factor=float(size), mode="nearest"))
        elif kind == "pool":
            parts.append(pool(size))
        else:
            pad = dilation * (size - 1) // 2
            parts += [conv(channels, 4, size, stride, pad, dilation), nn.ReLU()]
            channels = 4
    return nn.Sequential(*parts, conv(channels, 3, 1)).eval()


def small_smp() -> nn.Module:
    torch.manual_seed(1)
    return smp.Unet(
        "resnet18",
        encoder_weights=None,
        encoder_depth=2,
        decoder_channels=(16, 8),
        in_channels=2,
        classes=3,
    ).eval()


def small_monai(ndim: int, norm: str = "batch") -> nn.Module:
    torch.manual_seed(1)
    return monai.networks.nets.UNet(
        ndim, in_channels=1, out_channels=3, channels=(4, 8), strides=(2,), norm=norm
    ).eval()
