"""Define segmenters: a window becomes an embedding once, and prompts become masks as often as wanted.

Positions are in elements of the window, whole numbers at centres as everywhere in segpipe, and in the order
that the field has for prompts: x (column) before y (row). Arrays keep array order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from segpipe.errors import RequestError

MASK_SCALE, MASK_OFFSET = 20.0, -10.0
"""Logits of a given mask, 10 inside and −10 outside: SAM 2's own code, `_use_mask_as_output`."""
STABILITY_OFFSET = 1.0
"""What Kirillov et al. 2023 shift the threshold by."""


@dataclass(frozen=True, eq=False)
class Embedding:
    """An encoder's maps of one window: all that its decoder needs."""

    arrays: Mapping[str, np.ndarray]
    """By name: (c, y, x), float32 or, once halved, float16; names and shapes as `Segmenter.shapes`."""

    def half(self) -> Embedding:
        """As it is stored: float16.

        Raises:
            RequestError: a value is beyond what float16 can hold.
        """
        halved = {}
        for name, array in self.arrays.items():
            largest = float(np.abs(array).max(initial=0.0))
            if not largest <= float(np.finfo(np.float16).max):
                raise RequestError(f"embedding {name!r}: found {largest:g}; valid in float16: up to 65504")
            halved[name] = array.astype(np.float16)
        return Embedding(halved)


@dataclass(frozen=True, eq=False)
class Prompt:
    """The input for one object in one window: points, a box, a coarse mask, or several of these."""

    points_xy: np.ndarray = field(default_factory=lambda: np.empty((0, 2), np.float32))
    """(p, 2) float32."""
    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """(p,) int64: 1 for points of the object, 0 for points beside it."""
    box_xyxy: np.ndarray | None = None
    """(4,) float32: centre of its first element, x and y, and of its last."""
    mask: np.ndarray | None = None
    """(y, x) float32 logits of `Segmenter.mask_shape`: `Candidates.low` of before, or `mask_logits`."""


def mask_logits(mask: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A mask (y, x) of the window's size, bool or cover in 0…1, as the logits of `Prompt.mask`.

    As SAM 2 takes given masks: 10 inside, −10 outside, then bilinear with antialiasing.
    """
    import torch
    from torch.nn import functional

    logits = torch.from_numpy(mask.astype(np.float32))[None, None] * MASK_SCALE + MASK_OFFSET
    low = functional.interpolate(logits, size=shape, mode="bilinear", align_corners=False, antialias=True)
    return np.asarray(low[0, 0].numpy())


@dataclass(frozen=True, eq=False)
class Candidates:
    """Masks proposed for each of n prompts: k = 3, or 1 without multimask."""

    logits: np.ndarray
    """(n, k, y, x) float32 at the window's size: above 0 is the object."""
    iou: np.ndarray
    """(n, k) float32: the IoU with the object that the model predicts of its masks."""
    low: np.ndarray
    """(n, k, y, x) float32: the logits as the model gave them, of `Segmenter.mask_shape`."""


class Segmenter(Protocol):
    """A promptable model, ready on its device."""

    window: tuple[int, int]
    """Elements (y, x) of the only window that it takes."""
    mask_shape: tuple[int, int]
    """Elements (y, x) of masks as it gives and takes them."""
    shapes: Mapping[str, tuple[int, int, int]]
    """Name and shape (c, y, x) of each array of an embedding."""

    @property
    def parameters(self) -> int:
        """Numbers learned in training."""

    def encode(self, window: np.ndarray) -> Embedding:
        """The embedding, float32, of one window (c, y, x), float32, normalised by the card's steps."""

    def encode_batch(self, windows: np.ndarray) -> list[Embedding]:
        """The same of several (n, c, y, x) in one pass."""

    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = True
    ) -> Candidates:
        """Masks of each prompt, whatever the others are.

        They take 4 · k bytes per element of the window and prompt: ask for many in turns.

        Args:
            embedding: as `encode` gave it, or halved.
            prompts: one an object.
            multimask: three masks for what a prompt may mean; False: the model's one.

        Raises:
            RequestError: a prompt or the embedding does not fit; names the prompt's number.
        """


def stability_score(logits: np.ndarray) -> np.ndarray:
    """IoU of each mask with itself under a higher and a lower threshold (Kirillov et al. 2023, appendix B).

    Args:
        logits: (…, y, x); above 0 an element belongs to the mask.

    Returns:
        (…) float64; NaN where even the lower threshold leaves no element.
    """
    inner = np.count_nonzero(logits > STABILITY_OFFSET, axis=(-2, -1))
    outer = np.count_nonzero(logits > -STABILITY_OFFSET, axis=(-2, -1))
    nothing = np.full(outer.shape, np.nan)
    return np.asarray(np.divide(inner, outer, out=nothing, where=outer > 0))


def check_prompts(prompts: Sequence[Prompt], window: tuple[int, int], mask_shape: tuple[int, int]) -> None:
    """Check that no prompt is empty, and all have shapes and positions that a segmenter takes.

    Raises:
        RequestError: names the prompt's number and field, what was found and what would be valid.
    """
    for number, prompt in enumerate(prompts):
        points, labels, box, mask = prompt.points_xy, prompt.labels, prompt.box_xyxy, prompt.mask
        if not len(points) and box is None and mask is None:
            raise _wrong(number, "points_xy", "found none", "a point, a box or a mask")
        if points.ndim != 2 or points.shape[1] != 2 or not _inside(points, window):
            raise _wrong(
                number, "points_xy", f"found {points.tolist()}", f"x, y in a window of {window} (y, x)"
            )
        if labels.shape != (len(points),) or not np.isin(labels, (0, 1)).all():
            raise _wrong(number, "labels", f"found {labels.tolist()}", f"{len(points)} times 0 or 1")
        if box is not None and not (
            box.shape == (4,) and _inside(box.reshape(2, 2), window) and (box[:2] <= box[2:]).all()
        ):
            raise _wrong(
                number,
                "box_xyxy",
                f"found {box.tolist()}",
                f"x, y of the first and of the last element in a window of {window} (y, x)",
            )
        if mask is not None and not (mask.shape == mask_shape and np.isfinite(mask).all()):
            raise _wrong(number, "mask", f"found shape {mask.shape}", f"{mask_shape}, finite logits")


def _inside(xy: np.ndarray, window: tuple[int, int]) -> bool:
    """Whether positions (n, 2) lie in the window, whose elements reach half an element from their centres."""
    return bool(((xy >= -0.5) & (xy <= np.array(window[::-1]) - 0.5)).all())


def _wrong(number: int, name: str, found: str, valid: str) -> RequestError:
    return RequestError(f"prompt {number}: {name}: {found}; valid: {valid}")
