"""Classical methods as models: what the library says of the same whole array, or what must come out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from scipy import ndimage
from skimage import data, filters, graph, segmentation
from sklearn.metrics import cohen_kappa_score, jaccard_score

from segpipe.config.card import Card, load_card
from segpipe.errors import RequestError, SceneError
from segpipe.models.providers.classical.graphs import graph_cut, likeness
from segpipe.models.registry import check_card, load_model
from tests.inference.lab import Lab, labels_of, predict, prepared

WHOLE = {"size": "whole", "stride": 1}
SHARED = Path(__file__).parents[3] / "shared" / "data"
CONFIGS = Path(__file__).parents[2] / "configs" / "models"


@pytest.fixture
def photo() -> np.ndarray:
    """128 × 128, a dark figure before a bright sky."""
    return data.camera()[::4, ::4].astype(np.float32)


def card_of(make_card: Any, method: str, *, bands: int = 1, classes: int = 2, **fields: Any) -> Card:
    """A card of a method that looks at the whole scene."""
    fields = {"window": WHOLE, "output": {"activation": "none"}, **fields}
    return make_card("classical", "", architecture=method, bands=bands, classes=classes, **fields)


def answer(card: Card, scene: np.ndarray) -> np.ndarray:
    """Class indices of one window (c, …); the scores are 0 and 1 and add up to 1."""
    check_card(card)
    scores = load_model(card, "cpu", 1, "fp32")(torch.from_numpy(scene[None].astype(np.float32)))
    assert set(scores.unique().tolist()) <= {0.0, 1.0}
    assert bool((scores.sum(dim=1) == 1).all())
    return scores[0].argmax(dim=0).numpy()


def balls(shape: tuple[int, ...] = (24, 30, 36), noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A volume with two bright balls (100 on 20), and where they are."""
    axes = np.indices(shape)
    truth = np.zeros(shape, bool)
    for centre, radius in (((8, 9, 9), 6), ((14, 20, 25), 8)):
        offset = axes - np.array(centre).reshape(-1, 1, 1, 1)
        truth |= (offset**2).sum(axis=0) <= radius**2
    values = np.where(truth, 100, 20) + np.random.default_rng(3).normal(0, noise, shape)
    return values.astype(np.float32), truth


# -- thresholds -----------------------------------------------------------------------------------


def test_otsu_is_scikit_images_threshold_of_the_whole_image(make_card, photo):
    expected = photo > filters.threshold_otsu(photo)
    assert np.array_equal(answer(card_of(make_card, "otsu"), photo[None]), expected)


def test_otsu_finds_the_balls_of_a_volume(make_card):
    values, truth = balls(noise=5)
    card = card_of(make_card, "otsu", kind="volume", input={"bands": []})
    found = answer(card, values[None])
    assert np.array_equal(found, values > filters.threshold_otsu(values))
    assert (found != truth).mean() < 1e-3  # the threshold is a bin's centre, and some noise reaches above


@pytest.mark.parametrize("classes", [3, 4])
def test_multi_otsu_is_scikit_images(make_card, photo, classes):
    expected = np.digitize(photo, filters.threshold_multiotsu(photo, classes))
    assert len(np.unique(expected)) == classes
    assert np.array_equal(answer(card_of(make_card, "multi-otsu", classes=classes), photo[None]), expected)


def test_what_is_zero_in_every_band_has_no_say_in_a_raster(make_card, photo):
    """The engine puts 0 where a scene has no value; a card may say that its zeros are measured."""
    framed = np.zeros((300, 300), np.float32)
    framed[:128, :128] = photo + 1
    frameless = filters.threshold_otsu(photo + 1)
    assert filters.threshold_otsu(framed) < frameless - 5
    assert np.array_equal(answer(card_of(make_card, "otsu"), framed[None]), framed > frameless)
    card = card_of(make_card, "otsu", arguments={"nonzero": False})
    assert np.array_equal(answer(card, framed[None]), framed > filters.threshold_otsu(framed))


def test_features_combine_bands_by_name(make_card):
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 255, (3, 40, 50)).astype(np.float32)
    scene[:2, :5, :5] = 0  # nothing over nothing: an index of 0
    b0, b1, b2 = scene.astype(np.float64)
    index = np.where(b2 + b0 > 0, (b2 - b0) / np.maximum(b2 + b0, 1), 0)
    arguments = {"feature": {"normalised_difference": ["b2", "b0"]}, "thresholds": [-0.3, 0.25]}
    card = card_of(make_card, "multi-otsu", bands=3, classes=3, arguments=arguments)
    assert np.array_equal(answer(card, scene), np.digitize(index, [-0.3, 0.25]))
    arguments = {"feature": {"linear": {"b2": 2, "b1": -0.5}}, "thresholds": [200.25]}
    card = card_of(make_card, "otsu", bands=3, arguments=arguments)
    assert np.array_equal(answer(card, scene), 2 * b2 - 0.5 * b1 > 200.25)


