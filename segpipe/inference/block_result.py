"""What goes in and out of the engine: where blocks come from and go to, a block's result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from segpipe.geometry.box import Box
from segpipe.inference.object_merger import BlockObjects
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
