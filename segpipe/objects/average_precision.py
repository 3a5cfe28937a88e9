"""Average precision as COCO defines it (Lin et al. 2014; cocodataset.org/#detection-eval).

By class and IoU threshold (0.50, 0.55 … 0.95): predicted objects of all scenes by falling score,
each matched to a reference object of its scene; precision at 101 recalls (0, 0.01 … 1), each the best at
that recall or a higher one; their mean. AP is the mean over thresholds.

Three differences. There is no limit of 100 objects per image. Objects of equal score enter together,
so that the curve does not depend on their order. And objects mostly in void are treated as in
`matching`, where COCO has crowds.

At IoU ≥ 0.5 COCO's greedy choice by score need be made only once. Above 0.5 a match is unique. At
exactly 0.5 an object may have two partners, and then each of the two is half of it and lies within
it, so that they have no other: the one with the better score is taken, then one not mostly void.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from segpipe.metrics.overlap import NOT_IN_REFERENCE, mean
from segpipe.objects.matching import ONLY_VOID
from segpipe.objects.overlap_table import Overlaps

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""As pycocotools has them, to the last bit."""
RECALLS = np.linspace(0, 1, 101)
UNSCORED = 1.0
"""Score of an object that has none."""


@dataclass(frozen=True, eq=False)
class ScoredMatches:
    """What average precision needs to know of one class in one scene."""

    scores: np.ndarray
    """Of each predicted object, float64; NaN for none."""
    iou: np.ndarray
    """Of each predicted object with its partner; 0 for none at IoU ≥ 0.5."""
    void: np.ndarray
    """Which of the predicted objects are mostly void."""
    found: np.ndarray
    """Of each reference object, the IoU with its partner; 0 for none at IoU ≥ 0.5."""
    found_void: np.ndarray
    """Which of the reference objects are mostly void."""


@dataclass(frozen=True)
class AveragePrecision:
    """Average precision of one class."""

    ap: float
    ap50: float
    ap75: float
    reason: str = ""
    """Why they are NaN; empty when they are defined."""
    note: str = ""
    """What the scores allow to say."""


def detections(scene: Overlaps) -> dict[int, ScoredMatches]:
    """A scene's predicted objects with their partners, by class value."""
    predicted, reference = scene.predicted, scene.reference
    pairs = np.flatnonzero(scene.iou >= 0.5)
    score = _filled(predicted.objects.scores)[scene.first[pairs]]
    pairs = pairs[np.lexsort((-scene.judged[pairs], -score))]
    for column in (scene.first, scene.second):  # each object's first pair, in the order of scores
        pairs = pairs[np.sort(np.unique(column[pairs], return_index=True)[1])]
    iou, found = np.zeros(len(predicted.area)), np.zeros(len(reference.area))
    iou[scene.first[pairs]] = found[scene.second[pairs]] = scene.iou[pairs]
    result = {}
    for value in scene.classes:
        p, r = predicted.objects.classes == value, reference.objects.classes == value
        result[value] = ScoredMatches(
            predicted.objects.scores[p], iou[p], predicted.mostly_void[p], found[r], reference.mostly_void[r]
        )
    return result


def average_precision(scenes: Iterable[dict[int, ScoredMatches]]) -> dict[int, AveragePrecision]:
    """Average precision over scenes, by class value of every class that any has (`detections`)."""
    scenes = list(scenes)
    values = sorted({value for scene in scenes for value in scene})
    return {value: _of_class([scene[value] for scene in scenes if value in scene]) for value in values}


def _of_class(parts: list[ScoredMatches]) -> AveragePrecision:
    """Average precision of one class over scenes."""
    columns = (np.concatenate([getattr(p, n) for p in parts]) for n in ScoredMatches.__dataclass_fields__)
    scores, iou, void, found, found_void = columns
    by_threshold = []
    for threshold in IOU_THRESHOLDS:
        counted = (iou >= threshold) | ~void
        references = int(((found >= threshold) | ~found_void).sum())
        hits = iou[counted] >= threshold
        by_threshold.append(_curve_mean(_filled(scores[counted]), hits, references))
    ap = mean(by_threshold)
    without = int(np.isnan(scores).sum())
    note = ""
    if without:
        note = f"{without} of {len(scores)} objects have no score and count as {UNSCORED:g}"
    if without and without == len(scores):
        note = "no object has a score: AP is of one operating point"
    reason = ""
    if math.isnan(ap):
        reason = ONLY_VOID if len(found) else NOT_IN_REFERENCE
    return AveragePrecision(ap, by_threshold[0], by_threshold[5], reason, note)


def _curve_mean(scores: np.ndarray, hits: np.ndarray, references: int) -> float:
    """Mean of the interpolated precision at `RECALLS`; NaN without a reference object."""
    if not references:
        return math.nan
    if not len(scores):
        return 0.0
    order = np.argsort(-scores)
    last = np.r_[np.flatnonzero(np.diff(scores[order])), len(order) - 1]  # of each distinct score
    tp = np.cumsum(hits[order])[last]
    precision = tp / (last + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    place = np.searchsorted(tp / references, RECALLS)
    return mean(np.r_[best, 0.0][place].tolist())


def _filled(scores: np.ndarray) -> np.ndarray:
    """Scores, `UNSCORED` where there is none."""
    return np.where(np.isnan(scores), UNSCORED, scores)
