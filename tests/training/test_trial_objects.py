"""A network that finds objects, tried on what is kept apart: against truths that it knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from world import write_raster

from segpipe.config.recipe import Recipe
from segpipe.geometry.box import Box
from segpipe.objects.window import WindowObjects
from segpipe.training.validation import find_objects, try_objects
from tests.instances.scene import discs
from tests.training.conftest import fold_of, prepared, recipe_data

SHAPE = (90, 110)
GROUND, HOUSE, TREE, FIELD = 0, 7, 3, 5
CLASSES = [
    {"value": GROUND, "name": "ground", "color": "#000000", "background": True},
    {"value": HOUSE, "name": "house", "color": "#ff0000"},
    {"value": FIELD, "name": "field", "color": "#00ff00", "thing": False},
    {"value": TREE, "name": "tree", "color": "#0000ff"},
]
NAMES = {c["value"]: c["name"] for c in CLASSES}
NOT_SAID = 255
SAID = np.ones(SHAPE, bool)
SAID[:20, 60:90] = False


def world(
    folder: Path, kind: str, scenes: int = 2
) -> tuple[Recipe, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Scenes whose red band is the object's id; and the class and id of every element."""
    truths = {}
    for seed in range(2):
        ids = discs(SHAPE, 25, seed=seed, radius=(4, 9)).astype(np.int64)
        classes = np.where(ids == 0, GROUND, np.where(ids % 3 == 0, TREE, HOUSE))
        field = (ids == 0) & (np.arange(SHAPE[1]) < 30)
        classes[field] = FIELD
        values = classes * 1000 + np.where(field, np.arange(SHAPE[0])[:, None] % 2, ids)  # stuff has ids too
        values[:20, 60:90] = NOT_SAID * 1000
        write_raster(folder / "images" / f"scene{seed}.tif", ids[None].astype(np.uint16), names=("red",))
        write_raster(folder / "labels" / f"scene{seed}.tif", values[None].astype(np.int32))
        truths[f"scene{seed}"] = (classes, ids)
    fields: dict[str, Any] = {
        "provider": "torchvision", "architecture": "MaskRCNN", "output": {"kind": kind}, "classes": CLASSES,
        "input": {"bands": ["red"], "normalisation": []},
        "window": {"size": [32], "halo": [8], "stride": 4},
    }  # fmt: skip
    data = {"objects": True, "reference": {"divisor": 1000, "values": {NOT_SAID: None}}}
    recipe = recipe_data(folder, card=fields, data=data, split={"folds": 2})
    recipe["card"]["input"]["normalisation"] = []
    return Recipe.model_validate(recipe), truths


def knows(image: torch.Tensor) -> WindowObjects:
    """Every id of a window, numbered anew."""
    ids = image[0, 0].numpy().astype(int)
    present = np.setdiff1d(ids, [0])
    local = np.where(ids > 0, np.searchsorted(present, ids) + 1, 0)
    return WindowObjects(
        local.astype(np.int32),
        np.where(present % 3 == 0, TREE, HOUSE).astype(np.int64),
        np.ones(len(present), np.float32),
    )


def test_scenes_hold_channels_and_ids(tmp_path: Path) -> None:
    recipe, truths = world(tmp_path, "panoptic")
    for scene in prepared(recipe):
        classes, ids = truths[scene.name]
        _, target = scene.read(Box.whole(SHAPE))
        found = scene.read_ids(Box.whole(SHAPE))
        np.testing.assert_array_equal(target, np.where(SAID, _channel(classes), -1))
        things = SAID & np.isin(classes, [HOUSE, TREE])
        np.testing.assert_array_equal(found[things], (classes * 1000 + ids)[things])
        assert (found[SAID & (classes == GROUND)] == 0).all()


def _channel(values: np.ndarray) -> np.ndarray:
    order = [c["value"] for c in CLASSES]
    return np.vectorize(order.index)(values)


def test_a_network_that_knows_the_truth_has_quality_one(tmp_path: Path) -> None:
    recipe, truths = world(tmp_path, "instance")
    scenes = prepared(recipe)
    fold = fold_of(recipe, scenes)
    trial = try_objects(knows, recipe.card, scenes, fold)
    assert trial.measure == "pq"
    assert trial.score == 1
    [judged] = {name for name in truths if fold.judged(name)}
    classes, ids = truths[judged]
    for row in trial.table.itertuples():
        value = next(v for v, name in NAMES.items() if name == row[2])
        there = np.unique(ids[(classes == value) & SAID])
        assert (row.tp, row.fp, row.fn, row.sq) == (len(there), 0, 0, 1)
    assert set(trial.table["class"]) == {"house", "tree"}  # no stuff among instances
    assert trial.lines(recipe.card)[0] == "house 1.000"


def test_misses_and_wrong_halves_count_as_the_paper_says(tmp_path: Path) -> None:
    recipe, truths = world(tmp_path, "instance")
    scenes = prepared(recipe)
    fold = fold_of(recipe, scenes)

    def blind(image: torch.Tensor) -> WindowObjects:
        """Sees no house whose id is a multiple of 5."""
        kept = torch.where(image % 5 == 0, torch.zeros(()), image)
        return knows(kept)

    trial = try_objects(blind, recipe.card, scenes, fold)
    full = try_objects(knows, recipe.card, scenes, fold).table.set_index("class")
    [judged] = {name for name in truths if fold.judged(name)}
    classes, ids = truths[judged]
    for row in trial.table.itertuples():
        value = next(v for v, name in NAMES.items() if name == row[2])
        there = np.unique(ids[(classes == value) & SAID])
        missed = int((there % 5 == 0).sum())
        total = full.loc[row[2], "tp"]
        assert total == len(there)
        assert (row.tp, row.fp, row.fn) == (total - missed, 0, missed)
        assert row.pq == pytest.approx(row.tp / (row.tp + missed / 2))
    assert trial.score == pytest.approx(trial.table["pq"].mean())


def test_windows_are_joined(tmp_path: Path) -> None:
    recipe, truths = world(tmp_path, "instance")
    _, ids = truths["scene0"]
    found, objects = find_objects(knows, recipe.card, ids[None].astype(np.float32))
    assert len(objects) == len(np.unique(ids)) - 1
    pairs = np.unique(np.stack([ids.ravel(), found.ravel().astype(np.int64)]), axis=1)
    assert pairs.shape[1] == len(np.unique(ids))  # one to one
