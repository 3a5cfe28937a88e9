"""From stored values to what a network was trained on: steps declared by the card.

Steps before the first `window_zscore` work element by element on the native grid, with constants of
the card or statistics of the scene (law 8); those after it on a whole scene's window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from segpipe.config.card import (
    Card,
    Clip,
    Divide,
    Scale,
    SceneQuantiles,
    SceneZscore,
    Step,
    Subtract,
    WindowZscore,
)
from segpipe.geometry.box import Box, grid_boxes
from segpipe.geometry.geometry import Geometry
from segpipe.geometry.grid_map import GridMap, model_grid, sample_nearest
from segpipe.sources.base import Pixels, Scaling

SAMPLE_EDGE = {2: 1024, 3: 128}
"""Grid on which quantiles of a scene are taken, where the card names none."""
STATISTICS_TILE = {2: 2048, 3: 128}
"""Sums over a scene are made of these tiles, so that no block size can change them."""


Pairs = tuple[tuple[float, float], ...]
"""Two numbers per channel."""


@dataclass(frozen=True)
class Statistics:
    """What the card's steps need to know of a whole scene: one pair per step and channel."""

    pairs: tuple[Pairs, ...] = ()
    """For each step, in order: (low, high) or (mean, deviation) per channel; empty for others."""

    def to_json(self) -> list[Any]:
        """Plain lists."""
        return [[list(p) for p in step] for step in self.pairs]

    @classmethod
    def from_json(cls, data: list[Any]) -> Statistics:
        """The inverse of `to_json`; floats survive exactly."""
        return cls(tuple(tuple((p[0], p[1]) for p in step) for step in data))


def needs_statistics(card: Card) -> bool:
    """Whether the scene must be seen as a whole before its first window."""
    return any(isinstance(s, SceneQuantiles | SceneZscore) for s in card.input.normalisation)


def to_units(values: np.ndarray, scaling: Sequence[Scaling]) -> np.ndarray:
    """Stored values (c, …) in real units, float32: ``stored · scale + offset``."""
    real = values.astype(np.float32)
    for channel, s in enumerate(scaling):
        if s.scale != 1.0:
            real[channel] *= np.float32(s.scale)
        if s.offset != 0.0:
            real[channel] += np.float32(s.offset)
    return real


def _column(values: Sequence[float], ndim: int) -> np.ndarray:
    return np.asarray(values, dtype=np.float32).reshape((-1,) + (1,) * (ndim - 1))


def _apply(x: np.ndarray, step: Step, pairs: Pairs) -> np.ndarray:
    """One elementwise step on (c, …) float32."""
    match step:
        case Subtract(value=value):
            return np.asarray(x - _column(value, x.ndim))
        case Divide(value=value):
            return np.asarray(x / _column(value, x.ndim))
        case Scale(factor=factor, offset=offset):
            return np.asarray(x * np.float32(factor) + np.float32(offset))
        case Clip(low=low, high=high):
            return np.asarray(np.clip(x, np.float32(low), np.float32(high)))
        case SceneQuantiles():
            bottom = _column([p[0] for p in pairs], x.ndim)
            top = _column([p[1] for p in pairs], x.ndim)
            span = np.where(top > bottom, top - bottom, np.float32(1))
            return np.asarray(np.clip((x - bottom) / span, np.float32(0), np.float32(1)))
        case SceneZscore():
            mean = _column([p[0] for p in pairs], x.ndim)
            deviation = _column([p[1] or 1.0 for p in pairs], x.ndim)
            return np.asarray((x - mean) / deviation)
        case WindowZscore():
            raise ValueError("window_zscore is not elementwise")


@dataclass(frozen=True)
class Normaliser:
    """The card's steps, bound to one scene."""

    card: Card
    scaling: tuple[Scaling, ...]
    statistics: Statistics

    def _split(self) -> int:
        steps = self.card.input.normalisation
        return next((i for i, s in enumerate(steps) if isinstance(s, WindowZscore)), len(steps))

    def elementwise(self, pixels: Pixels, upto: int | None = None) -> np.ndarray:
        """Normalised float32 (c, …) on the native grid; 0 where not valid.

        Args:
            upto: only this many steps, for statistics of what comes after them.
        """
        x = to_units(pixels.values, self.scaling)
        if not pixels.valid.all():
            # NaN and nodata must not meet arithmetic: 0 now for the steps, and 0 again after them
            np.copyto(x, 0, where=~pixels.valid)
        steps = self.card.input.normalisation[: self._split() if upto is None else upto]
        for i, step in enumerate(steps):
            pairs = self.statistics.pairs[i] if i < len(self.statistics.pairs) else ()
            x = _apply(x, step, pairs)
        if not pixels.valid.all():
            np.copyto(x, 0, where=~pixels.valid)
        return x

    @property
    def has_window_steps(self) -> bool:
        """Whether `window` does anything."""
        return self._split() < len(self.card.input.normalisation)

    def window(self, x: np.ndarray) -> np.ndarray:
        """The steps from the first `window_zscore` on, for a window that is the whole scene."""
        for step in self.card.input.normalisation[self._split() :]:
            if isinstance(step, WindowZscore):
                t = torch.from_numpy(x)
                for channel in t:
                    channel.copy_((channel - channel.mean()) / channel.std())
            else:
                x = _apply(x, step, ())
        return x


