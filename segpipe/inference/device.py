"""Between the device and the host: copies that wait for nothing else, activations, mirror images."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from segpipe.inference.uncertainty import log_classes
from segpipe.objects.window import WindowObjects

Pending = tuple[torch.Tensor, torch.cuda.Event | None]
"""A tensor on the host, and what to wait for before it may be read."""


@dataclass
class ForwardResult:
    """What a batch gave, on its way to the host."""

    labels: Pending | None
    scores: Pending | None
    finite: Pending | None
    """One boolean: whether all scores are numbers."""
    objects: Sequence[WindowObjects] | None = None
    """What an instance or panoptic model found in each window; on the host already."""

    def wait(self) -> tuple[np.ndarray | None, np.ndarray | None, bool]:
        """Labels and scores as arrays on the host, and whether all scores are numbers."""
        finite = _arrived(self.finite)
        return _arrived(self.labels), _arrived(self.scores), finite is None or bool(finite)


class Stopwatch:
    """Seconds that a device is busy with what is begun between two calls.

    A GPU's are taken by its own events: launching a kernel returns at once. Read them after the answer has
    arrived.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._stream else []
        self._begun = time.perf_counter()
        self._ended = self._begun
        if self._events:
            self._events[0].record(self._stream)

    def stop(self) -> None:
        """All has been begun."""
        self._ended = time.perf_counter()
        if self._events:
            self._events[1].record(self._stream)

    @property
    def seconds(self) -> float:
        """Between making and `stop`."""
        if self._events:
            return float(self._events[0].elapsed_time(self._events[1])) / 1000
        return self._ended - self._begun


def to_host(tensor: torch.Tensor | None) -> Pending | None:
    """Start a copy to pinned memory right behind the kernels, so that it never waits for the next."""
    if tensor is None or tensor.device.type != "cuda":
        return None if tensor is None else (tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(tensor.device))
    return host, event


def _arrived(pending: Pending | None) -> np.ndarray | None:
    if pending is None:
        return None
    tensor, event = pending
    if event is not None:
        event.synchronize()
    return tensor.numpy()


def entropy(scores: torch.Tensor) -> torch.Tensor:
    """Entropy of (n, k, …) probabilities, as (n, 1, …) shares of ln k."""
    total: torch.Tensor = torch.special.entr(scores.clamp(0, 1)).sum(1, keepdim=True)
    return total / log_classes(scores.shape[1])


def flip_views(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Every set of these spatial axes, as axes of an (n, c, …) tensor, the empty one first."""
    return [tuple(2 + a for a in view) for n in range(len(axes) + 1) for view in combinations(axes, n)]
