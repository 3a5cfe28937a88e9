"""What is asked for on one scene: points, boxes and outlines of objects, and phrases.

Positions are fractional elements of the scene's grid in array order, whole numbers at the elements'
centres, as `Geometry.to_world` takes them: element i reaches from i − ½ to i + ½, so a
scene of n elements reaches from −½ to n − ½. Corners of boxes are positions too.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from shapely.affinity import affine_transform

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.regions.base import FULL
from segpipe.regions.cover import unit_cover


@dataclass(frozen=True, eq=False)
class Points:
    """Places in objects, or beside them."""

    position: np.ndarray
    """(n, axes) float64."""
    positive: np.ndarray
    """(n,) bool: in the object, or not."""
    objects: np.ndarray
    """(n,) int64: which object."""

    def __len__(self) -> int:
        return len(self.objects)


@dataclass(frozen=True, eq=False)
class Boxes:
    """Boxes around objects. An axis of no length names a slice of a volume."""

    start: np.ndarray
    """(n, axes) float64: the corner of smallest positions."""
    stop: np.ndarray
    """(n, axes) float64: the opposite corner."""
    objects: np.ndarray
    """(n,) int64: which object; a raster has one box an object, a volume may have one a slice."""

    def __len__(self) -> int:
        return len(self.objects)


@dataclass(frozen=True, eq=False)
class Outlines:
    """Coarse masks of objects on a raster, as polygons."""

    polygons: np.ndarray
    """(n,) shapely (multi)polygons inside the scene: x is the position along columns, y along rows."""
    objects: np.ndarray
    """(n,) int64: which object."""

    def __len__(self) -> int:
        return len(self.objects)


@dataclass(frozen=True, eq=False)
class Prompts:
    """All prompts on one scene; each object has at least one positive point, a box or an outline."""

    objects: np.ndarray
    """(n,) int64 from 1, ascending, none twice."""
    phrases: tuple[str, ...]
    """What each object is said to be; empty where nothing is said."""
    points: Points
    boxes: Boxes
    outlines: Outlines

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
    points: Points, boxes: Boxes, outlines: Outlines, phrases: Mapping[int, str]
) -> tuple[Prompts, tuple[int, ...]]:
    """Prompts of the objects that have something positive, and the objects that have only negative points.

    Args:
        points: of any objects.
        boxes: the same.
        outlines: the same.
        phrases: of objects; those it leaves out have none.
    """
    objects = np.unique(np.concatenate((points.objects[points.positive], boxes.objects, outlines.objects)))
    kept = np.isin(points.objects, objects)
    lost = tuple(np.unique(points.objects[~kept]).tolist())
    points = Points(points.position[kept], points.positive[kept], points.objects[kept])
    names = tuple(phrases.get(o, "") for o in objects.tolist())
    return Prompts(objects, names, points, boxes, outlines), lost


def join_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Prompts from several files as one; an object's number in two of them means the same object.

    Raises:
        RequestError: they give one object two phrases, or, on a raster, two boxes.
    """
    phrases: dict[int, str] = {}
    for part in parts:
        for number, phrase in zip(part.objects.tolist(), part.phrases, strict=True):
            if phrase and phrases.setdefault(number, phrase) != phrase:
                raise RequestError(
                    f"prompts: object {number} is {phrases[number]!r} in one file and {phrase!r} in another; "
                    "valid: one phrase an object"
                )
    points, boxes = [p.points for p in parts], [p.boxes for p in parts]
    outlines = [p.outlines for p in parts]
    joined = Boxes(
        np.concatenate([b.start for b in boxes]),
        np.concatenate([b.stop for b in boxes]),
        np.concatenate([b.objects for b in boxes]),
    )
    check_one_box(joined, "prompts")
    result, _ = make_prompts(
        Points(
            np.concatenate([p.position for p in points]),
            np.concatenate([p.positive for p in points]),
            np.concatenate([p.objects for p in points]),
        ),
        joined,
        Outlines(
            np.concatenate([o.polygons for o in outlines]), np.concatenate([o.objects for o in outlines])
        ),
        phrases,
    )
    return result


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


@dataclass(frozen=True)
class Phrases:
    """What is looked for in words."""

    phrases: tuple[str, ...]
    """In the order and the spelling in which they first came."""
    notes: tuple[str, ...]
    """What was left out, and why."""


def parse_phrases(text: str | Sequence[str]) -> Phrases:
    """Phrases from the field's syntax, ``lake . dock . field``, from lines, or from a list of either.

    A full stop or a new line ends a phrase, but a stop between two digits is a decimal point. White
    space around and inside is single spaces; the same phrase in other letters (case) is the same.

    Raises:
        RequestError: there is no phrase in it.
    """
    items = [text] if isinstance(text, str) else list(text)
    parts = [part for item in items for part in _split(item)]
    cleaned = [" ".join(unicodedata.normalize("NFC", part).split()) for part in parts]
    known: dict[str, str] = {}
    repeated: dict[str, None] = {}
    empty, wordless = 0, []
    for phrase in cleaned:
        if not phrase:
            empty += 1
        elif not any(c.isalnum() for c in phrase):
            wordless.append(phrase)
        elif known.setdefault(phrase.casefold(), phrase) is not phrase:
            repeated[known[phrase.casefold()]] = None
    notes = []
    if repeated:
        notes.append(f"named more than once, looked for once: {', '.join(map(repr, repeated))}")
    if wordless:
        notes.append(f"no words, left out: {', '.join(map(repr, wordless))}")
    if empty:
        notes.append(f"{empty} empty {'phrase' if empty == 1 else 'phrases'} left out")
    if not known:
        raise RequestError(f"text: found no phrase in {text!r}; valid: phrases such as 'lake . dock . field'")
    return Phrases(tuple(known.values()), tuple(notes))


def _split(item: str) -> list[str]:
    """The parts of one text; the end of a phrase at the end of a text begins no further one."""
    parts = re.split(r"(?<!\d)\.|\.(?!\d)|[\r\n]+", item)
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    return parts
