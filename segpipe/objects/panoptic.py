"""Panoptic quality (Kirillov et al., Panoptic Segmentation, CVPR 2019, section 4).

PQ = SQ × RQ, where over a class's segments, matched at IoU > 0.5,

    SQ = Σ IoU / tp        RQ = tp / (tp + fp/2 + fn/2)

Segments and void are those of `overlaps` with ``stuff``. Where nothing of a class is matched SQ is
not defined and PQ is 0; a mean of SQ leaves such classes out (panopticapi takes them as 0).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from segpipe.errors import RequestError
from segpipe.metrics.overlap import mean
from segpipe.objects.matching import ABOVE_HALF, NOT_MATCHED, ObjectCounts, object_counts, pooled
from segpipe.objects.overlap_table import Overlaps


@dataclass(frozen=True)
class Quality:
    """Panoptic quality of one class, or a mean over classes."""

    pq: float
    sq: float
    rq: float
    classes: int
    """How many classes have a PQ: 1 or 0 for one class. SQ may be defined in fewer."""
    reason: str
    """Why one of them is NaN; empty when all are defined."""


@dataclass(frozen=True)
class PanopticQuality:
    """Panoptic quality by class value, and its means."""

    by_class: dict[int, Quality]
    counts: dict[int, ObjectCounts]
    things: Quality
    stuff: Quality
    all: Quality


def panoptic_counts(scene: Overlaps) -> dict[int, ObjectCounts]:
    """A scene's segments by class value, matched at IoU > 0.5; add them up over scenes."""
    return object_counts(scene, ABOVE_HALF)


def panoptic_quality(
    scenes: Iterable[Mapping[int, ObjectCounts]], things: Collection[int], stuff: Collection[int]
) -> PanopticQuality:
    """Panoptic quality over scenes, of these classes only.

    Args:
        scenes: `panoptic_counts` of each, made with the same ``stuff``.
        things: classes of countable objects.
        stuff: classes that are one segment per scene.

    Raises:
        RequestError: a class is both thing and stuff.
    """
    both = set(things) & set(stuff)
    if both:
        raise RequestError(f"class {min(both)} is both thing and stuff; it must be one of them")
    scenes = list(scenes)
    counts = {
        value: pooled(scene.get(value, ObjectCounts()) for scene in scenes)
        for value in sorted({*things, *stuff})
    }
    by_class = {value: _quality(found) for value, found in counts.items()}
    return PanopticQuality(
        by_class,
        counts,
        things=_mean([by_class[v] for v in sorted(set(things))]),
        stuff=_mean([by_class[v] for v in sorted(set(stuff))]),
        all=_mean(list(by_class.values())),
    )


def _quality(counts: ObjectCounts) -> Quality:
    """Quality of one class."""
    if counts.tp:
        return Quality(counts.mean_iou * counts.f1, counts.mean_iou, counts.f1, 1, "")
    if counts.fp + counts.fn:
        return Quality(0.0, math.nan, 0.0, 1, f"SQ: {NOT_MATCHED}")
    return Quality(math.nan, math.nan, math.nan, 0, counts.reason)


def _mean(qualities: Collection[Quality]) -> Quality:
    """The mean over classes, each with the same weight, of what is defined."""
    pq, sq, rq = (mean(getattr(q, name) for q in qualities) for name in ("pq", "sq", "rq"))
    classes = sum(q.classes for q in qualities)
    if not classes:
        return Quality(pq, sq, rq, 0, "no class is defined")
    return Quality(pq, sq, rq, classes, f"SQ: {NOT_MATCHED}" if math.isnan(sq) else "")
