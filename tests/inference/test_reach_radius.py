"""The radius against integer arithmetic on layers, and against gradients in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from segpipe.inference.receptive_field.probe import Radius, measure_radius
from tests.inference.lab import Pyramid
from tests.inference.reach_nets import (
    Interval,
    Layer,
    beyond_cell,
    seen_through,
    small_monai,
    small_smp,
    stack,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def analytic(layers: Sequence[Layer], stride: int) -> int:
    seen = (0, stride - 1)
    for layer in reversed(layers):
        seen = seen_through(layer, seen)
    return beyond_cell(seen, stride)


def radius_of(
    net: Callable[[torch.Tensor], torch.Tensor],
    stride: int,
    ndim: int = 2,
    channels: int = 1,
    window: int = 64,
    fixed: bool = False,
    budget: int = 2**17,
) -> Radius:
    shape = [window] * ndim
    return measure_radius(net, channels, stride, shape, fixed=fixed, budget=budget, seed=0)


STACKS: list[tuple[int, list[Layer]]] = [
    (1, [("conv", 1, 1, 1)]),
    (1, [("conv", 3, 1, 1), ("conv", 5, 1, 1)]),
    (1, [("conv", 3, 1, 1), ("conv", 3, 1, 4), ("conv", 3, 1, 16), ("conv", 3, 1, 40)]),
    (2, [("conv", 3, 2, 1), ("conv", 3, 1, 1), ("up", 2, 2, 1), ("conv", 3, 1, 1)]),
    (4, [("conv", 7, 2, 1), ("pool", 2, 2, 1), ("conv", 3, 1, 2), ("up", 4, 4, 1), ("conv", 3, 1, 1)]),
    (8, [("conv", 3, 1, 1), ("pool", 8, 8, 1), ("conv", 3, 1, 1), ("up", 2, 2, 1), ("up", 4, 4, 1)]),
    (3, [("conv", 4, 3, 1), ("conv", 3, 1, 1), ("up", 3, 3, 1), ("conv", 5, 1, 1)]),
]


@pytest.mark.parametrize(("stride", "layers"), STACKS)
def test_radius_of_a_stack_is_the_arithmetic_of_its_layers(stride: int, layers: list[Layer]) -> None:
    window = 24 * stride
    expected = analytic(layers, stride)
    assert radius_of(stack(layers, 2), stride, window=window).values == (expected, expected)


@settings(max_examples=8, deadline=None)
@given(
    down=st.lists(
        st.tuples(st.just("conv"), st.sampled_from([1, 3, 5, 7]), st.sampled_from([1, 2]), st.integers(1, 3)),
        min_size=1,
        max_size=4,
    ),
    after=st.sampled_from([1, 3, 5]),
)
def test_radius_of_any_stack(down: list[Layer], after: int) -> None:
    stride = int(np.prod([layer[2] for layer in down]))
    layers: list[Layer] = [*down, ("up", stride, stride, 1), ("conv", after, 1, 1)]
    expected = analytic(layers, stride)
    assert radius_of(stack(layers, 2), stride).values == (expected, expected)


def test_each_axis_has_its_own_radius_in_3d() -> None:
    net = nn.Sequential(
        nn.Conv3d(1, 4, (1, 3, 5), padding=(0, 1, 2)),
        nn.ReLU(),
        nn.Conv3d(4, 2, (3, 1, 5), padding=(1, 0, 2)),
    )
    assert radius_of(net.eval(), 1, ndim=3, window=32).values == (1, 1, 4)


def test_neither_dead_units_nor_a_runtime_that_drops_nan_hide_the_radius() -> None:
    """The first layer answers nothing to ordinary input; the second net never sees a NaN."""
    layers: list[Layer] = [("conv", 5, 1, 1), ("conv", 3, 1, 4)]
    dead = stack(layers, 2)
    first = dead[0]
    assert isinstance(first, nn.Conv2d) and first.bias is not None
    with torch.no_grad():
        first.bias.fill_(-1000.0)
    net = stack([*layers, *[("conv", 3, 1, 1)] * 12], 2)
    assert radius_of(dead, 1).values == (6, 6)
    assert radius_of(lambda x: dead(x.nan_to_num(0.0)), 1).values == (6, 6)
    assert radius_of(lambda x: net(x.nan_to_num(0.0)), 1, window=128).values == (18, 18)


def gradient_radius(net: nn.Module, stride: int, channels: int, edge: int) -> int:
    """How far beyond the middle stride cell its outputs have a gradient, in float64; several inputs, since
    a ReLU or a maximum passes only some of it."""
    net = net.double()
    start = edge // 2 // stride * stride
    support = torch.zeros(edge, dtype=torch.bool)
    for seed in range(12):
        x = torch.randn(1, channels, edge, edge, generator=torch.Generator().manual_seed(seed)).double()
        x.requires_grad_()
        cell = net(x)[..., start : start + stride, start : start + stride]
        weights = torch.randn(cell.shape, generator=torch.Generator().manual_seed(seed)).double()
        (grad,) = torch.autograd.grad((cell * weights).sum(), x)
        support |= (grad != 0).any(0).any(0).any(1)
    net.float()
    at = support.nonzero()
    return beyond_cell((int(at[0]) - start, int(at[-1]) - start), stride)


@pytest.mark.parametrize(
    ("net", "stride", "channels"),
    [(small_smp(), 4, 2), (small_monai(2), 2, 1), (Pyramid(2, 1, 3).eval(), 2, 1)],
)
def test_radius_is_where_the_gradient_ends(net: nn.Module, stride: int, channels: int) -> None:
    expected = gradient_radius(net, stride, channels, edge=120)
    assert radius_of(net, stride, channels=channels).values == (expected, expected)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(1, 8, 4, 4)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x)
        flat = tokens.flatten(2).transpose(1, 2)
        mixed = self.mix(flat, flat, flat, need_weights=False)[0].transpose(1, 2).reshape(tokens.shape)
        return functional.interpolate(mixed, scale_factor=4.0)


def with_global_mean(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, functional.adaptive_avg_pool2d(x, 1).expand_as(x)], 1)


@pytest.mark.parametrize(
    ("net", "stride", "ndim"),
    [
        (with_global_mean, 1, 2),
        (nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4)).eval(), 1, 2),
        (small_monai(2, "instance"), 2, 2),
        (small_monai(3, "instance"), 2, 3),
        (nn.Sequential(nn.Conv2d(1, 8, 1), torchvision.ops.SqueezeExcitation(8, 2)).eval(), 1, 2),
        (Attention().eval(), 4, 2),
    ],
    ids=["pool", "instance", "monai2d", "monai3d", "squeeze", "attention"],
)
def test_no_radius_where_outputs_depend_on_everything(
    net: Callable[[torch.Tensor], torch.Tensor], stride: int, ndim: int
) -> None:
    found = radius_of(net, stride, ndim, budget=2**15)
    assert found.values is None
    assert "up to the ends of a probe" in found.reason


def coordinates(x: torch.Tensor) -> torch.Tensor:
    return x + torch.linspace(0, 1, x.shape[-1])


def patches_of_four(x: torch.Tensor) -> torch.Tensor:
    means = functional.avg_pool2d(x, 4, ceil_mode=True)
    return functional.interpolate(means, scale_factor=4.0)[..., : x.shape[2], : x.shape[3]]


def corners_aligned(x: torch.Tensor) -> torch.Tensor:
    return functional.interpolate(
        functional.avg_pool2d(x, 2), x.shape[2:], mode="bilinear", align_corners=True
    )


@pytest.mark.parametrize(("net", "stride"), [(coordinates, 1), (patches_of_four, 2), (corners_aligned, 2)])
@pytest.mark.parametrize("fixed", [False, True])
def test_no_radius_where_the_answer_depends_on_where_a_window_begins(
    net: Callable[[torch.Tensor], torch.Tensor], stride: int, fixed: bool
) -> None:
    found = radius_of(net, stride, fixed=fixed)
    assert found.values is None
    assert "where a window begins" in found.reason
    assert radius_of(patches_of_four, 4, fixed=fixed).values == (0, 0)


def test_a_radius_larger_than_the_probe_is_not_claimed() -> None:
    """Radius 40 + 1: seen in a window of 128, not of 80, which leaves less than that on either side."""
    net = stack([("conv", 3, 1, 40), ("conv", 3, 1, 1)], 2)
    assert radius_of(net, 1, window=128, fixed=True) == Radius((41, 41), 128, "")
    small = radius_of(net, 1, window=80, fixed=True)
    assert (small.values, small.probed) == (None, 80)


def resnet18_unet(stride: int = 32) -> int:
    """Radius of smp's U-Net on ResNet-18 by the arithmetic of its layers, as published: 7 × 7 stem, pool, two
    basic blocks a stage; decoder: up by 2, skip, two convolutions; a head of 3 × 3."""
    three: Layer = ("conv", 3, 1, 1)
    strided: Layer = ("conv", 3, 2, 1)
    stages: list[list[Layer]] = [[("conv", 7, 2, 1)], [strided, *[three] * 4], *[[strided, *[three] * 3]] * 3]

    def encoder(level: int, seen: Interval) -> Interval:
        for stage in reversed(stages[:level]):
            for layer in reversed(stage):
                seen = seen_through(layer, seen)
        return seen

    def decoder(level: int, out: Interval) -> Interval:
        """From the decoder's output at 1/2**level of the resolution."""
        if level == 5:
            return encoder(5, out)
        inner = seen_through(three, seen_through(three, out))
        deeper = decoder(level + 1, seen_through(("up", 2, 2, 1), inner))
        skip = encoder(level, inner) if level else deeper
        return min(deeper[0], skip[0]), max(deeper[1], skip[1])

    return beyond_cell(decoder(0, seen_through(three, (0, stride - 1))), stride)


