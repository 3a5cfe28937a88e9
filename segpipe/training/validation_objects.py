"""A network that finds objects, tried on what is kept apart: windows joined as in a run, then PQ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from segpipe.config.card import Card
from segpipe.config.losses import IGNORE
from segpipe.geometry.box import Box
from segpipe.inference.object_merger import ObjectMerger, stuff_values
from segpipe.metrics.tally import SizeScale
from segpipe.objects.matching import ObjectCounts, panoptic_counts, panoptic_quality, pooled
from segpipe.objects.merge import SceneObjects, merge_objects, relabel
from segpipe.objects.nodes import add_pairs, window_edges
from segpipe.objects.overlap_table import VOID, Objects, Overlaps, overlap_tile, overlaps
from segpipe.objects.window import WindowObjects
from segpipe.training.scenes import TrainScene
from segpipe.training.split import Fold
from segpipe.training.validation import Trial, trial_lattice

Find = Callable[[torch.Tensor], WindowObjects]
"""Image (1, c, …) to what is found in it."""


def try_objects(
    find: Find, card: Card, scenes: Sequence[TrainScene], fold: Fold, device: torch.device
) -> Trial:
    """Find the objects of each box that is judged, and count those that match (Kirillov et al., CVPR 2019).

    Each box is cut out of its scene: what lies outside is neither seen nor counted.

    Args:
        find: the network, in evaluation mode.
        card: its card; instance or panoptic.
        scenes: of which those with judged elements are taken.
        fold: says which elements are judged.
        device: of the network.
    """
    stuff = stuff_values(card)
    shown = [c for c in card.classes if not c.background and (c.thing or c.value in stuff)]
    things = [c.value for c in shown if c.value not in stuff]
    rows: list[tuple[Any, ...]] = []
    for scene in scenes:
        judged = [_judged(find, card, scene, box, device) for box in fold.judged(scene.name)]
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


def _judged(find: Find, card: Card, scene: TrainScene, box: Box, device: torch.device) -> Overlaps:
    """Objects of a box of a scene, found and true."""
    image, target = scene.read(box)
    whole, objects = find_objects(find, card, image, device)
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
def find_objects(
    find: Find, card: Card, image: np.ndarray, device: torch.device
) -> tuple[np.ndarray, SceneObjects]:
    """Ids (…) and objects of an image (c, …) in memory, by the card's windows, joined as in a run."""
    shape = image.shape[1:]
    whole, lattice = Box.whole(shape), trial_lattice(card, shape)
    beyond: Any = "constant" if card.window.padding == "zero" else card.window.padding
    merger = ObjectMerger(whole, lattice, card)
    for index in lattice.windows(whole, "trim"):
        window = lattice.window(index)
        seen = window.intersect(whole)
        rest = [(0, n - m) for n, m in zip(window.shape, seen.shape, strict=True)]
        pixels = np.pad(image[(slice(None), *seen.slices)], [(0, 0), *rest], mode=beyond)
        merger.aggregate(index, find(torch.from_numpy(pixels)[None].to(device)))
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
