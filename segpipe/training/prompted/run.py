"""The loop: batches in, a folder of weights out; a later call goes on from the checkpoint exactly."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segpipe.errors import RequestError
from segpipe.inference.queues import Prefetch
from segpipe.training.prompted.network import build, save
from segpipe.training.prompted.objective import judge
from segpipe.training.prompted.prompt_sampling import Looks, corrected, look
from segpipe.training.prompted.real import read_scenes
from segpipe.training.prompted.recipe import PromptedRecipe
from segpipe.training.prompted.samples import Batch, Samples

AHEAD = 3
"""Batches prepared ahead of the network."""
CENTRE, SPREAD = 0.5, 0.25
"""Images 0 to 1 become (x − centre) / spread: the card's last two steps."""


@dataclass
class Line:
    """A line of progress: means over the steps since the last one."""

    step: int
    loss: float
    box: float
    """IoU with a box, of looks drawn at random."""
    point: float
    """The same with one point."""
    again: float
    """The same of both after a correction."""
    seconds: float
    """Since the beginning, stops left out."""


@dataclass
class Progress:
    """What a checkpoint keeps beside tensors."""

    step: int = 0
    seconds: float = 0.0
    lines: list[Line] = field(default_factory=list)
    recent: dict[str, list[float]] = field(default_factory=dict)
    """Of the steps since the last line."""


class PromptedTraining:
    """A recipe's training: begins or goes on."""

    def __init__(self, recipe: PromptedRecipe) -> None:
        """Build the network, or take it from the checkpoint.

        Raises:
            RequestError: the network cannot be built.
        """
        self.recipe, plan = recipe, recipe.optimise
        self.folder = Path(recipe.out) / recipe.name / mark(recipe)
        self.network = build(recipe.network, plan.seed)
        self.average = AveragedModel(
            self.network, multi_avg_fn=get_ema_multi_avg_fn(plan.ema), use_buffers=True
        )
        learned = list(self.network.parameters())
        self.optimiser = torch.optim.AdamW(
            [
                {"params": [p for p in learned if p.ndim > 1], "weight_decay": plan.decay},
                {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=plan.rate,
            fused=True,
        )
        self.progress = Progress()
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def run(self, told: Callable[[Line], None]) -> None:
        """Train to the recipe's last step, with a checkpoint every few minutes; then export.

        Raises:
            RequestError: a scene cannot be read, or the loss is not finite.
        """
        plan, progress = self.recipe.optimise, self.progress
        torch.set_num_threads(plan.threads)
        self.folder.mkdir(parents=True, exist_ok=True)
        samples = Samples(self.recipe, read_scenes(self.recipe))
        begun, before = time.monotonic(), progress.seconds
        saved = begun
        with Prefetch(samples.batches(progress.step, plan.steps), AHEAD) as ahead:
            for batch in ahead:
                self.step(batch)
                progress.step += 1
                progress.seconds = before + time.monotonic() - begun
                last = progress.step == plan.steps
                if progress.step % plan.every == 0 or last:
                    told(self._line())
                if last or time.monotonic() - saved > plan.minutes * 60:
                    self._save()
                    saved = time.monotonic()
        self.export()

    def rate(self, step: int) -> float:
        """Learning rate: rises, stays, and falls linearly over the last steps.

        Until the fall begins nothing depends on the number of steps, so that a run can be made longer.
        """
        plan = self.recipe.optimise
        rising = (step + 1) / plan.warmup if step < plan.warmup else 1.0
        falling = (plan.steps - step) / plan.cooldown if plan.cooldown else 1.0
        return plan.rate * min(rising, falling, 1.0)

    def step(self, batch: Batch) -> None:
        """Learn from one batch."""
        plan, step = self.recipe.optimise, self.progress.step
        torch.manual_seed(plan.seed * 1_000_003 + step)
        for group in self.optimiser.param_groups:
            group["lr"] = self.rate(step)
        self.network.train()
        loss = self.loss(batch, np.random.default_rng((plan.seed, step, 1)))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise RequestError(
                f"optimise: the loss is not finite in step {step + 1}: try a lower `optimise.rate` "
                f"(found {plan.rate:g}) or a longer `optimise.warmup` (found {plan.warmup})"
            )
        self._note("loss", value)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), plan.clip)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if (step + 1) * (1 - plan.ema) < 1:
            # Early on an average of few steps would still be mostly the random start.
            self.average.n_averaged.zero_()
        self.average.update_parameters(self.network)

    def loss(self, batch: Batch, rng: np.random.Generator) -> torch.Tensor:
        """Of one look at each object; in some steps also of a second answer, after a correction."""
        images = torch.from_numpy((batch.images - CENTRE) / SPREAD).contiguous(
            memory_format=torch.channels_last
        )
        with self._precision():
            context = self.network.encode(images)
        looks = look(batch, rng)
        logits, loss = self._judged(images, context, looks)
        if self.progress.step % self.recipe.sampling.again == 0:
            loss = loss + self._judged(images, context, corrected(looks, logits, rng), again=True)[1]
        return loss

    def _judged(
        self, images: torch.Tensor, context: torch.Tensor, looks: Looks, again: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answers (n, LOOK, LOOK), without gradients, and their loss."""
        with self._precision():
            logits, predicted = self.network.decode(images, context, looks.of, looks.edges, looks.maps)
        judged = judge(logits, predicted, looks.cover, looks.total)
        by_point = looks.asked.boxes.isnan().any(1)
        for name, chosen in (
            [("again", by_point | ~by_point)] if again else [("box", ~by_point), ("point", by_point)]
        ):
            if chosen.any():
                self._note(name, float(judged.iou[chosen].mean()))
        return logits.detach(), judged.loss

    def _precision(self) -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.optimise.bf16)

    def _note(self, name: str, value: float) -> None:
        self.progress.recent.setdefault(name, []).append(value)

    def _line(self) -> Line:
        recent, progress = self.progress.recent, self.progress
        means = {
            name: float(np.mean(recent.get(name, [math.nan]))) for name in ("loss", "box", "point", "again")
        }
        line = Line(step=progress.step, seconds=progress.seconds, **means)
        progress.recent = {}
        progress.lines.append(line)
        (self.folder / "history.json").write_text(json.dumps([asdict(x) for x in progress.lines], indent=1))
        return line

    def export(self) -> Path:
        """Write the averaged weights to the recipe's file; where."""
        path = Path(self.recipe.export)
        save(self.average.module, path)
        return path

    def _save(self) -> None:
        state = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "progress": asdict(self.progress),
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimiser.load_state_dict(state["optimiser"])
        progress = dict(state["progress"])
        lines = [Line(**line) for line in progress.pop("lines")]
        self.progress = Progress(**progress, lines=lines)


def mark(recipe: PromptedRecipe) -> str:
    """Name of a recipe's folder: a hash of all that the weights depend on, but for where training ends.

    A run that has not begun to cool down can be given another end (`PromptedTraining.rate`).
    """
    fields = recipe.model_dump(mode="json", exclude={"out", "export"})
    for name in ("steps", "cooldown", "threads", "every", "minutes"):
        fields["optimise"].pop(name)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]
