"""Recipes: what YAML says, and mistakes told with their field before any work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from segpipe.config.recipe import Recipe, load_recipe
from segpipe.errors import RequestError
from segpipe.training.run import check_recipe, mark
from tests.training.conftest import RasterFolder, recipe_data, write_recipe

ROOT = Path(__file__).parents[2]
Rasters = Callable[..., Recipe]


def test_a_file_becomes_a_recipe_and_overrides_count(four_rasters: RasterFolder, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", recipe_data(four_rasters[0]))
    recipe = load_recipe(path, ["optimise.rate=0.5", "split.fold=1", "compute.threads=2"])
    assert recipe.optimise.rate == 0.5
    assert recipe.split.chosen == [1]
    assert recipe.compute.threads == "2"
    assert recipe.card.name == "tiny"  # the recipe's


def test_folds_to_train() -> None:
    from segpipe.config.recipe import Split

    assert Split(folds=3, fold="all").chosen == [0, 1, 2]
    assert Split(folds=3, fold="none").chosen == [None]
    assert Split(folds=3, fold=2).chosen == [2]  # type: ignore[arg-type]  # as YAML has it


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"optimise": {"step": 3}}, r"optimise\.step: unknown key; did you mean `steps`\?"),
        ({"split": {"folds": 2, "fold": 2}}, r"split: .*fold: found 2; valid: 0 to 1, all or none"),
        ({"card": {"weights": "x.pt"}}, r"card\.weights: leave it out"),
        ({"card": {"output": {"activation": "none"}}}, r"card\.output\.activation: found none"),
        ({"data": {"objects": True}}, r"data\.objects: ids have two classes"),
        ({"loss": [{"name": "border"}]}, r"loss: border weights need ids of objects"),
        (
            {
                "card": {
                    "input": {"normalisation": [{"op": "window_zscore"}]},
                    "window": {"size": "whole", "halo": [0]},
                }
            },
            r"card\.input\.normalisation: window_zscore is not for training",
        ),
    ],
)
def test_a_mistake_in_the_file_names_its_field(
    four_rasters: RasterFolder, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    path = write_recipe(tmp_path / "r.yaml", recipe_data(four_rasters[0], **fields))
    with pytest.raises(RequestError, match=said) as caught:
        load_recipe(path)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"windows": {"size": "33"}}, r"windows\.size: found 33x33; valid: multiples of 2"),
        ({"card": {"window": {"size": "whole", "halo": [0]}}}, r"windows\.size: the card takes whole scenes"),
        ({"card": {"architecture": "UNit"}}, r"architecture: .*UNit"),
        ({"card": {"provider": "onnx"}}, r"onnx models run here, but are not trained here"),
        ({"card": {"roi": {"card": "first.yaml"}}}, r"card\.roi: leave it out"),
        ({"start": "nowhere.yaml"}, r"start: nowhere\.yaml does not exist"),
        ({"split": {"buffer": 3}}, r"split\.buffer: is for `by: block`"),
        ({"augment": {"flip_axes": [0, 2]}}, r"augment\.flip_axes: found \[0, 2\]; valid: 0 to 1"),
        ({"loss": [{"name": "focal", "class_weights": [1, 2]}]}, r"loss: focal: found 2 class_weights"),
        ({"compute": {"precision": "fp16"}}, r"compute\.precision: found fp16 on a CPU"),
        ({"data": {"scenes": ["nowhere/*.tif"]}}, r"nowhere"),
        ({"data": {"reference": {"path": "nowhere"}}}, r"reference\.path: nowhere does not exist"),
    ],
)
def test_what_does_not_fit_the_world_is_refused_before_work(
    rasters: Rasters, tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(RequestError, match=said):
        check_recipe(rasters(**fields))
    assert not (tmp_path / "out").exists()


def test_the_folders_name_is_what_weights_depend_on(rasters: Rasters) -> None:
    first = mark(rasters())
    same: list[dict[str, Any]] = [
        {"name": "other"},
        {"out": "elsewhere"},
        {"compute": {"threads": 3}},
        {"split": {"fold": "all"}},
        {"card": {"title": "Another"}},
        {"weights": "fp16"},
    ]
    assert {mark(rasters(**fields)) for fields in same} == {first}
    other: list[dict[str, Any]] = [
        {"optimise": {"seed": 1}},
        {"split": {"seed": 1}},
        {"card": {"arguments": {"channels": [4, 8]}}},
        {"augment": {"flip": 0.5}},
        {"judge": {"every": 2}},
    ]
    assert len({first, *(mark(rasters(**fields)) for fields in other)}) == 1 + len(other)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/train").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_that_are_shipped_are_valid(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.card.licence
    assert recipe.data.description
