"""Answers as they are stored: columns and masks of one window, of one volume, or of a whole scene."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from segpipe.prompts.masks.automatic import Masks
from segpipe.prompts.masks.decode import Answer
from segpipe.prompts.masks.patches import Patch, dump_patches, load_patches

CANDIDATES = 3
"""Of which numbers are kept."""


@dataclass(frozen=True, eq=False)
class Answered:
    """What was answered for n objects."""

    number: np.ndarray
    """(n,) int64: of the object asked for; of a grid, a number of its own."""
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
    """(n,) int64: of the window that answered."""
    cut: np.ndarray
    """(n,) bool: the mask reaches its window's border inside the scene."""
    point: np.ndarray
    """(n, 2) float64: y, x of a grid's point; NaN: the object was asked for."""
    reason: tuple[str, ...]
    """How the mask was chosen; of a volume also why it ends where it does."""
    patches: tuple[tuple[Patch, ...], ...]
    """Of each object: none where its mask is empty, one of a raster's, one a slice of a volume's."""

    def __len__(self) -> int:
        return len(self.number)

    def dump(self) -> bytes:
        """Exact, as one blob."""
        flat = [patch for patches in self.patches for patch in patches]
        buffer = io.BytesIO()
        np.savez(
            buffer,
            reason=np.frombuffer(json.dumps(self.reason).encode(), np.uint8),
            count=np.array([len(patches) for patches in self.patches], np.int64),
            patches=np.frombuffer(dump_patches(flat), np.uint8),
            **{name: getattr(self, name) for name in COLUMNS},
        )
        return buffer.getvalue()

    @classmethod
    def load(cls, data: bytes) -> Answered:
        """The inverse of `dump`."""
        with np.load(io.BytesIO(data)) as f:
            flat = load_patches(f["patches"].tobytes())
            ends = np.cumsum(f["count"]).tolist()
            patches = tuple(flat[e - n : e] for n, e in zip(f["count"].tolist(), ends, strict=True))
            columns = {name: f[name] for name in COLUMNS}
            return cls(**columns, reason=tuple(json.loads(f["reason"].tobytes())), patches=patches)

    def take(self, places: np.ndarray) -> Answered:
        """Some of them."""
        chosen = places.tolist()
        return Answered(
            **{name: getattr(self, name)[places] for name in COLUMNS},
            reason=tuple(self.reason[i] for i in chosen),
            patches=tuple(self.patches[i] for i in chosen),
        )


COLUMNS = tuple(f.name for f in fields(Answered) if f.name not in ("reason", "patches"))
"""The arrays of `Answered`."""


def answered(answers: Sequence[Answer], level: int) -> Answered:
    """The answers of one window."""
    n = len(answers)
    return Answered(
        np.array([a.object for a in answers], np.int64),
        np.array([a.candidate for a in answers], np.int64),
        np.array([a.iou for a in answers], np.float64),
        np.array([a.stability for a in answers], np.float64),
        _wide([a.all_iou for a in answers]),
        _wide([a.all_stability for a in answers]),
        np.full(n, level),
        np.array([a.cut for a in answers], bool),
        np.full((n, 2), np.nan),
        tuple(a.reason for a in answers),
        tuple(() if a.patch is None else (a.patch,) for a in answers),
    )


def answered_grid(masks: Masks, first: int) -> Answered:
    """The masks of a grid, numbered from ``first``."""
    n = len(masks)
    return Answered(
        np.arange(first, first + n), masks.candidate, masks.iou, masks.stability,
        np.full((n, CANDIDATES), np.nan), np.full((n, CANDIDATES), np.nan), masks.level,
        np.zeros(n, bool), masks.point, ("point of a grid",) * n, tuple((patch,) for patch in masks.patches),
    )  # fmt: skip


def together(parts: Sequence[Answered]) -> Answered:
    """All parts, by number; of an object that several answer, the last one counts."""
    columns = {name: np.concatenate([getattr(p, name) for p in parts]) for name in COLUMNS}
    joined = Answered(
        **columns,
        reason=tuple(r for p in parts for r in p.reason),
        patches=tuple(x for p in parts for x in p.patches),
    )
    backwards = joined.number[::-1]
    last = len(backwards) - 1 - np.unique(backwards, return_index=True)[1]
    return joined.take(last)


def _wide(rows: Sequence[np.ndarray]) -> np.ndarray:
    """(n, CANDIDATES) of rows of at most as many, NaN behind."""
    wide = np.full((len(rows), CANDIDATES), np.nan)
    for i, row in enumerate(rows):
        wide[i, : len(row)] = row
    return wide
