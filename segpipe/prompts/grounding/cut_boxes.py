"""What windows show of objects, and the cut ones put together: steps 1, 2 of `merge_boxes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segpipe.geometry.box import Box
from segpipe.prompts.grounding.base import Detections
from segpipe.prompts.grounding.nms import Boxes, box_iou, common, neighbours
from segpipe.tiling.pyramid import Pyramid, Window

TOUCH = 0.01
"""Share of a window's edge: a detector's boxes end about so near to the border that cuts the object."""


@dataclass(frozen=True, eq=False)
class Placed:
    """What one window's detections are on the scene."""

    detections: Detections
    """In the scene's positions, clipped to what the window sees of it; what then has no area is out."""
    window: Window
    row: np.ndarray
    """(n,) int64: which of the window's own detections each is."""
    cut: np.ndarray
    """(n, 2, axes) bool: at its smallest and largest positions, the object may go on beyond the window."""
    beyond: np.ndarray
    """(m,) int64: phrase of each detection that is out."""


class Table:
    """All boxes of all windows, in an order that does not depend on that of the windows."""

    def __init__(self, parts: Sequence[Placed], pyramid: Pyramid) -> None:
        axes = len(pyramid.shape)
        views = np.array([view_of(part.window, pyramid) for part in parts], np.float64).reshape(-1, 2, axes)
        index = np.array([part.window.index for part in parts], np.int64).reshape(-1, axes)
        level = np.array([part.window.level for part in parts], np.int64)
        part = np.repeat(np.arange(len(parts)), [len(p.detections) for p in parts])

        def column(name: str, *shape: int) -> np.ndarray:
            empty = np.zeros((0, *shape))
            return np.concatenate([empty, *(getattr(p.detections, name) for p in parts)])

        start, stop, score = column("start", axes), column("stop", axes), column("score")
        phrase = column("phrase").astype(np.int64)
        row = np.concatenate([np.zeros(0, np.int64), *(p.row for p in parts)])
        keys = (row, -score, *index[part].T[::-1], level[part], phrase, *stop.T[::-1], *start.T[::-1])
        order = np.lexsort(keys)
        self.boxes = Boxes(start[order], stop[order], phrase[order])
        self.score, self.point = score[order], column("point", axes)[order]
        self.part, self.row = part[order], row[order]
        self.level = level[self.part]
        self.view = Boxes(views[self.part, 0], views[self.part, 1], self.boxes.group)
        self.cut = np.concatenate([np.zeros((0, 2, axes), bool), *(p.cut for p in parts)])[order]
        labels = [label for p in parts for label in p.detections.label]
        self.label = [labels[i] for i in order.tolist()]


@dataclass(frozen=True, eq=False)
class Candidates:
    """Boxes that may be objects, each of one row of the table or of several."""

    boxes: Boxes
    level: np.ndarray
    """(n,)."""
    cut: np.ndarray
    """(n,) bool."""
    rows: list[np.ndarray]
    """Of each, the best first."""

    def plus(self, other: Candidates) -> Candidates:
        """Both, one after the other."""
        boxes = [
            np.concatenate(pair)
            for pair in zip(vars(self.boxes).values(), vars(other.boxes).values(), strict=True)
        ]
        return Candidates(
            Boxes(*boxes),
            np.concatenate([self.level, other.level]),
            np.concatenate([self.cut, other.cut]),
            self.rows + other.rows,
        )

    def ranked(self, table: Table) -> Candidates:
        """From the best down: of one whole box first, by score, by place in the table."""
        first = np.array([r[0] for r in self.rows], np.int64)
        pieced = np.array([len(r) > 1 for r in self.rows], bool) | self.cut
        order = np.lexsort((first, -table.score[first], pieced))
        rows = [self.rows[i] for i in order.tolist()]
        return Candidates(self.boxes.take(order), self.level[order], self.cut[order], rows)


def assemble(table: Table, pyramid: Pyramid, iou: float, cover: float) -> tuple[Candidates, np.ndarray]:
    """Whole boxes and those joined from cut ones, and the rows (m,) that other boxes hold.

    Args:
        iou: `MergeRules.iou`.
        cover: `MergeRules.cover`.
    """
    whole = np.flatnonzero(~table.cut.any(axis=(1, 2)))
    rows = list(whole[:, None])
    objects = Candidates(table.boxes.take(whole), table.level[whole], np.zeros(len(whole), bool), rows)
    held = [np.zeros(0, np.int64)]
    open_rows = np.flatnonzero(table.cut.any(axis=(1, 2)))
    for level in np.unique(table.level[open_rows])[::-1].tolist():
        mine = open_rows[table.level[open_rows] == level]
        inside = _held(table.boxes.take(mine), level, objects, pyramid, cover)
        held.append(mine[inside])
        objects = objects.plus(_join(table, mine[~inside], pyramid, iou))
    return objects, np.concatenate(held)


def _held(boxes: Boxes, level: int, objects: Candidates, pyramid: Pyramid, cover: float) -> np.ndarray:
    """(n,) bool: which of a level's cut boxes are parts of objects."""
    edges = np.array([pyramid.edge(k) for k in range(pyramid.levels)])
    grown = TOUCH * np.maximum(edges[objects.level] - edges[level], 0)[:, None]
    holders = replace(objects.boxes, start=objects.boxes.start - grown, stop=objects.boxes.stop + grown)
    held = np.zeros(len(boxes), bool)
    for i, k in neighbours(boxes, holders):
        one = boxes.take(i)
        held[i[common(one, holders.take(k)) >= cover * one.area]] = True
    return held


def _join(table: Table, rows: np.ndarray, pyramid: Pyramid, iou: float) -> Candidates:
    """Cut boxes of one level, linked where they agree in what both windows see."""
    boxes, views, cut = table.boxes.take(rows), table.view.take(rows), table.cut[rows]
    links = [np.zeros((2, 0), np.int64)]
    for i, k in neighbours(boxes, boxes):
        i, k = i[i < k], k[i < k]
        start = np.maximum(views.start[i], views.start[k])
        stop = np.minimum(views.stop[i], views.stop[k])
        one, two = (
            Boxes(
                np.minimum(np.maximum(boxes.start[j], start), stop),
                np.maximum(np.minimum(boxes.stop[j], stop), start),
                boxes.group[j],
            )
            for j in (i, k)
        )
        agree = box_iou(one, two) >= iou
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
    return Candidates(Boxes(start, stop, table.boxes.group[first]), table.level[first], still_cut, pieces)


def view_of(window: Window, pyramid: Pyramid) -> tuple[np.ndarray, np.ndarray]:
    """Corners (axes,) of what a window sees of the scene, as positions."""
    seen = pyramid.box(window).intersect(Box.whole(pyramid.shape))
    return np.array(seen.start) - 0.5, np.array(seen.stop) - 0.5