def test_given_thresholds_need_no_whole_scene(tmp_path):
    """Through the engine: any window and block give what the threshold says, and no data stays no data."""
    rng = np.random.default_rng(5)
    values = rng.integers(1, 255, (1, 75, 61)).astype(np.uint8)
    values[0, 20:40, 10:30] = 0
    lab = Lab(tmp_path)
    ref = lab.raster(values, nodata=0)
    classes = [{"value": v, "name": f"c{v}", "color": "#000000"} for v in (7, 3)]
    keys = {"provider": "classical", "weights": "", "allow_torchscript": False, "classes": classes}
    for number, (size, arguments) in enumerate(
        [([32, 32], {"thresholds": [99.5]}), ([16, 16], {"thresholds": [99.5]}), ("whole", {})]
    ):
        window = {"size": size}
        card = lab.card(
            2, **keys, architecture="otsu", arguments=arguments, window=window, output={"activation": "none"}
        )
        tiling = {} if size == "whole" else {"window": str(size[0]), "halo": "0", "block": "32"}
        scene = prepared(lab.job(ref, card, f"out{number}", tiling=tiling), ref)
        predict(scene)
        found = labels_of(scene)
        known = values[0] > 0
        limit = 99.5 if arguments else filters.threshold_otsu(values[0][known].astype(np.float32))
        assert np.array_equal(found[known], np.where(values[0] > limit, 3, 7)[known])
        assert not np.isin(found[~known], [3, 7]).any()


# -- regions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("ndim", [2, 3])
def test_region_growing_keeps_the_components_that_hold_a_seed(make_card, ndim):
    shape = (60, 70) if ndim == 2 else (20, 24, 28)
    values = ndimage.gaussian_filter(np.random.default_rng(1).normal(size=shape), 2).astype(np.float32) + 5
    low, high = np.quantile(values, [0.7, 0.98])
    components, count = ndimage.label(values > low)
    seeded = np.unique(components[values > high])
    assert 1 < len(seeded) < count
    fields = {} if ndim == 2 else {"kind": "volume", "input": {"bands": []}}
    card = card_of(make_card, "region-growing", arguments={"seed": 0.98, "grow": 0.7}, **fields)
    assert np.array_equal(answer(card, values[None]), np.isin(components, seeded))


def test_watershed_is_scikit_images_over_the_gradient(make_card, photo):
    low, high = np.quantile(photo, [0.2, 0.6])
    markers = np.where(photo <= low, 1, np.where(photo >= high, 2, 0))
    expected = segmentation.watershed(filters.sobel(photo), markers) - 1
    card = card_of(make_card, "watershed", arguments={"markers": [[0, 0.2], [0.6, 1]], "nonzero": False})
    assert np.array_equal(answer(card, photo[None]), expected)


def test_watershed_of_a_volume_finds_the_balls(make_card):
    values, truth = balls()
    values = ndimage.gaussian_filter(values, 1)
    card = card_of(
        make_card,
        "watershed",
        kind="volume",
        input={"bands": []},
        arguments={"markers": [[0, 0.5], [0.95, 1]]},
    )
    wrong = answer(card, values[None]) != truth
    assert ndimage.binary_dilation(truth)[wrong].all()  # off by one element at most
    assert ndimage.binary_dilation(~truth)[wrong].all()
    assert wrong.sum() < 0.1 * truth.sum()


def test_an_island_without_a_marker_goes_by_value(make_card):
    scene = np.zeros((9, 30), np.float32)
    scene[:, :10], scene[:, 10:20] = 10, 90
    scene[2:5, 24:26], scene[2:5, 27:29] = 40, 60  # among zeros, which is no data
    card = card_of(make_card, "watershed", arguments={"markers": [[0, 0.3], [0.7, 1]]})
    found = answer(card, scene[None])
    assert (found[:, :10] == 0).all() and (found[:, 10:20] == 1).all()
    assert (found[2:5, 24:26] == 0).all() and (found[2:5, 27:29] == 1).all()


# -- graphs ---------------------------------------------------------------------------------------


