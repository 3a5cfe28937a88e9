"""All prompts of one scene as tables of columns: points, boxes, outlines, and where each object came from.

Positions are fractional elements of the scene's grid in array order, whole numbers at the elements'
centres, as `Geometry.to_world` takes them: element i reaches from i − ½ to i + ½, so a
scene of n elements reaches from −½ to n − ½. Corners of boxes are positions too.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any, Self

import numpy as np
import shapely
from shapely.affinity import affine_transform

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.regions.base import FULL
from segpipe.regions.polygons import unit_cover


@dataclass(frozen=True, eq=False)
class Columns:
    """A dataclass whose fields hold one item a row: arrays, tuples, or further `Columns`."""

    def __len__(self) -> int:
        return len(getattr(self, fields(self)[0].name))

    def take(self, rows: np.ndarray) -> Self:
        """Return some rows: by number in that order, or where a mask is True.

        A tuple without items is a column that is not known; it stays so.
        """
        return type(self)(**{f.name: _taken(getattr(self, f.name), rows) for f in fields(self)})

    @classmethod
    def concatenate(cls, parts: Sequence[Self]) -> Self:
        """Return the rows of all parts, of which there is at least one, one part after the other."""
        return cls(**{f.name: _concatenated([getattr(p, f.name) for p in parts]) for f in fields(cls)})


def _taken(column: Any, rows: np.ndarray) -> Any:
    if isinstance(column, np.ndarray):
        return column[rows]
    if isinstance(column, Columns):
        return column.take(rows)
    return tuple(column[i] for i in np.arange(len(column))[rows].tolist()) if column else ()


def _concatenated(columns: Sequence[Any]) -> Any:
    if isinstance(columns[0], np.ndarray):
        return np.concatenate(columns)
    if isinstance(columns[0], Columns):
        return type(columns[0]).concatenate(columns)
    return tuple(item for column in columns for item in column)


def dump_arrays(compressed: bool = False, **arrays: np.ndarray | bytes) -> bytes:
    """Return arrays and blobs, exact, as one blob, in this order."""
    buffer, save = io.BytesIO(), np.savez_compressed if compressed else np.savez
    columns: Any = {k: np.frombuffer(a, np.uint8) if isinstance(a, bytes) else a for k, a in arrays.items()}
    save(buffer, **columns)
    return buffer.getvalue()


def load_arrays(data: bytes) -> dict[str, Any]:
    """Return the inverse of `dump_arrays`; blobs are uint8."""
    with np.load(io.BytesIO(data)) as found:
        return dict(found)


class PromptSource(IntEnum):
    """Where an object's prompt came from."""

    DRAWN = 0
    """Points, boxes and outlines of a person."""
    EARLIER = 1
    """Labels of an earlier run."""
    TEXT = 2
    """A phrase, through a grounder."""
    AUTOMATIC = 3
    """The grid of points."""


@dataclass(frozen=True, eq=False)
class Points(Columns):
    """Positions in objects, or beside them."""

    position: np.ndarray
    """(n, axes) float64."""
    positive: np.ndarray
    """(n,) bool: in the object, or not."""
    objects: np.ndarray
    """(n,) int64: which object."""


@dataclass(frozen=True, eq=False)
class Boxes(Columns):
    """Boxes around objects. An axis of no length names a slice of a volume."""

    start: np.ndarray
    """(n, axes) float64: the corner of smallest positions."""
    stop: np.ndarray
    """(n, axes) float64: the opposite corner."""
    objects: np.ndarray
    """(n,) int64: which object; a raster has one box an object, a volume may have one a slice."""


