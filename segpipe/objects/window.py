"""The objects of one window: from masks that overlap to one id per element."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

WindowTable = tuple[np.ndarray, np.ndarray]
"""Class values and scores of a window's objects; local id k has place k − 1."""


@dataclass(frozen=True, eq=False)
class WindowObjects:
    """What a model found in one window."""

    ids: np.ndarray
    """int32 over the window, (y, x) or (z, y, x): 0 no object, k the k-th of the others."""
    classes: np.ndarray
    """(n,) class values, int64."""
    scores: np.ndarray
    """(n,) float32 in [0, 1], NaN where the model gives none."""

    def __post_init__(self) -> None:
        if self.classes.ndim != 1 or self.classes.shape != self.scores.shape:
            raise ValueError(f"classes {self.classes.shape} and scores {self.scores.shape}; valid: both (n,)")
        low, high = int(self.ids.min(initial=0)), int(self.ids.max(initial=0))
        if low < 0 or high > len(self.classes):
            raise ValueError(f"ids {low} to {high} of {len(self.classes)} objects")
        if (self.scores < 0).any() or (self.scores > 1).any():
            raise ValueError("a score outside [0, 1]")

    @property
    def table(self) -> WindowTable:
        """Classes and scores without the ids: what nodes are made with."""
        return self.classes, self.scores


def resolve_masks(
    masks: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray,
    *,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.8,
    things: Collection[int],
    stuff: Collection[int],
    rule: Literal["transformers", "paper"] = "transformers",
) -> WindowObjects:
    """Panoptic segments of a window (Cheng et al., MaskFormer, NeurIPS 2021, section 3.4).

    An element goes to the mask with the highest score × mask there. A segment is dropped, and its
    elements are no object, where its elements over its mask's are fewer than ``overlap_threshold``. Segments
    of one class of stuff become one, with the mean of their scores weighted by elements.

    The ``transformers`` rule is `Mask2FormerImageProcessor.post_process_panoptic_segmentation`'s: a mask's
    elements are where score × mask is at least ``mask_threshold``, and every element goes to a segment,
    however faint all masks are there: a lone object fills its window. The ``paper`` rule is that of the
    paper's own code: they are where the mask alone is, and a segment has no others. (Unlike
    transformers 5, which goes on counting from a fused segment's id, no two segments share an id.)

    Args:
        masks: (n, y, x) or (n, z, y, x) probabilities.
        classes: (n,) class values; masks whose class is neither thing nor stuff take no part.
        scores: (n,) probability of the class.
        score_threshold: a mask takes part if its score is above.
    """
    kept = np.flatnonzero(np.isin(classes, [*things, *stuff]) & (scores > score_threshold))
    best = np.full(masks.shape[1:], -1, masks.dtype)
    winner = np.zeros(masks.shape[1:], np.int32)
    sure = np.zeros(masks.shape[1:], bool)
    original = np.zeros(len(kept), np.int64)
    for k, row in enumerate(kept):
        weighted = masks[row] * scores[row]
        inside = (weighted if rule == "transformers" else masks[row]) >= mask_threshold
        original[k] = np.count_nonzero(inside)
        better = weighted > best
        best[better], winner[better], sure[better] = weighted[better], k + 1, inside[better]
    elements = np.bincount(winner.ravel(), minlength=len(kept) + 1)[1:]
    good = (original > 0) & (elements >= overlap_threshold * original)
    if rule == "paper":
        winner[~sure] = 0
    place = np.where(good, np.arange(1, len(kept) + 1), 0)
    for value in stuff:
        same = good & (classes[kept] == value)
        place[same] = place[same].min(initial=len(kept))
    return _numbered(np.r_[0, place][winner], winner, classes[kept], scores[kept])


def resolve_instances(
    masks: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray,
    *,
    score_threshold: float = 0.5,
    mask_threshold: float = 0.5,
    overlap_threshold: float = 0.0,
) -> WindowObjects:
    """Objects of a window, the one with the highest score in front (Kirillov et al. 2019, section 7).

    From the highest score down, ties in the order given, an object takes the elements of its mask that
    are still free; it is dropped where there are none, or where they are a smaller share of its mask than
    ``overlap_threshold``. (transformers 5 paints masks in the order of queries, the last in front, and
    thresholds MaskFormer's and OneFormer's before it enlarges them: where masks overlap its map is another.)

    Args:
        masks: (n, y, x) or (n, z, y, x) probabilities.
        classes: (n,) class values.
        scores: (n,); for Mask2Former the class's probability × `mask_quality`.
        score_threshold: an object takes part if its score is at least this.
        mask_threshold: an element belongs to a mask if its probability is above.
    """
    ids = np.zeros(masks.shape[1:], np.int32)
    for row in np.argsort(-scores, kind="stable"):
        if not scores[row] >= score_threshold:
            continue
        mask = masks[row] > mask_threshold
        free = mask & (ids == 0)
        if np.count_nonzero(free) >= overlap_threshold * np.count_nonzero(mask):
            ids[free] = row + 1
    return _numbered(ids, ids, classes, scores)


def mask_quality(masks: np.ndarray, mask_threshold: float = 0.5) -> np.ndarray:
    """Mean probability of each mask where it is above the threshold, (n,) float32; 0 where it is nowhere."""
    inside = masks > mask_threshold
    space = tuple(range(1, masks.ndim))
    total = np.where(inside, masks, 0).sum(space, dtype=np.float64)
    return np.asarray(total / np.maximum(1, np.count_nonzero(inside, space)), np.float32)


def _numbered(ids: np.ndarray, parts: np.ndarray, classes: np.ndarray, scores: np.ndarray) -> WindowObjects:
    """Objects numbered 1…n without gaps.

    Args:
        ids: row + 1 of each element's object, or 0.
        parts: row + 1 of the mask it comes from: others than ``ids`` where masks were fused.
        classes: class value of each row.
        scores: of each row; a fused object has the mean, weighted by elements.
    """
    rows = np.unique(ids[ids > 0])
    new = np.zeros(len(classes) + 1, np.int32)
    new[rows] = np.arange(1, len(rows) + 1)
    numbered = new[ids]
    owner = np.zeros(len(classes) + 1, np.int32)
    owner[parts.ravel()] = numbered.ravel()
    weight = np.bincount(parts[numbered > 0], minlength=len(classes) + 1)[1:]
    known = weight > 0  # a score of NaN or infinity elsewhere must not reach the sums
    sums = np.bincount(owner[1:][known], (weight * scores.astype(np.float64))[known], len(rows) + 1)
    mean = sums[1:] / np.bincount(numbered.ravel(), minlength=len(rows) + 1)[1:]
    return WindowObjects(numbered, classes[rows - 1].astype(np.int64), mean.astype(np.float32))
