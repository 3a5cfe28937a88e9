"""CLIP as a labeller, tiny and random: probabilities are those of the library's own model and processor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.detector_files import clip, save
from segpipe.errors import RequestError
from segpipe.prompts.grounding.base import Outcome
from segpipe.prompts.grounding.clip import FROM_ABOVE, PHOTO, load_labeller, mask_crop

CPU = torch.device("cpu")
PHRASES = ["lake", "small docks", "field"]
RNG = np.random.default_rng(3)
CROPS = [RNG.random((3, n, n)).astype(np.float32) * RNG.random((3, 1, 1)) for n in (9, 32, 40, 70, 17)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("models") / "clip"
    return folder, *save(folder, clip, factor=6)


@pytest.mark.parametrize("others", [(), ("background",)])
def test_probabilities_with_one_template(model: tuple[Path, Any, Any], others: tuple[str, ...]) -> None:
    folder, network, processor = model
    texts = [PHOTO[0].replace("{}", phrase) for phrase in (*PHRASES, *others)]
    batch = processor(text=texts, images=CROPS, padding=True, do_rescale=False, return_tensors="pt")
    with torch.no_grad():
        expected = network(**batch).logits_per_image.softmax(dim=1).numpy()
    assert expected.std() > 0.05, "there is something to tell apart"
    found = load_labeller(folder, CPU, 0.0, batch=2).label(CROPS, PHRASES, others)
    np.testing.assert_allclose(found.probability, expected, atol=1e-4)
    np.testing.assert_array_equal(found.best, expected.argmax(axis=1))
    assert [a.found for a in found.accounts] == [(expected.argmax(1) == i).sum() for i in range(3)]


def test_probabilities_with_several_templates(model: tuple[Path, Any, Any]) -> None:
    """The mean of unit vectors, made a unit vector again: Radford et al. 2021, section 3.1.4."""
    folder, network, processor = model
    with torch.no_grad():
        pixels = processor(images=CROPS, do_rescale=False, return_tensors="pt")["pixel_values"]
        images = network.get_image_features(pixels).pooler_output.double().numpy()
        vectors = []
        for template in FROM_ABOVE:
            texts = [template.replace("{}", phrase) for phrase in PHRASES]
            words = processor(text=texts, padding=True, return_tensors="pt")
            each = network.get_text_features(**words).pooler_output.double().numpy()
            vectors.append(each / np.linalg.norm(each, axis=1, keepdims=True))
    mean = np.mean(vectors, axis=0)
    cosines = images @ mean.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(mean, axis=1)
    logits = cosines * math.exp(network.logit_scale.item())
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = load_labeller(folder, CPU, 0.0, FROM_ABOVE).label(CROPS, PHRASES)
    np.testing.assert_allclose(found.probability, expected, atol=1e-4)


def test_below_the_threshold_and_other_things_have_no_phrase(model: tuple[Path, Any, Any]) -> None:
    folder = model[0]
    sure = load_labeller(folder, CPU, 0.0).label(CROPS, PHRASES)
    highest = np.sort(sure.probability.max(axis=1))
    threshold = float(highest[1:3].mean())  # between two, so that no rounding crosses it
    assert np.diff(highest)[1] > 1e-4
    found = load_labeller(folder, CPU, threshold).label(CROPS, PHRASES)
    likely = sure.probability.max(axis=1) >= threshold
    assert 0 < likely.sum() < len(CROPS)
    names = [PHRASES[i] if ok else "" for i, ok in zip(sure.best, likely, strict=True)]
    assert list(found.names) == names and found.best.tolist() == sure.best.tolist()
    for i, account in enumerate(found.accounts):
        assert account.found == names.count(PHRASES[i])
        assert account.found + account.below == (sure.best == i).sum()
    only = int(sure.best[0])
    rest = [p for i, p in enumerate(PHRASES) if i != only]
    other = load_labeller(folder, CPU, 0.0).label(CROPS, rest, [PHRASES[only]])
    assert other.names[0] == "" and other.best[0] == 2 and other.phrase[0] == -1


def test_crops_do_not_change_each_other(model: tuple[Path, Any, Any]) -> None:
    """Beyond float32's rounding: on a CPU the last bits depend on a crop's place in its batch."""
    labeller = load_labeller(model[0], CPU, batch=4)
    together = labeller.label(CROPS, PHRASES).probability
    alone = [labeller.label([crop], PHRASES).probability[0] for crop in CROPS]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-6)
    nothing = labeller.label([], PHRASES)
    assert nothing.probability.shape == (0, 3) and nothing.accounts[0].outcome is Outcome.absent


def test_crop_is_square_around_the_box() -> None:
    image = RNG.random((3, 20, 30)).astype(np.float32)
    mask = np.zeros((20, 30), bool)
    mask[6:10, 10:18] = True
    mask[7, 12] = False
    # Box of 4 × 8; margin of a quarter of 8 on every side: 12 × 12 from (2, 8).
    np.testing.assert_array_equal(mask_crop(image, mask), image[:, 2:14, 8:20])


def test_crop_at_the_image_s_corner() -> None:
    image = RNG.random((3, 8, 8)).astype(np.float32)
    mask = np.zeros((8, 8), bool)
    mask[:4, 4:] = True
    crop = mask_crop(image, mask)
    assert crop.shape == (3, 6, 6)
    np.testing.assert_array_equal(crop[:, 1:, :5], image[:, :5, 3:])
    assert (crop[:, :1] == 0.5).all() and (crop[:, :, 5:] == 0.5).all()


def test_what_is_refused(model: tuple[Path, Any, Any]) -> None:
    folder = model[0]
    with pytest.raises(RequestError, match="two or more together"):
        load_labeller(folder, CPU).label(CROPS, ["lake"])
    with pytest.raises(RequestError, match="valid: at most 40"):
        load_labeller(folder, CPU).label(CROPS, ["a long phrase about lakes and docks, and piers", "field"])
