"""Prompts drawn at random for known objects, as training of a promptable model needs them.

`sample_prompts` draws a box and a point for each object of some windows; `sample_looks` cuts out what our own
network sees of each object (`segpipe.prompts.segmenters.looknet`); `sample_corrections` adds what a person
would add who sees the answer. Everything comes from the generator that is handed in.

The objective sums the cross-entropy and the soft Jaccard loss of a mask, and the squared error of its
predicted against its true IoU (the last as Kirillov et al., Segment Anything, ICCV 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from segpipe.prompts.segmenters.looknet import CERTAIN, LOOK, LOOKS, PromptTensors, drawn, looks_at, resampled

MAX_JITTER = 20.0
"""Elements by which an edge of a box is moved, at most (Kirillov et al. 2023, appendix A)."""
OUTLINED = 0.25
"""Share of boxes that come with a coarse mask."""
COARSE = (2, 4, 8)
"""Cells of such a mask's own, along each axis."""
WAVER, WAVES = 0.25, 9
"""Noise on it: its deviation as a share of cover, and waves along a look."""


@dataclass(frozen=True, eq=False)
class ObjectPrompts:
    """Objects of some windows, and a box and a point for each of them."""

    windows: np.ndarray
    """(n,) int64: the window of each object."""
    masks: np.ndarray
    """(n, y, x) bool."""
    boxes: np.ndarray
    """(n, 4) float32: x, y of the first element and of the last, jittered or not."""
    points: np.ndarray
    """(n, 2) float32: x, y of an element of the object."""


def sample_prompts(
    rng: np.random.Generator, masks: Sequence[np.ndarray], windows: Sequence[int], jitter: float, exact: float
) -> ObjectPrompts:
    """Draw a box and a point for each object.

    Args:
        rng: Draws.
        masks: (y, x) bool, not empty, all of one square shape.
        windows: The window of each mask.
        jitter: Deviation of a box's edges, as a share of its size.
        exact: Share of boxes without jitter.
    """
    boxes = np.stack([mask_box(mask) for mask in masks])
    loose = rng.random(len(boxes)) >= exact
    boxes[loose] = jitter_boxes(rng, boxes[loose], jitter, len(masks[0]))
    points = np.stack([sample_point(rng, mask) for mask in masks])
    return ObjectPrompts(np.array(windows), np.stack(masks), boxes, points)


def mask_box(mask: np.ndarray) -> np.ndarray:
    """Return (4,) float32: x, y of a mask's first element and of its last."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


def jitter_boxes(rng: np.random.Generator, boxes: np.ndarray, share: float, edge: int) -> np.ndarray:
    """Move the edges of boxes by normal noise, `MAX_JITTER` elements at most.

    Args:
        rng: Draws.
        boxes: (n, 4) of `mask_box`.
        share: Deviation of the noise, as a share of a box's size.
        edge: Elements of the window along each axis, beyond which no edge goes.
    """
    size = np.tile(boxes[:, 2:] - boxes[:, :2] + 1, 2)
    moved = boxes + np.clip(rng.normal(0, 1, boxes.shape) * share * size, -MAX_JITTER, MAX_JITTER)
    moved = np.clip(moved, 0, edge - 1)
    low, high = np.minimum(moved[:, :2], moved[:, 2:]), np.maximum(moved[:, :2], moved[:, 2:])
    return np.asarray(np.hstack([low, high]), np.float32)


def sample_point(rng: np.random.Generator, mask: np.ndarray) -> np.ndarray:
    """Return (2,) float32: x, y of an element of a mask, each as likely."""
    inside = np.flatnonzero(mask)
    y, x = divmod(int(inside[rng.integers(len(inside))]), mask.shape[1])
    return np.array([x, y], np.float32)


@dataclass(frozen=True, eq=False)
class Looks:
    """What the network is shown of n objects, and what it should find."""

    windows: torch.Tensor
    """(n,) int64: the window of each."""
    asked: PromptTensors
    """Prompts."""
    edges: torch.Tensor
    """(n, 4) the look at each."""
    given: torch.Tensor
    """(n, LOOK, LOOK) logits of a coarse mask, 0 where none is given."""
    cover: torch.Tensor
    """(n, LOOK, LOOK) share of each cell that is the object's."""
    total: torch.Tensor
    """(n,) cells that the whole object would take."""

    @property
    def maps(self) -> torch.Tensor:
        """Prompts as the network takes them."""
        return drawn(self.asked, self.edges, self.given)


