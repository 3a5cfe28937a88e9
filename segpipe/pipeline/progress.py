"""What steps did, how long blocks take, and blocks grouped into batches by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from segpipe.pipeline.model_scene import Scene
from segpipe.tiling.windows import Index

SECONDS_PER_MPX = 2.0
"""A first guess for sizing batches of blocks, before anything was measured."""


@dataclass(frozen=True)
class Done:
    """What a step did."""

    computed: int
    """Blocks computed now."""
    reused: int
    """Blocks that were there already."""
    seconds: float
    timings: dict[str, float]
    elements: int = 0
    """Of the blocks computed, of the native grid."""


@dataclass
class Pace:
    """How long blocks take: a first guess, then what was measured."""

    seconds: float = 0.0
    elements: int = 0

    def note(self, done: Done) -> None:
        """A batch of blocks is done."""
        if done.elements:
            self.seconds += done.seconds
            self.elements += done.elements

    def of(self, scene: Scene, blocks: int) -> float:
        """Seconds that some blocks of a scene may take."""
        elements = math.prod(scene.plan.blocks.block)
        if self.elements:
            return blocks * elements * self.seconds / self.elements
        return blocks * max(0.5, elements / 1e6 * SECONDS_PER_MPX)


def batches_of(
    scene: Scene, blocks: Sequence[Index], minutes: float, workers: int, pace: Pace
) -> list[list[Index]]:
    """Blocks grouped into batches of about this many minutes, each a run of neighbours.

    At least one for each worker, so that a scene of few minutes is not one worker's alone.
    """
    seconds = pace.of(scene, 1)
    size = max(1, min(int(minutes * 60 / seconds), -(-len(blocks) // workers)))
    return [list(blocks[i : i + size]) for i in range(0, len(blocks), size)]


def together(parts: Sequence[Done], reused: int) -> Done:
    """What all batches of a scene did."""
    names = sorted({name for part in parts for name in part.timings})
    return Done(
        computed=sum(part.computed for part in parts),
        reused=reused + sum(part.reused for part in parts),
        seconds=sum(part.seconds for part in parts),
        timings={name: sum(part.timings.get(name, 0.0) for part in parts) for name in names},
    )
