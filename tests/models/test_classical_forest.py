"""The random forest: scikit-learn's own answer from a file without code, the same for any tiling."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from safetensors.torch import load_file, save_file
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import accuracy_score, jaccard_score

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.providers.classical.forest import CHUNK, fit_forest, load_forest, save_forest
from segpipe.models.registry import check_card, describe, load_model

SCENE = Path(__file__).parents[3] / "shared" / "data" / "nc_landsat"


@pytest.fixture
def labelled() -> tuple[np.ndarray, np.ndarray]:
    """An image (3, 40, 50) and targets 0, 2 and -1; class 1 never occurs."""
    rng = np.random.default_rng(8)
    image = rng.normal(size=(3, 40, 50)).astype(np.float32)
    target = np.where(image[0] + 0.3 * image[1] ** 2 + rng.normal(0, 0.3, (40, 50)) > 0, 2, 0)
    target[rng.random(target.shape) < 0.2] = -1
    return image, target


def forest_card(make_card: Any, **fields: Any) -> Card:
    fields = {"bands": 3, "window": {"stride": 1}, "output": {"activation": "none"}, **fields}
    return make_card("classical", "forest.safetensors", architecture="random-forest", **fields)


def proba(forest: RandomForestClassifier, image: np.ndarray) -> np.ndarray:
    """scikit-learn's own answer, (classes seen, …)."""
    return forest.predict_proba(image.reshape(len(image), -1).T).T.reshape(-1, *image.shape[1:])


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_stored_forest_answers_as_scikit_learn(make_card, tmp_path, labelled, ndim):
    image, target = labelled
    forest = fit_forest(image, target, trees=20, min_samples_leaf=1)
    save_forest(forest, tmp_path / "forest.safetensors")
    fields = {} if ndim == 2 else {"kind": "volume", "bands": 3}
    card = forest_card(make_card, **fields)
    check_card(card)
    model = load_model(card, "cpu", 2, "fp32")
    shape = (2, 3, 64, 33) if ndim == 2 else (2, 3, 9, 16, 21)
    batch = torch.randn(shape)
    scores = model(batch).numpy()
    for window, found in zip(batch.numpy(), scores, strict=True):
        assert np.abs(found[[0, 2]] - proba(forest, window)).max() < 1e-6
        assert not found[1].any()  # a class it never saw


def test_every_threshold_parts_the_same_float32_values(make_card, tmp_path, labelled):
    """scikit-learn's thresholds are float64: at each, and the float32 beside it, the answer is the same."""
    image, target = labelled
    forest = fit_forest(image, target, trees=5)
    save_forest(forest, tmp_path / "forest.safetensors")
    trees = [e.tree_ for e in forest.estimators_]
    limits = np.unique(np.concatenate([t.threshold[t.children_left >= 0] for t in trees]))
    near = limits.astype(np.float32)
    near = np.concatenate([np.nextafter(near, -np.inf), near, np.nextafter(near, np.inf)])
    scene = np.stack([np.roll(near, shift) for shift in (0, 7, 101)])[:, None]
    scores = load_model(forest_card(make_card), "cpu", 1, "fp32")(torch.from_numpy(scene[None]))[0].numpy()
    assert np.abs(scores[[0, 2]] - proba(forest, scene)).max() < 1e-6


def test_the_forest_is_the_same_tiled_and_whole(make_card, tmp_path, labelled):
    save_forest(fit_forest(*labelled, trees=3), tmp_path / "forest.safetensors")
    model = load_model(forest_card(make_card), "cpu", 2, "fp32")
    scene = torch.randn(1, 3, 300, 301)
    assert scene[0, 0].numel() > CHUNK
    whole = model(scene)
    tiled = torch.empty_like(whole)
    for row, col in itertools.product((0, 64, 256), (0, 100, 173)):
        part = (..., slice(row, row + 192), slice(col, col + 128))
        tiled[part] = model(scene[part])
    assert torch.equal(tiled, whole)


