"""Solids of known shape as label volumes, and models that answer with their true sections."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from segpipe.geometry.box import Box
from segpipe.prompts.masks.patches import patch_cover
from segpipe.prompts.prompt_set import PromptSet, make_boxes, make_outlines, make_points, make_prompts
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt
from segpipe.prompts.volumes.propagate import Embedder, SliceMask, Stop
from segpipe.prompts.volumes.propagate_memory import Memory, Seen
from segpipe.tiling.pyramid import Pyramid, Window


def grid(shape: Sequence[int], centre: Sequence[float]) -> list[np.ndarray]:
    return [g - c for g, c in zip(np.indices(shape).astype(float), centre, strict=True)]


def ball(shape: Sequence[int], centre: Sequence[float], radius: float) -> np.ndarray:
    z, y, x = grid(shape, centre)
    return z**2 + y**2 + x**2 <= radius**2


def torus(shape: Sequence[int], centre: Sequence[float], large: float, small: float) -> np.ndarray:
    """Around the z axis."""
    z, y, x = grid(shape, centre)
    return (np.hypot(y, x) - large) ** 2 + z**2 <= small**2


def cone(shape: Sequence[int], apex: Sequence[float], height: float, slope: float) -> np.ndarray:
    """Opening towards larger z."""
    z, y, x = grid(shape, apex)
    return (np.hypot(y, x) <= slope * z + 0.5) & (z >= 0) & (z <= height)


def slanted(shape: Sequence[int], begin: Sequence[float], drift: float, radius: float) -> np.ndarray:
    """A cylinder that moves along y and x with z."""
    z, y, x = grid(shape, (0, *begin))
    return np.hypot(y - drift * z, x - drift * z) <= radius


class Truth:
    """A segmenter that knows the labels: its embedding is the window itself.

    Of three masks the second is the section of the object that the prompt means: what is at the first point,
    or where there is nothing or no point, most of the box. The first is of all objects together and has the
    best score; the last is a half. A negative point on the object: it is not there.
    """

    parameters = 0

    def __init__(self, window: int) -> None:
        self.window = self.mask_shape = (window, window)
        self.shapes = {"image": (1, window, window)}

    def encode(self, window: np.ndarray) -> Embedding:
        return Embedding({"image": window})

    def encode_batch(self, windows: np.ndarray) -> list[Embedding]:
        return [self.encode(w) for w in windows]

    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = True
    ) -> Candidates:
        labels = embedding.arrays["image"][0]
        masks = np.zeros((len(prompts), 3, *labels.shape), bool)
        for n, prompt in enumerate(prompts):
            value = meant(labels, prompt)
            masks[n, 1] = (labels == value) & (value > 0)
            masks[n, 0] = (labels > 0) & masks[n, 1].any()
            masks[n, 2] = masks[n, 1] & (np.arange(labels.shape[0]) % 2 == 0)[:, None]
        logits = np.where(masks, 4.0, -4.0).astype(np.float32)
        return Candidates(logits, np.tile(np.float32([0.95, 0.9, 0.3]), (len(prompts), 1)), logits)


def meant(labels: np.ndarray, prompt: Prompt) -> float:
    at = np.round(prompt.points_xy).astype(int)
    under = labels[at[:, 1], at[:, 0]]
    value = under[prompt.labels == 1][0] if (prompt.labels == 1).any() else 0
    if value == 0 and prompt.box_xyxy is not None:
        x0, y0, x1, y1 = np.round(prompt.box_xyxy).astype(int)
        inside = labels[y0 : y1 + 1, x0 : x1 + 1]
        values, counts = np.unique(inside[inside > 0], return_counts=True)
        value = values[counts.argmax()] if len(values) else 0
    return 0.0 if value in under[prompt.labels == 0] else float(value)


class TruthMemory:
    """The same as a network with a memory: of a prompted slice it remembers the label that it follows."""

    def __init__(self, window: int) -> None:
        self.window = (window, window)

    def prompt(self, memory: Memory, index: int, embedding: Embedding, prompt: Prompt | np.ndarray) -> Seen:
        labels = embedding.arrays["image"][0]
        if isinstance(prompt, np.ndarray):
            values, counts = np.unique(labels[prompt & (labels > 0)], return_counts=True)
            value = float(values[counts.argmax()])
        else:
            value = meant(labels, prompt)
        memory.prompted[index] = {"label": torch.tensor(value)}
        return self._section(memory, labels)

    def track(
        self, memory: Memory, index: int, embedding: Embedding, reverse: bool, prompt: Any = None
    ) -> Seen:
        return self._section(memory, embedding.arrays["image"][0])

    @staticmethod
    def _section(memory: Memory, labels: np.ndarray) -> Seen:
        value = next(iter(memory.prompted.values()))["label"].item()
        return Seen(np.where((labels == value) & (labels > 0), 4.0, -4.0).astype(np.float32), 0.9)


def embedder(
    labels: np.ndarray, axis: int, pyramid: Pyramid, encode: Callable[[np.ndarray], Embedding]
) -> tuple[Embedder, list[tuple[int, Window]]]:
    """Windows of slices, each cell the last of the elements around its centre; and what was asked for."""
    asked: list[tuple[int, Window]] = []
    planes = np.moveaxis(labels, axis, 0)

    def embed(index: int, window: Window) -> Embedding:
        asked.append((index, window))
        scale, box = 1 << window.level, pyramid.box(window)
        part = planes[index, box.start[0] : box.stop[0], box.start[1] : box.stop[1]]
        part = part[scale // 2 :: scale, scale // 2 :: scale]
        out = np.zeros((1, pyramid.window, pyramid.window), np.float32)
        out[0, : part.shape[0], : part.shape[1]] = part
        return encode(out)

    return embed, asked


def said(
    points: Sequence[tuple[int, Sequence[float], bool]] = (),
    boxes: Sequence[tuple[int, Sequence[float], Sequence[float]]] = (),
) -> PromptSet:
    return make_prompts(make_points(points, 3), make_boxes(boxes, 3), make_outlines([]), {})[0]


def slice_box(
    solid: np.ndarray, axis: int, index: int, number: int = 1
) -> tuple[int, list[float], list[float]]:
    """The box that somebody draws around a solid on a slice."""
    found = np.argwhere(solid.take([index], axis=axis)).astype(float)
    start, stop = found.min(axis=0) - 0.5, found.max(axis=0) + 0.5
    start[axis] = stop[axis] = index
    return number, start.tolist(), stop.tolist()


def collect(
    events: Iterable[SliceMask | Stop], shape: Sequence[int]
) -> tuple[dict[int, np.ndarray], list[SliceMask], dict[tuple[int, int, str], Stop]]:
    """Solids by object; answers; stops by object, prompted slice and direction."""
    solids: dict[int, np.ndarray] = {}
    answers, stops = [], {}
    for event in events:
        if isinstance(event, Stop):
            key = (event.object, event.origin, event.how.value)
            assert key not in stops
            stops[key] = event
            continue
        answers.append(event)
        solid = solids.setdefault(event.mask.object, np.zeros(shape, bool))
        if event.mask.patch is not None:
            cover = patch_cover(event.mask.patch, Box.whole(shape))
            assert not (solid & cover).any()  # a slice is answered once
            solid |= cover
    return solids, answers, stops
