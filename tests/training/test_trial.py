"""A model tried: counts held against numpy over whole scenes, and windows that are trimmed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix
from torch.nn.functional import conv2d
from world import write_raster

from segpipe.config.recipe import Recipe
from segpipe.geometry.box import Box
from segpipe.training.validation import try_model
from tests.training.conftest import CLASSES, RasterFolder, fold_of, prepared, recipe_of, write_scene


def by_value(images: torch.Tensor) -> torch.Tensor:
    """Scores whose best class is the nearest of the counts: normalised, these are -1, 0 and 1."""
    centres = torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1)
    return -((images[:, :1] - centres) ** 2)


def by_neighbours(images: torch.Tensor) -> torch.Tensor:
    """The same of a mean over 5 by 5 pixels: what lies beyond a window's halo of 2 is not needed.

    Means are multiples of 1 / 1250: a little more, and none lies between two classes, where rounding decides.
    """
    return by_value(conv2d(images[:, :1], torch.full((1, 1, 5, 5), 1 / 25), padding=2) + 2e-4)


def expected(recipe: Recipe, model: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, np.ndarray]:
    """Confusion by scene, of one pass over each whole scene."""
    scenes = prepared(recipe)
    fold = fold_of(recipe, scenes)
    found = {}
    for scene in scenes:
        box = Box.whole(scene.shape)
        judged = fold.is_judged(scene.name, box)
        if not judged.any():
            continue
        image, target = scene.read(box)
        labels = model(torch.from_numpy(image)[None]).argmax(1)[0].numpy()
        keep = judged & (target >= 0)
        found[scene.name] = confusion_matrix(target[keep], labels[keep], labels=[0, 1, 2])
    return found


@pytest.mark.parametrize("split", [{"by": "scene"}, {"by": "block", "block": 13, "buffer": 2}])
@pytest.mark.parametrize("model", [by_value, by_neighbours])
def test_counts_are_those_of_the_whole_scene(
    rasters: Callable[..., Recipe], split: dict[str, object], model: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    recipe = rasters(card={"window": {"size": [16], "halo": [2]}}, split=split)
    scenes = prepared(recipe)
    trial = try_model(model, recipe.card, scenes, fold_of(recipe, scenes))
    wanted = expected(recipe, model)
    assert set(trial.table["scene"]) == set(wanted)
    for scene, matrix in wanted.items():
        rows = trial.table[trial.table["scene"] == scene].set_index("class").loc[["ground", "crop", "water"]]
        tp = np.diag(matrix)
        np.testing.assert_array_equal(rows["tp"], tp)
        np.testing.assert_array_equal(rows["fp"], matrix.sum(0) - tp)
        np.testing.assert_array_equal(rows["fn"], matrix.sum(1) - tp)
        np.testing.assert_allclose(rows["dice"], 2 * tp / (matrix.sum(0) + matrix.sum(1)))
    total = sum(wanted.values())
    tp = np.diag(total)
    assert trial.miou == pytest.approx((tp / (total.sum(0) + total.sum(1) - tp))[1:].mean())
    means = trial.table.groupby("class")["dice"].mean()
    assert trial.score == pytest.approx((means["crop"] + means["water"]) / 2)
    assert 0.2 < trial.score < 1 if model is by_neighbours else trial.score > 0.99


def test_a_class_that_neither_side_has_is_not_counted(tmp_path: Path) -> None:
    for name in "ab":
        write_scene(tmp_path, name, (20, 20), 1)
        pixels = np.full((2, 20, 20), 150, np.uint16)
        write_raster(tmp_path / f"images/{name}.tif", pixels, names=("red", "nir"))
        write_raster(tmp_path / f"labels/{name}.tif", np.full((1, 20, 20), 7, np.uint8))
    recipe = recipe_of(tmp_path)
    scenes = prepared(recipe)
    trial = try_model(by_value, recipe.card, scenes, fold_of(recipe, scenes))
    water = trial.table[trial.table["class"] == "water"]
    assert water["dice"].isna().all()
    assert trial.score == trial.miou == 1.0
    assert trial.lines(recipe.card) == ["crop 1.000", "water not in what is kept apart"]


def test_one_logit_and_ids_of_objects(tmp_path: Path) -> None:
    write_scene(tmp_path, "a", (20, 24), 1)
    ids = np.zeros((20, 24), np.uint16)
    ids[2:8, 3:9], ids[10:18, 10:20] = 7, 300
    pixels = np.where(ids > 0, 200, 100).astype(np.uint16)
    pixels[2, 3] = 100  # missed
    pixels[0, 0] = 200  # wrong
    write_raster(tmp_path / "images/a.tif", np.stack([pixels, pixels]), names=("red", "nir"))
    write_raster(tmp_path / "labels/a.tif", ids[None])
    card = {"classes": CLASSES[:2], "output": {"activation": "sigmoid"}, "window": {"size": [8], "halo": [0]}}
    split = {"by": "block", "block": 12}
    recipe = recipe_of(tmp_path, card=card, data={"objects": True}, split=split)
    scenes = prepared(recipe)
    found = sum(
        try_model(lambda x: x[:, :1], recipe.card, scenes, fold_of(recipe, scenes, apart))
        .table.set_index("class")
        .loc["crop", ["tp", "fp", "fn"]]
        .to_numpy()
        for apart in (0, 1)
    )
    assert found.tolist() == [36 + 80 - 1, 1, 1]


def test_the_cards_own_window_and_padding_are_used(four_rasters: RasterFolder, tmp_path: Path) -> None:
    """Also where windows in training are smaller; at the trailing edge the last pixel is repeated."""
    seen = []

    def model(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return by_value(images)

    window = {"size": [64], "halo": "auto", "stride": 16, "padding": "edge"}
    fields = {"windows": {"size": "16"}, "card": {"window": window}}
    recipe = recipe_of(four_rasters[0], out=str(tmp_path), **fields)
    scenes = prepared(recipe)
    try_model(model, recipe.card, scenes, fold_of(recipe, scenes))
    assert {tuple(i.shape) for i in seen} == {(1, 2, 48, 64)}  # 44 by 50, up to the stride
    for images in seen:
        assert torch.equal(images[..., 44:, :50], images[..., 43:44, :50].expand(-1, -1, 4, -1))


def test_volumes_in_one_pass_or_in_windows(tmp_path: Path) -> None:
    from tests.training.conftest import write_scan

    for number in range(2):
        write_scan(tmp_path, f"s{number}", (13, 17, 11), number)
    tables = []
    for window in ({"size": "whole", "halo": [0]}, {"size": [8], "halo": [2]}):
        recipe = recipe_of(tmp_path, "volume", card={"window": window}, windows={"size": "8"})
        scenes = prepared(recipe)

        def model(images: torch.Tensor) -> torch.Tensor:
            return -((images - torch.tensor([-1.0, 0.0, 1.0]).reshape(1, 3, 1, 1, 1)) ** 2)

        tables.append(try_model(model, recipe.card, scenes, fold_of(recipe, scenes)).table)
    assert tables[0].equals(tables[1])
    assert tables[0]["tp"].sum() == 13 * 17 * 11
