"""Masks that a prompt may mean: what is measured of each, and which one is taken."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from segpipe.config.prompts import Choice
from segpipe.prompts.segmenters.base import stability_score


@dataclass(frozen=True, eq=False)
class Measured:
    """What is known of each of k masks of one window."""

    iou: np.ndarray
    """(k,) float64: predicted by the model."""
    stability: np.ndarray
    """(k,) float64: `stability_score`; NaN where even the lower threshold leaves no element."""
    elements: np.ndarray
    """(k,) int64: of the window."""
    start: np.ndarray
    """(k, 2) float64: y, x at which the bounding box begins, an outer edge of its first element, as boxes of
    prompts have it; NaN of an empty mask."""
    stop: np.ndarray
    """(k, 2) float64: where it ends."""


def measure(logits: np.ndarray, iou: np.ndarray) -> Measured:
    """What is known of masks.

    Args:
        logits: (k, y, x): above 0 is the object. −inf where there can be none.
        iou: (k,) as the model predicted it.
    """
    masks = logits > 0
    start, stop = bounds(masks)
    elements = np.count_nonzero(masks, axis=(-2, -1)).astype(np.int64)
    return Measured(np.asarray(iou, np.float64), stability_score(logits), elements, start, stop)


def bounds(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounding boxes of masks (k, y, x): where they start and stop, (k, 2) y, x; see `Measured.start`."""
    start, stop = np.full((2, len(masks), 2), np.nan)
    for axis in (0, 1):
        lines = np.asarray(masks.any(axis=2 - axis))
        some = lines.any(axis=-1)
        start[some, axis] = lines[some].argmax(axis=-1) - 0.5
        stop[some, axis] = lines.shape[-1] - lines[some, ::-1].argmax(axis=-1) - 0.5
    return start, stop


def box_iou(start: np.ndarray, stop: np.ndarray, other: np.ndarray, other_stop: np.ndarray) -> np.ndarray:
    """IoU (…) of boxes with corners (…, 2) and others, broadcast; 0 where neither has an area, or is NaN."""
    shared = np.clip(np.minimum(stop, other_stop) - np.maximum(start, other), 0, None).prod(axis=-1)
    union = (stop - start).prod(axis=-1) + (other_stop - other).prod(axis=-1) - shared
    return np.asarray(np.divide(shared, union, out=np.zeros_like(union), where=union > 0))


def choose(choice: Choice, measured: Measured, box: np.ndarray | None = None) -> tuple[int, str]:
    """Which candidate is taken, and why in words. Of equals it is the first.

    Args:
        choice: the rule.
        measured: of the candidates, in the model's order.
        box: (2, 2) start and stop of the prompt's box, y, x of the window; None: the prompt has none.
    """
    some = np.flatnonzero(measured.elements)
    if not len(some):
        return int(measured.iou.argmax()), f"no element in any of {len(measured.iou)}"
    index, reason = _choose(choice, measured, some, box)
    return index, f"{reason}, of {_several(len(some), len(measured.iou))}"


def _choose(choice: Choice, measured: Measured, some: np.ndarray, box: np.ndarray | None) -> tuple[int, str]:
    """The same of those numbered ``some``."""
    if choice is Choice.box and box is not None:
        agreement = box_iou(measured.start[some], measured.stop[some], *box)
        best = int(agreement.argmax())
        return int(some[best]), f"box agrees best, IoU {agreement[best]:.2f}"
    if choice in (Choice.score, Choice.box):
        best = int(some[measured.iou[some].argmax()])
        missing = "no box to agree with: " if choice is Choice.box else ""
        return best, f"{missing}highest predicted IoU"
    elements = measured.elements[some]
    at = {Choice.small: 0, Choice.medium: (len(some) - 1) // 2, Choice.large: -1}[choice]
    index = int(some[(elements == np.sort(elements)[at]).argmax()])
    return index, f"{choice.value} by elements"


def _several(count: int, of: int) -> str:
    return f"{of}" if count == of else f"{count} that are not empty"