def test_a_forest_follows_its_seed_alone(tmp_path, labelled):
    """The same file, byte for byte, however many threads fit it."""
    files = []
    for seed, threads in ((4, 1), (4, 2), (5, 1)):
        forest = fit_forest(*labelled, trees=6, seed=seed, threads=threads)
        save_forest(forest, tmp_path / "forest.safetensors")
        files.append((tmp_path / "forest.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


def test_what_has_no_label_or_no_value_teaches_nothing(labelled):
    image, target = labelled
    spoiled = image.copy()
    spoiled[:, target == -1] = 1e6
    hole = (slice(10, 12), slice(None))
    fewer = target.copy()
    fewer[hole] = -1
    spoiled[1][hole] = np.nan
    found = fit_forest(spoiled, target, trees=4)
    assert np.array_equal(proba(found, image), proba(fit_forest(image, fewer, trees=4), image))
    with pytest.raises(RequestError, match="no element"):
        fit_forest(image, np.full_like(target, -1))
    with pytest.raises(RequestError, match="found shape"):
        fit_forest(image, target[1:])


def test_parameters_are_questions_and_shares(make_card, tmp_path):
    """One tree that asks once: one threshold, two leaves of two shares."""
    image = np.arange(20, dtype=np.float32).reshape(1, 20)
    forest = fit_forest(image, (image[0] > 9).astype(int), trees=1, min_samples_leaf=1)
    save_forest(forest, tmp_path / "forest.safetensors")
    card = forest_card(make_card, bands=1, classes=2)
    assert describe(card).parameters == 1 + 2 * 2


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("children_left", lambda a: torch.where(a < 0, a, 0)),  # round in circles
        ("children_right", lambda a: torch.where(a < 0, a, a + 10_000)),
        ("children_right", lambda a: a[:-1]),
        ("feature", lambda a: a + 3),
        ("threshold", lambda a: a * float("nan")),
        ("roots", lambda a: a - 1),
        ("shares", lambda a: a[1:]),
        ("shares", lambda a: a.double()),
    ],
)
def test_damaged_files_are_refused(make_card, tmp_path, labelled, name, change):
    path = tmp_path / "forest.safetensors"
    save_forest(fit_forest(*labelled, trees=3), path)
    state = load_file(path)
    save_file({**state, name: change(state[name]).contiguous()}, path)
    with pytest.raises(RequestError, match=r"forest.safetensors: (\w+): "):
        load_model(forest_card(make_card), "cpu", 1, "fp32")


def test_forests_for_other_bands_or_classes_are_refused(make_card, tmp_path, labelled):
    path = tmp_path / "forest.safetensors"
    save_forest(fit_forest(*labelled, trees=2), path)
    with pytest.raises(RequestError, match=r"takes 3 bands; input.bands has 4"):
        load_model(forest_card(make_card, bands=4), "cpu", 1, "fp32")
    with pytest.raises(RequestError, match=r"classes are \[0, 2\]; valid: 0 to 1"):
        load_model(forest_card(make_card, classes=2), "cpu", 1, "fp32")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RequestError, match="not a readable safetensors"):
        load_model(forest_card(make_card), "cpu", 1, "fp32")


def test_the_forest_reaches_the_known_floor_on_north_carolina(tmp_path):
    """Western 60 % to eastern 40 %: mIoU 0.204 and accuracy 0.594, measured before and elsewhere."""
    if not SCENE.is_dir():
        pytest.skip(f"needs the data of {SCENE}")
    with rasterio.open(SCENE / "landsat_multiband.tif") as source:
        image = source.read().astype(np.float32)
        image[:, (image == source.nodata).any(axis=0)] = np.nan
    with rasterio.open(SCENE / "strata.tif") as source:
        strata = source.read(1)
    target = np.where((strata >= 1) & (strata <= 7), strata - 1, -1).astype(int)
    split = int(image.shape[2] * 0.6)
    forest = fit_forest(image[:, :, :split], target[:, :split], trees=50, max_samples=20_000, threads=2)
    save_forest(forest, tmp_path / "forest.safetensors")
    model = load_forest(tmp_path / "forest.safetensors", 5, 7, torch.device("cpu"))
    east = image[:, :, split:]
    found = model(torch.from_numpy(np.nan_to_num(east))[None])[0].argmax(dim=0).numpy()
    known = (target[:, split:] >= 0) & np.isfinite(east).all(axis=0)
    truth, found = target[:, split:][known], found[known]
    assert jaccard_score(truth, found, labels=range(7), average="macro") == pytest.approx(0.204, abs=0.02)
    assert accuracy_score(truth, found) == pytest.approx(0.594, abs=0.02)
