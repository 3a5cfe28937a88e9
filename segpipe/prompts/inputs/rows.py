"""Make prompts from the rows of a file: number objects, read labels, account for every row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import shapely

from segpipe.errors import RequestError
from segpipe.geometry.geometry import Geometry
from segpipe.prompts.inputs.to_grid import ClippedPolygon, inside
from segpipe.prompts.prompt_set import (
    PromptSet,
    check_one_box,
    make_boxes,
    make_outlines,
    make_points,
    make_prompts,
)

POSITIVE = frozenset({"1", "1.0", "+", "true", "positive", "foreground"})
NEGATIVE = frozenset({"0", "0.0", "-", "-1", "false", "negative", "background"})
DIGITS = 18
"""Of an object's number, which must be one of 64 bits."""
LISTED = 5
"""Row numbers that a note names before it says how many more there are."""


@dataclass(frozen=True, kw_only=True)
class FileAccount:
    """What became of every row or feature of a file; they are numbered from 1, without a header."""

    source: str
    given: int
    used: tuple[int, ...] = ()
    """Those of which something is used."""
    outside: tuple[int, ...] = ()
    """Wholly outside the scene, or without a place in its CRS."""
    cut: tuple[int, ...] = ()
    """Used, but partly outside the scene: boxes and outlines end at its edge, points beyond are left out."""
    empty: tuple[int, ...] = ()
    """Without coordinates, or polygons without area."""
    negative: tuple[int, ...] = ()
    """Negative points of objects with nothing positive in the scene."""
    remarks: tuple[str, ...] = ()
    """On how the file was read."""

    def lines(self) -> tuple[str, ...]:
        """The account in words, one line a fact."""
        said = [f"{self.source}: {len(self.used)} of {self.given} prompts are used"]
        for rows, what in (
            (self.outside, "outside the scene, left out"),
            (self.empty, "empty, left out"),
            (self.negative, "negative points of objects with nothing positive, left out"),
            (self.cut, "partly outside the scene, cut at its edge"),
        ):
            if rows:
                more = f" and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
                numbers = ", ".join(map(str, rows[:LISTED]))
                said.append(f"{self.source}: {len(rows)} {what} (number {numbers}{more})")
        return (*said, *(f"{self.source}: {remark}" for remark in self.remarks))


@dataclass(frozen=True)
class Attributes:
    """What the columns of a file say beside coordinates, one value a row."""

    objects: tuple[int, ...]
    positive: tuple[bool, ...]
    phrases: tuple[str, ...]
    remarks: tuple[str, ...]


DIGITS = 18
"""Of the number of an object, at most: it is kept as int64."""


def read_attributes(columns: Mapping[str, Sequence[object]], count: int, source: str) -> Attributes:
    """Objects, labels and phrases of ``count`` rows.

    - ``object``: whole numbers from 1; rows of one number are one object; an empty one is an object of its
      own. Without it ``id`` is taken where it has a different number for each row, as tables of instances do.
    - ``label``: 1 or 0, positive or negative; empty is positive. If it holds no such word at all, it is
      the phrase.
    - ``phrase``, or ``class``: what the object is said to be.

    Raises:
        RequestError: a value is none of these, or one object has two phrases; names the row.
    """
    low = {str(name).strip().lower(): [_text(v) for v in column] for name, column in columns.items()}
    remarks = []
    numbers = low.get("object")
    if numbers is None and _are_ids(low.get("id")):
        numbers = low["id"]
        remarks.append("column 'id' gives the objects' numbers")
    objects = _objects(numbers or [""] * count, source)
    labels = low.get("label", [""] * count)
    filled = [v for v in labels if v]
    is_text = bool(filled) and not any(v.lower() in POSITIVE | NEGATIVE for v in filled)
    phrases = low.get("phrase", low.get("class", [""] * count))
    if is_text:
        if any(phrases):
            raise RequestError(
                f"{source}: label: found {filled[0]!r}; valid: 1 (in the object) or 0 (beside it)"
            )
        remarks.append("column 'label' holds no 1 or 0: it is taken as the phrase")
        labels, phrases = [""] * count, labels
    positive = tuple(_positive(v, row, source) for row, v in enumerate(labels, 1))
    _one_phrase(objects, phrases, source)
    return Attributes(objects, positive, tuple(phrases), tuple(remarks))


