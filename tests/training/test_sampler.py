"""Windows to learn from: where they lie, what is in them, and that their number says everything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from world import write_raster

from segpipe.config.losses import IGNORE
from segpipe.config.recipe import Recipe, Split
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.training.losses import border_weights
from segpipe.training.sampler import Sampler
from segpipe.training.split import Fold
from tests.training.conftest import CLASSES, VALUES, fold_of, merged, prepared, recipe_of

Rasters = Callable[..., Recipe]
WITHOUT_STEPS = {"card": {"input": {"normalisation": []}}}
"""Channels are nir (0) and red (1), which `places` fills with rows and columns, from 1."""
AUGMENTED = {"augment": {"flip": 0.5, "rotate": 0.8, "scale": 0.8, "elastic": 0.8, "noise": 0.5}}


def places(folder: Path, name: str, channels: np.ndarray) -> None:
    """A raster whose values say where they are, with labels of these channels."""
    rows, columns = np.indices(channels.shape) + 1
    write_raster(
        folder / "images" / f"{name}.tif", np.stack([columns, rows]).astype(np.uint16), names=("red", "nir")
    )
    write_raster(folder / "labels" / f"{name}.tif", VALUES[channels].astype(np.uint8)[None])


def sampler_of(recipe: Recipe, apart: int | None = 0) -> Sampler:
    scenes = prepared(recipe)
    return Sampler(recipe, scenes, fold_of(recipe, scenes, apart))


def whole_scene(folder: Path, channels: np.ndarray, **fields: Any) -> Sampler:
    """Windows of one scene of `places`, of which nothing is kept apart."""
    places(folder, "a", channels)
    return sampler_of(recipe_of(folder, **merged(WITHOUT_STEPS, fields)), None)


def origin(image: torch.Tensor) -> tuple[int, int]:
    """Where a window begins that `places` filled."""
    return int(image[0].max()) - image.shape[1], int(image[1].max()) - image.shape[2]


def same(first: Any, second: Any) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_window_is_a_piece_of_the_scene_and_of_its_labels(tmp_path: Path) -> None:
    channels = np.random.default_rng(1).integers(0, 3, (50, 70))
    sampler = whole_scene(tmp_path, channels, windows={"size": "8x12"})
    origins = set()
    for number in range(60):
        image, target, weights = sampler.window(number)
        top, left = origin(image)
        rows, columns = np.indices((8, 12))
        np.testing.assert_array_equal(image[0], rows + top + 1)
        np.testing.assert_array_equal(image[1], columns + left + 1)
        np.testing.assert_array_equal(target, channels[top : top + 8, left : left + 12])
        assert (image.dtype, target.dtype, weights) == (torch.float32, torch.int64, None)
        origins.add((top, left))
    assert len(origins) > 50


def test_a_window_depends_on_its_number_and_the_seed_alone(rasters: Rasters) -> None:
    first, second = sampler_of(rasters(**AUGMENTED)), sampler_of(rasters(**AUGMENTED))
    backwards = {number: second.window(number) for number in reversed(range(6))}
    assert all(same(first.window(number), backwards[number]) for number in range(6))
    assert not same(first.window(0), first.window(1))
    other = sampler_of(rasters(**AUGMENTED, optimise={"seed": 1}))
    assert not same(first.window(0), other.window(0))


def test_a_batch_is_its_windows(rasters: Rasters) -> None:
    sampler = sampler_of(rasters())
    images, targets, weights = next(sampler.batches(2, 3))
    assert weights is None
    for place, number in enumerate((4, 5)):
        image, target, _ = sampler.window(number)
        assert same((images[place], targets[place]), (image, target))


def test_processes_share_the_numbers_without_gap_or_overlap(tmp_path: Path) -> None:
    sampler = whole_scene(tmp_path, np.random.default_rng(1).integers(0, 3, (99, 99)), windows={"size": "8"})
    world, steps, size = 3, 2, 2
    batches = {r: list(sampler.batches(0, steps, r, world)) for r in range(world)}
    shared = [origin(image) for n in range(steps) for r in range(world) for image in batches[r][n][0]]
    assert shared == [origin(sampler.window(i)[0]) for i in range(world * steps * size)]
    alone = [origin(image) for n in range(1, steps) for image in next(sampler.batches(n, n + 1, 0, 1))[0]]
    assert alone == [origin(sampler.window(i)[0]) for i in range(size, steps * size)]


def test_balanced_windows_have_each_class_as_often(tmp_path: Path) -> None:
    channels = np.zeros((120, 120), int)
    channels[30, 30] = 1  # one pixel
    channels[80:95, 80:95] = 2  # 225 pixels
    count = 400
    half = whole_scene(tmp_path, channels, windows={"size": "8", "balance": 0.5})
    targets = [half.window(number)[1] for number in range(count)]
    found = [sum(bool((t == c).any()) for t in targets) for c in (1, 2)]
    places_of_windows = (120 - 8 + 1) ** 2
    by_chance = [8 * 8 / places_of_windows, (15 + 7) ** 2 / places_of_windows]
    for number, chance in zip(found, by_chance, strict=True):
        # half around a class, a third of these each; the background's and the others only by chance
        share = 0.5 / 3 + (0.5 + 0.5 / 3) * chance
        assert binomtest(number, count, share).pvalue > 1e-3


def test_unbalanced_windows_lie_anywhere(tmp_path: Path) -> None:
    sampler = whole_scene(tmp_path, np.zeros((20, 30), int), windows={"size": "8", "balance": 0})
    origins = np.array([origin(sampler.window(number)[0]) for number in range(500)])
    for axis, size in enumerate((20, 30)):
        counts = np.bincount(origins[:, axis], minlength=size - 8 + 1)
        assert len(counts) == size - 8 + 1
        assert all(binomtest(int(k), 500, 1 / len(counts)).pvalue > 1e-4 for k in counts)


def test_the_element_lies_in_the_inner_half_of_its_window_anywhere(tmp_path: Path) -> None:
    channels = np.zeros((60, 60), int)
    channels[30, 25] = 1
    fields = {"windows": {"size": "8x12", "balance": 1}, "data": {"reference": {"values": {0: None}}}}
    sampler = whole_scene(tmp_path, channels, **fields)
    origins = [origin(sampler.window(number)[0]) for number in range(300)]
    offsets = {(30 - top, 25 - left) for top, left in origins}
    assert offsets == {(y, x) for y in range(2, 6) for x in range(3, 9)}


def test_a_class_is_sought_in_the_scenes_that_have_it(tmp_path: Path) -> None:
    plain = np.zeros((40, 40), int)
    marked = plain.copy()
    marked[20, 20] = 2
    for name, channels in (("a", plain), ("b", plain), ("c", marked)):
        places(tmp_path, name, channels)
    recipe = recipe_of(tmp_path, **merged(WITHOUT_STEPS, {"windows": {"size": "8", "balance": 1}}))
    sampler = sampler_of(recipe, None)
    found = sum(bool((sampler.window(n)[1] == 2).any()) for n in range(200))
    assert binomtest(found, 200, 0.5).pvalue > 1e-3  # two classes are there


def test_a_smaller_scene_is_padded_with_nothing_to_learn_from(tmp_path: Path) -> None:
    channels = np.random.default_rng(1).integers(0, 3, (5, 50))
    sampler = whole_scene(tmp_path, channels, windows={"size": "16"})
    tops = set()
    for number in range(60):
        image, target, _ = sampler.window(number)
        inside = np.argwhere(image[0].numpy() == 1)
        top, left = inside[0, 0], int(image[1].max()) - 16
        rows = slice(top, top + 5)
        np.testing.assert_array_equal(target[rows], channels[:, left : left + 16])
        np.testing.assert_array_equal(image[0, rows, 0], np.arange(1, 6))
        beyond = np.ones(16, bool)
        beyond[rows] = False
        assert (target[beyond] == IGNORE).all()
        assert (image[:, beyond] == 0).all()
        tops.add(int(top))
    assert tops == set(range(12))


@pytest.mark.parametrize("by", ["scene", "block"])
def test_nothing_that_is_judged_is_ever_learned_from(tmp_path: Path, by: str) -> None:
    """Labels say where they are judged (channel 2); augmentation moves image and labels, and adds none."""
    split = {"by": by, "folds": 2, "block": 12, "buffer": 3 if by == "block" else 0}
    shapes = dict.fromkeys("abcd", (50, 44))
    fold = Fold.of(Split.model_validate(split), shapes, 0)
    for name, shape in shapes.items():
        judged = ~fold.is_learned(name, Box.whole(shape))
        places(tmp_path, name, np.where(judged, 2, np.indices(shape).sum(0) % 2))
    fields = merged(WITHOUT_STEPS, {"split": split, "windows": {"size": "16"}, **AUGMENTED})
    sampler = sampler_of(recipe_of(tmp_path, **fields))
    targets = torch.stack([sampler.window(number)[1] for number in range(80)])
    assert set(targets.unique().tolist()) == {IGNORE, 0, 1}
    assert (targets >= 0).float().mean() > 0.1


def test_from_memory_or_from_the_store_is_the_same(rasters: Rasters) -> None:
    split = {"by": "block", "block": 16, "buffer": 2}
    memory = sampler_of(rasters(split=split, **AUGMENTED))
    store = sampler_of(rasters(split=split, compute={"memory": "0MiB"}, **AUGMENTED))
    assert all(same(memory.window(number), store.window(number)) for number in range(12))
    assert memory._held
    assert not store._held


def test_borders_between_objects_have_weights(tmp_path: Path) -> None:
    places(tmp_path, "a", np.zeros((24, 24), int))
    ids = np.zeros((24, 24), np.uint16)
    ids[4:12, 4:12], ids[13:20, 4:12] = 5, 6
    write_raster(tmp_path / "labels/a.tif", ids[None])
    fields = {
        "card": {"input": {"normalisation": []}, "classes": CLASSES[:2]},
        "data": {"objects": True},
        "loss": [{"name": "border"}],
        "windows": {"size": "24"},
    }
    image, target, weights = sampler_of(recipe_of(tmp_path, **fields), None).window(0)
    assert origin(image) == (0, 0)
    np.testing.assert_array_equal(target, ids > 0)
    assert weights is not None
    np.testing.assert_array_equal(weights, border_weights(ids.astype(np.int64)))
    assert weights[12, 8] == weights.max() > 1  # between the two


def test_labels_of_nothing_are_refused(tmp_path: Path) -> None:
    places(tmp_path, "a", np.zeros((24, 24), int))
    with pytest.raises(RequestError, match="data: no element to learn from"):
        sampler_of(recipe_of(tmp_path, data={"reference": {"values": {0: None}}}), None)
