"""How far a network looks: one cell of its input is changed, and every output that changes is counted.

The *radius* along an axis is the most elements beyond the edge of its own stride cell that an output
depends on, on either side: for cells [i·s, (i+1)·s) of stride s, exactly the context that a window must
have before and behind the elements it answers for. One pass shows which cells the change of a cell
reaches, on both sides and for every phase of the stride; parts of the cell then show from which element on.

Probes are long along one axis and narrow along the others. A dependence along one axis runs through the
middle taps of the others, and so survives in a narrow strip; thousands of elements then cost as
much as one window.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from segpipe.errors import RequestError

Predict = Callable[[torch.Tensor], torch.Tensor]
"""(1, c, y, x) or (1, c, z, y, x) float32 on the CPU → scores (1, k, …) with the same spatial shape."""

STRENGTHS = (math.nan, 1.0, 1e4, 1e8)
"""What the cell is filled with: NaN, or normal noise of this deviation.

NaN passes dead ReLUs, zero weights and saturated gates, so it finds the whole structure; where a runtime
swallows NaN, strong noise outweighs the decay of the outermost taps (a product of some 30 weights below one)
and wins every maximum, and weak noise sees what strong noise saturates. The radius is the widest found."""
SAME_SHAPE_NOISE = 1e-6
"""A change below this share of the largest score is noise: 16 units in the last place of float32. On a CPU,
outputs that do not depend on the cell are equal bit by bit; algorithms that mix neighbours in a transformed
domain (Winograd) are not."""
OTHER_SHAPE_NOISE = 1e-5
"""The same where both passes have other shapes: sums are then split otherwise, layer after layer."""
LONGEST = 2048
"""Elements of the longest probe: finds radii up to about 1000."""
NARROW = {2: 64, 3: 16}
"""Least width of a probe across, by number of spatial axes; two strides where those are more."""


@dataclass(frozen=True)
class Radius:
    """What the probes found."""

    values: tuple[int, ...] | None
    """Elements per axis; None: no finite radius within the probes, or one that no window can rely on."""
    probed: int
    """Elements of the longest probe."""
    reason: str
    """Why there is none; empty where there is one."""


def round_up(n: int, stride: int) -> int:
    """The next multiple of the stride."""
    return -(-n // stride) * stride


def ask(predict: Predict, x: torch.Tensor) -> torch.Tensor:
    """Scores (1, k, …) on the CPU.

    Raises:
        RequestError: the answer has another spatial shape than the question.
    """
    with torch.inference_mode():
        y = predict(x).float().cpu()
    if y.shape[2:] != x.shape[2:]:
        raise RequestError(
            f"model: an input of {tuple(x.shape)} is answered with {tuple(y.shape)}; "
            "valid: scores with the input's spatial shape"
        )
    return y


def measure_radius(
    predict: Predict,
    channels: int,
    stride: int,
    window: Sequence[int],
    *,
    fixed: bool,
    budget: int,
    seed: int,
) -> Radius:
    """The radius along each axis, by the probes of this module.

    A network whose answer depends on where the window lies (coordinates, learned positions, a total stride
    larger than the one given, windows of attention) has no radius that tiling could rely on: for those, two
    windows one stride apart are compared where both have all the context the probes asked for.

    Args:
        predict: the model; on a GPU, transformed-domain convolutions can make the radius too large.
        channels: of the input.
        stride: total stride.
        window: elements per axis.
        fixed: the model takes this window only, which is then the probe.
        budget: elements of the largest forward pass.
        seed: of the noise.

    Raises:
        RequestError: no probe fits into the budget, or the model answers ordinary noise with NaN.
    """
    found: list[int] = []
    probed = 0
    across = tuple(window) if fixed else _across(predict, channels, stride, window)
    for axis in range(len(window)):
        radius = None
        for shape in _shapes(axis, stride, across, fixed, budget):
            probed = max(probed, shape[axis])
            strip = _Strip(predict, (1, channels, *shape), axis, stride, seed)
            radius = strip.radius()
            if radius is not None:
                break
        if radius is None:
            reason = f"axis {axis}: outputs change up to the ends of a probe of {shape[axis]} elements"
            return Radius(None, probed, reason)
        shift = strip.shift_error(radius, fixed)
        if not shift <= OTHER_SHAPE_NOISE:
            reason = (
                f"axis {axis}: outputs depend on where a window begins "
                f"(one stride further they differ by {shift:.1g} of the largest score)"
            )
            return Radius(None, probed, reason)
        found.append(radius)
    return Radius(tuple(found), probed, "")


def _across(predict: Predict, channels: int, stride: int, window: Sequence[int]) -> tuple[int, ...]:
    """Widths of probes across: the least that the network takes, the window's at most.

    A pyramid of poolings (PAN's) leaves nothing of an image that is narrow.
    """
    narrow = round_up(max(NARROW[len(window)], 2 * stride), stride)
    while any(n > narrow for n in window):
        widths = tuple(min(narrow, n) for n in window)
        try:
            ask(predict, torch.zeros(1, channels, *widths))
        except (RuntimeError, ValueError):  # torch's, of whatever layer it is
            narrow *= 2
        else:
            return widths
    return tuple(window)


def _shapes(
    axis: int, stride: int, across: Sequence[int], fixed: bool, budget: int
) -> Iterator[tuple[int, ...]]:
    """Spatial shapes of the probes along one axis, each twice as long as the one before.

    Raises:
        RequestError: not even the shortest fits into the budget.
    """
    if fixed:
        yield tuple(across)
        return
    shape = list(across)
    shape[axis] = 1
    least = 8 * stride
    longest = min(max(LONGEST, least), budget // math.prod(shape) // stride * stride)
    if longest < least:
        raise RequestError(
            f"budget_elements: found {budget}; valid: at least {least * math.prod(shape)}, the shortest probe"
        )
    edge = min(round_up(max(256, least), stride), longest)
    while True:
        shape[axis] = edge
        yield tuple(shape)
        if edge == longest:
            return
        edge = min(2 * edge, longest)


class _Strip:
    """One probe: what changes in the outputs when planes of its middle cell are replaced, or all is moved."""

    def __init__(self, predict: Predict, shape: Sequence[int], axis: int, stride: int, seed: int) -> None:
        self.edge, self.stride = shape[axis + 2], stride
        self.start = self.edge // 2 // stride * stride
        self._predict, self._shape, self._axis, self._seed = predict, shape, axis + 2, seed
        self._before: dict[float, torch.Tensor] = {}

    def changed(self, strength: float, first: int, stop: int) -> tuple[int, int] | None:
        """First and last output that changes with input planes [first, stop) of the cell; None: none.

        Raises:
            RequestError: ordinary noise is answered with NaN or infinity.
        """
        # The same numbers at each call, so that more planes can only change more.
        generator = torch.Generator().manual_seed(self._seed)
        x = torch.randn(*self._shape, generator=generator)
        if strength not in self._before:
            self._before[strength] = ask(self._predict, x)
        before = self._before[strength]
        scale = float(before.abs().max())
        if not math.isfinite(scale):
            raise RequestError("model: normal noise is answered with NaN or infinity; valid: finite scores")
        cell = x.narrow(self._axis, self.start, self.stride)
        noise = torch.randn(*cell.shape, generator=generator) * strength
        planes = (self._axis, first, stop - first)
        cell.narrow(*planes).copy_(noise.narrow(*planes))
        changed = ~((ask(self._predict, x) - before).abs() <= SAME_SHAPE_NOISE * scale)
        at = changed.movedim(self._axis, 0).flatten(1).any(1).nonzero()
        return (int(at[0]), int(at[-1])) if len(at) else None

    def radius(self) -> int | None:
        """The radius along this axis; None: the change reaches the probe's ends."""
        start, stride = self.start, self.stride
        ends: list[tuple[int, int, float]] = []
        for strength in STRENGTHS:
            found = self.changed(strength, 0, stride)
            if found is None:
                continue
            if found[0] < 2 * stride or found[1] >= self.edge - 2 * stride:
                # Two cells free at either end: the next cell's reach is seen whole, and two windows one
                # stride apart still share a part with full context.
                return None
            ends.append((*found, strength))
        if not ends:
            return 0
        first, _, left = min(ends, key=lambda end: end[0])
        _, last, right = max(ends, key=lambda end: end[1])
        before, behind = (start + stride - 1 - first) // stride, (last - start) // stride
        # Cells `before` and `behind` this one still change. How many planes of this cell, from its far side,
        # does it take? The last of those is the farthest input of that cell.

        def reaches_before(planes: int) -> bool:
            found = self.changed(left, stride - planes, stride)
            return found is not None and found[0] < start - (before - 1) * stride

        def reaches_behind(planes: int) -> bool:
            found = self.changed(right, 0, planes)
            return found is not None and found[1] >= start + behind * stride

        few = range(1, stride)
        context = [0]
        if before:
            context.append(before * stride - bisect_left(few, True, key=reaches_before))
        if behind:
            context.append(behind * stride - bisect_left(few, True, key=reaches_behind))
        return max(context)

    def shift_error(self, radius: int, fixed: bool) -> float:
        """Largest difference between two windows that begin one stride apart, where both have ``radius``
        elements of context: as a share of the largest score.

        The second window is as short as can be, so that its edges matter too, unless the model fixes it.
        """
        edge, stride, axis = self.edge, self.stride, self._axis
        margin = round_up(radius, stride)
        length = edge if fixed else 2 * margin + stride
        long = [*self._shape]
        long[axis] = max(edge, stride + length)
        x = torch.randn(*long, generator=torch.Generator().manual_seed(self._seed))
        first = ask(self._predict, x.narrow(axis, 0, edge))
        second = ask(self._predict, x.narrow(axis, stride, length))
        start, stop = stride + margin, min(edge, stride + length) - margin
        a = first.narrow(axis, start, stop - start)
        b = second.narrow(axis, margin, stop - start)
        difference, scale = float((a - b).abs().max()), float(first.abs().max())
        return difference / scale if scale else difference
