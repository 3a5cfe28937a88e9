"""The loop: windows in, weights out, with checkpoints that a later call goes on from exactly."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from segpipe.config.recipe import KeptWeights, Recipe
from segpipe.errors import RequestError
from segpipe.inference.queues import Prefetch
from segpipe.models.base import Truth
from segpipe.training.distributed import World
from segpipe.training.losses import build_loss
from segpipe.training.network import TrainNetwork
from segpipe.training.sampler import Batch, Sampler
from segpipe.training.scenes import TrainScene
from segpipe.training.split import Fold
from segpipe.training.validation import Trial, try_model, try_objects

AHEAD = 4
"""Batches prepared ahead of the network."""


@dataclass
class MetricsRow:
    """Where training is: a row of the history, and what is told."""

    step: int
    steps: int
    loss: float
    """Mean over the steps since the last row."""
    rate: float
    score: float = math.nan
    """Of the trial (`Trial.score`); NaN where there was none."""
    miou: float = math.nan
    """The same; NaN for networks that find objects."""
    seconds: float = 0.0
    """Since the beginning, stops left out."""


@dataclass
class TrainingProgress:
    """What a checkpoint keeps beside tensors."""

    step: int = 0
    seconds: float = 0.0
    best: float = -math.inf
    worse: int = 0
    """Trials since the best."""
    stopped: bool = False
    history: list[MetricsRow] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Of the steps since the last row of the history."""


class Training:
    """One fold's training: begins or goes on, ends or stops with a checkpoint."""

    def __init__(
        self,
        recipe: Recipe,
        scenes: Sequence[TrainScene],
        fold: Fold,
        network: TrainNetwork,
        folder: Path,
        world: World,
    ) -> None:
        self.recipe, self.scenes, self.fold, self.network = recipe, scenes, fold, network
        self.folder, self.world = folder, world
        self.sampler = Sampler(recipe, scenes, fold)
        self.loss = build_loss(recipe.loss, len(recipe.card.classes)).to(network.device)
        self.optimiser = torch.optim.AdamW(network.groups(), lr=recipe.optimise.rate)
        self.scaler = torch.amp.GradScaler(enabled=network.precision == "fp16")
        self.progress = TrainingProgress()
        self.forward = world.wrap(network.module)
        self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.progress.stopped or self.progress.step >= self.recipe.optimise.steps

    def run(self, told: Callable[[MetricsRow], None], should_stop: Callable[[], bool]) -> bool:
        """Train until the end, or until time is up or a stop is asked for.

        Args:
            told: called with every row of the history.
            should_stop: asked after every step.

        Returns:
            Whether it is finished; else the checkpoint is where to go on.
        """
        recipe, progress = self.recipe, self.progress
        begun, before = time.monotonic(), progress.seconds
        limit = recipe.compute.minutes * 60 or math.inf
        per_step = recipe.optimise.accumulate
        batches = self.sampler.batches(
            progress.step * per_step, recipe.optimise.steps * per_step, self.world.rank, self.world.size
        )
        with Prefetch(batches, AHEAD) as ahead:
            source = iter(ahead)
            while not self.finished:
                progress.losses.append(self._step([next(source) for _ in range(per_step)]))
                progress.step += 1
                progress.seconds = before + time.monotonic() - begun
                due = progress.step % recipe.judge.every == 0 or self.finished
                if due:
                    self._judge()
                # a later call has a time of its own
                stop = self.world.any(should_stop() or time.monotonic() - begun > limit)
                if due or stop:
                    self._save()
                if due:
                    told(progress.history[-1])  # after the checkpoint: whatever fails there loses nothing
                if stop and not self.finished:
                    return False
        return True

    def rate(self, step: int) -> float:
        """Learning rate of a step: rises over the warm-up, then half a cosine down to nothing."""
        plan = self.recipe.optimise
        warm = max(1, round(plan.warmup * plan.steps))
        if step < warm:
            return plan.rate * (step + 1) / warm
        return plan.rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, plan.steps - warm)))

    def _step(self, batches: Sequence[Batch]) -> float:
        """One step of the optimiser; the loss, a mean over its batches."""
        progress, plan = self.progress, self.recipe.optimise
        # Dropout draws from the step's own numbers, so that a resumed run draws the same.
        torch.manual_seed(plan.seed * 1_000_003 + progress.step * self.world.size + self.world.rank)
        rate = self.rate(progress.step)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.network.module.train()
        total = 0.0
        for batch in batches:
            loss = self._loss(batch) / len(batches)
            self.scaler.scale(loss).backward()
            total += float(loss.detach())
        if self.world.any(not math.isfinite(total)):
            raise RequestError(
                f"optimise: the loss is not finite in step {progress.step + 1}, so nothing more is learned: "
                f"try a lower `optimise.rate` (found {plan.rate:g}), a longer `optimise.warmup`, or "
                f"`compute.precision: fp32` (found {self.network.precision})"
            )
        self.scaler.unscale_(self.optimiser)
        torch.nn.utils.clip_grad_norm_(self.network.module.parameters(), plan.clip)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad(set_to_none=True)
        self.network.update_average(progress.step)
        return total

    def _loss(self, batch: Batch) -> torch.Tensor:
        network, (images, targets, weights) = self.network, batch
        images = images.to(network.device)
        if isinstance(targets, list):
            truths = [Truth(t.masks.to(network.device), t.classes.to(network.device)) for t in targets]
            return network.own_loss(self.forward, images, truths)
        weights = None if weights is None else weights.to(network.device)
        loss: torch.Tensor = self.loss(
            network.logits(self.forward, images), targets.to(network.device), weights
        )
        return loss

    def trial(self, limit: int | None = None) -> Trial | None:
        """Try the averaged model on what is kept apart; None where nothing is."""
        judged = [s for s in self.scenes if self.fold.judged(s.name)]
        if not judged:
            return None
        if self.recipe.card.output.kind != "semantic":
            return try_objects(self.network.find, self.recipe.card, judged[:limit], self.fold)
        return try_model(self.network.predict, self.recipe.card, judged[:limit], self.fold)

    def _judge(self) -> None:
        progress, judge = self.progress, self.recipe.judge
        moment = MetricsRow(
            step=progress.step,
            steps=self.recipe.optimise.steps,
            loss=self.world.mean(sum(progress.losses) / len(progress.losses)),
            rate=self.rate(progress.step - 1),
            seconds=progress.seconds,
        )
        trial = self.trial(judge.scenes) if self.world.first else None
        if trial is not None:
            moment.score, moment.miou = trial.score, trial.miou
            if trial.score > progress.best:
                progress.best, progress.worse = trial.score, 0
                if judge.keep is KeptWeights.best:
                    torch.save(self.network.average.state_dict(), self.folder / "best.pt")
            else:
                progress.worse += 1
        stop = bool(judge.patience) and progress.worse >= judge.patience
        progress.stopped = self.world.any(stop)
        progress.history.append(moment)
        progress.losses = []

    def take_best(self) -> None:
        """Make the weights of the best trial the result, where the recipe says so."""
        best = self.folder / "best.pt"
        if self.recipe.judge.keep is KeptWeights.best and best.exists():
            self.network.average.load_state_dict(torch.load(best, weights_only=True))

    def _save(self) -> None:
        if not self.world.first:
            return
        state = {
            "network": self.network.state(),
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.progress),
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def _resume(self) -> None:
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location=self.network.device, weights_only=True)
        self.network.load(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        progress = dict(state["progress"])
        history = [MetricsRow(**moment) for moment in progress.pop("history")]
        self.progress = TrainingProgress(**progress, history=history)
