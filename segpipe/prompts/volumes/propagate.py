"""Propagate masks from prompted slices of a volume to the others: the rules that all ways share.

Slices are cut across one axis. First every prompted slice is segmented; then masks go from slice to slice
away from it, in both directions. The way from one prompted slice in one direction is a chain. A slice
between two prompted ones of an object is the nearer one's, of two as near the lower one's, so a correction
on a later slice takes over half way to it. Chains of different objects know nothing of each other. All
chains that go up are walked together, slice after slice, then all that go down: what is held is one mask a
chain, however deep the volume is. Every chain says where it ended and why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from segpipe.config.prompts import Volume
from segpipe.prompts.masks.decode import ObjectMask, measure, view_of
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.prompt_set import PromptSet
from segpipe.prompts.segmenters.base import Embedding
from segpipe.prompts.volumes.slices import (
    ObjectPrompts,
    SlicePrompt,
    mask_box,
    overlaps,
    placed,
    prompts_by_slice,
)
from segpipe.tiling.pyramid import Pyramid, Window

Embedder = Callable[[int, Window], Embedding]
"""The embedding of a window of slice i, encoded or out of a cache."""


class Direction(str, Enum):
    """How a mask on a slice came about."""

    prompted = "prompted"
    forward = "forward"
    backward = "backward"


class StopReason(str, Enum):
    """Why a chain ended."""

    end = "the volume ends"
    box = "the object's box ends"
    reach = "as far as asked"
    met = "another prompted slice is as near"
    empty = "no mask"
    iou = "low predicted IoU"
    overlap = "little overlap with the slice before"
    change = "area changed too much"


@dataclass(frozen=True, eq=False, kw_only=True)
class SliceMask:
    """One object on one slice."""

    mask: ObjectMask
    """Without a patch: a prompted slice shows nothing; elsewhere the chain would have ended."""
    index: int
    """Of the slice along the axis."""
    origin: int
    """The prompted slice from which it was reached: itself, if prompted."""
    how: Direction
    overlap: float
    """IoU with the mask of the slice before; NaN on a prompted slice."""


@dataclass(frozen=True, kw_only=True)
class Stop:
    """The end of one chain."""

    object: int
    origin: int
    """The prompted slice from which the chain went."""
    how: Direction
    """forward or backward."""
    last: int
    """The last slice that it reached: ``origin``, if none."""
    why: StopReason
    value: float
    """What was compared with the rule; NaN where the rule compares nothing."""


@dataclass(frozen=True, eq=False)
class Section:
    """The mask of one object on one slice, and the window it was decoded in."""

    window: Window
    mask: ObjectMask


@dataclass(eq=False, kw_only=True)
class Chain:
    """The way of one object from one prompted slice in one direction; moves on as it is walked."""

    prompts: ObjectPrompts
    origin: int
    step: int
    """1: forward; −1: backward."""
    limit: int
    """The last slice that is its own."""
    limited: StopReason
    """By what."""
    patch: Patch
    """The mask of the slice before."""
    window: Window
    """In which it was decoded."""


class Tracker(Protocol):
    """A way of going from slice to slice."""

    def begin(self, objects: Sequence[ObjectPrompts]) -> Iterator[tuple[SlicePrompt, Section]]:
        """Masks of all prompted slices."""

    def follow(self, index: int, chains: Sequence[Chain]) -> list[Section]:
        """The next mask of each chain, on the slice that follows its last one, in their order."""

    def drop(self, chain: Chain) -> None:
        """Forget what is held for a chain that ended."""


def how_of(step: int) -> Direction:
    """The direction of a step."""
    return Direction.forward if step > 0 else Direction.backward


def propagate(
    prompts: PromptSet, axis: int, shape: Sequence[int], pyramid: Pyramid, tracker: Tracker, rules: Volume
) -> Iterator[SliceMask | Stop]:
    """Masks of every object on every slice that its chains reach, and the end of every chain.

    Prompted slices come first, then all chains forward, then all backward. Every prompted slice has two
    chains; an object on it that has no mask there has two that end at once.

    Args:
        prompts: of the volume.
        axis: across which the slices are cut.
        shape: of the volume.
        pyramid: of a slice.
        tracker: how a mask goes on.
        rules: when it does not.

    Raises:
        RequestError: as `prompts_by_slice`.
    """
    known = {a.object: a for a in prompts_by_slice(prompts, axis, shape)}
    chains: list[Chain] = []
    for prompt, section in tracker.begin([*known.values()]):
        number, index, patch = prompt.object, prompt.index, section.mask.patch
        yield SliceMask(mask=section.mask, index=index, origin=index, how=Direction.prompted, overlap=np.nan)
        for step in (1, -1):
            if patch is None:
                how, why = how_of(step), StopReason.empty
                yield Stop(object=number, origin=index, how=how, last=index, why=why, value=np.nan)
                continue
            limit, limited = _limit(known[number], index, step, shape[axis], rules.reach)
            chain = Chain(
                prompts=known[number], origin=index, step=step, limit=limit, limited=limited, patch=patch,
                window=section.window,
            )  # fmt: skip
            chains.append(chain)
    for step in (1, -1):
        yield from _sweep([c for c in chains if c.step == step], step, pyramid, tracker, rules)


def _sweep(
    chains: Sequence[Chain], step: int, pyramid: Pyramid, tracker: Tracker, rules: Volume
) -> Iterator[SliceMask | Stop]:
    """All chains of one direction, slice after slice."""
    waiting = sorted(chains, key=lambda c: (c.origin * step, c.prompts.object), reverse=True)
    active: list[Chain] = []
    index = 0
    while waiting or active:
        if not active:
            index = waiting[-1].origin + step
        while waiting and waiting[-1].origin + step == index:
            active.append(waiting.pop())
        active.sort(key=lambda c: (c.prompts.object, c.origin))
        for chain in [c for c in active if (c.limit - index) * step < 0]:
            active.remove(chain)
            tracker.drop(chain)
            yield _stop(chain, index, chain.limited, np.nan)
        sections = tracker.follow(index, active) if active else []
        for chain, section in zip(list(active), sections, strict=True):
            overlap, broken = _check_rules(chain.patch, section, pyramid, rules)
            patch = section.mask.patch
            if broken or patch is None:
                active.remove(chain)
                tracker.drop(chain)
                yield _stop(chain, index, *(broken or (StopReason.empty, np.nan)))
                continue
            chain.patch, chain.window = patch, section.window
            yield SliceMask(
                mask=section.mask, index=index, origin=chain.origin, how=how_of(chain.step), overlap=overlap
            )
        index += step


def _stop(chain: Chain, index: int, why: StopReason, value: float) -> Stop:
    return Stop(
        object=chain.prompts.object, origin=chain.origin, how=how_of(chain.step), last=index - chain.step,
        why=why, value=value,
    )  # fmt: skip


def _check_rules(
    before: Patch, section: Section, pyramid: Pyramid, rules: Volume
) -> tuple[float, tuple[StopReason, float] | None]:
    """IoU of a mask with the one before, and the first rule that it breaks, and by what."""
    mask = section.mask
    if mask.patch is None:
        return 0.0, (StopReason.empty, np.nan)
    masks = placed(mask.patch, section.window, pyramid)[None]
    overlap = float(overlaps(before, masks, section.window, pyramid)[0])
    ratio = _area(mask.patch) / _area(before)
    # A comparison with NaN is False: a model that predicts none does not go on.
    if not mask.iou >= rules.least_iou:
        return overlap, (StopReason.iou, mask.iou)
    if overlap < rules.least_overlap:
        return overlap, (StopReason.overlap, overlap)
    if max(ratio, 1 / ratio) > rules.change:
        return overlap, (StopReason.change, ratio)
    return overlap, None


def _limit(prompts: ObjectPrompts, origin: int, step: int, depth: int, reach: int) -> tuple[int, StopReason]:
    """The last slice of a chain, and what ends it there."""
    ends = [
        (0 if step < 0 else depth - 1, StopReason.end),
        (prompts.first if step < 0 else prompts.last, StopReason.box),
    ]
    if reach:
        ends.append((origin + step * reach, StopReason.reach))
    others = [p.index for p in prompts.prompted]
    if step > 0 and (later := [i for i in others if i > origin]):
        ends.append(((origin + min(later)) // 2, StopReason.met))
    if step < 0 and (before := [i for i in others if i < origin]):
        ends.append(((origin + max(before)) // 2 + 1, StopReason.met))
    # The nearest; where two are as near, the volume's own end says most.
    return min(ends, key=lambda e: e[0] * step)


def _area(patch: Patch) -> int:
    """Elements of the plane."""
    return int(np.count_nonzero(patch.logits > 0)) * patch.scale**2


def section_of(
    number: int, logits: np.ndarray, iou: np.ndarray, taken: int, reason: str, window: Window,
    pyramid: Pyramid, plane: tuple[int, int],
) -> Section:  # fmt: skip
    """Return one of k candidates as the section of an object.

    Args:
        number: of the object.
        logits: (k, y, x) of the window.
        iou: (k,) as the model predicts it.
        taken: which candidate is taken.
        reason: why, in words.
        window: of the pyramid.
        pyramid: of a slice.
        plane: axis and index of the slice.
    """
    view = view_of(window, pyramid)
    stats = measure(view.only(logits), iou)
    return Section(window, view.mask(number, logits, taken, reason, stats, plane))


def wider(
    sections: Sequence[Section], needed: Sequence[np.ndarray], pyramid: Pyramid, tried: set[Window]
) -> Window | None:
    """The next window for masks of an object of which one is cut by its window; None: none is.

    It is the one that the pyramid gives the masks and all that is said of the object: of the same level, if
    only one of this level was tried, else one coarser. The coarsest sees everything, and cuts nothing.

    Args:
        sections: masks of one window.
        needed: boxes, (2, 2) positions, of what is said.
        pyramid: of a slice.
        tried: windows that were.
    """
    if not any(s.mask.cut for s in sections):
        return None
    patches = [s.mask.patch for s in sections if s.mask.patch is not None]
    boxes = np.stack([*needed, *(mask_box(p, pyramid.shape) for p in patches)])
    start, stop = boxes[:, 0].min(axis=0).tolist(), boxes[:, 1].max(axis=0).tolist()
    for level in range(sections[0].window.level, pyramid.levels):
        window = pyramid.window_of(start, stop, level)
        if window not in tried and sum(w.level == window.level for w in tried) < 2:
            return window
    return None
