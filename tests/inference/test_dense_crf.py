"""The dense CRF against mean field with all pairs written out, scipy's Gaussian filter, and its own reach."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from segpipe.inference.dense_crf import PROBABILITY_FLOOR, dense_crf

KERNELS: dict[str, Any] = {
    "appearance_weight": 4.0,
    "appearance_sigma": 3.0,
    "image_sigma": 0.7,
    "smooth_weight": 2.0,
    "smooth_sigma": 1.3,
}


def scene(
    shape: tuple[int, ...], classes: int = 3, bands: int = 2, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities (k, …) and image (c, …), random, float32."""
    rng = np.random.default_rng(seed)
    p = np.moveaxis(rng.dirichlet(np.ones(classes), shape), -1, 0)
    return p.astype(np.float32), rng.normal(size=(bands, *shape)).astype(np.float32)


def crf(p: np.ndarray, image: np.ndarray, valid: np.ndarray | None = None, **arguments: Any) -> np.ndarray:
    mask = None if valid is None else torch.from_numpy(valid)
    return dense_crf(
        torch.from_numpy(p), torch.from_numpy(image), valid=mask, **{**KERNELS, **arguments}
    ).numpy()


def all_pairs(
    p: np.ndarray,
    image: np.ndarray,
    *,
    iterations: int,
    radius: int,
    appearance_weight: float,
    appearance_sigma: float,
    image_sigma: float,
    smooth_weight: float,
    smooth_sigma: float,
    valid: np.ndarray | None = None,
) -> np.ndarray:
    """Algorithm 1 of Krähenbühl and Koltun 2011 with one matrix of all pairs, float64."""
    space = p.shape[1:]
    keep = np.ones(space, bool) if valid is None else valid
    places = np.argwhere(keep).astype(float)
    apart = places[:, None] - places
    square = (apart**2).sum(-1)
    colours = image[:, keep].T.astype(float) / image_sigma
    colour = ((colours[:, None] - colours) ** 2).sum(-1)
    inside = np.abs(apart).max(-1) <= radius
    appearance = np.exp(-square / (2 * appearance_sigma**2) - colour / 2) * inside
    smooth = np.exp(-square / (2 * smooth_sigma**2)) * inside
    kernel = np.zeros_like(square)
    for weight, k in ((appearance_weight, appearance), (smooth_weight, smooth)):
        n = np.diag(1 / np.sqrt(k.sum(1)))
        kernel += weight * n @ k @ n
    np.fill_diagonal(kernel, 0)
    k = len(p)
    disagree = 1 - np.eye(k)  # Potts
    unary = -np.log(np.maximum(p[:, keep].astype(float), PROBABILITY_FLOOR))
    q = np.exp(-unary) / np.exp(-unary).sum(0)
    for _ in range(iterations):
        q = np.exp(-unary - disagree @ (q @ kernel))
        q /= q.sum(0)
    out = p.astype(float)
    out[:, keep] = q
    return out


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=2, max_size=3),
    st.integers(2, 4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 1000),
)
def test_mean_field_is_that_of_all_pairs(shape, classes, bands, iterations, radius, seed):
    """Radius 5 and more: every pair of the image. Below: those within the window."""
    p, image = scene(tuple(shape), classes, bands, seed)
    expected = all_pairs(p, image, iterations=iterations, radius=radius, **KERNELS)
    found = crf(p, image, iterations=iterations, radius=radius)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(found.sum(0), 1, atol=1e-5)


def test_smoothing_alone_is_scipys_gaussian_filter_in_the_exponent():
    p, image = scene((23, 31), seed=4)
    sigma, radius, weight = 1.3, 4, 2.0
    at = np.arange(-radius, radius + 1)
    total = np.exp(-(at**2) / (2 * sigma**2)).sum() ** 2  # scipy divides by the kernel's sum

    def filtered(values: np.ndarray) -> np.ndarray:
        return total * gaussian_filter(values.astype(float), sigma, mode="constant", radius=radius)

    n = np.sqrt(filtered(np.ones(image.shape[1:])))
    messages = np.stack([(filtered(plane / n) - plane / n) / n for plane in p])
    expected = p * np.exp(weight * messages)
    expected /= expected.sum(0)
    found = crf(p, image, iterations=1, radius=radius, appearance_weight=0.0)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_two_elements_by_hand():
    """Alike and side by side: both kernels are e^(−1/2) before they are divided by 1 + e^(−1/2)."""
    p = torch.tensor([[[0.9, 0.4]], [[0.1, 0.6]]])
    found = dense_crf(
        p, torch.zeros(1, 1, 2), iterations=1, radius=1, appearance_sigma=1, smooth_sigma=1, image_sigma=1
    )
    pull = 13 * 0.60653066 / 1.60653066  # the default weights, 10 + 3
    odds = 0.4 / 0.6 * np.exp(pull * (0.9 - 0.1))
    assert float(found[0, 0, 1]) == pytest.approx(odds / (1 + odds), rel=1e-5)


def test_without_weights_nothing_changes():
    p, image = scene((6, 7))
    np.testing.assert_allclose(crf(p, image, appearance_weight=0.0, smooth_weight=0.0), p, atol=2e-5)


def test_a_sigma_for_each_band():
    p, image = scene((8, 9))
    scaled = image / np.array([0.5, 3], np.float32)[:, None, None]
    np.testing.assert_allclose(
        crf(p, image, image_sigma=[0.5, 3.0]), crf(p, scaled, image_sigma=1.0), atol=1e-5
    )


