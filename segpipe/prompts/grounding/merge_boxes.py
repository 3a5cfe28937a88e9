"""Merge the detections of overlapping windows at several scales, so that each object is reported once.

Windows are those of `segpipe.tiling.pyramid`: every level sees the whole scene, neighbours share a half, so
what is at most half a window long is whole in one of them. Detectors trained on photographs find what is as
large in the window as things are in photographs: levels decide what is found. They know nothing of pixels of
ten metres or of slices of a body; for these there is the vocabulary grounder.

A box that comes within `TOUCH` of its window's border, inside the scene, is *cut*: there may be more of the
object. Boxes become objects in this order, each phrase for itself:

1. A cut box goes where a whole one, or an object already made of cut ones, holds most of it: levels are gone
   through from the coarsest, and a holder of a coarser level is grown by its own `TOUCH`. A pond inside the
   box of a lake is not lost by it, unless every window that shows the pond whole has missed it.
2. The cut boxes left on a level are one object where they agree in what both of their windows see: the IoU of
   the two boxes, both clipped to the windows' overlap. The object is the hull of all that are linked so.
3. Of boxes that are the same by their IoU the best is kept: whole ones, then by score, then by position.
4. Boxes of different phrases that are the same are one object: the best one's phrase, the others `also`.

Nothing depends on the order of windows, and what became of every box is counted. Nested boxes are two objects
(a pond inside the box of a winding lake).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from segpipe.geometry.box import Box
from segpipe.prompts.grounding.base import Detections, PhraseAccount
from segpipe.prompts.inputs.components import joined
from segpipe.prompts.masks.nms import GroupedBoxes, box_iou, neighbours, shared_area, suppress
from segpipe.prompts.prompt_set import Columns
from segpipe.tiling.pyramid import Pyramid, Window

TOUCH = 0.01
"""Share of a window's edge: a detector's boxes end about so near to the border that cuts the object."""
IOU = 0.5
"""Least IoU of two boxes of one phrase that are one object; of two cut ones in what both windows see."""
COVER = 0.5
"""Least share of a cut box inside a whole one that it is a part of."""
OTHER_PHRASE_IOU = 0.7
"""Least IoU of two boxes of different phrases that are one object."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowDetections:
    """One window's detections on the scene."""

    detections: Detections
    """In the scene's positions, clipped to what the window sees of it; what then has no area is out."""
    window: Window
    row: np.ndarray
    """(n,) int64: which of the window's own detections each is."""
    cut: np.ndarray
    """(n, 2, axes) bool: at its smallest and largest positions, the object may go on beyond the window."""
    beyond: np.ndarray
    """(m,) int64: phrase of each detection that is out."""


class BoxTable:
    """All boxes of all windows, in an order that does not depend on that of the windows."""

    def __init__(self, parts: Sequence[WindowDetections], pyramid: Pyramid) -> None:
        axes = len(pyramid.shape)
        views = np.array([view_of(part.window, pyramid) for part in parts], np.float64).reshape(-1, 2, axes)
        index = np.array([part.window.index for part in parts], np.int64).reshape(-1, axes)
        level = np.array([part.window.level for part in parts], np.int64)
        part = np.repeat(np.arange(len(parts)), [len(p.detections) for p in parts])
        found = Detections.join([p.detections for p in parts], axes)
        row = np.concatenate([np.zeros(0, np.int64), *(p.row for p in parts)])
        keys = (
            row, -found.score, *index[part].T[::-1], level[part], found.phrase, *found.stop.T[::-1],
            *found.start.T[::-1],
        )  # fmt: skip
        order = np.lexsort(keys)
        self.detections = found.take(order)
        self.boxes = GroupedBoxes(self.detections.start, self.detections.stop, self.detections.phrase)
        part = part[order]
        self.level = level[part]
        self.view = GroupedBoxes(views[part, 0], views[part, 1], self.boxes.group)
        self.cut = np.concatenate([np.zeros((0, 2, axes), bool), *(p.cut for p in parts)])[order]


