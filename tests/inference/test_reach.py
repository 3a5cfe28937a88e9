"""The reach against integer arithmetic on layers, against gradients, and against tiles in float64."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import monai
import numpy as np
import pytest
import segmentation_models_pytorch as smp
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import nn
from torch.nn import functional

from segpipe.errors import RequestError
from segpipe.inference.reach import Reach, largest_halo, measure_reach, natural_noise
from segpipe.inference.reach_probe import Radius, measure_radius
from segpipe.lattice import make_lattice
from segpipe.models.card import load_card
from segpipe.models.registry import load_model
from tests.inference.lab import RADIUS, STRIDE, Lab, Pyramid

Interval = tuple[int, int]
"""First and last element along one axis."""
Layer = tuple[str, int, int, int]
"""conv: kernel, stride, dilation. pool, up: factor twice, and 1."""


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


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


def analytic(layers: Sequence[Layer], stride: int) -> int:
    seen = (0, stride - 1)
    for layer in reversed(layers):
        seen = seen_through(layer, seen)
    return beyond_cell(seen, stride)


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


def padded(x: torch.Tensor, stride: int) -> torch.Tensor:
    rest = [(0, -n % stride) for n in reversed(x.shape[2:])]
    return functional.pad(x, [n for pair in rest for n in pair])


def tiled(net: nn.Module, x: torch.Tensor, window: int, halo: Sequence[int], stride: int) -> torch.Tensor:
    """Window by window as the lattice lays them, each element from its owner."""
    shape = x.shape[2:]
    x = padded(x, stride)
    lattice = make_lattice(shape, [window] * len(shape), halo, stride)
    out = torch.full((1, 3, *shape), torch.nan, dtype=x.dtype)
    for index in np.ndindex(*[len(a.origins) for a in lattice.axes]):
        seen, mine = lattice.window(index), lattice.owned(index)
        out[(0, slice(None), *mine.slices)] = net(x[(..., *seen.slices)])[
            (0, slice(None), *mine.within(seen))
        ]
    return out


@lru_cache
def family(name: str) -> tuple[nn.Module, int, int, int, int]:
    """Network, axes, channels, stride and a window."""
    dilated: list[Layer] = [("conv", 3, 1, 1), ("conv", 3, 1, 5)]
    return {
        "dilated": (stack(dilated, 2), 2, 1, 1, 24),
        "dilated 3d": (stack(dilated[:1], 3), 3, 1, 1, 8),
        "pyramid": (Pyramid(2, 1, 3).eval(), 2, 1, 2, 24),
        "pyramid 3d": (Pyramid(3, 1, 3).eval(), 3, 1, 2, 24),
        "monai": (small_monai(2), 2, 1, 2, 40),
        "smp": (small_smp(), 2, 2, 4, 160),
    }[name]


@lru_cache
def family_halo(name: str) -> tuple[int, ...]:
    net, ndim, channels, stride, window = family(name)
    reach = measure_reach(net.float(), channels, ndim, stride, (window,) * ndim, activation="softmax")
    assert reach.radius is not None
    assert reach.halo == tuple(-(-r // stride) * stride for r in reach.radius)
    return reach.halo


def law_2_error(name: str, shape: Sequence[int], less: int, seed: int) -> float:
    """Largest difference of tiles from the whole, in float64, so that the weakest outermost tap shows."""
    halo = [h - less for h in family_halo(name)]
    net, _, channels, stride, window = family(name)
    x = torch.randn(1, channels, *shape, generator=torch.Generator().manual_seed(seed)).double()
    with torch.no_grad():
        net.double()
        whole = net(padded(x, stride))[(..., *(slice(0, n) for n in shape))]
        return float((tiled(net, x, window, halo, stride) - whole).abs().max())


@pytest.mark.parametrize("name", ["dilated", "dilated 3d", "pyramid", "pyramid 3d", "monai"])
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_law_2_with_the_measured_halo_tiles_equal_the_whole(name: str, data: st.DataObject) -> None:
    """From one pixel to several windows."""
    _, ndim, _, _, window = family(name)
    shape = data.draw(st.tuples(*[st.integers(1, (4 if ndim == 2 else 2) * window)] * ndim))
    assert law_2_error(name, shape, 0, data.draw(st.integers(0, 99))) <= 1e-10  # NaN if one is not answered


@pytest.mark.parametrize("shape", [(1, 1), (7, 200), (320, 250)])
def test_law_2_for_a_unet_on_a_residual_encoder(shape: tuple[int, int]) -> None:
    assert law_2_error("smp", shape, 0, 0) <= 1e-10


@pytest.mark.parametrize("name", ["dilated", "dilated 3d", "pyramid", "pyramid 3d", "monai", "smp"])
def test_with_a_halo_of_one_stride_less_tiles_differ(name: str) -> None:
    _, ndim, _, stride, window = family(name)
    shape = (2 * window, *[window] * (ndim - 1))
    assert law_2_error(name, shape, stride, 0) > 1e-9


def test_the_laboratorys_network_has_the_halo_that_its_author_counted() -> None:
    """Skip: 1 + 1. Through the pool: 1 + 2·(1 + 1) + 1 less the cell's own element: 5, rounded up to 6."""
    found = measure_reach(Pyramid(2, 1, 3).eval(), 1, 2, STRIDE, (32, 32), activation="softmax")
    assert found.radius == (5, 5)
    assert found.halo == (RADIUS, RADIUS)
    below = [row for row in found.seams if row[0] < RADIUS]
    assert all(row[2] > 1e-3 for row in below) and len(below) == 3
    assert all(row[2] <= 1e-5 for row in found.seams if row[0] >= RADIUS)


