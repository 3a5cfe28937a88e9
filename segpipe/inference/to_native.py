"""From merged scores on the model grid to a block's answer on the native one, class by class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segpipe.geometry.box import Box
from segpipe.geometry.grid_map import onto_native
from segpipe.inference.uncertainty import Uncertainty
from segpipe.tiling.plan import Plan


@dataclass(frozen=True)
class NativeAnswer:
    """A block's answer, native grid; 0 outside the region of interest."""

    channel: np.ndarray
    """The first channel of the highest score: uint8, or int32 for more than 256 classes."""
    scores: np.ndarray | None
    """(k, …) float32."""
    uncertainty: np.ndarray | None
    """(channel, …) uint16; see `segpipe.inference.uncertainty`."""


def native_answer(merged: np.ndarray, classes: int, plan: Plan, box: Box, nearest: bool) -> NativeAnswer:
    """Resample scores where the grids differ, keeping one plane beside the best so far.

    Args:
        merged: (k, …) scores over the block's region of the model grid; one channel more where
            elements have several answers: the mean of their entropies.
        classes: k.
        plan: of the scene; says what is wanted beside the class.
        box: the block, native grid.
        nearest: how to resample; else linear.
    """
    load, identity = plan.workload, plan.grid.identity
    inside = box.intersect(plan.grid.crop)
    here = inside.within(box)
    region = plan.grid.model_box(box)
    channel = np.zeros(box.shape, np.uint8 if classes <= 256 else np.int32)
    keep = np.zeros((classes, *box.shape), np.float32) if load.keep_scores else None
    spread = np.zeros((load.uncertainty, *box.shape), np.uint16) if load.uncertainty else None
    if inside.size == 0:
        return NativeAnswer(channel, keep, spread)

    def plane(number: int) -> np.ndarray:
        part = merged[number : number + 1]
        if not identity:
            part = onto_native(part, region, plan.grid, inside, nearest=nearest)
        found: np.ndarray = part[0]
        return found

    doubt = Uncertainty(inside.shape, classes) if spread is not None else None
    best = plane(0).copy()
    for number in range(classes):
        scores = plane(number) if number else best
        if keep is not None:
            keep[number][here] = scores
        if doubt is not None:
            doubt.add(scores)
        if number:
            better = scores > best
            channel[here][better] = number
            np.copyto(best, scores, where=better)
    if spread is not None and doubt is not None:
        expected = plane(classes) if len(merged) > classes else None
        spread[(slice(None), *here)] = doubt.finish(expected)
    return NativeAnswer(channel, keep, spread)
