"""The loop: the same weights with or without stops, and what optimisers, averages and rates must be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from segpipe.config.recipe import Recipe
from segpipe.training.distributed import World
from segpipe.training.loop import MetricsRow, Training
from segpipe.training.network import TrainNetwork
from tests.training.conftest import CLASSES, RasterFolder, fold_of, prepared, recipe_of

Rasters = Callable[..., Recipe]
WITH_STATE = {
    "card": {"arguments": {"channels": [8, 16], "strides": [2], "norm": "BATCH", "dropout": 0.3}},
    "augment": {"flip": 0.5, "rotate": 0.5, "noise": 0.5},
}
"""All that carries state or draws numbers: batch norm, dropout, augmentation."""


def training_of(recipe: Recipe, folder: Path, precision: str = "fp32", apart: int | None = 0) -> Training:
    folder.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    scenes = prepared(recipe)
    network = TrainNetwork(recipe, torch.device("cpu"), precision)
    return Training(recipe, scenes, fold_of(recipe, scenes, apart), network, folder, World())


def never() -> bool:
    return False


def ignored(moment: MetricsRow) -> None:
    """Nobody is told."""


def after(steps: int) -> Callable[[], bool]:
    """Asked after every step; yes from that one on."""
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= steps

    return stop


def tensors(training: Training) -> dict[str, torch.Tensor]:
    """Everything that training changes."""
    moments = training.optimiser.state_dict()["state"]
    found = {f"module.{k}": v for k, v in training.network.module.state_dict().items()}
    found |= {f"average.{k}": v for k, v in training.network.average.state_dict().items()}
    return found | {f"adam.{n}.{k}": v for n, state in moments.items() for k, v in state.items()}


def rows(training: Training) -> list[str]:
    """The history without its times; text, because NaN is not itself."""
    return [repr(replace(moment, seconds=0)) for moment in training.progress.history]


def assert_same(first: Training, second: Training) -> None:
    one, other = tensors(first), tensors(second)
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []
    assert rows(first) == rows(second)
    assert first.progress.best == second.progress.best


@pytest.mark.parametrize(
    ("precision", "stops"),
    [("fp32", [2, 1]), ("fp32", [3]), ("bf16", [4])],
    ids=["twice", "at-trial", "bf16"],
)
def test_stops_change_nothing(rasters: Rasters, tmp_path: Path, precision: str, stops: list[int]) -> None:
    recipe = rasters(**WITH_STATE, optimise={"accumulate": 2, "ema": 0.6})
    once = training_of(recipe, tmp_path / "once", precision)
    assert once.run(ignored, never)
    for steps in stops:
        part = training_of(recipe, tmp_path / "parts", precision)
        assert not part.run(ignored, after(steps))
    rest = training_of(recipe, tmp_path / "parts", precision)
    assert rest.progress.step == sum(stops)
    assert rest.run(ignored, never)
    assert_same(once, rest)
    assert [m.step for m in rest.progress.history] == [3, 6]
    first = training_of(recipe, tmp_path / "first", precision)
    assert not torch.equal(*(next(t.network.module.parameters()) for t in (first, once)))


def test_time_is_up_and_a_later_call_has_its_own(rasters: Rasters, tmp_path: Path) -> None:
    once = training_of(rasters(), tmp_path / "once")
    once.run(ignored, never)
    calls = 0
    while True:
        part = training_of(rasters(compute={"minutes": 1e-9}), tmp_path / "parts")
        calls += 1
        if part.run(ignored, never):
            break
        assert part.checkpoint.is_file()
        assert part.progress.step == calls
    assert calls == 6
    assert_same(once, part)
    assert part.progress.seconds > 0


def test_a_killed_call_goes_on_from_the_last_trial(rasters: Rasters, tmp_path: Path) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def kill() -> bool:
        if training.progress.step == 5:
            raise Killed
        return False

    training = training_of(rasters(), tmp_path / "killed")
    with pytest.raises(Killed):
        training.run(ignored, kill)
    again = training_of(rasters(), tmp_path / "killed")
    assert again.progress.step == 3
    again.run(ignored, never)
    once = training_of(rasters(), tmp_path / "once")
    once.run(ignored, never)
    assert_same(once, again)


def test_a_finished_training_does_nothing_more(rasters: Rasters, tmp_path: Path) -> None:
    first = training_of(rasters(), tmp_path)
    first.run(ignored, never)
    told: list[MetricsRow] = []
    second = training_of(rasters(), tmp_path)
    assert second.finished
    assert second.run(told.append, never)
    assert told == []
    assert_same(first, second)


def test_rate_rises_then_falls_as_half_a_cosine(rasters: Rasters, tmp_path: Path) -> None:
    training = training_of(rasters(optimise={"steps": 100, "rate": 0.2, "warmup": 0.1}), tmp_path)
    rates = [training.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.02 * (n + 1) for n in range(10)])
    rest = [0.1 * (1 + math.cos(math.pi * n / 90)) for n in range(90)]
    assert rates[10:] == pytest.approx(rest)
    assert max(rates) == pytest.approx(0.2)
    assert 0 < rates[-1] < 1e-4


def test_a_step_is_adamw_on_the_clipped_mean_gradient(rasters: Rasters, tmp_path: Path) -> None:
    """Against torch's optimiser, called by hand on the loss of both accumulated batches."""
    plan = {"accumulate": 2, "clip": 0.05, "decay": 0.1, "steps": 2, "warmup": 0, "ema": 0}
    loss = [{"name": "cross_entropy"}]
    training = training_of(rasters(optimise=plan, loss=loss), tmp_path / "a")
    twin = training_of(rasters(optimise=plan, loss=loss), tmp_path / "b").network.module
    batches = list(training.sampler.batches(0, 2))
    training.run(ignored, after(1))
    twin.train()
    logits = [twin(images) for images, _, _ in batches]
    losses = [
        torch.nn.functional.cross_entropy(x, b[1], ignore_index=-1)
        for x, b in zip(logits, batches, strict=True)
    ]
    (sum(losses) / 2).backward()  # type: ignore[union-attr]
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in twin.parameters() if p.grad is not None))
    assert norm > 0.05
    for p in twin.parameters():
        assert p.grad is not None
        p.grad *= 0.05 / (norm + 1e-6)
    kernels = [p for p in twin.parameters() if p.ndim > 1]
    rest = [p for p in twin.parameters() if p.ndim <= 1]
    for group, decay in ((kernels, 0.1), (rest, 0.0)):
        if group:
            torch.optim.AdamW(group, lr=0.01, weight_decay=decay).step()
    for a, b in zip(training.network.module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_result_is_a_moving_average_of_the_weights(rasters: Rasters, tmp_path: Path) -> None:
    """By hand: the last weights for the first 1 / (1 − ema) steps, then a₍ₙ₎ = 0.75·a + 0.25·w."""
    recipe = rasters(optimise={"ema": 0.75, "steps": 7}, judge={"every": 100})
    training = training_of(recipe, tmp_path)
    module, by_hand = training.network.module, {}

    def follow() -> bool:
        for name, p in module.named_parameters():
            first = training.progress.step <= 4
            by_hand[name] = p.detach().clone() if first else by_hand[name] * 0.75 + p.detach() * 0.25
        return False

    training.run(ignored, follow)
    assert list(by_hand) == [n for n, _ in training.network.average.named_parameters()]
    for name, p in training.network.average.named_parameters():
        torch.testing.assert_close(p, by_hand[name], rtol=0, atol=1e-6)
    assert not torch.equal(next(module.parameters()), next(training.network.average.parameters()))


def test_history_holds_mean_losses_and_rates(rasters: Rasters, tmp_path: Path) -> None:
    told: list[MetricsRow] = []
    training = training_of(rasters(optimise={"steps": 5}, judge={"every": 2}), tmp_path / "two")
    training.run(told.append, never)
    single = training_of(rasters(optimise={"steps": 5}, judge={"every": 1}), tmp_path / "one")
    single.run(ignored, never)
    losses = [m.loss for m in single.progress.history]
    assert [m.step for m in told] == [2, 4, 5]
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert [m.loss for m in told] == pytest.approx(means)
    assert [m.rate for m in told] == [training.rate(step) for step in (1, 3, 4)]
    assert all(m.steps == 5 and 0 <= m.score <= 1 and 0 <= m.miou <= m.score for m in told)
    assert [m.seconds for m in told] == sorted(m.seconds for m in told)
    assert told == training.progress.history


def test_patience_ends_and_the_best_weights_stay(rasters: Rasters, tmp_path: Path) -> None:
    """Such a rate ruins what was found: the score falls, and the best trial's weights are the result."""
    judge = {"every": 5, "patience": 2, "keep": "best"}
    optimise = {"steps": 500, "rate": 0.3, "clip": 1000.0, "warmup": 0.2, "ema": 0}
    training = training_of(rasters(judge=judge, optimise=optimise), tmp_path)
    assert training.run(ignored, never)
    scores = [m.score for m in training.progress.history]
    best = max(range(len(scores)), key=scores.__getitem__)  # the first of the highest
    assert training.progress.stopped
    assert training.progress.step == 5 * len(scores) < 500
    assert len(scores) - 1 - best == 2
    training.take_best()
    trial = training.trial()
    assert trial is not None
    assert trial.score == scores[best]
    again = training_of(rasters(judge=judge, optimise=optimise), tmp_path)
    assert again.finished


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(four_rasters: RasterFolder, tmp_path: Path, precision: str) -> None:
    optimise = {"steps": 60, "rate": 0.03, "ema": 0.9}
    fields: dict[str, Any] = {"out": str(tmp_path), "optimise": optimise, "judge": {"every": 60}}
    training = training_of(recipe_of(four_rasters[0], **fields), tmp_path / "f", precision)
    before = training.trial()
    training.run(ignored, never)
    after_it = training.trial()
    assert before is not None
    assert after_it is not None
    assert before.score < 0.6
    assert after_it.score > 0.95
    assert after_it.score == training.progress.history[-1].score


def test_one_logit_for_two_classes_learns_too(four_rasters: RasterFolder, tmp_path: Path) -> None:
    card = {"classes": CLASSES[:2], "output": {"activation": "sigmoid"}}
    reference = {"values": {3: 7}}
    fields: dict[str, Any] = {
        "optimise": {"steps": 60, "rate": 0.03, "ema": 0.9},
        "judge": {"every": 60},
        "data": {"reference": reference},
        "loss": [{"name": "bce"}, {"name": "dice"}],
    }
    training = training_of(recipe_of(four_rasters[0], card=card, out=str(tmp_path), **fields), tmp_path / "f")
    training.run(ignored, never)
    assert training.progress.history[-1].score > 0.95


def test_a_checkpoint_from_before_losses_were_kept_is_read(rasters: Rasters, tmp_path: Path) -> None:
    training = training_of(rasters(), tmp_path)
    training.run(ignored, after(3))
    state = torch.load(training.checkpoint, weights_only=True)
    del state["progress"]["losses"]
    torch.save(state, training.checkpoint)
    again = training_of(rasters(), tmp_path)
    assert again.run(ignored, never)
    assert again.progress.step == 6


def test_nothing_kept_apart_is_trained_without_scores(rasters: Rasters, tmp_path: Path) -> None:
    training = training_of(rasters(), tmp_path, apart=None)
    assert training.run(ignored, never)
    assert training.trial() is None
    assert [math.isnan(m.score) for m in training.progress.history] == [True, True]
    assert len(training.sampler.scenes) == 4


def test_trials_on_the_way_take_few_scenes_and_the_last_all(rasters: Rasters, tmp_path: Path) -> None:
    training = training_of(rasters(judge={"scenes": 1}), tmp_path)
    training.run(ignored, never)
    few, everything = training.trial(1), training.trial()
    assert few is not None
    assert everything is not None
    assert (few.table["scene"].nunique(), everything.table["scene"].nunique()) == (1, 2)
    assert training.progress.history[-1].score == few.score != everything.score
