"""Integer boxes in array order: the one vocabulary for windows, blocks, crops and reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod


@dataclass(frozen=True, order=True)
class Box:
    """A half-open box ``[start, stop)`` of elements, axes in array order: (y, x) or (z, y, x)."""

    start: tuple[int, ...]
    """First element along each axis."""
    stop: tuple[int, ...]
    """One past the last element along each axis."""

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """The box that covers an array of this shape."""
        return cls((0,) * len(shape), tuple(int(n) for n in shape))

    @classmethod
    def at(cls, start: Sequence[int], shape: Sequence[int]) -> Box:
        """The box of ``shape`` whose first element is ``start``."""
        return cls(tuple(start), tuple(a + n for a, n in zip(start, shape, strict=True)))

    @property
    def ndim(self) -> int:
        return len(self.start)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(max(0, b - a) for a, b in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index an array whose element (0, …) is the grid's element (0, …)."""
        return tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Index an array that holds ``outer``; this box must lie inside it."""
        if not outer.contains(self):
            raise ValueError(f"{self} does not lie inside {outer}")
        return tuple(slice(a - o, b - o) for a, b, o in zip(self.start, self.stop, outer.start, strict=True))

    def contains(self, other: Box) -> bool:
        return all(a <= c for a, c in zip(self.start, other.start, strict=True)) and all(
            d <= b for b, d in zip(self.stop, other.stop, strict=True)
        )

    def intersect(self, other: Box) -> Box:
        """The common part; empty (size 0) when the boxes are disjoint."""
        start = tuple(max(a, c) for a, c in zip(self.start, other.start, strict=True))
        stop = tuple(min(b, d) for b, d in zip(self.stop, other.stop, strict=True))
        return Box(start, tuple(max(a, b) for a, b in zip(start, stop, strict=True)))

    def hull(self, other: Box) -> Box:
        """The smallest box that holds both."""
        return Box(tuple(map(min, self.start, other.start)), tuple(map(max, self.stop, other.stop)))

    def narrowed(self, axis: int, start: int, stop: int) -> Box:
        """The same box but for one axis, on which it is ``[start, stop)``."""
        starts, stops = list(self.start), list(self.stop)
        starts[axis], stops[axis] = start, stop
        return Box(tuple(starts), tuple(stops))

    def shift(self, offset: Sequence[int]) -> Box:
        return Box(
            tuple(a + o for a, o in zip(self.start, offset, strict=True)),
            tuple(b + o for b, o in zip(self.stop, offset, strict=True)),
        )


def grid_boxes(shape: Sequence[int], step: Sequence[int]) -> Iterator[Box]:
    """Boxes of ``step`` that partition ``shape`` in C order; the last along an axis may be short."""
    starts = [range(0, n, s) for n, s in zip(shape, step, strict=True)]
    for start in product(*starts):
        yield Box(tuple(start), tuple(min(a + s, n) for a, s, n in zip(start, step, shape, strict=True)))
