"""Blocks: the native grid cut into units of writing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from segpipe.geometry.box import Box
from segpipe.tiling.windows import Index

BLOCK_EDGE = {2: 2048, 3: 160}
"""Edge aimed at by `block: auto`, native elements, by number of axes."""


CHUNK_EDGE = {2: 512, 3: 64}
"""Longest edge of the chunks inside a shard."""


@dataclass(frozen=True)
class Blocks:
    """The native grid cut into units of writing: one block, one shard, one writer."""

    shape: tuple[int, ...]
    """Of the scene."""
    block: tuple[int, ...]
    """Of a block, and of a shard; the last along an axis may be short."""
    absorb: tuple[int, ...]
    """A rest of at most this many elements joins the block before it: its windows are the same."""

    @property
    def counts(self) -> tuple[int, ...]:
        """Blocks along each axis."""
        counts = []
        for n, b, rest in zip(self.shape, self.block, self.absorb, strict=True):
            whole, left = divmod(n, b)
            counts.append(max(1, whole + (left > rest)))
        return tuple(counts)

    @property
    def count(self) -> int:
        return math.prod(self.counts)

    def indices(self) -> Iterator[Index]:
        """All blocks in C order."""
        yield from product(*(range(n) for n in self.counts))

    def box(self, index: Index) -> Box:
        """Native elements of a block."""
        return Box(
            tuple(i * b for i, b in zip(index, self.block, strict=True)),
            tuple(
                n if i == last - 1 else (i + 1) * b
                for i, b, n, last in zip(index, self.block, self.shape, self.counts, strict=True)
            ),
        )

    def meeting(self, box: Box) -> Iterator[Index]:
        """Blocks that a box of at least one element meets, C order."""
        yield from product(
            *(
                range(min(a // b, n - 1), min((e - 1) // b, n - 1) + 1)
                for a, e, b, n in zip(box.start, box.stop, self.block, self.counts, strict=True)
            )
        )

    @property
    def chunk(self) -> tuple[int, ...]:
        """Inner chunk of a shard: the longest divisor of each edge that is not too long."""
        cap = CHUNK_EDGE[len(self.block)]
        return tuple(_divisor(b, cap) for b in self.block)


def _divisor(n: int, cap: int) -> int:
    """The largest divisor of n up to cap; n itself where only slivers would be left."""
    best = max(d for d in range(1, min(n, cap) + 1) if n % d == 0)
    return best if best * 8 >= min(n, cap) else n


def block_id(index: Index) -> str:
    """Name of a block's receipt; sorts like the index."""
    return ".".join(f"{i:05d}" for i in index)
