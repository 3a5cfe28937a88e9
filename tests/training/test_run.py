"""Whole recipes: what they leave on disk, and that a second call does nothing twice."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from segpipe.config.card import load_card
from segpipe.config.recipe import Recipe
from segpipe.models.registry import load_model
from segpipe.training.loop import MetricsRow
from segpipe.training.run import SILENT, Result, Told, mark, train
from segpipe.training.validation import try_model
from tests.training.conftest import RasterFolder, fold_of, prepared, recipe_of

FILES = {
    "card.yaml", "checkpoint.pt", "history.csv", "samples", "scores.csv",
    "training.html", "training.json", "weights.safetensors",
}  # fmt: skip
Rasters = Callable[..., Recipe]


@dataclass(frozen=True)
class Trained:
    """A recipe that was carried out, and what its caller heard."""

    recipe: Recipe
    result: Result
    ready: list[tuple[int, int]]
    moments: list[tuple[str, int]]

    def fold(self, number: int) -> Path:
        return self.result.folder / f"fold-{number}"


def listen(recipe: Recipe) -> Trained:
    ready: list[tuple[int, int]] = []
    moments: list[tuple[str, int]] = []

    def moment(fold: str, moment: MetricsRow) -> None:
        moments.append((fold, moment.step))

    result = train(recipe, Told(lambda n, total: ready.append((n, total)), moment))
    return Trained(recipe, result, ready, moments)


@pytest.fixture(scope="module")
def two_folds(four_rasters: RasterFolder, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Both folds of four scenes; the title holds markup."""
    out = tmp_path_factory.mktemp("out")
    optimise = {"steps": 24, "rate": 0.03}
    data = {"description": "Made for tests & <i>nothing</i> else."}
    fields = {"split": {"fold": "all"}, "judge": {"every": 12}, "weights": "fp16"}
    return listen(recipe_of(four_rasters[0], out=str(out), optimise=optimise, data=data, **fields))


def test_the_caller_hears_of_scenes_and_trials(two_folds: Trained) -> None:
    assert two_folds.ready == [(n, 4) for n in (1, 2, 3, 4)]
    assert two_folds.moments == [(f"fold-{n}", step) for n in (0, 1) for step in (12, 24)]


def test_a_fold_leaves_its_files(two_folds: Trained) -> None:
    folder = two_folds.result.folder
    assert folder == Path(two_folds.recipe.out) / "tiny" / mark(two_folds.recipe)
    for number in (0, 1):
        assert {p.name for p in two_folds.fold(number).iterdir()} == FILES


def test_the_scores_are_those_of_the_card_as_it_is_loaded(two_folds: Trained) -> None:
    scenes = prepared(two_folds.recipe)
    judged = []
    for number in (0, 1):
        path = two_folds.fold(number)
        card = load_card(path / "card.yaml")
        model = load_model(card, "cpu", 1, "fp32")
        fold = fold_of(two_folds.recipe, scenes, number)
        wanted = try_model(model, card, scenes, fold)
        table = pd.read_csv(path / "scores.csv")
        for column in ("scene", "class"):
            assert table[column].tolist() == wanted.table[column].tolist()
        # Training has another layout in memory: classes that are alike but for rounding may change places.
        counts = ["tp", "fp", "fn"]
        np.testing.assert_allclose(table[counts], wanted.table[counts], rtol=0, atol=2)
        hit = 2 * table["tp"]
        np.testing.assert_allclose(table["dice"], hit / (hit + table["fp"] + table["fn"]))
        means = table.groupby("class")["dice"].mean()
        assert card.scores.startswith(
            f"Part {number} of 2 parts of scenes, never learned from (2 scenes): Dice crop"
        )
        assert re.findall(r"(crop|water) ([\d.]+) \(", card.scores) == [
            (name, f"{means[name]:.3f}") for name in ("crop", "water")
        ]
        judged += sorted(set(table["scene"]))
    assert sorted(judged) == [s.name for s in scenes]  # each once