@dataclass(frozen=True, eq=False)
class ObjectBoxes(Columns):
    """GroupedBoxes that may be objects, each of one row of the table or of several."""

    boxes: GroupedBoxes
    level: np.ndarray
    """(n,)."""
    cut: np.ndarray
    """(n,) bool."""
    rows: tuple[np.ndarray, ...]
    """Of each, the best first."""

    def ranked(self, table: BoxTable) -> ObjectBoxes:
        """From the best down: of one whole box first, by score, by row of the table."""
        first = np.array([r[0] for r in self.rows], np.int64)
        pieced = np.array([len(r) > 1 for r in self.rows], bool) | self.cut
        return self.take(np.lexsort((first, -table.detections.score[first], pieced)))


def assemble(table: BoxTable, pyramid: Pyramid) -> tuple[ObjectBoxes, np.ndarray]:
    """Whole boxes and those joined from cut ones, and the rows (m,) that other boxes hold."""
    whole = np.flatnonzero(~table.cut.any(axis=(1, 2)))
    rows = tuple(whole[:, None])
    objects = ObjectBoxes(table.boxes.take(whole), table.level[whole], np.zeros(len(whole), bool), rows)
    held = [np.zeros(0, np.int64)]
    open_rows = np.flatnonzero(table.cut.any(axis=(1, 2)))
    for level in np.unique(table.level[open_rows])[::-1].tolist():
        mine = open_rows[table.level[open_rows] == level]
        inside = _held(table.boxes.take(mine), level, objects, pyramid)
        held.append(mine[inside])
        objects = ObjectBoxes.concatenate([objects, _join(table, mine[~inside], pyramid)])
    return objects, np.concatenate(held)


def _held(boxes: GroupedBoxes, level: int, objects: ObjectBoxes, pyramid: Pyramid) -> np.ndarray:
    """(n,) bool: which of a level's cut boxes are parts of objects."""
    edges = np.array([pyramid.edge(k) for k in range(pyramid.levels)])
    grown = TOUCH * np.maximum(edges[objects.level] - edges[level], 0)[:, None]
    holders = replace(objects.boxes, start=objects.boxes.start - grown, stop=objects.boxes.stop + grown)
    held = np.zeros(len(boxes), bool)
    for i, k in neighbours(boxes, holders):
        one = boxes.take(i)
        held[i[shared_area(one, holders.take(k)) >= COVER * one.area]] = True
    return held


def _join(table: BoxTable, rows: np.ndarray, pyramid: Pyramid) -> ObjectBoxes:
    """Cut boxes of one level, linked where they agree in what both windows see."""
    boxes, views, cut = table.boxes.take(rows), table.view.take(rows), table.cut[rows]
    links = []
    for i, k in neighbours(boxes, boxes):
        i, k = i[i < k], k[i < k]
        start = np.maximum(views.start[i], views.start[k])
        stop = np.minimum(views.stop[i], views.stop[k])
        clipped = [
            (np.clip(boxes.start[j], start, stop), np.clip(boxes.stop[j], start, stop)) for j in (i, k)
        ]
        agree = box_iou(*clipped[0], *clipped[1]) >= IOU
        links.append(np.column_stack((i[agree], k[agree])))
    member = joined(links, len(rows))
    count = int(member.max(initial=-1)) + 1
    start, stop = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    np.minimum.at(start, member, boxes.start)
    np.maximum.at(stop, member, boxes.stop)
    # Edges are known to `TOUCH`. A side is open where all pieces that end there were cut there.
    reach = 2 * TOUCH * pyramid.edge(int(table.level[rows[0]])) if len(rows) else 0.0
    far = np.stack([boxes.start > start[member] + reach, boxes.stop < stop[member] - reach], axis=1)
    still = np.ones((count, *cut.shape[1:]), bool)
    np.logical_and.at(still, member, cut | far)
    order = np.lexsort((np.arange(len(rows)), -table.detections.score[rows], member))
    pieces = np.split(rows[order], np.cumsum(np.bincount(member, minlength=count))[:-1]) if count else []
    first = np.array([p[0] for p in pieces], np.int64)
    still_cut = np.asarray(still.any(axis=(1, 2)))
    return ObjectBoxes(
        GroupedBoxes(start, stop, table.boxes.group[first]), table.level[first], still_cut, tuple(pieces)
    )


