"""Put together the boxes that windows cut: steps 1, 2 of `merge_boxes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segpipe.geometry.box import Box
from segpipe.prompts.columns import Columns
from segpipe.prompts.grounding.base import Detections
from segpipe.prompts.masks.nms import GroupedBoxes, box_iou, neighbours, shared_area
from segpipe.tiling.pyramid import Pyramid, Window

TOUCH = 0.01
"""Share of a window's edge: a detector's boxes end about so near to the border that cuts the object."""


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
        self.score = self.detections.score
        self.boxes = GroupedBoxes(self.detections.start, self.detections.stop, self.detections.phrase)
        self.part, self.row = part[order], row[order]
        self.level = level[self.part]
        self.view = GroupedBoxes(views[self.part, 0], views[self.part, 1], self.boxes.group)
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
        return self.take(np.lexsort((first, -table.score[first], pieced)))


def assemble(table: BoxTable, pyramid: Pyramid, iou: float, cover: float) -> tuple[ObjectBoxes, np.ndarray]:
    """Whole boxes and those joined from cut ones, and the rows (m,) that other boxes hold.

    Args:
        iou: least, of two cut boxes of one object, in what both windows see.
        cover: least share of a cut box inside a whole one that it is a part of.
    """
    whole = np.flatnonzero(~table.cut.any(axis=(1, 2)))
    rows = tuple(whole[:, None])
    objects = ObjectBoxes(table.boxes.take(whole), table.level[whole], np.zeros(len(whole), bool), rows)
    held = [np.zeros(0, np.int64)]
    open_rows = np.flatnonzero(table.cut.any(axis=(1, 2)))
    for level in np.unique(table.level[open_rows])[::-1].tolist():
        mine = open_rows[table.level[open_rows] == level]
        inside = _held(table.boxes.take(mine), level, objects, pyramid, cover)
        held.append(mine[inside])
        objects = ObjectBoxes.concatenate([objects, _join(table, mine[~inside], pyramid, iou)])
    return objects, np.concatenate(held)


def _held(
    boxes: GroupedBoxes, level: int, objects: ObjectBoxes, pyramid: Pyramid, cover: float
) -> np.ndarray:
    """(n,) bool: which of a level's cut boxes are parts of objects."""
    edges = np.array([pyramid.edge(k) for k in range(pyramid.levels)])
    grown = TOUCH * np.maximum(edges[objects.level] - edges[level], 0)[:, None]
    holders = replace(objects.boxes, start=objects.boxes.start - grown, stop=objects.boxes.stop + grown)
    held = np.zeros(len(boxes), bool)
    for i, k in neighbours(boxes, holders):
        one = boxes.take(i)
        held[i[shared_area(one, holders.take(k)) >= cover * one.area]] = True
    return held


def _join(table: BoxTable, rows: np.ndarray, pyramid: Pyramid, iou: float) -> ObjectBoxes:
    """Cut boxes of one level, linked where they agree in what both windows see."""
    boxes, views, cut = table.boxes.take(rows), table.view.take(rows), table.cut[rows]
    links = [np.zeros((2, 0), np.int64)]
    for i, k in neighbours(boxes, boxes):
        i, k = i[i < k], k[i < k]
        start = np.maximum(views.start[i], views.start[k])
        stop = np.minimum(views.stop[i], views.stop[k])
        clipped = [
            (np.clip(boxes.start[j], start, stop), np.clip(boxes.stop[j], start, stop)) for j in (i, k)
        ]
        agree = box_iou(*clipped[0], *clipped[1]) >= iou
        links.append(np.stack([i[agree], k[agree]]))
    ends = np.concatenate(links, axis=1)
    graph = coo_array((np.ones(ends.shape[1], bool), (ends[0], ends[1])), shape=(len(rows),) * 2)
    count, member = connected_components(graph, directed=False) if len(rows) else (0, rows)
    start, stop = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    np.minimum.at(start, member, boxes.start)
    np.maximum.at(stop, member, boxes.stop)
    # Edges are known to `TOUCH`. A side is open where all pieces that end there were cut there.
    reach = 2 * TOUCH * pyramid.edge(int(table.level[rows[0]])) if len(rows) else 0.0
    far = np.stack([boxes.start > start[member] + reach, boxes.stop < stop[member] - reach], axis=1)
    still = np.ones((count, *cut.shape[1:]), bool)
    np.logical_and.at(still, member, cut | far)
    order = np.lexsort((np.arange(len(rows)), -table.score[rows], member))
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