def test_the_card_says_what_the_recipe_said(two_folds: Trained) -> None:
    card = load_card(two_folds.fold(0) / "card.yaml")
    assert card.data == two_folds.recipe.data.description
    assert card.source.startswith("trained by `segpipe train`")
    assert card.weights == "weights.safetensors"
    said = two_folds.recipe.card
    changed = {"weights", "scores", "data", "source"}
    assert card.model_dump(exclude=changed) == said.model_dump(exclude=changed)
    assert {t.dtype for t in load_file(two_folds.fold(0) / "weights.safetensors").values()} == {torch.float16}


def test_the_record_is_enough_to_do_it_again(two_folds: Trained) -> None:
    record = json.loads((two_folds.fold(1) / "training.json").read_text())
    assert Recipe.model_validate(record["recipe"]) == two_folds.recipe
    assert record["apart"] == 1
    names = {f"scene{n}" for n in range(4)}
    assert set(record["learned_from"]) | set(record["judged_by"]) == names
    assert len(record["learned_from"]) == len(record["judged_by"]) == 2
    assert (record["steps"], record["precision"], record["torch"]) == (24, "fp32", torch.__version__)
    history = pd.read_csv(two_folds.fold(1) / "history.csv")
    assert list(history.columns) == ["step", "steps", "loss", "rate", "score", "miou", "seconds"]
    assert history["step"].tolist() == [12, 24]
    assert history["loss"].is_monotonic_decreasing
    checkpoint = torch.load(two_folds.fold(1) / "checkpoint.pt", weights_only=True)["progress"]
    assert [m["score"] for m in checkpoint["history"]] == pytest.approx(history["score"].tolist())


def test_the_page_stands_alone_and_shows_what_is_kept_apart(two_folds: Trained) -> None:
    page = (two_folds.fold(0) / "training.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "url(http" not in page
    assert "<b>network</b>" not in page
    assert "Tiny &lt;b&gt;network&lt;/b&gt;" in page
    assert "tests &amp; &lt;i&gt;nothing&lt;/i&gt; else" in page
    scores = load_card(two_folds.fold(0) / "card.yaml").scores
    assert scores in page
    pictures = re.findall(r'<img src="data:image/jpeg;base64,([^"]+)" alt="(scene\d): (\w+)">', page)
    captions = ["image", "reference", "predicted", "difference"]
    judged = json.loads((two_folds.fold(0) / "training.json").read_text())["judged_by"]
    assert [(name, caption) for _, name, caption in pictures] == [(n, c) for n in judged for c in captions]
    for data, *_ in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(data)))
        assert image.size == (256, 256)  # 32 pixels, eight times as large
    assert page.count("<svg") >= 2
    files = {p.name for p in (two_folds.fold(0) / "samples").iterdir()}
    assert files == {f"{number}-{caption}.jpg" for number in (0, 1) for caption in captions}


def test_the_folds_together_are_an_ensemble(two_folds: Trained) -> None:
    path = two_folds.result.folder / "card.yaml"
    assert two_folds.result.card == path
    fields = yaml.safe_load(path.read_text())
    assert fields["provider"] == "ensemble"
    assert fields["arguments"] == {"cards": ["fold-0/card.yaml", "fold-1/card.yaml"]}
    card = load_card(path)
    assert card.values == two_folds.recipe.card.values
    assert card.input == two_folds.recipe.card.input