@dataclass(frozen=True, eq=False)
class Outlines(Columns):
    """Coarse masks of objects on a raster, as polygons."""

    polygons: np.ndarray
    """(n,) shapely (multi)polygons inside the scene: x is the position along columns, y along rows."""
    objects: np.ndarray
    """(n,) int64: which object."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PromptSet:
    """All prompts of one scene; each object has at least one positive point, a box or an outline.

    It is made once for a scene and kept in the store, so that every worker segments the same objects.
    """

    objects: np.ndarray
    """(n,) int64 from 1, ascending, none twice."""
    phrases: tuple[str, ...]
    """Phrase of each object; empty where it has none."""
    points: Points
    boxes: Boxes
    outlines: Outlines
    source: np.ndarray
    """(n,) int64, `PromptSource`."""
    score: np.ndarray
    """(n,) float64, the grounder's; NaN: no grounder found the object."""
    also: tuple[tuple[str, ...], ...]
    """Further phrases that found the same box."""
    accounts: tuple[dict[str, Any], ...] = ()
    """What became of each phrase of the text, as `segpipe.tables.record.AskedPhrase` takes it."""
    notes: tuple[str, ...] = ()
    """What became of each file of prompts, in words."""

    def __len__(self) -> int:
        return len(self.objects)

    def extents(self) -> Boxes:
        """The envelope of everything positive that is said of each object, in the order of `objects`."""
        axes = self.points.position.shape[1]
        start, stop = np.full((len(self), axes), np.inf), np.full((len(self), axes), -np.inf)
        inside = self.points.positive
        x0, y0, x1, y1 = shapely.bounds(self.outlines.polygons).reshape(-1, 4).T
        for objects, low, high in (
            (self.points.objects[inside], self.points.position[inside], self.points.position[inside]),
            (self.boxes.objects, self.boxes.start, self.boxes.stop),
            (self.outlines.objects, np.column_stack((y0, x0)), np.column_stack((y1, x1))),
        ):
            if len(objects):
                at = np.searchsorted(self.objects, objects)
                np.minimum.at(start, at, low)
                np.maximum.at(stop, at, high)
        return Boxes(start, stop, self.objects)

    def of_objects(self, objects: np.ndarray) -> PromptSet:
        """Return the prompts of some objects (ascending numbers) alone."""
        rows = np.isin(self.objects, objects)
        numbers = np.flatnonzero(rows).tolist()
        return PromptSet(
            objects=self.objects[rows], phrases=tuple(self.phrases[i] for i in numbers),
            points=self.points.take(np.isin(self.points.objects, objects)),
            boxes=self.boxes.take(np.isin(self.boxes.objects, objects)),
            outlines=self.outlines.take(np.isin(self.outlines.objects, objects)),
            source=self.source[rows], score=self.score[rows], also=tuple(self.also[i] for i in numbers),
        )  # fmt: skip

    def renumbered(self, first: int) -> PromptSet:
        """Return the same objects as first, first + 1, … in the order of their numbers."""

        def new(objects: np.ndarray) -> np.ndarray:
            return np.asarray(np.searchsorted(self.objects, objects) + first)

        return replace(
            self, objects=new(self.objects),
            points=replace(self.points, objects=new(self.points.objects)),
            boxes=replace(self.boxes, objects=new(self.boxes.objects)),
            outlines=replace(self.outlines, objects=new(self.outlines.objects)),
        )  # fmt: skip

    @classmethod
    def concatenate(cls, parts: Sequence[PromptSet]) -> PromptSet:
        """Return the objects of several sets, at least one, numbered 1…n one set after the other."""
        ends = np.cumsum([len(part) for part in parts]).tolist()
        moved = [part.renumbered(end - len(part) + 1) for part, end in zip(parts, ends, strict=True)]
        return cls(
            objects=np.arange(1, ends[-1] + 1), phrases=tuple(name for p in parts for name in p.phrases),
            points=Points.concatenate([p.points for p in moved]),
            boxes=Boxes.concatenate([p.boxes for p in moved]),
            outlines=Outlines.concatenate([p.outlines for p in moved]),
            source=np.concatenate([p.source for p in parts]), score=np.concatenate([p.score for p in parts]),
            also=tuple(names for p in parts for names in p.also),
            accounts=tuple(row for p in parts for row in p.accounts),
            notes=tuple(note for p in parts for note in p.notes),
        )  # fmt: skip

    def dump(self) -> bytes:
        """Return all columns, exact, as one blob."""
        text = {"names": self.phrases, "also": self.also, "phrases": self.accounts, "lines": self.notes}
        polygons = shapely.to_wkb(shapely.GeometryCollection(self.outlines.polygons.tolist()))
        return dump_arrays(
            True, objects=self.objects, kind=self.source, score=self.score,
            points=self.points.position, positive=self.points.positive, points_of=self.points.objects,
            box_start=self.boxes.start, box_stop=self.boxes.stop, boxes_of=self.boxes.objects,
            outlines_of=self.outlines.objects, outlines=bytes(polygons), text=json.dumps(text).encode(),
        )  # fmt: skip

    @classmethod
    def load(cls, data: bytes) -> PromptSet:
        """Return the inverse of `dump`."""
        f = load_arrays(data)
        text = json.loads(f["text"].tobytes())
        polygons = np.array([*shapely.from_wkb(f["outlines"].tobytes()).geoms], dtype=object)
        return cls(
            objects=f["objects"], phrases=tuple(text["names"]),
            points=Points(f["points"], f["positive"], f["points_of"]),
            boxes=Boxes(f["box_start"], f["box_stop"], f["boxes_of"]),
            outlines=Outlines(polygons, f["outlines_of"]),
            source=f["kind"], score=f["score"], also=tuple(tuple(names) for names in text["also"]),
            accounts=tuple(text["phrases"]), notes=tuple(text["lines"]),
        )  # fmt: skip


