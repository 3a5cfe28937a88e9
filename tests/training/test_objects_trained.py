"""Networks that find objects, trained from a recipe and run: first quickly, then until they are good."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.objects import count, draw_discs, on_border, run, trained, write_scenes
from segpipe.config.card import load_card
from segpipe.config.recipe import load_recipe
from segpipe.errors import RequestError
from segpipe.training.run import SILENT, check_recipe, train

QUICK = ["optimise.steps=4", "optimise.batch=1", "judge.every=2", "judge.scenes=1", "compute.precision=fp32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("discs")
    write_scenes(found)
    return found


def changes(folder: Path, out: Path, *more: str) -> list[str]:
    where = [f"data.scenes=[{folder / 'images'}]", f"data.reference.path={folder / 'labels'}", f"out={out}"]
    return [*where, *QUICK, *more]


def test_a_recipe_of_objects_leaves_card_scores_and_page(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe("configs/train/discs-mask2former.yaml", changes(folder, tmp_path))
    result = train(recipe, SILENT)
    assert result.card is not None
    card = load_card(result.card)
    assert card.output.kind == "instance"
    assert re.search(r"\(2 scenes\): panoptic quality disc [01]\.\d{3} \(", card.scores)
    scores = pd.read_csv(result.card.parent / "scores.csv")
    assert list(scores.columns) == ["scene", "class", "tp", "fp", "fn", "pq", "sq", "rq"]
    assert (scores["tp"] + scores["fn"]).tolist() == [25, 25]
    page = (result.card.parent / "training.html").read_text()
    assert "Panoptic quality on what is kept apart" in page
    assert page.count("data:image/jpeg") == 8  # two scenes, four pictures
    again = train(recipe, SILENT)
    assert again == result


def test_a_stopped_training_of_objects_goes_on_bit_for_bit(folder: Path, tmp_path: Path) -> None:
    asked = iter([False, False, True])
    parts = load_recipe("configs/train/discs-mask2former.yaml", changes(folder, tmp_path / "a"))
    assert train(parts, SILENT, lambda: next(asked)).card is None
    rest = train(parts, SILENT)
    whole = train(
        load_recipe("configs/train/discs-mask2former.yaml", changes(folder, tmp_path / "b")), SILENT
    )
    assert rest.card is not None
    assert whole.card is not None
    first, second = ((r.card.parent / "weights.safetensors").read_bytes() for r in (rest, whole) if r.card)
    assert first == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.objects=false", "data.objects: found false; networks that find objects learn from ids"),
        ("loss=[{name: dice}]", "loss: leave it out; networks that find objects have their library's own"),
        ("card.window.halo=[0]", "window.halo: found"),
    ],
)
def test_a_wrong_recipe_of_objects_is_refused(
    folder: Path, tmp_path: Path, change: str, message: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        check_recipe(load_recipe("configs/train/discs-maskrcnn.yaml", changes(folder, tmp_path, change)))


def test_a_loss_that_is_not_finite_ends_training_with_the_reason(folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe(
        "configs/train/discs-mask2former.yaml",
        changes(folder, tmp_path, "optimise.rate=1e30", "optimise.clip=1e30"),
    )
    with pytest.raises(RequestError, match=r"the loss is not finite in step \d.*lower `optimise.rate`"):
        train(recipe, SILENT)


def test_what_becomes_of_discs_is_counted() -> None:
    truth = draw_discs((96, 96), 8, 3)
    assert len(np.unique(truth)) == 9
    found = truth.copy()
    found[truth == 1] = 0
    rows = np.arange(96)[:, None] * np.ones(96, int)
    half = rows[truth == 2].mean()
    found[(truth == 2) & (rows > half)] = 100
    found[0:3, 0:3] = np.where(truth[0:3, 0:3] == 0, 200, found[0:3, 0:3])
    result = count(truth, found)
    assert (result.discs, result.once, result.parts, result.missed, result.false) == (8, 6, 1, 1, 1)
    single = np.zeros((96, 96), int)
    single[60:70, 10:20], single[10:20, 10:20] = 1, 2
    assert on_border(single).tolist() == [1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["discs-maskrcnn", "discs-mask2former"])
def test_objects_on_a_block_border_come_out_once(folder: Path, name: str) -> None:
    truth, found = run(trained(name, folder), folder)
    border = on_border(truth)
    assert len(border) > 20
    result = count(truth, found, border)
    assert result.parts == 0
    assert result.once >= 0.9 * result.discs
    other, again = run(trained(name, folder), folder, block=160)  # found, not trained anew
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(other, truth)