def view_of(window: Window, pyramid: Pyramid) -> tuple[np.ndarray, np.ndarray]:
    """Corners (axes,) of what a window sees of the scene, as positions."""
    seen = pyramid.box(window).intersect(Box.whole(pyramid.shape))
    return np.array(seen.start) - 0.5, np.array(seen.stop) - 0.5


@dataclass(frozen=True, kw_only=True)
class MergeCounts:
    """What became of one phrase's boxes: `seen` is the sum of all the others."""

    seen: int
    """In all windows."""
    beyond: int
    """Outside the scene, or of no area."""
    cut: int
    """Cut by a window's border, of an object that another window shows whole (or several together)."""
    joined: int
    """Cut, and one with others: pieces less objects."""
    repeated: int
    """The same as a better one."""
    also: int
    """The same as a better one of another phrase, which tells this phrase as well."""
    best: int
    """Objects of which this is the phrase."""

    @property
    def found(self) -> int:
        """Objects that tell the phrase, as theirs or as well."""
        return self.best + self.also


@dataclass(frozen=True, eq=False, kw_only=True)
class MergedDetections:
    """The objects of a scene, by ascending first corner."""

    detections: Detections
    also: tuple[tuple[int, ...], ...]
    """Of each object, further phrases (their numbers, ascending)."""
    cut: np.ndarray
    """(n,) bool: no window shows the object whole, nor do its pieces: it may go on."""
    pieces: np.ndarray
    """(n,) int64: how many boxes the object is made of."""
    counts: tuple[MergeCounts, ...]
    """Of each phrase."""

    def __len__(self) -> int:
        return len(self.detections)


def detection_windows(pyramid: Pyramid, levels: Iterable[int]) -> Iterator[Window]:
    """All windows of some levels, the finest level first, in C order.

    Args:
        pyramid: of a raster; its margin does not matter here.
        levels: 0 is the finest; those above the coarsest of the scene are the coarsest.
    """
    for level in sorted({min(level, pyramid.levels - 1) for level in levels}):
        for index in product(*(range(n) for n in pyramid.counts(level))):
            yield Window(level, index)


def to_scene(found: Detections, window: Window, pyramid: Pyramid) -> WindowDetections:
    """Take a window's detections to the scene.

    Args:
        found: in positions of the window's W × W elements; boxes may reach beyond them.
    """
    low, high = view_of(window, pyramid)
    reach = TOUCH * pyramid.edge(window.level)
    start = np.clip(pyramid.to_scene(found.start, window), low, high)
    stop = np.clip(pyramid.to_scene(found.stop, window), low, high)
    there = (stop > start).all(axis=1)
    row = np.flatnonzero(there)
    start, stop = start[there], stop[there]
    ends = np.array(pyramid.shape) - 0.5
    cut = np.stack([(start <= low + reach) & (low > -0.5), (stop >= high - reach) & (high < ends)], axis=1)
    inside = found.take(row)
    point = np.clip(pyramid.to_scene(inside.point, window), start, stop)
    detections = replace(inside, start=start, stop=stop, point=point)
    return WindowDetections(
        detections=detections, window=window, row=row, cut=cut, beyond=found.phrase[~there]
    )


