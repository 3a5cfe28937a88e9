"""Store the masks of one window, of one volume, or of a whole scene as columns."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from segpipe.prompts.masks.automatic import GridMasks
from segpipe.prompts.masks.decode import ObjectMask
from segpipe.prompts.masks.patches import Patch, dump_patches, load_patches
from segpipe.prompts.prompt_set import Columns, dump_arrays, load_arrays

CANDIDATES = 3
"""Candidates of a prompt whose scores are kept."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowMasks(Columns):
    """The masks of n objects and their scores; arrays are stored in this order."""

    number: np.ndarray
    """(n,) int64: of the object in the prompt set; of a grid, a number of its own."""
    candidate: np.ndarray
    """(n,) int64: which of the model's masks was taken, from 0."""
    iou: np.ndarray
    """(n,) float64: predicted of the mask taken; of a volume the mean over its slices."""
    stability: np.ndarray
    """(n,) float64 of the mask taken."""
    all_iou: np.ndarray
    """(n, CANDIDATES) float64: of every candidate; NaN where there is none."""
    all_stability: np.ndarray
    """(n, CANDIDATES) float64."""
    level: np.ndarray
    """(n,) int64: of the window."""
    cut: np.ndarray
    """(n,) bool: the mask reaches its window's border inside the scene."""
    point: np.ndarray
    """(n, 2) float64: y, x of a grid's point; NaN: the object is of the prompt set."""
    reason: tuple[str, ...]
    """How the mask was chosen; of a volume also why it ends where it does."""
    patches: tuple[tuple[Patch, ...], ...]
    """Of each object: none where its mask is empty, one of a raster's, one a slice of a volume's."""

    @classmethod
    def of_window(cls, masks: Sequence[ObjectMask], level: int) -> WindowMasks:
        """Return the masks of one window of this level."""
        all_iou, all_stability = np.full((2, len(masks), CANDIDATES), np.nan)
        for row, mask in enumerate(masks):
            all_iou[row, : len(mask.stats.iou)] = mask.stats.iou
            all_stability[row, : len(mask.stats.iou)] = mask.stats.stability
        return cls(
            number=np.array([m.object for m in masks], np.int64),
            candidate=np.array([m.candidate for m in masks], np.int64),
            iou=np.array([m.iou for m in masks], np.float64),
            stability=np.array([m.stability for m in masks], np.float64),
            all_iou=all_iou, all_stability=all_stability, level=np.full(len(masks), level),
            cut=np.array([m.cut for m in masks], bool), point=np.full((len(masks), 2), np.nan),
            reason=tuple(m.reason for m in masks),
            patches=tuple(() if m.patch is None else (m.patch,) for m in masks),
        )  # fmt: skip

    @classmethod
    def of_grid(cls, masks: GridMasks, first: int) -> WindowMasks:
        """Return the masks of a grid, numbered from ``first``."""
        n = len(masks)
        return cls(
            number=np.arange(first, first + n), candidate=masks.candidate, iou=masks.iou,
            stability=masks.stability, all_iou=np.full((n, CANDIDATES), np.nan),
            all_stability=np.full((n, CANDIDATES), np.nan), level=masks.level, cut=np.zeros(n, bool),
            point=masks.point, reason=("point of a grid",) * n, patches=tuple((p,) for p in masks.patches),
        )  # fmt: skip

    @classmethod
    def merge(cls, parts: Sequence[WindowMasks]) -> WindowMasks:
        """Return all parts, by number; of an object that several have, the last one's mask counts."""
        whole = cls.concatenate(parts)
        backwards = whole.number[::-1]
        return whole.take(len(backwards) - 1 - np.unique(backwards, return_index=True)[1])

    def dump(self) -> bytes:
        """Return all columns, exact, as one blob."""
        flat = [patch for patches in self.patches for patch in patches]
        return dump_arrays(
            reason=json.dumps(self.reason).encode(),
            count=np.array([len(patches) for patches in self.patches], np.int64),
            patches=dump_patches(flat),
            **{f.name: getattr(self, f.name) for f in fields(WindowMasks)[:-2]},
        )

    @classmethod
    def load(cls, data: bytes) -> WindowMasks:
        """Return the inverse of `dump`."""
        arrays = load_arrays(data)
        flat, counts = load_patches(arrays.pop("patches").tobytes()), arrays.pop("count")
        ends = np.cumsum(counts).tolist()
        patches = tuple(flat[e - n : e] for n, e in zip(counts.tolist(), ends, strict=True))
        reason = tuple(json.loads(arrays.pop("reason").tobytes()))
        return cls(**arrays, reason=reason, patches=patches)