def energies(values: np.ndarray, known: np.ndarray, smoothness: float) -> tuple[np.ndarray, np.ndarray]:
    """Every labelling (2ⁿ, …) of a tiny image, and its energy as `graph_cut` defines it."""
    n = values.size
    labelling = (np.arange(2**n)[:, None] >> np.arange(n) & 1).reshape(-1, *values.shape)
    bright = values > filters.threshold_otsu(values[known])
    means = np.array([values[known & ~bright].mean(), values[known & bright].mean()])
    data_term = (
        ((values - means[labelling]) ** 2 / (means[1] - means[0]) ** 2 * known).reshape(2**n, -1).sum(1)
    )
    borders = np.zeros(2**n)
    for axis in range(values.ndim):
        pairs = np.diff(labelling, axis=axis + 1) != 0
        both = np.delete(known, 0, axis) & np.delete(known, -1, axis)
        borders += (pairs * both).reshape(2**n, -1).sum(axis=1)
    return labelling, data_term + smoothness * borders


@pytest.mark.parametrize("shape", [(3, 4), (2, 2, 3)])
@pytest.mark.parametrize("smoothness", [0.0, 0.15, 0.4, 2.0])
def test_graph_cut_has_the_least_energy_of_all_labellings(shape, smoothness):
    rng = np.random.default_rng(11)
    for _ in range(8):
        values = rng.normal(size=shape).astype(np.float32)
        known = rng.random(shape) < 0.9
        found = graph_cut(values, known, smoothness, 256)
        labelling, energy = energies(values.astype(np.float64), known, smoothness)
        here = (labelling == found).reshape(len(labelling), -1).all(axis=1)
        assert energy[here][0] <= energy.min() + 1e-4


def test_graph_cut_takes_away_what_is_cheaper_than_its_border(make_card):
    """A lone bright element saves 1 and has four borders: it stays below a price of 1/4 and goes above."""
    scene = np.full((1, 30, 30), 10, np.float32)
    scene[0, :, 15:] = 50
    scene[0, 7, 7] = 50
    square = scene[0] > 30
    for price, lone in ((0.24, 1), (0.26, 0)):
        found = answer(card_of(make_card, "graph-cut", arguments={"smoothness": price}), scene)
        expected = square.copy()
        expected[7, 7] = lone
        # The means are those of Otsu's two classes, so the bright one's saving is exactly 1.
        assert np.array_equal(found, expected)


def test_likeness_is_rag_mean_color_for_three_bands():
    photo = data.astronaut()[::4, ::4]
    pieces = segmentation.slic(photo, 60)
    expected = graph.rag_mean_color(photo.astype(float), pieces, mode="similarity", sigma=255.0)
    found = likeness(np.moveaxis(photo.astype(np.float64), -1, 0), pieces, 255.0)
    assert set(found.edges) == set(expected.edges)
    for a, b, edge in expected.edges(data=True):
        assert found.edges[a, b]["weight"] == pytest.approx(edge["weight"], rel=1e-9)


def test_normalised_cut_parts_what_differs(make_card):
    """Two bands, of which one shows a disc; without a neighbourhood the noise would cost 16 %."""
    rng = np.random.default_rng(2)
    row, col = np.indices((96, 96))
    disc = (row - 50) ** 2 + (col - 44) ** 2 < 28**2
    scene = np.stack([rng.normal(50, 2, disc.shape), disc * 40 + rng.normal(60, 20, disc.shape)])
    arguments = {"feature": {"linear": {"b1": 1}}, "segments": 150}
    card = card_of(make_card, "normalised-cut", bands=2, arguments=arguments)
    found = answer(card, scene)
    assert (found != disc).mean() < 0.05
    assert ((scene[1] > 80) != disc).mean() > 0.14
    assert np.array_equal(answer(card, scene), found)


def test_normalised_cut_of_a_volume(make_card):
    values, truth = balls(noise=3)
    card = card_of(
        make_card, "normalised-cut", kind="volume", input={"bands": []}, arguments={"segments": 300}
    )
    assert (answer(card, values[None]) != truth).mean() < 0.02


# -- scenes and cards that cannot be served -------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "otsu": {},
    "multi-otsu": {},
    "graph-cut": {},
    "normalised-cut": {},
    "region-growing": {"seed": 0.9, "grow": 0.5},
    "watershed": {"markers": [[0, 0.4], [0.6, 1]]},
}