def merge_detections(parts: Sequence[WindowDetections], pyramid: Pyramid, phrases: int) -> MergedDetections:
    """The objects of a scene (see the module).

    Args:
        parts: every window's, in any order.
        pyramid: that the windows are of.
        phrases: how many there are.
    """
    table = BoxTable(parts, pyramid)
    objects, held = assemble(table, pyramid)
    ranked = objects.ranked(table)
    into = suppress(ranked.boxes, IOU)
    kept = np.flatnonzero(into < 0)
    other = suppress(ranked.boxes.take(kept), OTHER_PHRASE_IOU, across=True)
    also, doubled = _also(ranked.boxes.group[kept], other)
    counts = _counts(parts, table, held, ranked, into, kept[other >= 0], kept[doubled], phrases)
    final = np.flatnonzero(other < 0)
    boxes = ranked.boxes.take(kept[final])
    order = np.lexsort((boxes.group, *boxes.stop.T[::-1], *boxes.start.T[::-1]))
    final = final[order]
    places = kept[final]
    rows = [ranked.rows[i] for i in places.tolist()]
    best = np.array([r[0] for r in rows], np.int64)
    boxes = ranked.boxes.take(places)
    detections = replace(table.detections.take(best), start=boxes.start, stop=boxes.stop, phrase=boxes.group)
    return MergedDetections(
        detections=detections, also=tuple(also.get(i, ()) for i in final.tolist()), cut=ranked.cut[places],
pieces=np.array([len(r) for r in rows], np.int64), counts=counts,
    )  # fmt: skip


def add_accounts(
    parts: Sequence[Sequence[PhraseAccount]], counts: Sequence[MergeCounts]
) -> tuple[PhraseAccount, ...]:
    """What became of each phrase on the scene: found after merging, the rest summed over windows.

    An object that two windows see below the threshold is counted as below in both.

    Args:
        parts: each window's accounts; at least one window.
        counts: `MergedDetections.counts`.
    """
    result = []
    for mine, count in zip(zip(*parts, strict=True), counts, strict=True):
        if len({account.phrase for account in mine}) > 1:
            raise ValueError(f"accounts of different phrases: {sorted({a.phrase for a in mine})}")
        scores = [account.best for account in mine if not math.isnan(account.best)]
        result.append(
            replace(
                mine[0],
                found=count.found,
                below=sum(account.below for account in mine),
                small=sum(account.small for account in mine),
                best=max(scores, default=math.nan),
            )
        )
    return tuple(result)


def _also(phrase: np.ndarray, into: np.ndarray) -> tuple[dict[int, tuple[int, ...]], np.ndarray]:
    """The further phrases of each kept box, and places (m,) of boxes whose phrase it tells already."""
    further: dict[int, set[int]] = {}
    doubled = []
    for place in np.flatnonzero(into >= 0).tolist():
        known = further.setdefault(int(into[place]), set())
        if int(phrase[place]) in known:
            doubled.append(place)
        known.add(int(phrase[place]))
    return {k: tuple(sorted(v)) for k, v in further.items()}, np.array(doubled, np.int64)


def _counts(
    parts: Sequence[WindowDetections], table: BoxTable, held: np.ndarray, objects: ObjectBoxes,
    into: np.ndarray, also: np.ndarray, doubled: np.ndarray, phrases: int,
) -> tuple[MergeCounts, ...]:  # fmt: skip
    """Per phrase.

    Args:
        held: rows of the table that are parts of others.
        objects: all boxes that may be objects.
        into: (n,) of each, the better one of its phrase, or −1.
        also: those that are the same as one of another phrase.
        doubled: those of ``also`` whose phrase that one tells already.
    """

    def per_phrase(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(values, weights, phrases).astype(np.int64)

    group = objects.boxes.group
    pieces = np.array([len(r) for r in objects.rows], np.int64)
    beyond = np.concatenate([np.zeros(0, np.int64), *(p.beyond for p in parts)])
    gone = into >= 0
    lost = per_phrase(group[gone], pieces[gone]) + per_phrase(group[doubled])
    alive, as_well = per_phrase(group[~gone]), per_phrase(group[also])
    columns = {
        "seen": per_phrase(table.boxes.group) + per_phrase(beyond),
        "beyond": per_phrase(beyond),
        "cut": per_phrase(table.boxes.group[held]),
        "joined": per_phrase(group[~gone], pieces[~gone] - 1),
        "repeated": lost,
        "also": as_well - per_phrase(group[doubled]),
        "best": alive - as_well,
    }
    return tuple(
        MergeCounts(**{name: int(column[k]) for name, column in columns.items()}) for k in range(phrases)
    )
