"""What goes in and out of the engine: blocks and their results, copies between the device and the host."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Protocol

import numpy as np
import torch

from segpipe.geometry.box import Box
from segpipe.inference.object_merger import BlockObjects
from segpipe.inference.uncertainty import log_classes
from segpipe.objects.window import WindowObjects
from segpipe.sources.base import Pixels
from segpipe.tiling.windows import Index


@dataclass
class BlockResult:
    """What the engine hands to the sink for one block."""

    index: Index
    box: Box
    labels: np.ndarray
    """Class values over the box, native grid; the plan's nodata where the scene is not valid."""
    scores: np.ndarray | None
    """(k, …) float32 probabilities, where they were asked for."""
    uncertainty: np.ndarray | None
    """(channel, …) uint16, where it was asked for."""
    objects: BlockObjects | None
    """Of an instance or panoptic card."""
    valid: int
    """Number of valid elements."""
    windows: int
    """Windows computed for this block."""
    skipped: int
    """Windows without a valid element, not computed."""
    seconds: float
    """That the device was busy with this block's windows."""
    begun: float
    """When it was read, in seconds since 1970."""


class BlockStore(Protocol):
    """Where blocks come from and go to."""

    def read(self, box: Box) -> Pixels:
        """Pixels of a native box, the model's channels in the card's order."""
        ...

    def ingest(self, index: Index, box: Box, pixels: Pixels) -> None:
        """Keep a block as read (write-through); called in the writer's thread."""
        ...

    def finish(self, result: BlockResult) -> None:
        """Keep a block's result and commit it; called in the writer's thread."""
        ...


@dataclass
class Timings:
    """Seconds, by thread: they overlap, so they do not add up to the wall time."""

    wall: float = 0.0
    read: float = 0.0
    forward: float = 0.0
    stitch: float = 0.0
    write: float = 0.0
    passes: int = 0
    """Windows forwarded, without padding and test-time views."""


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
