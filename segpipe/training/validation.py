"""The model tried on what is kept apart: windows as in a run, counts per scene and class, PQ of objects."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch

from segpipe.config.card import Card
from segpipe.config.losses import IGNORE
from segpipe.geometry.box import Box
from segpipe.inference.normalise import padded
from segpipe.inference.object_merger import ObjectMerger, stuff_values
from segpipe.metrics.bootstrap import mean_intervals
from segpipe.metrics.tally import SizeScale
from segpipe.models.network import best_class
from segpipe.objects.matching import ObjectCounts, panoptic_counts, panoptic_quality, pooled
from segpipe.objects.nodes import add_pairs, window_edges
from segpipe.objects.overlap_table import VOID, Objects, Overlaps, overlap_tile, overlaps
from segpipe.objects.scene_objects import SceneObjects, merge_objects, relabel
from segpipe.objects.window import WindowObjects
from segpipe.tiling.windows import Lattice, make_lattice
from segpipe.training.losses import of_all_classes
from segpipe.training.scenes import TrainScene
from segpipe.training.split import Fold

Predict = Callable[[torch.Tensor], torch.Tensor]
"""Images (1, c, …) on the CPU to logits (1, k, …) of the same size."""


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


def try_model(predict: Predict, card: Card, scenes: Sequence[TrainScene], fold: Fold) -> Trial:
    """Predict the scenes that are judged, window by window, and count.

    Args:
        predict: the network, in evaluation mode.
        card: its card.
        scenes: of which those with judged elements are taken.
        fold: says which elements are judged.
    """
    rows = []
    for scene in scenes:
        judged = fold.judged(scene.name)
        if not judged:
            continue
        matrix = _confusion(predict, card, scene, fold, trial_lattice(card, scene.shape))
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
def _confusion(predict: Predict, card: Card, scene: TrainScene, fold: Fold, lattice: Lattice) -> np.ndarray:
    """Elements by reference (row) and predicted class (column)."""
    classes = len(card.classes)
    matrix = np.zeros((classes, classes), dtype=np.int64)
    whole = Box.whole(lattice.shape)
    for index in lattice.windows(whole, "trim"):
        owned, window = lattice.owned(index), lattice.window(index)
        judged = fold.is_judged(scene.name, owned)
        if not judged.any():
            continue
        seen = window.intersect(whole)
        image, target = scene.read(seen)
        image = padded(image, window.shape, card.window.padding)
        logits = of_all_classes(predict(torch.from_numpy(image)[None]))
        labels = best_class(logits)[0].cpu().numpy()[owned.within(window)].astype(np.int64)
        truth = target[owned.within(seen)].astype(np.int64)
        keep = judged & (truth != IGNORE)
        matrix += np.bincount(truth[keep] * classes + labels[keep], minlength=classes**2).reshape(classes, -1)
    return matrix


Find = Callable[[torch.Tensor], WindowObjects]
"""Image (1, c, …) on the CPU to what is found in it."""


def try_objects(find: Find, card: Card, scenes: Sequence[TrainScene], fold: Fold) -> Trial:
    """Find the objects of each box that is judged, and count those that match (Kirillov et al., CVPR 2019).

    Each box is cut out of its scene: what lies outside is neither seen nor counted.

    Args:
        find: the network, in evaluation mode.
        card: its card; instance or panoptic.
        scenes: of which those with judged elements are taken.
        fold: says which elements are judged.
    """
    stuff = stuff_values(card)
    shown = [c for c in card.classes if not c.background and (c.thing or c.value in stuff)]
    things = [c.value for c in shown if c.value not in stuff]
    rows: list[tuple[Any, ...]] = []
    for scene in scenes:
        judged = [_judged(find, card, scene, box) for box in fold.judged(scene.name)]
        if not judged:
            continue
        found = [panoptic_counts(one) for one in judged]
        counts = {c.value: pooled(f.get(c.value, ObjectCounts()) for f in found) for c in shown}
        quality = panoptic_quality([counts], things, stuff)
        for c in shown:
            n, q = counts[c.value], quality.by_class[c.value]
            rows.append((scene.name, c.name, n.tp, n.fp, n.fn, q.pq, q.sq, q.rq))
    table = pd.DataFrame(rows, columns=["scene", "class", "tp", "fp", "fn", "pq", "sq", "rq"])
    by_class = table.groupby("class")["pq"].mean()
    return Trial(table, float(by_class.mean()), math.nan, "pq")


def _judged(find: Find, card: Card, scene: TrainScene, box: Box) -> Overlaps:
    """Objects of a box of a scene, found and true."""
    image, target = scene.read(box)
    whole, objects = find_objects(find, card, image)
    true, classes = _true_objects(card, target, scene.read_ids(box))
    scale = SizeScale("px", 1.0, 0, np.ones(box.shape[0], np.int64))
    table = overlap_tile(
        np.where(target == IGNORE, VOID, whole.astype(np.int64)), true, Box.whole(box.shape), scale
    )
    return overlaps(
        table,
        Objects.of(objects.ids, objects.classes, objects.scores),
        Objects.of(np.arange(1, len(classes) + 1), classes),
        scale,
        stuff=stuff_values(card),
    )


@torch.inference_mode()
def find_objects(find: Find, card: Card, image: np.ndarray) -> tuple[np.ndarray, SceneObjects]:
    """Ids (…) and objects of an image (c, …) in memory, by the card's windows, joined as in a run."""
    shape = image.shape[1:]
    whole, lattice = Box.whole(shape), trial_lattice(card, shape)
    merger = ObjectMerger(whole, lattice, card)
    for index in lattice.windows(whole, "trim"):
        window = lattice.window(index)
        seen = window.intersect(whole)
        pixels = padded(image[(slice(None), *seen.slices)], window.shape, card.window.padding)
        merger.aggregate(index, find(torch.from_numpy(pixels)[None]))
    _, block = merger.finalize()
    pairs = add_pairs(
        window_edges(overhang, lattice, lambda box: block.raw[box.slices]) for overhang in block.overhangs
    )
    objects, lookup = merge_objects(block.nodes, pairs, lattice, stuff=stuff_values(card))
    return relabel(block.raw, whole, lattice, lookup), objects


def _true_objects(card: Card, target: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True ids 1…n (…), `VOID` where nothing is said, and the class value of each."""
    numbers = np.zeros(target.shape, np.int64)
    classes: list[int] = []
    for channel, c in enumerate(card.classes):
        here = target == channel
        if c.background or (card.output.kind == "instance" and not c.thing):
            continue
        # stuff is one segment, whatever its ids
        own = np.where(here, ids if c.thing else 1, 0)
        found, place = np.unique(own, return_inverse=True)
        new = np.where(found > 0, len(classes) + np.cumsum(found > 0), 0)
        numbers += new[place.reshape(own.shape)]
        classes += [c.value] * int((found > 0).sum())
    return np.where(target == IGNORE, VOID, numbers), np.array(classes, np.int64)