@pytest.mark.parametrize("fixed", [False, True])
def test_an_onnx_model_through_its_card(tmp_path: Path, fixed: bool) -> None:
    """No gradients there; the fixed file takes 32 × 32 only."""
    buffer = io.BytesIO()
    axes = None if fixed else {name: {2: "y", 3: "x"} for name in ("in", "out")}
    torch.onnx.export(
        Pyramid(2, 1, 3).eval(),
        (torch.zeros(1, 1, 32, 32),),
        buffer,
        dynamo=False,
        input_names=["in"],
        output_names=["out"],
        dynamic_axes=axes,
    )
    (tmp_path / "pyramid.onnx").write_bytes(buffer.getvalue())
    window = {"size": [32], "halo": [0], "stride": STRIDE, "fixed": fixed}
    changes = {"provider": "onnx", "allow_torchscript": False, "weights": "pyramid.onnx", "window": window}
    card = load_card(Lab(tmp_path).card(2, **changes))
    model = load_model(card, "cpu", 1, "fp32")
    found = measure_reach(model, 1, 2, STRIDE, (32, 32), activation="softmax", fixed=fixed)
    assert (found.radius, found.halo) == ((5, 5), (6, 6))
    assert {halo: change <= 1e-5 for halo, _, change in found.seams} == {
        0: False,
        2: False,
        4: False,
        6: True,
        8: True,
    }


