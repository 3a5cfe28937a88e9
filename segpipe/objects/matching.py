"""Which predicted object is which reference object, and the counts that follow.

An object is matched with at most one other, of its class, at an IoU of at least a threshold. An
unmatched object of which more than half is void is neither false positive nor false negative, as in
panopticapi; here this holds for both sides.

Panoptic quality (Kirillov et al., Panoptic Segmentation, CVPR 2019, section 4): PQ = SQ × RQ, where over a
class's segments, matched at IoU > 0.5,

    SQ = Σ IoU / tp        RQ = tp / (tp + fp/2 + fn/2)

Segments and void are those of `overlaps` with ``stuff``. Where nothing of a class is matched SQ is
not defined and PQ is 0; a mean of SQ leaves such classes out (panopticapi takes them as 0).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple, dataclass
from operator import add

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching

from segpipe.errors import RequestError
from segpipe.metrics.overlap import ABSENT_IN_BOTH, NOT_IN_REFERENCE, NOT_PREDICTED, mean, share
from segpipe.objects.overlap_table import Overlaps

ABOVE_HALF = math.nextafter(0.5, 1)
"""Threshold of panoptic quality: an IoU of *more* than 0.5."""
NOT_MATCHED = "nothing matched"
ONLY_VOID = "mostly void where it is"

IOU_BITS = 48
"""Sums of IoU are kept in 2**-48, whole numbers, so that they do not depend on the order."""
DENSE_CELLS = 1 << 24
"""Cells of a group's cost matrix (128 MiB); a larger group is solved as a sparse one."""


@dataclass(frozen=True)
class ObjectCounts:
    """Objects of one class, or of all."""

    tp: int = 0
    """Matched pairs."""
    fp: int = 0
    """Predicted objects without a match."""
    fn: int = 0
    """Reference objects without a match."""
    iou: int = 0
    """Sum of the matched pairs' IoU, in 2**-`IOU_BITS`."""
    void_predicted: int = 0
    """Predicted objects without a match, mostly where the reference is void: not in `fp`."""
    void_reference: int = 0
    """Reference objects without a match, mostly where nothing valid was predicted: not in `fn`."""

    def __add__(self, other: ObjectCounts) -> ObjectCounts:
        return ObjectCounts(*map(add, astuple(self), astuple(other)))

    @property
    def precision(self) -> float:
        """tp / (tp + fp)."""
        return share(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """tp / (tp + fn)."""
        return share(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """2·tp / (2·tp + fp + fn); the recognition quality of panoptic quality."""
        return share(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def mean_iou(self) -> float:
        """Mean IoU of the matched pairs; the segmentation quality of panoptic quality."""
        return share(self.iou, self.tp << IOU_BITS)

    @property
    def reason(self) -> str:
        """Why ratios are NaN; empty when all are defined."""
        if not self.tp + self.fp + self.fn:
            return ONLY_VOID if self.void_predicted + self.void_reference else ABSENT_IN_BOTH
        reasons = []
        if not self.tp + self.fp:
            reasons.append(f"precision: {ONLY_VOID if self.void_predicted else NOT_PREDICTED}")
        if not self.tp + self.fn:
            reasons.append(f"recall: {ONLY_VOID if self.void_reference else NOT_IN_REFERENCE}")
        if not self.tp:
            reasons.append(f"mean IoU: {NOT_MATCHED}")
        return "; ".join(reasons)


def pooled(counts: Iterable[ObjectCounts]) -> ObjectCounts:
    """Counts of several classes or scenes as one."""
    return sum(counts, ObjectCounts())


def object_counts(scene: Overlaps, threshold: float) -> dict[int, ObjectCounts]:
    """Counts by class value, of every class that has an object on either side.

    Raises:
        RequestError: the threshold is not above 0 and at most 1.
    """
    pairs = match(scene, threshold)
    matched = scene.predicted.objects.classes[scene.first[pairs]]
    units = np.rint(scene.iou[pairs] * (1 << IOU_BITS)).astype(np.int64)
    free = []
    for side, taken in ((scene.predicted, scene.first[pairs]), (scene.reference, scene.second[pairs])):
        alone = np.ones(len(side.area), dtype=bool)
        alone[taken] = False
        free += [side.objects.classes[alone & void] for void in (~side.mostly_void, side.mostly_void)]
    fp, void_predicted, fn, void_reference = (Counter(classes.tolist()) for classes in free)
    return {
        value: ObjectCounts(
            int((matched == value).sum()),
            fp[value],
            fn[value],
            sum(units[matched == value].tolist()),  # Python's: 2**15 pairs would overflow int64
            void_predicted[value],
            void_reference[value],
        )
        for value in scene.classes
    }


def match(scene: Overlaps, threshold: float) -> np.ndarray:
    """Indices of the pairs (`Overlaps.first`, `.second`) that are matches: IoU ≥ threshold.

    Above 0.5 all such pairs are. Otherwise the most pairs that can be; of these sets the one that
    leaves the fewest mistakes (it matters next to void only); of these the largest sum of IoU.

    Raises:
        RequestError: the threshold is not above 0 and at most 1.
    """
    if not 0 < threshold <= 1:
        raise RequestError(f"IoU threshold {threshold}: it must be above 0 and at most 1")
    pairs = np.flatnonzero(scene.iou >= threshold)
    # Kirillov et al. 2019, section 4.1: objects of one side are disjoint. If p matched r and s, then
    # |p∩r| > |p∪r|/2 ≥ |p|/2 and |p∩s| > |p|/2, so |p| ≥ |p∩r| + |p∩s| > |p|: a contradiction.
    if threshold > 0.5:
        return pairs
    first, second = scene.first[pairs], scene.second[pairs]
    shift = len(scene.predicted.area)
    nodes = shift + len(scene.reference.area)
    graph = coo_array((np.ones(len(pairs), dtype=bool), (first, shift + second)), shape=(nodes, nodes))
    group = connected_components(graph, directed=False)[1][first]
    order = np.argsort(group, kind="stable")
    ends = np.flatnonzero(np.diff(group[order])) + 1
    chosen = []
    for part in np.split(order, ends) if len(order) else []:
        if len(part) > 1:
            judged = scene.judged[pairs[part]]
            part = part[_assign(first[part], second[part], scene.iou[pairs[part]], judged)]
        chosen.append(part)
    return np.sort(pairs[np.concatenate(chosen)]) if chosen else pairs


def _assign(first: np.ndarray, second: np.ndarray, iou: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """Which of a group's pairs to take: as many, as judged, and of as much IoU as can be, in this order."""
    rows, i = np.unique(first, return_inverse=True)
    columns, j = np.unique(second, return_inverse=True)
    # all IoUs together weigh less than one object judged, and all of these less than one pair
    most = min(len(rows), len(columns)) + 1
    gain = 1 + (judged + iou / most) / (2 * most)
    if len(rows) * len(columns) <= DENSE_CELLS:
        matrix = np.zeros((len(rows), len(columns)))
        matrix[i, j] = gain
        partner = np.full(len(rows), -1)
        taken, to = linear_sum_assignment(matrix, maximize=True)
        partner[taken] = to
    else:  # every row may stay alone, with a column of its own; 1 more for all, as 0 is no edge
        n = np.arange(len(rows))
        weights = csr_array(
            (np.r_[1 + gain, np.ones(len(n))], (np.r_[i, n], np.r_[j, len(columns) + n])),
            shape=(len(rows), len(columns) + len(rows)),
        )
        partner = min_weight_full_bipartite_matching(weights, maximize=True)[1]
    return np.asarray(np.flatnonzero(partner[i] == j))


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
