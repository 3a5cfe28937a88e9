"""The windows of a scene: one lattice on the model grid.

Along one axis, cells of ``step = window − 2·halo`` partition the
scene. Cell ``i`` is answered by the window that begins at ``i·step − halo``, shifted to stay inside
the scene (padded at its trailing edge to the network's total stride). Cells that would be
answered by the same window share it. So every element comes from the window whose nominal centre is
nearest, has at least ``halo`` elements of context unless the scene ends before, every origin is a
multiple of the stride, and a block that is a multiple of the step never shares a window with the
next one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from segpipe.errors import RequestError
from segpipe.geometry.box import Box

Index = tuple[int, ...]
"""Position of a window in the lattice, or of a block in the block grid."""


@dataclass(frozen=True)
class Axis:
    """The windows along one axis of the model grid."""

    size: int
    """Elements of the scene."""
    padded: int
    """The same, up to the next multiple of the stride (or to a fixed window)."""
    window: int
    """Elements of a window: never more than ``padded``."""
    origins: tuple[int, ...]
    """First element of each window, ascending."""
    cuts: tuple[int, ...]
    """Window ``i`` answers for [cuts[i], cuts[i + 1]); one more than origins."""

    def owners(self, start: int, stop: int) -> range:
        """Windows that answer for a part of [start, stop)."""
        return _span(self.cuts[:-1], self.cuts[1:], start, stop)

    def covering(self, start: int, stop: int) -> range:
        """Windows that see a part of [start, stop)."""
        return _span(self.origins, [o + self.window for o in self.origins], start, stop)


def _span(lows: Sequence[int], highs: Sequence[int], start: int, stop: int) -> range:
    """Ascending intervals [low, high) that meet [start, stop), as a range of their indices."""
    if start >= stop:
        return range(0)
    hits = [i for i, (a, b) in enumerate(zip(lows, highs, strict=True)) if a < stop and start < b]
    return range(hits[0], hits[-1] + 1) if hits else range(0)


def lattice_axis(size: int, window: int, halo: int, stride: int, fixed: bool = False) -> Axis:
    """Windows along one axis; see the module's text.

    Args:
        size: elements of the scene, at least 1.
        window: elements seen at once, a multiple of ``stride``.
        halo: margin wanted; rounded up to a multiple of ``stride``, so that origins stay aligned.
        stride: total stride of the network.
        fixed: the network takes exactly ``window``; a smaller scene is padded up to it.
    """
    padded = -(-size // stride) * stride
    if fixed:
        padded = max(padded, window)
    seen = min(window, padded)
    if seen == padded:
        return Axis(size, padded, seen, (0,), (0, size))
    margin = -(-halo // stride) * stride
    step = window - 2 * margin
    origins: list[int] = []
    cuts: list[int] = []
    for cell in range(-(-size // step)):
        origin = min(max(cell * step - margin, 0), padded - seen)
        if not origins or origin != origins[-1]:
            origins.append(origin)
            cuts.append(cell * step)
    return Axis(size, padded, seen, tuple(origins), (*cuts, size))


@dataclass(frozen=True)
class Lattice:
    """All windows of a scene: the product of its axes."""

    axes: tuple[Axis, ...]

    @property
    def count(self) -> int:
        """Number of windows."""
        return math.prod(len(a.origins) for a in self.axes)

    @property
    def window_shape(self) -> tuple[int, ...]:
        return tuple(a.window for a in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(a.size for a in self.axes)

    def window(self, index: Index) -> Box:
        """What a window sees; at the trailing edge it may reach into the padding."""
        return Box.at([a.origins[i] for a, i in zip(self.axes, index, strict=True)], self.window_shape)

    def owned(self, index: Index) -> Box:
        """What a window answers for under `trim`; these boxes partition the model grid."""
        return Box(
            tuple(a.cuts[i] for a, i in zip(self.axes, index, strict=True)),
            tuple(a.cuts[i + 1] for a, i in zip(self.axes, index, strict=True)),
        )

    def needed(self, box: Box, blend: str) -> list[range]:
        """Windows needed for a box of the model grid: per axis, a range of lattice positions."""
        pick = Axis.owners if blend == "trim" else Axis.covering
        return [pick(a, s, e) for a, s, e in zip(self.axes, box.start, box.stop, strict=True)]

    def windows(self, box: Box, blend: str) -> Iterator[Index]:
        """The same as indices, in C order: the order in which blended scores are added."""
        yield from product(*self.needed(box, blend))


def halo_limit(window: int, stride: int) -> int:
    """The most that a halo may be: rounded up to multiples of the stride, it leaves one of a window."""
    return max(0, (window - stride) // 2 // stride * stride)


def make_lattice(
    shape: Sequence[int],
    window: Sequence[int],
    halo: Sequence[int],
    stride: int,
    fixed: bool = False,
) -> Lattice:
    """The lattice over a model grid of this shape.

    Raises:
        RequestError: a window is no multiple of the stride, or its halo leaves nothing of it.
    """
    axes = []
    for size, w, h in zip(shape, window, halo, strict=True):
        if w % stride or w < 1:
            raise RequestError(
                f"tiling.window: found {w}; valid: a multiple of the model's total stride {stride}"
            )
        if w < size and (h < 0 or h > halo_limit(w, stride)):
            most = halo_limit(w, stride)
            raise RequestError(
                f"tiling.halo: found {h} for a window of {w} (stride {stride}); valid: 0 to {most}"
            )
        axes.append(lattice_axis(size, w, h, stride, fixed))
    return Lattice(tuple(axes))


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
