"""The model tried on what is kept apart: trimmed windows, counts per scene and class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from segpipe.config.card import Card
from segpipe.config.losses import IGNORE
from segpipe.geometry.box import Box
from segpipe.metrics.bootstrap import mean_intervals
from segpipe.models.network import best_class
from segpipe.tiling.windows import Lattice, make_lattice
from segpipe.training.scenes import TrainScene
from segpipe.training.split import Fold

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Images (1, c, …) to logits (1, k, …) of the same size."""


@dataclass(frozen=True)
class Trial:
    """What the model did on what is kept apart."""

    table: pd.DataFrame
    """A row per scene and class: scene, class, tp, fp, fn, and measures; NaN where neither side has it."""
    score: float
    """Mean over classes (background left out) of the mean over scenes of Dice; of objects: of PQ."""
    miou: float
    """Mean over classes of IoU, of all scenes' counts together; NaN for objects."""
    measure: str = "dice"
    """Column that `score` is of."""

    def lines(self, card: Card) -> list[str]:
        """For people: the mean over scenes for each class, with its interval."""
        found = []
        for c in card.classes:
            if c.background:
                continue
            found_by_scene = self.table[self.table["class"] == c.name][self.measure].to_numpy(float)
            count = int(np.isfinite(found_by_scene).sum())
            if not count:
                found.append(f"{c.name} not in what is kept apart")
                continue
            scenes = len(found_by_scene)
            interval = mean_intervals(found_by_scene[:, None], np.arange(scenes), scenes)
            text = f"{c.name} {np.nanmean(found_by_scene):.3f}"
            if count > 1:
                text += f" ({interval.low[0]:.3f} to {interval.high[0]:.3f})"
            found.append(text)
        return found


def trial_lattice(card: Card, shape: Sequence[int]) -> Lattice:
    """The card's windows over a scene, as in a run; a halo of a quarter where it is yet to be measured."""
    stride, window = card.window.stride, card.window_shape
    if window is None or card.window.size == "whole":
        return make_lattice(shape, [-(-n // stride) * stride for n in shape], [0] * len(shape), stride)
    halo = card.halo or tuple(n // 4 // stride * stride for n in window)
    return make_lattice(shape, window, halo, stride, card.window.fixed)


def try_model(
    predict: Predict,
    card: Card,
    scenes: Sequence[TrainScene],
    fold: Fold,
    device: torch.device,
) -> Trial:
    """Predict the scenes that are judged, window by window, and count.

    Args:
        predict: the network, in evaluation mode.
        card: its card.
        scenes: of which those with judged elements are taken.
        fold: says which elements are judged.
        device: of the network.
    """
    rows = []
    for scene in scenes:
        judged = fold.judged(scene.name)
        if not judged:
            continue
        matrix = _confusion(predict, card, scene, fold, trial_lattice(card, scene.shape), device)
        for channel, c in enumerate(card.classes):
            tp = int(matrix[channel, channel])
            rows.append(
                (scene.name, c.name, tp, int(matrix[:, channel].sum()) - tp, int(matrix[channel].sum()) - tp)
            )
    table = pd.DataFrame(rows, columns=["scene", "class", "tp", "fp", "fn"])
    hit, wrong = table["tp"].to_numpy(float), (table["fp"] + table["fn"]).to_numpy(float)
    with np.errstate(invalid="ignore"):
        table["dice"], table["iou"] = 2 * hit / (2 * hit + wrong), hit / (hit + wrong)
    shown = [c.name for c in card.classes if not c.background]
    dice = table.groupby("class")["dice"].mean()
    pooled = table.groupby("class")[["tp", "fp", "fn"]].sum()
    iou = pooled["tp"] / pooled.sum(axis=1)
    return Trial(table, float(dice[shown].mean()), float(iou[shown].mean()))


@torch.inference_mode()
def _confusion(
    predict: Predict, card: Card, scene: TrainScene, fold: Fold, lattice: Lattice, device: torch.device
) -> np.ndarray:
    """Elements by reference (row) and predicted class (column)."""
    classes = len(card.classes)
    matrix = np.zeros((classes, classes), dtype=np.int64)
    whole = Box.whole(lattice.shape)
    beyond: Any = "constant" if card.window.padding == "zero" else card.window.padding
    for index in lattice.windows(whole, "trim"):
        owned, window = lattice.owned(index), lattice.window(index)
        judged = fold.is_judged(scene.name, owned)
        if not judged.any():
            continue
        seen = window.intersect(whole)
        image, target = scene.read(seen)
        rest = [(0, n - m) for n, m in zip(window.shape, seen.shape, strict=True)]
        image = np.pad(image, [(0, 0), *rest], mode=beyond)
        logits = predict(torch.from_numpy(image)[None].to(device))
        if logits.shape[1] == 1:
            logits = torch.cat([torch.zeros_like(logits), logits], 1)
        labels = best_class(logits)[0].cpu().numpy()[owned.within(window)].astype(np.int64)
        truth = target[owned.within(seen)].astype(np.int64)
        keep = judged & (truth != IGNORE)
        matrix += np.bincount(truth[keep] * classes + labels[keep], minlength=classes**2).reshape(classes, -1)
    return matrix
