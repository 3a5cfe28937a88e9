"""The halo against tiles in float64, and the seams against filters of scipy."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter
from scipy import ndimage
from torch import nn
from torch.nn import functional

from segpipe.config.card import load_card
from segpipe.errors import RequestError
from segpipe.inference.receptive_field.reach import Reach, largest_halo, measure_reach, natural_noise
from segpipe.models.registry import load_model
from segpipe.tiling.windows import make_lattice
from tests.inference.lab import RADIUS, STRIDE, Lab, Pyramid
from tests.inference.reach_nets import Layer, small_monai, small_smp, stack

pytestmark = pytest.mark.usefixtures("one_thread")


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
    assert TypeAdapter(Reach).validate_python(json.loads(json.dumps(asdict(one)))) == one
    finite = measure_reach(blur(2, 0.5), 1, 2, 1, (32, 32), activation="none")
    assert TypeAdapter(Reach).validate_python(json.loads(json.dumps(asdict(finite)))) == finite


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