@pytest.mark.skipif(
    importlib.util.find_spec("segpipe.models.providers.ensemble") is None, reason="no ensembles here"
)
def test_an_ensemble_gives_the_mean_of_its_members_probabilities(two_folds: Trained) -> None:
    members = [load_model(load_card(two_folds.fold(n) / "card.yaml"), "cpu", 1, "fp32") for n in (0, 1)]
    together = load_model(load_card(two_folds.result.folder / "card.yaml"), "cpu", 1, "fp32")
    images = torch.randn(1, 2, 32, 32)
    wanted = torch.stack([member(images).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(together(images), wanted, rtol=0, atol=1e-6)


def test_a_second_call_finds_it_all_done(two_folds: Trained) -> None:
    def times() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in two_folds.result.folder.glob("fold-*/*")}

    before = times()
    again = listen(two_folds.recipe)
    assert again.moments == []
    assert times() == before
    assert again.result == two_folds.result
    # one of the folds alone is found there as well
    one = train(
        two_folds.recipe.model_copy(
            update={"split": two_folds.recipe.split.model_copy(update={"fold": "1"})}
        ),
        SILENT,
    )
    assert one.card == two_folds.fold(1) / "card.yaml"
    assert one.scores == two_folds.result.scores.splitlines()[1]
    assert times() == before


def test_a_stop_leaves_a_checkpoint_and_the_next_call_goes_on(rasters: Rasters, tmp_path: Path) -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == 4

    recipe = rasters()
    stopped = train(recipe, SILENT, stop)
    assert stopped.card is None
    assert stopped.scores == "stopped: the same command goes on from the checkpoint"
    fold = stopped.folder / "fold-0"
    assert torch.load(fold / "checkpoint.pt", weights_only=True)["progress"]["step"] == 4
    assert not (fold / "card.yaml").exists()
    rest = listen(recipe)
    assert rest.moments == [("fold-0", 6)]
    assert rest.result.card == fold / "card.yaml"
    at_once = train(rasters(out=str(tmp_path / "other")), SILENT)
    assert at_once.card is not None
    assert rest.result.scores == at_once.scores
    first, second = (
        load_file(card.parent / "weights.safetensors") for card in (rest.result.card, at_once.card)
    )
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_another_title_is_another_card_of_the_same_weights(rasters: Rasters) -> None:
    first = listen(rasters())
    weights = (first.fold(0) / "weights.safetensors").read_bytes()
    renamed = listen(rasters(card={"title": "Renamed"}))
    assert renamed.result.folder == first.result.folder
    assert renamed.moments == []
    assert load_card(first.fold(0) / "card.yaml").title == "Renamed"
    assert (first.fold(0) / "weights.safetensors").read_bytes() == weights
    half = listen(rasters(weights="fp16"))
    assert half.moments == []
    assert len((half.fold(0) / "weights.safetensors").read_bytes()) < 0.7 * len(weights)


def test_nothing_kept_apart_says_so(rasters: Rasters) -> None:
    result = train(rasters(split={"fold": "none"}), SILENT)
    assert result.folder / "all" / "card.yaml" == result.card
    assert result.scores == "Not judged: the model has learned from all the data."
    assert {p.name for p in (result.folder / "all").iterdir()} == FILES - {"scores.csv"}
    assert "Nothing is kept apart." in (result.folder / "all/training.html").read_text()


def test_blocks_are_scored_together_and_the_best_trial_flatters(rasters: Rasters) -> None:
    result = train(rasters(split={"by": "block", "block": 16, "buffer": 4}, judge={"keep": "best"}), SILENT)
    table = pd.read_csv(result.folder / "fold-0/scores.csv").groupby("class")[["tp", "fp", "fn"]].sum()
    iou = table["tp"] / table.sum(axis=1)
    assert result.scores == (
        "Part 0 of 2 parts of blocks of 16 elements, never learned from, but the best of several trials on "
        f"it was kept, so this flatters: mIoU {(iou['crop'] + iou['water']) / 2:.3f}; "
        f"IoU crop {iou['crop']:.3f}, water {iou['water']:.3f}."
    )
    blocks = 4 * 3 * 4  # of four scenes, 44 by 50 pixels; a half of them is judged
    judged = table.to_numpy()[:, [0, 2]].sum()
    assert 0.3 * blocks * 16 * 16 < judged < blocks / 2 * 16 * 16


def test_a_volume_is_trained_and_shown(tmp_path: Path) -> None:
    from tests.training.conftest import write_scan

    for number in range(2):
        write_scan(tmp_path, f"s{number}", (13, 17, 11), number)
    card = {"window": {"size": "whole", "halo": [0]}, "input": {"orientation": "RAS"}}
    result = train(recipe_of(tmp_path, "volume", card=card, windows={"size": "8x12x8"}), SILENT)
    assert result.card is not None
    counts = pd.read_csv(result.card.parent / "scores.csv")
    assert counts[["tp", "fn"]].to_numpy().sum() == 13 * 17 * 11
    assert (result.card.parent / "training.html").read_text().count("data:image/jpeg") == 4