def sample_looks(prompts: ObjectPrompts, rng: np.random.Generator) -> Looks:
    """Draw one look at each object: two of three are asked for by the box, one by the point."""
    count = len(prompts.windows)
    by_point = torch.arange(count) % 3 == 2
    boxes = torch.from_numpy(prompts.boxes).masked_fill(by_point[:, None], torch.nan)
    asked = PromptTensors(
        boxes, torch.from_numpy(prompts.points)[:, None], torch.where(by_point, 1, -1)[:, None]
    )
    edges = looks_at(asked, torch.from_numpy(rng.integers(LOOKS, size=count)))
    masks = torch.from_numpy(prompts.masks).float()
    cover = resampled(masks[:, None], torch.arange(count), edges)[:, 0]
    cells = ((edges[:, 2:] - edges[:, :2]) / LOOK).prod(1)
    outlined = torch.from_numpy(rng.random(count) < OUTLINED) & ~by_point
    given = torch.where(outlined[:, None, None], coarse_masks(cover, rng), 0.0)
    return Looks(torch.from_numpy(prompts.windows), asked, edges, given, cover, masks.sum((1, 2)) / cells)


def coarse_masks(cover: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return logits (n, y, x) of coarse masks: means of cover (n, y, x) over blocks of cells, with noise."""
    coarse = int(rng.choice(COARSE))
    small = functional.avg_pool2d(cover[:, None], coarse)
    large = functional.interpolate(small, scale_factor=float(coarse), mode="bilinear")
    noise = torch.from_numpy(rng.normal(0, WAVER, (len(cover), 1, WAVES, WAVES)).astype(np.float32))
    large = large + functional.interpolate(noise, cover.shape[1:], mode="bicubic")
    return 2 * CERTAIN * (large[:, 0] - 0.5)


def sample_corrections(looks: Looks, logits: torch.Tensor, rng: np.random.Generator) -> Looks:
    """Add a point in a cell where the answer was wrong and, half of the time, the answer itself as a mask.

    Args:
        looks: What the network answered.
        logits: (n, LOOK, LOOK), the answer.
        rng: Chooses cells.
    """
    truth = looks.cover > 0.5
    wrong = ((logits > 0) != truth).flatten(1).float() + 1e-6  # where all is right, any cell is as likely
    draws = torch.from_numpy(rng.random((len(wrong), 1)).astype(np.float32))
    sums = wrong.cumsum(1)
    at = torch.searchsorted(sums, draws * sums[:, -1:]).clamp(max=LOOK**2 - 1)
    cells = torch.cat([at % LOOK, at // LOOK], 1) + 0.5
    low, high = looks.edges[:, :2], looks.edges[:, 2:]
    point = (low + (high - low) * cells / LOOK)[:, None]
    label = truth.flatten(1).gather(1, at).long()
    asked = looks.asked
    asked = replace(
        asked, points=torch.cat([asked.points, point], 1), labels=torch.cat([asked.labels, label], 1)
    )
    answered = torch.from_numpy(rng.random(len(wrong)) < 0.5)
    return replace(looks, asked=asked, given=torch.where(answered[:, None, None], logits, looks.given))


def mask_loss(
    logits: torch.Tensor, predicted: torch.Tensor, cover: torch.Tensor, total: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of n masks and their true IoU.

    Args:
        logits: (n, y, x) of each cell.
        predicted: (n,) IoU as the network predicts it.
        cover: (n, y, x) share of each cell that the object covers.
        total: (n,) cells that the whole object would take, inside these cells and beyond them.

    Returns:
        The loss, a scalar, and the IoU (n,) of each mask with its whole object, which has no gradient.
    """
    entropy = functional.binary_cross_entropy_with_logits(logits, cover, reduction="none").mean((1, 2))
    true = mask_iou(logits.detach(), cover, total)
    return (entropy + jaccard_loss(logits, cover)).mean() + functional.mse_loss(predicted, true), true


def jaccard_loss(logits: torch.Tensor, cover: torch.Tensor) -> torch.Tensor:
    """Return 1 − (Σ p·t + 1) / (Σ p + Σ t − Σ p·t + 1) of each mask, (n,).

    Args:
        logits: (n, y, x), whose sigmoid is p.
        cover: (n, y, x), t.
    """
    p = logits.sigmoid()
    shared = (p * cover).sum((1, 2))
    return 1 - (shared + 1) / (p.sum((1, 2)) + cover.sum((1, 2)) - shared + 1)


@torch.no_grad()
def mask_iou(logits: torch.Tensor, cover: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """Return the IoU (n,) of masks with whole objects, as `mask_loss` takes them.

    A cell is the object's where the object covers more than half of it.
    """
    found, truth = logits > 0, cover > 0.5
    both = (found & truth).sum((1, 2))
    return both / (found.sum((1, 2)) + torch.maximum(total, truth.sum((1, 2))) - both).clamp(min=1)
