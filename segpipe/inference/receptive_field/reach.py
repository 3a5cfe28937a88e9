"""`halo: auto`: how far a model looks, and the error that each smaller halo would make.

Where every output depends on a bounded neighbourhood (`reach_probe`), a halo of that radius makes tiles equal
to the whole. Many networks have no such radius, or one that no window can afford: for those, the error at
the seams is measured by halo, and the smallest halo that keeps it under a tolerance is taken.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from types import EllipsisType

import numpy as np
import scipy.fft
import torch
from pydantic import TypeAdapter

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.inference.receptive_field.probe import Predict, Radius, ask, measure_radius, round_up
from segpipe.models.network import activate, all_finite, best_class
from segpipe.models.registry import load_model
from segpipe.models.weights import weights_fingerprint
from segpipe.store.stage import Stage, stage_key
from segpipe.tiling.windows import make_lattice

TOLERANCE = 1e-3
"""Share of elements whose class may change where the radius cannot be afforded."""
BUDGET = 2**23
"""Elements of the largest forward pass: 2896 × 2896 or 203 × 203 × 203."""
HARDLY_MORE = 1.1
"""Where no halo meets the tolerance: a wider one must change a tenth fewer to be worth its forward passes."""
REACH_VERSION = 1
"""Raised when the same model would be measured otherwise."""

CROPS, ENOUGH = 4, 2**20
"""Seams are measured in up to four places, fewer once the windows hold that many elements together."""


@dataclass(frozen=True)
class Reach:
    """How far a model looks, and what a halo does for it; lengths in elements of the model grid."""

    radius: tuple[int, ...] | None
    """Per axis, the most elements beyond its stride cell that an output depends on, on either side: with that
    context, tiles equal the whole. None: none within what was probed."""
    seams: tuple[tuple[int, float, float], ...]
    """By halo: (halo, share of elements whose class changes, largest change of a probability) inside a
    window, against the same place with the widest context affordable. Along an axis whose window is too
    small for a halo, its `largest_halo` stands for it."""
    probed: int
    """Edge of the longest probe."""
    halo: tuple[int, ...]
    """The halo to use, per axis: multiples of the stride."""
    note: str
    """What was found, in one sentence."""


def card_reach(card: Card, window: Sequence[int], out: str) -> Reach:
    """How far the model looks, in float32 on the CPU; found in the store after the first time.

    Args:
        card: of the model.
        window: elements per model axis.
        out: output location of the job, whose store keeps the finding.

    Raises:
        RequestError: the model cannot be probed; give the card's `window.halo` in elements.
    """
    parts = {
        "card": card.prediction_fingerprint(),
        "weights": weights_fingerprint(card),
        "window": list(window),
        "version": REACH_VERSION,
    }
    record = Stage(out, stage_key("reach", parts))
    found = record.read_json("reach.json")
    if found is None:
        model = load_model(card, "cpu", os.cpu_count() or 1, "fp32")
        reach = measure_reach(
            model,
            card.channels,
            card.ndim,
            card.window.stride,
            tuple(window),
            activation=card.output.activation,
            fixed=card.window.fixed,
        )
        found = asdict(reach)
        record.write_json("reach.json", found)
    return TypeAdapter(Reach).validate_python(found)


def measure_reach(
    predict: Predict,
    channels: int,
    ndim: int,
    stride: int,
    window: tuple[int, ...],
    *,
    activation: str,
    tolerance: float = TOLERANCE,
    budget_elements: int = BUDGET,
    sample: torch.Tensor | None = None,
    fixed: bool = False,
    seed: int = 0,
) -> Reach:
    """Measure a model once.

    The halo is the radius, rounded up to the stride, where it is at most `largest_halo`; else the smallest
    halo measured that changes the class of at most ``tolerance`` of the elements; where none does, the
    smallest that changes hardly more than the best.

    Args:
        predict: (1, c, *space) float32 on the CPU → logits (1, k, *space). In float32: half precision
            differs from window to window by itself, and would look like a dependence on the place.
        channels: of the input.
        ndim: spatial axes, 2 or 3.
        stride: total stride of the network.
        window: elements per axis, multiples of the stride.
        activation: ``softmax``, ``sigmoid`` or ``none``, as on the card.
        tolerance: see above.
        budget_elements: elements of the largest forward pass.
        sample: (1, c, *space) normalised values to measure seams on; mirrored where it is smaller than a
            window with its context. Without it: noise with the spectrum of natural images.
        fixed: the network takes this window only.
        seed: of the noise and the places.

    Raises:
        RequestError: the arguments do not fit each other, the budget holds no window with context, or
            the model answers with NaN or with another shape.
    """
    _check(channels, ndim, stride, window, sample)
    radius = measure_radius(predict, channels, stride, window, fixed=fixed, budget=budget_elements, seed=seed)
    context = _contexts(window, stride, radius.values, budget_elements)
    halos = _ladder(window, stride, radius.values)
    if fixed:
        halos = [h for h in halos if h < max(_reference_halo(window, stride))] or [0]
    crops = _crops(sample, channels, [n + 2 * c for n, c in zip(window, context, strict=True)], window, seed)
    seams = _seams(predict, crops, window, stride, context, halos, activation, fixed)
    halo, note = _choose(radius, seams, window, stride, tolerance, sample is not None)
    return Reach(radius.values, tuple(seams), radius.probed, halo, note)


def largest_halo(window: int, stride: int) -> int:
    """Largest multiple of the stride that is at most a quarter of the window.

    Beyond, less than half a window is kept along each axis: more than 4 (2D) or 8 (3D) forward passes an
    element.
    """
    return window // 4 // stride * stride


def _check(channels: int, ndim: int, stride: int, window: Sequence[int], sample: torch.Tensor | None) -> None:
    if ndim not in (2, 3) or len(window) != ndim:
        raise RequestError(
            f"window: found {tuple(window)} for {ndim} axes; valid: 2 or 3 sizes, one per axis"
        )
    if any(n < 1 or n % stride for n in window):
        raise RequestError(f"window: found {tuple(window)}; valid: positive multiples of the stride {stride}")
    if sample is not None and (sample.ndim != ndim + 2 or sample.shape[:2] != (1, channels)):
        raise RequestError(
            f"sample: found shape {tuple(sample.shape)}; valid: (1, {channels}) and {ndim} spatial axes"
        )


def _contexts(
    window: Sequence[int], stride: int, radius: Sequence[int] | None, budget: int
) -> tuple[int, ...]:
    """Context of the reference on either side, per axis: the radius, or a window where that is less or there
    is no radius, as far as the budget goes.

    Odd multiples of the stride: a window that begins at an even one could hide that the network's true
    stride is twice the one given.

    Raises:
        RequestError: the budget holds no window with one stride around it.
    """
    cells = [-(-min(r, n) // stride) | 1 for r, n in zip(radius or window, window, strict=True)]

    def elements() -> int:
        return math.prod(n + 2 * stride * k for n, k in zip(window, cells, strict=True))

    while elements() > budget:
        widest = max(range(len(cells)), key=cells.__getitem__)
        if cells[widest] == 1:
            raise RequestError(
                f"budget_elements: found {budget}; valid: at least {elements()}, a window of "
                f"{_times(window)} with one stride around it"
            )
        cells[widest] -= 2
    return tuple(stride * k for k in cells)


def _ladder(window: Sequence[int], stride: int, radius: Sequence[int] | None) -> list[int]:
    """Halos to measure: 0, s, 2s, 3s, 4s, 6s, 8s, 12s, … up to the largest, and the radius if below it."""
    top = max(largest_halo(n, stride) for n in window)
    halos = {0, top}
    halo = stride
    while halo < top:
        halos |= {halo, min(halo // stride * 3 // 2 * stride, top)}
        halo *= 2
    if radius is not None:
        halos.add(min(round_up(max(radius), stride), top))
    return sorted(halos)


def _capped(halo: int, window: Sequence[int], stride: int) -> tuple[int, ...]:
    return tuple(min(halo, largest_halo(n, stride)) for n in window)


def natural_noise(channels: int, shape: Sequence[int], seed: int) -> torch.Tensor:
    """Noise whose amplitude falls as 1/frequency, as in natural images (Field 1987); mean 0, deviation 1.

    Returns:
        float32 (1, c, *shape).
    """
    frequencies = np.meshgrid(*(np.fft.fftfreq(n) for n in shape), indexing="ij", sparse=True)
    radial = np.sqrt(sum(f**2 for f in frequencies)).astype(np.float32)
    radial[(0,) * len(shape)] = np.inf  # no mean
    axes = tuple(range(1, len(shape) + 1))
    white = np.random.default_rng(seed).standard_normal((channels, *shape), np.float32)
    values = scipy.fft.ifftn(scipy.fft.fftn(white, axes=axes) / radial, axes=axes).real
    deviation = values.std(axis=axes, keepdims=True)
    return torch.from_numpy(values / np.where(deviation > 0, deviation, 1))[None]


def _crops(
    sample: torch.Tensor | None, channels: int, shape: Sequence[int], window: Sequence[int], seed: int
) -> Iterator[torch.Tensor]:
    """Places to measure, (1, c, *shape) each."""
    count = max(1, min(CROPS, ENOUGH // math.prod(window)))
    if sample is None:
        yield from (natural_noise(channels, shape, seed + i) for i in range(count))
        return
    values = sample.float().cpu().numpy()
    missing = [max(0, n - have) for n, have in zip(shape, values.shape[2:], strict=True)]
    values = np.pad(values, [(0, 0), (0, 0), *((m // 2, m - m // 2) for m in missing)], mode="symmetric")
    rng = np.random.default_rng(seed)
    rooms = [have - n + 1 for n, have in zip(shape, values.shape[2:], strict=True)]
    starts = {tuple(int(rng.integers(room)) for room in rooms): None for _ in range(count)}
    for start in starts:
        yield torch.from_numpy(np.ascontiguousarray(values[_over(Box.at(start, shape).slices)]))


def _seams(
    predict: Predict,
    crops: Iterator[torch.Tensor],
    window: Sequence[int],
    stride: int,
    context: Sequence[int],
    halos: Sequence[int],
    activation: str,
    fixed: bool,
) -> list[tuple[int, float, float]]:
    """For each halo (halo, share of changed classes, largest change of a probability).

    One window gives them all: what it answers at least ``halo`` elements from its edges is what a tiling
    with that halo keeps of it.
    """
    middle = Box.at(context, window)
    whole = Box.whole(window)
    changed, total, largest = (np.zeros(len(halos)) for _ in range(3))
    for crop in crops:
        reference = activate(_reference(predict, crop, middle, stride, fixed), activation)
        here = activate(ask(predict, crop[_over(middle.slices)].contiguous()), activation)
        if not (all_finite(reference) and all_finite(here)):
            raise RequestError("model: answers the sample with NaN or infinity; valid: finite scores")
        classes = best_class(here) != best_class(reference)
        change = (here - reference).abs()
        for i, halo in enumerate(halos):
            margins = _capped(halo, window, stride)
            kept = Box(margins, tuple(n - m for n, m in zip(whole.stop, margins, strict=True))).slices
            changed[i] += int(classes[_over(kept)].sum())
            total[i] += classes[_over(kept)].numel()
            largest[i] = max(largest[i], float(change[_over(kept)].max()))
    return [(h, float(c / n), float(m)) for h, c, n, m in zip(halos, changed, total, largest, strict=True)]


def _reference_halo(window: Sequence[int], stride: int) -> tuple[int, ...]:
    """Widest halo whose tiles stay affordable as a reference: a quarter of the window is kept."""
    return tuple(min(3 * n // 8, (n - stride) // 2) // stride * stride for n in window)


def _reference(predict: Predict, crop: torch.Tensor, middle: Box, stride: int, fixed: bool) -> torch.Tensor:
    """Scores (1, k, …) of the middle window with context: the crop in one pass, or, where the model takes one
    window only, tiled with a halo wider than any that is measured."""
    if not fixed:
        return ask(predict, crop)[_over(middle.slices)]
    window = middle.shape
    lattice = make_lattice(crop.shape[2:], window, _reference_halo(window, stride), stride, fixed=True)
    out = None
    for index in lattice.windows(middle, "trim"):
        seen = lattice.window(index)
        answer = ask(predict, crop[_over(seen.slices)].contiguous())
        if out is None:
            out = answer.new_zeros((*answer.shape[:2], *window))
        part = lattice.owned(index).intersect(middle)
        out[_over(part.within(middle))] = answer[_over(part.within(seen))]
    assert out is not None
    return out


def _choose(
    radius: Radius,
    seams: Sequence[tuple[int, float, float]],
    window: Sequence[int],
    stride: int,
    tolerance: float,
    sampled: bool,
) -> tuple[tuple[int, ...], str]:
    """The halo to use and the sentence that says why."""
    if radius.values is not None:
        full = tuple(round_up(r, stride) for r in radius.values)
        if all(h <= largest_halo(n, stride) for h, n in zip(full, window, strict=True)):
            return (
                full,
                f"outputs depend on {_times(radius.values)} elements around; that halo leaves no seams",
            )
        why = f"outputs depend on {_times(radius.values)} elements around, over a quarter of the window"
    else:
        why = f"no finite radius ({radius.reason})"
    best = min(share for _, share, _ in seams)
    halo, share, change = next(row for row in seams if row[1] <= max(tolerance, HARDLY_MORE * best))
    where = "of the sample" if sampled else "of synthetic noise"
    verdict = "" if share <= tolerance else f", and none up to {seams[-1][0]} gets below {best:.3%}"
    found = f"a halo of {halo} changes the class of {share:.3%} {where}{verdict}"
    return _capped(halo, window, stride), f"{why}; {found} (a probability by up to {change:.2g})"


def _over(slices: tuple[slice, ...]) -> tuple[EllipsisType | slice, ...]:
    """Index the spatial axes of (n, c, *space)."""
    return (..., *slices)


def _times(sizes: Sequence[int]) -> str:
    return " × ".join(map(str, sizes))