def test_elements_without_values_take_no_part():
    p, image = scene((6, 7))
    valid = np.random.default_rng(1).random((6, 7)) < 0.7
    image[:, ~valid] = np.nan
    p[0, ~valid] = np.nan
    arguments = {"iterations": 3, "radius": 2}
    found = crf(p, image, valid, **arguments)
    expected = all_pairs(p, image, valid=valid, **arguments, **KERNELS)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.array_equal(found[:, ~valid], p[:, ~valid], equal_nan=True)


@pytest.mark.parametrize(("iterations", "radius"), [(1, 1), (2, 3), (3, 2)])
def test_the_reach_is_exact(iterations, radius):
    """One element's image changes answers as far away as the reach, and none beyond."""
    middle = 15
    p, image = scene((31, 31), classes=2, seed=2)
    p = np.clip(p, 0.4, 0.6)
    flat = {"appearance_sigma": 30.0, "image_sigma": 2.0, "iterations": iterations, "radius": radius}
    before = crf(p, image, **flat)

    def distance(p: np.ndarray, image: np.ndarray) -> int:
        changed = (crf(p, image, **flat) != before).any(0)
        return int(np.abs(np.argwhere(changed) - middle).max())

    other_image, other_p = image.copy(), p.copy()
    other_image[:, middle, middle] += 50
    other_p[:, middle, middle] = [0, 1]
    assert distance(p, other_image) == (iterations + 1) * radius
    assert distance(other_p, image) == iterations * radius


@pytest.mark.parametrize("margin", [0, 1])
def test_tiles_with_the_reach_as_halo_are_the_whole(margin):
    """And with two radii less they are not."""
    arguments = {"iterations": 3, "radius": 2}
    halo = (arguments["iterations"] + 1 - 2 * margin) * arguments["radius"]
    p, image = scene((37, 50), seed=5)
    valid = np.random.default_rng(5).random((37, 50)) < 0.9
    whole = crf(p, image, valid, **arguments)
    tiled = np.zeros_like(whole)
    edge = 16
    for y, x in itertools.product(range(0, 37, edge), range(0, 50, edge)):
        top, left = max(0, y - halo), max(0, x - halo)
        window = (slice(top, y + edge + halo), slice(left, x + edge + halo))
        answer = crf(p[:, *window], image[:, *window], valid[window], **arguments)
        part = answer[:, y - top : y - top + edge, x - left : x - left + edge]
        tiled[:, y : y + edge, x : x + edge] = part
    error = float(np.abs(tiled - whole).max())
    assert error < 1e-6 if margin == 0 else error > 1e-5


def test_speckles_go_and_edges_follow_the_image():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:40, :40]
    truth = ((y - 20) ** 2 + (x - 20) ** 2 < 150).astype(int)
    image = np.where(truth, 200, 60)[None] + rng.normal(0, 6, (1, 40, 40))
    said = np.roll(truth, 2, axis=1)  # two elements off the mark
    said = np.where(rng.random((40, 40)) < 0.15, 1 - said, said)
    p = np.where(np.arange(2)[:, None, None] == said, 0.7, 0.3).astype(np.float32)
    found = {
        weight: crf(p, image.astype(np.float32), appearance_weight=weight, image_sigma=13.0).argmax(0)
        for weight in (10.0, 0.0)
    }
    assert (p.argmax(0) == truth).mean() < 0.85
    assert (found[10.0] == truth).all()
    assert 0 < (found[0.0] != truth).mean() < 0.15  # smoothing alone: no speckles, but the edge stays wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"iterations": 0}, "iterations 0"),
        ({"radius": 0}, "radius 0"),
        ({"smooth_weight": -1.0}, "weights"),
        ({"appearance_sigma": 0.0}, "sigmas"),
        ({"image_sigma": [1.0, 2.0, 3.0]}, "image_sigma: found .* valid: 1 or 2 numbers above 0"),
        ({"image_sigma": 0.0}, "image_sigma"),
        ({"valid": np.ones((4, 4), bool)}, r"valid: found torch.bool \(4, 4\)"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments, message):
    p, image = scene((4, 5))
    with pytest.raises(ValueError, match=message):
        crf(p, image, **arguments)


def test_grids_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"probabilities \(3, 4, 5\), image \(2, 5, 4\)"):
        crf(scene((4, 5))[0], scene((5, 4))[1])


def test_a_cards_crf_is_the_function_on_each_window(tmp_path) -> None:
    """Through the engine: a scene of one window has the labels of the network's probabilities, refined."""
    from segpipe.inference.dense_crf import dense_crf
    from tests.inference.lab import STRIDE, Lab, labels_of, patches, predict, prepared

    lab, values = Lab(tmp_path), patches((64, 64), seed=3)
    crf = {"iterations": 4, "radius": 4, "image_sigma": 0.5}
    steps = [{"op": "subtract", "value": [128]}, {"op": "divide", "value": [40]}]
    window = {"size": [64], "halo": [0], "stride": STRIDE}
    found = {}
    for name, output in (("plain", {}), ("crf", {"crf": crf})):
        card = lab.card(2, window=window, output=output, input={"bands": ["b0"], "normalisation": steps})
        scene = prepared(lab.job(lab.raster(values), card, name, scores=True), lab.raster(values))
        predict(scene)
        found[name] = np.asarray(scene.predict.array("scores")[...]), labels_of(scene)
    image = torch.from_numpy((values.astype(np.float32) - 128) / 40)
    wanted = dense_crf(torch.from_numpy(found["plain"][0]), image, **crf)
    assert np.allclose(found["crf"][0], wanted.numpy(), atol=1e-6)
    assert (found["crf"][1] != found["plain"][1]).any()