def padded(values: np.ndarray, shape: Sequence[int], padding: str = "zero") -> np.ndarray:
    """Values (…) or (c, …) of this shape, padded at their end, as a card's `window.padding` says."""
    rest = [(0, n - m) for n, m in zip(shape, values.shape[-len(shape) :], strict=True)]
    mode: Any = "constant" if padding == "zero" else padding
    return np.pad(values, [(0, 0)] * (values.ndim - len(shape)) + rest, mode=mode)


class Readable(Protocol):
    """What statistics read from: anything that gives `Pixels` for a native box."""

    def read(self, box: Box) -> Pixels:
        """Pixels of a native box, the model's channels in the card's order."""
        ...


def scene_statistics(
    card: Card, geometry: Geometry, scaling: tuple[Scaling, ...], reader: Readable
) -> Statistics:
    """Statistics of a scene for the card's steps: streamed, the same for every tiling.

    Each is taken after the steps before it. Quantiles come from the scene sampled (nearest) onto a
    small grid; means and deviations from exact sums over fixed tiles.
    """
    pairs: list[Pairs] = []
    for position, step in enumerate(card.input.normalisation):
        so_far = Normaliser(card, scaling, Statistics(tuple(pairs)))
        if isinstance(step, SceneQuantiles):
            pairs.append(_quantiles(so_far, step, position, geometry, reader))
        elif isinstance(step, SceneZscore):
            pairs.append(_moments(so_far, step, position, geometry, reader))
        else:
            pairs.append(())
    return Statistics(tuple(pairs))


def sample_grid(card: Card, geometry: Geometry, shape: Sequence[int] | None) -> GridMap:
    """The whole scene on a small grid, in the card's orientation."""
    if shape is None:
        edge = SAMPLE_EDGE[geometry.ndim]
        oriented = model_grid(geometry, orientation=card.input.orientation)
        shape = [min(edge, n) for n in oriented.shape]
    return model_grid(geometry, orientation=card.input.orientation, shape=shape)


def _quantiles(
    so_far: Normaliser, step: SceneQuantiles, position: int, geometry: Geometry, reader: Readable
) -> Pairs:
    grid = sample_grid(so_far.card, geometry, step.grid)

    def read(box: Box) -> np.ndarray:
        pixels = reader.read(box)
        x = so_far.elementwise(pixels, position)
        return np.where(pixels.valid, x, np.float32(np.nan))

    sample = torch.from_numpy(sample_nearest(read, grid, np.float32))
    known = [channel[~channel.isnan()] for channel in sample]
    return tuple(
        (float(v.quantile(step.low)), float(v.quantile(step.high))) if len(v) else (0.0, 1.0) for v in known
    )


def _moments(
    so_far: Normaliser, step: SceneZscore, position: int, geometry: Geometry, reader: Readable
) -> Pairs:
    """Mean and deviation by Chan's pairwise update over fixed tiles, in float64."""
    channels = so_far.card.channels
    count, mean, square = np.zeros(channels), np.zeros(channels), np.zeros(channels)
    tile = (STATISTICS_TILE[geometry.ndim],) * geometry.ndim
    for box in grid_boxes(geometry.shape, tile):
        pixels = reader.read(box)
        x = so_far.elementwise(pixels, position)
        for c in range(channels):
            keep = pixels.valid & (x[c] != 0) if step.nonzero else pixels.valid
            values = x[c][keep].astype(np.float64)
            if values.size == 0:
                continue
            n, m = float(values.size), float(values.mean())
            s = float(((values - m) ** 2).sum())
            total = count[c] + n
            delta = m - mean[c]
            mean[c] += delta * n / total
            square[c] += s + delta**2 * count[c] * n / total
            count[c] = total
    deviation = np.sqrt(np.divide(square, count, out=np.zeros_like(square), where=count > 0))
    return tuple((float(m), float(d)) for m, d in zip(mean, deviation, strict=True))