def _text(value: object) -> str:
    """A cell as text; whole numbers that a reader made float are whole again."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _are_ids(values: Sequence[str] | None) -> bool:
    return (
        values is not None
        and all(v.isdecimal() and len(v) <= DIGITS and int(v) > 0 for v in values)
        and len(set(values)) == len(values)
    )


def _objects(values: Sequence[str], source: str) -> tuple[int, ...]:
    for row, value in enumerate(values, 1):
        if value and not (value.isdecimal() and len(value) <= DIGITS and int(value) > 0):
            raise RequestError(
                f"{source}: object: found {value!r} in number {row}; valid: whole numbers from 1"
            )
    free = max((int(v) for v in values if v), default=0)
    result = []
    for value in values:
        free += not value
        result.append(int(value) if value else free)
    return tuple(result)


def _positive(value: str, row: int, source: str) -> bool:
    if value and value.lower() not in POSITIVE | NEGATIVE:
        raise RequestError(
            f"{source}: label: found {value!r} in number {row}; valid: 1 (in the object) or 0 (beside it)"
        )
    return value.lower() not in NEGATIVE


def _one_phrase(objects: Sequence[int], phrases: Sequence[str], source: str) -> None:
    known: dict[int, str] = {}
    for number, phrase in zip(objects, phrases, strict=True):
        if phrase and known.setdefault(number, phrase) != phrase:
            raise RequestError(
                f"{source}: object {number} has the phrases {known[number]!r} and {phrase!r}; "
                "valid: one phrase an object"
            )


@dataclass
class Collector:
    """Gathers the rows of one file over one scene."""

    source: str
    geometry: Geometry
    attributes: Attributes
    outlines: bool
    """Whether polygons are also kept as outlines."""
    _points: list[tuple[int, Sequence[float], bool]] = field(default_factory=list)
    _point_rows: list[int] = field(default_factory=list)
    _boxes: list[tuple[int, Sequence[float], Sequence[float]]] = field(default_factory=list)
    _outlines: list[tuple[int, shapely.Geometry]] = field(default_factory=list)
    _rows: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Rows by the field of the account that counts them."""

    def add_empty(self, row: int) -> None:
        """A row without coordinates (rows are counted from 0 here)."""
        self._rows["empty"].append(row)

    def add_points(self, row: int, positions: np.ndarray) -> None:
        """Positions (n, axes) of one row, all of its object and label."""
        here = inside(positions, self.geometry.shape)
        if not self._is_used(row, bool(here.any()), not here.all()):
            return
        number, positive = self.attributes.objects[row], self.attributes.positive[row]
        self._points += [(number, position, positive) for position in positions[here].tolist()]
        self._point_rows += [row] * int(here.sum())

    def add_box(self, row: int, start: np.ndarray, stop: np.ndarray) -> None:
        """A box of positions, cut at the scene's edge; an axis of no length names a slice."""
        self._must_be_positive(row)
        end = np.array(self.geometry.shape) - 0.5
        low, high = np.maximum(start, -0.5), np.minimum(stop, end)
        beyond = np.where(start == stop, (start < -0.5) | (start >= end), low >= high)
        there = not beyond.any() and bool(np.isfinite([start, stop]).all())
        if self._is_used(row, there, bool((low > start).any() or (high < stop).any())):
            self._boxes.append((self.attributes.objects[row], low, high))

    def add_polygon(self, row: int, polygon: ClippedPolygon) -> None:
        """A polygon as a box and, where wanted, as an outline."""
        self._must_be_positive(row)
        if not self._is_used(row, not polygon.polygon.is_empty, polygon.cut):
            return
        self._boxes.append((self.attributes.objects[row], *polygon.corners))
        if self.outlines:
            self._outlines.append((self.attributes.objects[row], polygon.polygon))

    def _is_used(self, row: int, there: bool, cut: bool) -> bool:
        """Count a row as used, if something of it is ``there``, and perhaps cut; else as outside."""
        self._rows["used" if there else "outside"].append(row)
        if there and cut:
            self._rows["cut"].append(row)
        return there

    def _must_be_positive(self, row: int) -> None:
        if not self.attributes.positive[row]:
            raise RequestError(
                f"{self.source}: label: found 0 for number {row + 1}, a box or polygon; "
                "valid: only points are negative"
            )

    def result(self) -> tuple[PromptSet, FileAccount]:
        """The prompts and the account.

        Raises:
            RequestError: an object of a raster has two boxes.
        """
        axes = len(self.geometry.shape)
        boxes = make_boxes(self._boxes, axes)
        check_one_box(boxes, self.source)
        phrases = {o: p for o, p in zip(self.attributes.objects, self.attributes.phrases, strict=True) if p}
        points = make_points(self._points, axes)
        prompts, lost = make_prompts(points, boxes, make_outlines(self._outlines), phrases)
        negative = {row for row in self._point_rows if self.attributes.objects[row] in lost}
        counted = {name: _numbers(set(rows) - negative) for name, rows in self._rows.items()}
        account = FileAccount(
            source=self.source, given=len(self.attributes.objects), negative=_numbers(negative),
            remarks=self.attributes.remarks, **counted,
        )  # fmt: skip
        return prompts, account


def _numbers(rows: set[int]) -> tuple[int, ...]:
    return tuple(row + 1 for row in sorted(rows))
