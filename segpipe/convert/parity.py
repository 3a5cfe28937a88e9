"""Two forms of one model side by side: do they say the same, and how fast is each?"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from segpipe.config.card import Card
from segpipe.models.base import SegmentationModel
from segpipe.models.network import activate, best_class

NOISE_EDGE = 64
"""Shortest edge of a window of noise for a model without a window of its own."""


@dataclass(frozen=True)
class Parity:
    """How far the answers of two models are apart."""

    elements: int
    """Compared, of all windows."""
    differing: int
    """Elements whose class differs."""
    largest: float
    """Largest difference of any class's probability; NaN where one of them is no number."""

    @property
    def share(self) -> float:
        """Elements whose class differs, of all."""
        return self.differing / self.elements

    def __str__(self) -> str:
        return (
            f"{self.differing:,} of {self.elements:,} elements change class ({self.share:.2g}), "
            f"probabilities differ by at most {self.largest:.2g}"
        )


@torch.inference_mode()
def compare(
    card: Card, before: SegmentationModel, after: SegmentationModel, windows: Iterable[torch.Tensor]
) -> Parity:
    """Two models' answers for the same windows.

    Args:
        card: of either: what is done to the scores.
        before, after: on the CPU.
        windows: normalised, (c, …) each, at least one.
    """
    elements = differing = 0
    largest = torch.zeros(())
    for window in windows:
        first, second = (activate(m(window[None]), card.output.activation) for m in (before, after))
        elements += first[:, 0].numel()
        differing += int((best_class(first) != best_class(second)).sum())
        largest = torch.maximum(largest, (first - second).abs().amax())  # keeps NaN
    return Parity(elements, differing, float(largest))


def milliseconds(models: Sequence[SegmentationModel], window: torch.Tensor, repeats: int = 9) -> list[float]:
    """Median time of one forward pass of each model, in ms.

    The models take turns, so a machine that slows down slows all; one pass each goes before.

    Args:
        models: on the CPU.
        window: (c, …).
        repeats: passes of each that count.
    """
    times: list[list[float]] = [[] for _ in models]
    for _ in range(repeats + 1):
        for model, own in zip(models, times, strict=True):
            begun = time.perf_counter()
            model(window[None])
            own.append(1000 * (time.perf_counter() - begun))
    return [statistics.median(own[1:]) for own in times]


def noise_windows(card: Card, count: int = 4) -> list[torch.Tensor]:
    """Standard normal noise in the shape of the card's windows: (c, …) float32 each, always the same."""
    generator = torch.Generator().manual_seed(0)
    shape = (card.channels, *example_shape(card))
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def example_shape(card: Card) -> tuple[int, ...]:
    """Elements per axis of a window; a small one where the card takes whole scenes as they are."""
    stride = card.window.stride
    return card.window_shape or (max(4 * stride, -(-NOISE_EDGE // stride) * stride),) * card.ndim
