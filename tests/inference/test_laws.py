"""Laws 1, 2, 4, 5 and 8 of the design, over random scenes, through the real store and files."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inference.lab import CLASSES, RADIUS, STRIDE, Lab, Pyramid, labels_of, predict, prepared, scores_of

FEW = settings(max_examples=15, deadline=None)
FEWER = settings(max_examples=8, deadline=None)


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with tempfile.TemporaryDirectory() as folder:
        yield Lab(Path(folder))


def noise(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Smooth enough that classes form patches, uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(size=tuple(n // 4 + 2 for n in shape))
    for axis, n in enumerate(shape):
        coarse = np.take(coarse, np.minimum(np.arange(n) // 4, coarse.shape[axis] - 1), axis=axis)
    return ((coarse + rng.normal(scale=0.3, size=shape)) * 40 + 128).clip(0, 255).astype(np.uint8)


VOLUME_WINDOW = 20

NORMAL = [{"op": "subtract", "value": [128]}, {"op": "divide", "value": [40]}]


def sizes(low: int, high: int, ndim: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.tuples(*[st.integers(low, high)] * ndim)


@FEW
@given(
    shape=sizes(1, 100, 2),
    window=st.sampled_from([16, 32, 48]),
    block=sizes(1, 70, 2),
    blend=st.sampled_from(["trim", "gaussian"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_law_1_raster_labels_do_not_depend_on_the_partition(
    lab: Lab,
    shape: tuple[int, int],
    window: int,
    block: tuple[int, int],
    blend: str,
    seed: int,
    data: st.DataObject,
) -> None:
    """Bit for bit: any block size, any order, any grouping into calls; holes of nodata included."""
    values = noise((1, *shape), seed)
    values[0, : shape[0] // 3, : shape[1] // 2] = 0
    ref = lab.raster(values, nodata=0)
    card = lab.card(2, input={"bands": ["b0"], "normalisation": NORMAL})
    tiling = {"window": window, "halo": 4, "blend": blend}
    one = prepared(lab.job(ref, card, f"a{ref.uri[-9:]}", tiling=tiling), ref)
    predict(one)
    other = prepared(
        lab.job(ref, card, f"b{ref.uri[-9:]}", tiling={**tiling, "block": "x".join(map(str, block))}), ref
    )
    assert one.predict.key == other.predict.key
    order = data.draw(st.permutations(list(other.plan.blocks.indices())))
    cut = data.draw(st.integers(0, len(order)))
    predict(other, order[:cut])
    predict(other, order[cut:])
    np.testing.assert_array_equal(labels_of(one), labels_of(other))
    expected_nodata = values[0] == 0
    np.testing.assert_array_equal(labels_of(one) == 255, expected_nodata)


@FEWER
@given(
    shape=sizes(1, 40, 3),
    block=sizes(5, 40, 3),
    blend=st.sampled_from(["trim", "gaussian"]),
    orientation=st.sampled_from([None, "RAS", "LPI", "SAR"]),
    spacing=st.sampled_from([None, [1.3, 0.8, 2.0]]),
    seed=st.integers(0, 99),
)
def test_law_1_volume_labels_do_not_depend_on_the_partition(
    lab: Lab,
    shape: tuple[int, int, int],
    block: tuple[int, int, int],
    blend: str,
    orientation: str | None,
    spacing: list[float] | None,
    seed: int,
) -> None:
    """The same on another grid than the native one: reoriented and resampled there and back."""
    affine = np.diag([-1.0, 1.2, 1.5, 1.0])
    ref = lab.volume(noise(shape, seed), affine)
    card = lab.card(3, input={"orientation": orientation, "spacing": spacing, "normalisation": NORMAL})
    tiling = {"window": 16, "halo": 4, "blend": blend}
    keys = []
    found = []
    for name, extra in (("one", {}), ("other", {"block": "x".join(map(str, block))})):
        out = f"{name}-{Path(ref.uri).name}"
        scene = prepared(lab.job(ref, card, out, tiling={**tiling, **extra}), ref)
        predict(scene)
        keys.append(scene.predict.key)
        found.append(labels_of(scene))
    assert keys[0] == keys[1]
    np.testing.assert_array_equal(found[0], found[1])


@FEW
@given(shape=sizes(1, 100, 2), window=st.sampled_from([20, 32, 34]), seed=st.integers(0, 99))
def test_law_2_tiled_equals_whole_in_2d(lab: Lab, shape: tuple[int, int], window: int, seed: int) -> None:
    """Sizes from one pixel to five windows; the halo is the radius."""
    assert tiled_from_whole(lab, noise((1, *shape), seed), window) <= 1e-5


@FEW
@given(shape=sizes(1, 100, 2), seed=st.integers(0, 99))
def test_gaussian_is_the_weighted_mean_of_its_windows(lab: Lab, shape: tuple[int, int], seed: int) -> None:
    """Against the formula, window by window in float64; weights sum to one up to the very edge."""
    values = noise((1, *shape), seed)
    ref = lab.raster(values)
    card = lab.card(2, input={"bands": ["b0"], "normalisation": NORMAL})
    tiling = {"window": 32, "halo": 8, "blend": "gaussian", "block": 24}
    scene = prepared(lab.job(ref, card, f"g-{Path(ref.uri).name}", True, tiling=tiling), ref)
    predict(scene)
    lattice = scene.plan.lattice
    padded = [(0, a.padded - a.size) for a in lattice.axes]
    x = torch.from_numpy(np.pad((values[0].astype(np.float32) - 128) / 40, padded))[None, None]
    edges = lattice.window_shape
    lines = [np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) for n in edges]
    weight = np.multiply.outer(*lines)
    weight = np.maximum(weight / weight.max(), 1e-8)
    total, weights = np.zeros((len(CLASSES), *x.shape[2:])), np.zeros(x.shape[2:])
    network = Pyramid(2, 1, len(CLASSES)).eval()
    for index in np.ndindex(*[len(a.origins) for a in lattice.axes]):
        part = lattice.window(index).slices
        with torch.no_grad():
            total[(slice(None), *part)] += network(x[(..., *part)]).softmax(1)[0].numpy() * weight
        weights[part] += weight
    expected = (total / weights)[(slice(None), *(slice(0, n) for n in shape))]
    np.testing.assert_allclose(scores_of(scene), expected, atol=1e-5)


@FEWER
@given(shape=sizes(1, 50, 3), seed=st.integers(0, 99))
def test_law_2_tiled_equals_whole_in_3d(lab: Lab, shape: tuple[int, int, int], seed: int) -> None:
    assert tiled_from_whole(lab, noise(shape, seed), VOLUME_WINDOW) <= 1e-5


def tiled_from_whole(lab: Lab, values: np.ndarray, window: int) -> float:
    """Greatest difference of a score from the scene in one pass by torch itself, padded with zeros at
    its trailing edge.

    Args: values: (1, y, x) for a raster, (z, y, x) for a volume.
    """
    ndim = 2 if values.shape[0] == 1 and window != VOLUME_WINDOW else 3
    ref = lab.raster(values) if ndim == 2 else lab.volume(values, np.eye(4))
    scene_values = values[0] if ndim == 2 else values
    bands = ["b0"] if ndim == 2 else []
    card = lab.card(ndim, input={"bands": bands, "normalisation": NORMAL})
    rest = [(0, -n % STRIDE) for n in scene_values.shape]
    x = np.pad((scene_values.astype(np.float32) - 128) / 40, rest)
    with torch.no_grad():
        out = Pyramid(ndim, 1, len(CLASSES)).eval()(torch.from_numpy(x)[None, None])
    whole = out.softmax(1)[0].numpy()[(slice(None), *(slice(0, n) for n in scene_values.shape))]
    tiling = {"window": window, "halo": RADIUS}
    scene = prepared(lab.job(ref, card, f"t-{Path(ref.uri).name}", True, tiling=tiling), ref)
    predict(scene)
    tiled = scores_of(scene)
    assert tiled.shape == whole.shape
    return float(np.abs(tiled - whole).max())  # NaN if any score is


@FEW
@given(shape=sizes(1, 150, 2), times=sizes(1, 3, 2))
def test_law_4_no_forward_pass_twice(lab: Lab, shape: tuple[int, int], times: tuple[int, int]) -> None:
    """Blocks of any multiple of the step: the network sees each lattice window once."""
    ref = lab.raster(noise((1, *shape), 1) | 1)
    step = 32 - 2 * 8
    block = "x".join(str(step * t) for t in times)
    scene = prepared(
        lab.job(
            ref, lab.card(2), f"n-{Path(ref.uri).name}", tiling={"window": 32, "halo": 8, "block": block}
        ),
        ref,
    )
    done = predict(scene)
    assert done.timings["passes"] == scene.plan.lattice.count == scene.plan.window_passes


def test_law_5_what_is_done_is_not_done_again(lab: Lab) -> None:
    ref = lab.raster(noise((1, 90, 90), 3))
    job = lab.job(ref, lab.card(2), "again", tiling={"window": 32, "halo": 8, "block": 16})
    scene = prepared(job, ref)
    total = scene.plan.blocks.count
    first = predict(scene, list(scene.plan.blocks.indices())[: total // 2])
    resumed = prepared(job, ref)
    second = predict(resumed)
    assert (first.computed, second.computed) == (total // 2, total - total // 2)
    assert predict(prepared(job, ref)).computed == 0


def test_windows_without_a_valid_pixel_are_not_computed(lab: Lab) -> None:
    values = noise((1, 64, 64), 5) | 1
    values[0, :, :40] = 0
    ref = lab.raster(values, nodata=0)
    scene = prepared(lab.job(ref, lab.card(2), "empty", tiling={"window": 32, "halo": 8, "block": 16}), ref)
    done = predict(scene)
    skipped = sum(r["skipped"] for r in scene.predict.receipts().values())
    assert done.timings["passes"] + skipped == scene.plan.window_passes
    assert skipped > 0
    assert (labels_of(scene)[:, :40] == 255).all()


def test_law_8_scene_statistics_do_not_depend_on_tiling_or_store(lab: Lab) -> None:
    """Quantiles and z-scores are the scene's: equal to numpy's over all valid pixels."""
    values = noise((1, 70, 90), 9)
    values[0, :10] = 0
    ref = lab.raster(values, nodata=0)
    steps = [{"op": "scene_quantiles", "low": 0.02, "high": 0.98}, {"op": "scene_zscore"}]
    card = lab.card(2, input={"bands": ["b0"], "normalisation": steps})
    found = []
    for out, tiling in (("s1", {"block": 16}), ("s2", {"block": 64}), ("s3", {"store": "direct"})):
        scene = prepared(lab.job(ref, card, out, tiling={"window": 32, "halo": 8, **tiling}), ref)
        predict(scene)
        found.append((scene.statistics, labels_of(scene)))
    valid = values[0][values[0] != 0].astype(np.float64)
    low, high = np.quantile(valid, [0.02, 0.98])
    scaled = ((valid - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(found[0][0][0], [(low, high)], rtol=1e-6)
    np.testing.assert_allclose(found[0][0][1], [(scaled.mean(), scaled.std())], rtol=1e-5)
    for statistics, labels in found[1:]:
        assert statistics == found[0][0]
        np.testing.assert_array_equal(labels, found[0][1])


def test_flips_are_the_mean_over_all_mirror_images(lab: Lab) -> None:
    values = noise((1, 32, 32), 11)
    ref = lab.raster(values)
    card = lab.card(2, input={"bands": ["b0"], "normalisation": NORMAL})
    scene = prepared(lab.job(ref, card, "tta", True, compute={"tta": "flips"}), ref)
    predict(scene)
    x = torch.from_numpy((values.astype(np.float32) - 128) / 40)[None]
    net = Pyramid(2, 1, len(CLASSES)).eval()
    with torch.no_grad():
        views = [
            net(x.flip(v)).softmax(1).flip(v) for n in range(3) for v in itertools.combinations((2, 3), n)
        ]
    np.testing.assert_allclose(scores_of(scene), torch.stack(views).mean(0)[0].numpy(), atol=1e-5)