@pytest.mark.parametrize("method", ["otsu", "multi-otsu", "graph-cut", "normalised-cut", "watershed"])
def test_a_scene_of_one_value_is_refused(make_card, method):
    with pytest.raises(SceneError, match="value"):
        answer(card_of(make_card, method, arguments=METHODS[method]), np.full((1, 20, 20), 7.0))


@pytest.mark.parametrize("method", METHODS)
def test_a_scene_of_zeros_is_refused(make_card, method):
    with pytest.raises(SceneError, match="0 in every band"):
        answer(card_of(make_card, method, arguments=METHODS[method]), np.zeros((1, 20, 20)))


@pytest.mark.parametrize("method", METHODS)
def test_what_looks_at_the_scene_takes_no_windows(make_card, method):
    arguments = METHODS[method]
    with pytest.raises(RequestError, match=f"window.size: found .*64.*{method}.*valid: whole"):
        check_card(card_of(make_card, method, arguments=arguments, window={"size": [64], "stride": 1}))
    with pytest.raises(RequestError, match=r"window\.stride: found 2; valid: 1"):
        check_card(card_of(make_card, method, arguments=arguments, window={"size": "whole", "stride": 2}))


@pytest.mark.parametrize(
    ("method", "fields", "message"),
    [
        ("otso", {}, "did you mean otsu"),
        ("otsu", {"output": {}}, "output.activation: found softmax; valid: none"),
        ("otsu", {"classes": 3}, "classes: found 3; valid: 2"),
        ("otsu", {"arguments": {"threshold": 1}}, "threshold: unknown key; did you mean `thresholds`"),
        ("otsu", {"arguments": {"thresholds": [1, 2]}}, "arguments.thresholds: found .*; valid: 1 "),
        ("multi-otsu", {"classes": 3, "arguments": {"thresholds": [2, 2]}}, "2 that rise"),
        ("multi-otsu", {"classes": 4, "arguments": {"bins": 4096}}, "classes: found 4 with 4096 bins"),
        ("otsu", {"bands": 2}, r"arguments.feature: missing; .*normalised_difference: \[b0, b1\]"),
        ("otsu", {"arguments": {"feature": {"linear": {"nir": 1}}}}, "feature: found 'nir'; valid: b0"),
        ("otsu", {"arguments": {"feature": {}}}, "feature: give one of"),
        ("region-growing", {"arguments": {"seed": 0.5}}, "grow: missing"),
        ("region-growing", {"arguments": {"seed": 0.5, "grow": 0.6}}, "grow: found 0.6; valid: at most"),
        ("region-growing", {"arguments": {"seed": 1.5, "grow": 0.6}}, "seed: found 1.5"),
        ("watershed", {"arguments": {"markers": [[0, 0.6], [0.5, 1]]}}, "markers: found .* rise"),
        ("watershed", {"classes": 3, "arguments": METHODS["watershed"]}, "markers: found 2; valid: 3"),
        ("graph-cut", {"arguments": {"smoothness": -1}}, "smoothness: found -1"),
        ("random-forest", {}, "weights: missing"),
    ],
)
def test_cards_that_do_not_fit_are_refused(make_card, method, fields, message):
    with pytest.raises(RequestError, match=message):
        check_card(card_of(make_card, method, **fields))


def test_methods_have_no_weights(make_card, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"")
    fields = {"window": WHOLE, "output": {"activation": "none"}, "bands": 1, "classes": 2}
    with pytest.raises(RequestError, match="otsu has none: leave it out"):
        check_card(make_card("classical", "w.safetensors", architecture="otsu", **fields))


# -- real scenes ----------------------------------------------------------------------------------


def shared(folder: str) -> Path:
    if not (SHARED / folder).is_dir():
        pytest.skip(f"needs the data of {SHARED / folder}")
    return SHARED / folder


@pytest.mark.parametrize(("scene", "kappa", "iou"), [("sentinel2", 0.796, 0.707), ("landsat7", 0.607, 0.548)])
def test_the_cloud_card_scores_what_it_says(scene, kappa, iou):
    folder = shared("cloud_scenes")
    card = load_card(CONFIGS / "cloud-otsu.yaml")
    assert str(kappa) in card.scores and str(iou) in card.scores
    with rasterio.open(folder / f"{scene}_toa.tif") as source:
        blue = source.read([1])
    with rasterio.open(folder / f"{scene}_mask.tif") as source:
        truth = (source.read(1) == 4).ravel()
    found = answer(card, blue).ravel()
    assert cohen_kappa_score(truth, found) == pytest.approx(kappa, abs=5e-4)
    assert jaccard_score(truth, found) == pytest.approx(iou, abs=5e-4)