def make_points(rows: Iterable[tuple[int, Sequence[float], bool]], axes: int) -> Points:
    """Points from (object, position, positive)."""
    items = list(rows)
    return Points(
        np.array([p for _, p, _ in items], np.float64).reshape(-1, axes),
        np.array([bool(s) for _, _, s in items], bool),
        np.array([o for o, _, _ in items], np.int64),
    )


def make_boxes(rows: Iterable[tuple[int, Sequence[float], Sequence[float]]], axes: int) -> Boxes:
    """Boxes from (object, start, stop)."""
    items = list(rows)
    return Boxes(
        np.array([a for _, a, _ in items], np.float64).reshape(-1, axes),
        np.array([b for _, _, b in items], np.float64).reshape(-1, axes),
        np.array([o for o, _, _ in items], np.int64),
    )


def make_outlines(rows: Iterable[tuple[int, shapely.Geometry]]) -> Outlines:
    """Outlines from (object, polygon)."""
    items = list(rows)
    polygons = np.empty(len(items), dtype=object)
    polygons[:] = [polygon for _, polygon in items]
    return Outlines(polygons, np.array([o for o, _ in items], np.int64))


def make_prompts(
    points: Points,
    boxes: Boxes,
    outlines: Outlines,
    phrases: Mapping[int, str],
    source: PromptSource = PromptSource.DRAWN,
) -> tuple[PromptSet, tuple[int, ...]]:
    """Return prompts of the objects with something positive, and the objects with negative points alone.

    Args:
        points: of any objects.
        boxes: the same.
        outlines: the same.
        phrases: of objects; those it leaves out have none.
        source: of all of them.
    """
    objects = np.unique(np.concatenate((points.objects[points.positive], boxes.objects, outlines.objects)))
    kept = np.isin(points.objects, objects)
    n = len(objects)
    prompts = PromptSet(
        objects=objects, phrases=tuple(phrases.get(o, "") for o in objects.tolist()),
        points=points.take(kept), boxes=boxes, outlines=outlines,
        source=np.full(n, int(source)), score=np.full(n, np.nan), also=((),) * n,
    )  # fmt: skip
    return prompts, tuple(np.unique(points.objects[~kept]).tolist())


def check_one_box(boxes: Boxes, where: str) -> None:
    """A raster's objects have one box each.

    Raises:
        RequestError: one has several; ``where`` they are from.
    """
    numbers, counts = np.unique(boxes.objects, return_counts=True)
    if boxes.start.shape[1] == 2 and (counts > 1).any():
        number, count = int(numbers[counts > 1][0]), int(counts[counts > 1][0])
        raise RequestError(
            f"{where}: object {number} has {count} boxes; valid: one box an object, and points as many as "
            "are wanted"
        )


def element_corners(box: Box) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A box of whole elements as positions: the outer edges of its first and last ones."""
    return tuple(a - 0.5 for a in box.start), tuple(b - 0.5 for b in box.stop)


def outline_cover(polygon: shapely.Geometry, box: Box, shape: Sequence[int]) -> np.ndarray:
    """Share of each cell that an outline covers, float32 of ``shape``: a mask prompt of a window.

    Args:
        polygon: in positions.
        box: (y, x) of the scene; may reach beyond it.
        shape: cells into which the box is cut, (y, x).
    """
    fy, fx = (n / k for n, k in zip(shape, box.shape, strict=True))
    (y0, x0), _ = element_corners(box)
    placed = affine_transform(polygon, [fx, 0, 0, fy, -x0 * fx, -y0 * fy])
    return (unit_cover(placed, Box.whole(shape)) / np.float32(FULL)).astype(np.float32)
