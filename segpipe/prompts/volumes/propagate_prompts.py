"""Propagate masks through a volume by prompts: the mask on one slice is the prompt on the next.

For promptable models without a memory of frames. The next slice is prompted with the box of the mask before,
a little grown, and the mask's deepest element as a point; of the candidates the one is taken that overlaps
most with the mask before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from segpipe.config.prompts import Choice
from segpipe.prompts.masks.decode import decode_window, view_of, window_prompt
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.prompt_set import make_boxes, make_outlines, make_points, make_prompts
from segpipe.prompts.segmenters.base import Prompt, Segmenter
from segpipe.prompts.volumes.propagate import Chain, Embedder, Section, section_of, wider
from segpipe.prompts.volumes.slices import (
    ObjectPrompts,
    SlicePrompt,
    deepest_point,
    holds,
    mask_box,
    overlaps,
)
from segpipe.tiling.pyramid import Pyramid, Window

Decoder = Callable[[Sequence[int], Window], list[Section]]
"""Decodes prompts, by their numbers, in a window of a slice."""


GROW = 0.05
"""By which the box of the mask before grows on every side, as a share of its edge."""
AT_ONCE = 16
"""Prompts decoded in one call."""


@dataclass(frozen=True, eq=False)
class Linker:
    """A `segpipe.prompts.volumes.propagate.Tracker`.

    Each object keeps its window while this holds the box before, grown, and is of the level that the pyramid
    gives this box; else it takes the pyramid's. A mask that reaches its window's border inside the scene is
    decoded again: in another window of the level, then one level coarser, until it is whole.

    The embedding of a window of a slice is needed once for the prompted slices, once for all chains
    forward and once for all backward; for one object on one prompted slice that is once in all, where the
    embedder keeps the recent ones at hand.
    """

    axis: int
    """Across which the volume is cut."""
    pyramid: Pyramid
    """Of a slice."""
    segmenter: Segmenter
    """Of the pyramid's window."""
    embed: Embedder
    choice: Choice
    """Which candidate is taken on prompted slices."""

    def begin(self, objects: Sequence[ObjectPrompts]) -> Iterator[tuple[SlicePrompt, Section]]:
        """As `Tracker.begin`, ascending by slice."""
        every = sorted((p for a in objects for p in a.prompted), key=lambda p: (p.index, p.object))
        for index in sorted({p.index for p in every}):
            here = [p for p in every if p.index == index]
            windows = [self.pyramid.window_of(*p.extent.tolist()) for p in here]
            extents = [p.extent for p in here]
            sections = self._decode(windows, extents, partial(self._prompted, index, here))
            yield from zip(here, sections, strict=True)

    def follow(self, index: int, chains: Sequence[Chain]) -> list[Section]:
        """As `Tracker.follow`."""
        windows, boxes = [], []
        for chain in chains:
            box = mask_box(chain.patch, self.pyramid.shape, GROW)
            wanted = self.pyramid.window_of(*box.tolist())
            same = wanted.level == chain.window.level and holds(self.pyramid, chain.window, box)
            windows.append(chain.window if same else wanted)
            boxes.append(box)
        return self._decode(windows, boxes, partial(self._next, index, chains))

    def drop(self, chain: Chain) -> None:
        """Nothing is held."""

    def _decode(
        self, windows: Sequence[Window], needed: Sequence[np.ndarray], decode: Decoder
    ) -> list[Section]:
        """Decode one slice, window by window; masks that are cut are decoded again in another."""
        sections: dict[int, Section] = {}
        tried: list[set[Window]] = [set() for _ in windows]
        pending = dict(enumerate(windows))
        while pending:
            for window in sorted(set(pending.values())):
                numbers = [n for n, w in pending.items() if w == window]
                sections.update(zip(numbers, decode(numbers, window), strict=True))
                for n in numbers:
                    tried[n].add(window)
            others = {n: wider([sections[n]], [needed[n]], self.pyramid, tried[n]) for n in pending}
            pending = {n: w for n, w in others.items() if w is not None}
        return [sections[n] for n in range(len(windows))]

    def _prompted(
        self, index: int, prompts: Sequence[SlicePrompt], numbers: Sequence[int], window: Window
    ) -> list[Section]:
        """Return the masks of prompts on a slice."""
        some = [prompts[n] for n in numbers]
        points = [
            (p.object, xy, s) for p in some for xy, s in zip(p.points, p.positive.tolist(), strict=True)
        ]
        boxes = [(p.object, *p.box) for p in some if p.box is not None]
        given, _ = make_prompts(make_points(points, 2), make_boxes(boxes, 2), make_outlines([]), {})
        masks = decode_window(
            self.segmenter, self.embed(index, window), window, self.pyramid, given, self.choice, AT_ONCE,
            (self.axis, index),
        )  # fmt: skip
        return [Section(window, mask) for mask in masks]

    def _next(
        self, index: int, chains: Sequence[Chain], numbers: Sequence[int], window: Window
    ) -> list[Section]:
        """Return the masks on a slice that those of the slice before lead to."""
        embedding, sections = self.embed(index, window), []
        for begin in range(0, len(numbers), AT_ONCE):
            some = [chains[n] for n in numbers[begin : begin + AT_ONCE]]
            found = self.segmenter.decode(embedding, [self._prompt(c, index, window) for c in some])
            for chain, logits, iou in zip(some, found.logits, found.iou, strict=True):
                taken, reason = self._choose(chain.patch, logits, iou, window)
                section = section_of(
                    chain.prompts.object, logits, iou, taken, reason, window, self.pyramid, (self.axis, index)
                )
                sections.append(section)
        return sections

    def _prompt(self, chain: Chain, index: int, window: Window) -> Prompt:
        """Return the prompt that the mask before makes on the next slice."""
        beside = chain.prompts.hints.get(index, np.empty((0, 2)))
        points = np.concatenate((deepest_point(chain.patch)[None], beside))
        box = mask_box(chain.patch, self.pyramid.shape, GROW)
        return window_prompt(window, self.pyramid, points, np.arange(len(points)) == 0, box)

    def _choose(self, before: Patch, logits: np.ndarray, iou: np.ndarray, window: Window) -> tuple[int, str]:
        """The candidate that overlaps most with the mask before; of several the one of best predicted IoU, of
        these the first."""
        masks = view_of(window, self.pyramid).only(logits) > 0
        overlap = overlaps(before, masks, window, self.pyramid)
        best = int(np.lexsort((-np.arange(len(iou)), iou, overlap))[-1])
        return best, f"overlaps most with the slice before, IoU {overlap[best]:.2f}, of {len(iou)}"