@pytest.mark.slow
def test_unet_on_resnet18() -> None:
    """281 elements of context; published as 286, which is how far the change of one column can be seen."""
    torch.manual_seed(0)
    net = smp.Unet("resnet18", encoder_weights=None, in_channels=3, classes=3).eval()
    found = radius_of(net, 32, channels=3, window=512)
    assert resnet18_unet() == 281
    assert (found.values, found.probed) == ((281, 281), 1024)
    x = torch.randn(1, 3, 1024, 64)
    x[:, :, 512] = torch.nan
    with torch.no_grad():
        seen = net(x).isnan().any(1).any(2)[0].nonzero()
    assert int(seen[-1]) - 512 == 286


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["DeepLabV3Plus", "PSPNet", "Unet"])
def test_published_architectures_with_global_pooling_have_no_radius(architecture: str) -> None:
    torch.manual_seed(0)
    encoder = "efficientnet-b0" if architecture == "Unet" else "resnet18"
    net = getattr(smp, architecture)(encoder, encoder_weights=None, in_channels=3, classes=3).eval()
    assert radius_of(net, 32, channels=3, window=256).values is None


def test_a_network_that_takes_no_narrow_image_is_probed_by_wider_ones() -> None:
    torch.manual_seed(0)
    pan = smp.PAN("resnet18", encoder_weights=None, in_channels=1, classes=2).eval()
    with pytest.raises(RuntimeError, match="Output size is too small"), torch.inference_mode():
        pan(torch.zeros(1, 1, 256, 64))  # the width of a probe
    found = measure_radius(pan, 1, 16, (256, 256), fixed=False, budget=2**18, seed=0)
    assert found.values is None  # it pools the whole image
    assert "outputs change up to the ends" in found.reason