def blur(radius: int, threshold: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Probabilities of two classes: a box mean, zero beyond the border, and a constant."""

    def net(x: torch.Tensor) -> torch.Tensor:
        mean = functional.avg_pool2d(x, 2 * radius + 1, 1, radius)
        return torch.cat([mean, torch.full_like(mean, threshold)], 1)

    return net


@pytest.mark.parametrize(("window", "radius", "fixed"), [(32, 10, False), (64, 20, True)])
@pytest.mark.parametrize("small", [False, True])
def test_seams_of_a_box_mean_are_those_of_ndimage(window: int, radius: int, fixed: bool, small: bool) -> None:
    """Of a constant scene, and of a few elements of it, mirrored: the mean falls towards a window's edges."""
    threshold = 0.9
    shape = (3, 5) if small else (130, 140)
    found = measure_reach(
        blur(radius, threshold),
        1,
        2,
        1,
        (window, window),
        activation="none",
        sample=torch.ones(1, 1, *shape),
        fixed=fixed,
    )
    mean = ndimage.uniform_filter(np.ones((window, window)), 2 * radius + 1, mode="constant")
    assert found.radius == (radius, radius)
    assert [row[0] for row in found.seams][:6] == [0, 1, 2, 3, 4, 6]
    for halo, share, change in found.seams:
        kept = mean[halo : window - halo, halo : window - halo]
        assert share == pytest.approx((kept < threshold).mean(), abs=1e-12)
        assert change == pytest.approx(1 - kept.min(), abs=1e-5)
    assert found.halo == (window // 4,) * 2  # none reaches the tolerance: the best
    assert "none up to" in found.note


def test_the_smallest_halo_within_the_tolerance_is_taken() -> None:
    """A mean of 0.6 is reached at depth 6 in the corner: (7 + 10 of 21)² = 0.655; at depth 4 it is 0.510."""
    sample = torch.ones(1, 1, 100, 100)
    found = measure_reach(blur(10, 0.6), 1, 2, 1, (32, 32), activation="none", sample=sample)
    assert found.halo == (6, 6)
    mean = ndimage.uniform_filter(np.ones((32, 32)), 21, mode="constant")
    shares = {h: (mean[h : 32 - h, h : 32 - h] < 0.6).mean() for h in (3, 4)}
    loose = measure_reach(
        blur(10, 0.6), 1, 2, 1, (32, 32), activation="none", sample=sample, tolerance=sum(shares.values()) / 2
    )
    assert shares[4] < shares[3]
    assert loose.halo == (4, 4)


def test_no_halo_is_bought_where_none_helps() -> None:
    """Bright inside the window, dark around it: the class by the mean of what is seen is wrong everywhere."""
    sample = torch.zeros(1, 1, 98, 98)
    sample[..., 33:65, 33:65] = 1
    found = measure_reach(
        lambda x: torch.cat([x.mean() + 0 * x, 0.5 + 0 * x], 1),
        1,
        2,
        1,
        (32, 32),
        activation="none",
        sample=sample,
    )
    assert found.radius is None
    assert found.halo == (0, 0)
    outside = 32**2 / 98**2
    for _, share, change in found.seams:
        assert (share, change) == (1.0, pytest.approx(1 - outside, abs=1e-5))


def test_sigmoid_has_two_classes() -> None:
    """Logit of the blurred field less its threshold: the class changes where the mean is below it."""
    found = measure_reach(
        lambda x: functional.avg_pool2d(x, 21, 1, 10) - 0.6,
        1,
        2,
        1,
        (32, 32),
        activation="sigmoid",
        sample=torch.ones(1, 1, 60, 60),
    )
    mean = ndimage.uniform_filter(np.ones((32, 32)), 21, mode="constant")
    _, share, change = found.seams[0]
    assert share == pytest.approx((mean < 0.6).mean())
    at = 1 / (1 + np.exp(-(np.array([1.0, mean.min()]) - 0.6)))
    assert change == pytest.approx(at[0] - at[1], abs=1e-5)


def test_axes_with_small_windows_have_smaller_halos() -> None:
    """A thin window: its halo ends at a quarter of it while that of the other axis goes on."""
    found = measure_reach(
        blur(10, 0.7), 1, 2, 1, (16, 64), activation="none", sample=torch.ones(1, 1, 60, 200)
    )
    assert (largest_halo(16, 1), largest_halo(64, 1)) == (4, 16)
    mean = ndimage.uniform_filter(np.ones((16, 64)), 21, mode="constant")
    for halo, share, _ in found.seams:
        thin = min(halo, 4)
        kept = mean[thin : 16 - thin, halo : 64 - halo]
        assert share == pytest.approx((kept < 0.7).mean(), abs=1e-12)
    # At depth 4 the thin axis sees 15 of 21: the other must see all 21 (0.714), as it does at depth 10.
    assert found.halo == (4, 10)


@pytest.mark.parametrize("shape", [(256, 256), (64, 64, 64)])
def test_synthetic_noise_has_the_spectrum_of_natural_images(shape: tuple[int, ...]) -> None:
    """Field (1987): amplitude 1/f, so power falls with slope −2 on logarithmic axes."""
    noise = natural_noise(2, shape, 0)
    assert noise.shape == (1, 2, *shape) and noise.dtype == torch.float32
    assert noise.mean().abs() < 1e-4
    assert noise.std() == pytest.approx(1, abs=1e-3)
    power = np.abs(np.fft.fftn(noise[0, 0].numpy())) ** 2
    radial = np.sqrt(sum(f**2 for f in np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij")))
    inside = (radial > 0.05) & (radial < 0.5)
    slope = np.polyfit(np.log(radial[inside]), np.log(power[inside]), 1)[0]
    assert slope == pytest.approx(-2, abs=0.1)


def test_the_same_seed_gives_the_same_reach_also_through_json() -> None:
    net = small_monai(2, "instance")
    one, two = (measure_reach(net, 1, 2, 2, (32, 32), activation="softmax", seed=5) for _ in range(2))
    assert one == two
    assert one.radius is None
    assert Reach.from_json(json.loads(json.dumps(one.to_json()))) == one
    finite = measure_reach(blur(2, 0.5), 1, 2, 1, (32, 32), activation="none")
    assert Reach.from_json(json.loads(json.dumps(finite.to_json()))) == finite


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": (30, 32)}, "window: found"),
        ({"window": (32,)}, "window: found"),
        ({"sample": torch.zeros(1, 3, 64, 64)}, "sample: found shape"),
        ({"budget_elements": 500}, "budget_elements: found 500; valid: at least 1024"),
        ({"budget_elements": 1200, "window": (32, 32)}, "a window of 32 × 32 with one stride around it"),
        ({"predict": lambda x: x * torch.nan}, "answered with NaN"),
        ({"predict": lambda x: x[..., ::2, ::2]}, "the input's spatial shape"),
        ({"predict": lambda x: 1 / x, "sample": torch.zeros(1, 1, 64, 64)}, "answers the sample with NaN"),
    ],
)
def test_mistakes_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {"predict": lambda x: x, "window": (32, 32), **changes}
    predict, window = arguments.pop("predict"), arguments.pop("window")
    with pytest.raises(RequestError, match=message):
        measure_reach(predict, 1, 2, 4, window, activation="softmax", **arguments)  # type: ignore[arg-type]


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
