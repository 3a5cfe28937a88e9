"""The additive table of one scene's objects, and the pairs of objects that follow from it.

Objects are given as arrays of ids, tile by tile, in 2D or 3D: 0 is no object, and a negative id
(`VOID`) says that the element is left out: in the prediction because it has no valid pixel, in the
reference because it says nothing there. Such elements count in no intersection, union or area that
is compared; they are kept apart, because an object that lies mostly in them cannot be judged.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.metrics.tally import MOST_ELEMENTS, SizeScale, SumTable, compact

VOID = -1
"""Id of an element that is left out."""


@dataclass(frozen=True, eq=False)
class OverlapTable(SumTable):
    """Elements by (predicted id, reference id), at least one an object: sorted, none twice.

    The area of an object is the sum of its rows.
    """

    KEYS: ClassVar[int] = 2
    predicted: np.ndarray
    """Predicted id, 0 for no object or `VOID`; int64 as all columns."""
    reference: np.ndarray
    """Reference id, 0 for no object or `VOID`."""
    count: np.ndarray
    """Elements."""
    size: np.ndarray
    """Area or volume, in 2**-bits of the scene's largest element (`SizeScale`)."""

    @classmethod
    def from_columns(cls, **columns: Any) -> Self:
        """Return a table of rows in any order, equal pairs added up, pairs without an object left out."""
        keep = (np.asarray(columns["predicted"]) > 0) | (np.asarray(columns["reference"]) > 0)
        return super().from_columns(**{name: np.asarray(column)[keep] for name, column in columns.items()})


add = OverlapTable.sum


def overlap_tile(predicted: np.ndarray, reference: np.ndarray, box: Box, scale: SizeScale) -> OverlapTable:
    """The table of one tile.

    Args:
        predicted: ids of the box's shape, (y, x) or (z, y, x); 0 no object, negative left out.
        reference: the same of the reference.
        box: the tile, on the scene's grid.
        scale: of the scene.

    Raises:
        SceneError: an id is above 2**63 - 1.
    """
    if predicted.shape != box.shape or reference.shape != box.shape:
        raise ValueError(f"predicted or reference ids of another shape than {box}")
    if box.size > MOST_ELEMENTS:
        raise ValueError(f"a tile of {box.size} elements; at most {MOST_ELEMENTS} can be summed")
    keep = (predicted > 0) | (reference > 0)
    first, code = compact(_signed(predicted[keep], "predicted"))
    second, other = compact(_signed(reference[keep], "reference"))
    pairs, code = compact(code * np.int64(max(1, len(second))) + other)
    rows = scale.rows[box.start[0] : box.stop[0]].reshape(-1, *[1] * (box.ndim - 1))
    sizes = np.broadcast_to(rows, box.shape)[keep]
    place = pairs // max(1, len(second)), pairs % max(1, len(second))
    return OverlapTable.from_columns(
        predicted=first[place[0]],
        reference=second[place[1]],
        count=np.bincount(code, minlength=len(pairs)),
        # float64 holds these sums exactly: at most 2**22 elements of at most 2**30
        size=np.rint(np.bincount(code, weights=sizes, minlength=len(pairs))).astype(np.int64),
    )


def _signed(ids: np.ndarray, side: str) -> np.ndarray:
    """Ids as int64, everything negative as `VOID`."""
    if ids.dtype == np.uint64 and ids.size and int(ids.max()) >> 63:
        raise SceneError(f"{side} object id {ids.max()}: ids are at most 2**63 - 1")
    return np.maximum(ids.astype(np.int64), VOID)


@dataclass(frozen=True, eq=False)
class Objects:
    """What is known of each id of a scene beyond its elements, by ascending id."""

    ids: np.ndarray
    """int64, above 0, none twice."""
    classes: np.ndarray
    """Class value of each, int64."""
    scores: np.ndarray
    """Confidence of each, float64; NaN where there is none."""

    @classmethod
    def of(cls, ids: Any, classes: Any, scores: Any = None) -> Objects:
        """Objects in any order; without ``scores`` none has one.

        Raises:
            SceneError: an id is not above 0 or occurs twice, or a score is infinite.
        """
        ids = np.asarray(ids, dtype=np.int64)
        classes = np.asarray(classes, dtype=np.int64)
        scores = np.full(ids.shape, np.nan) if scores is None else np.asarray(scores, dtype=np.float64)
        if not ids.shape == classes.shape == scores.shape or ids.ndim != 1:
            raise ValueError(f"{ids.shape} ids, {classes.shape} classes, {scores.shape} scores")
        order = np.argsort(ids)
        ids, classes, scores = ids[order], classes[order], scores[order]
        if len(ids) and ids[0] <= 0:
            raise SceneError(f"object id {ids[0]}: ids are above 0")
        if (np.diff(ids) == 0).any():
            raise SceneError(f"object id {ids[:-1][np.diff(ids) == 0][0]} occurs twice; ids are unique")
        if np.isinf(scores).any():
            raise SceneError(f"object {ids[np.isinf(scores)][0]} has an infinite score; it must be finite")
        return cls(ids, classes, scores)

    def take(self, ids: np.ndarray, side: str) -> Objects:
        """Those of these ascending ids.

        Raises:
            SceneError: one of them is not known.
        """
        missing = ids[~np.isin(ids, self.ids)]
        if len(missing):
            raise SceneError(f"{side} object {missing[0]} has elements, but no class")
        place = np.searchsorted(self.ids, ids)
        return Objects(ids, self.classes[place], self.scores[place])


@dataclass(frozen=True)
class Minimum:
    """How large an object must be, with all its elements, to be one."""

    elements: int = 0
    """Pixels or voxels."""
    size: float = 0.0
    """In the scene's unit (`SizeScale.unit`): m2, mm3 or px."""


@dataclass(frozen=True, eq=False)
class ObjectSide:
    """The objects of prediction or reference that take part, by ascending id."""

    objects: Objects
    area: np.ndarray
    """Elements of each that are compared, int64."""
    void: np.ndarray
    """Elements of each that are left out, because the other side is `VOID` there."""

    @property
    def mostly_void(self) -> np.ndarray:
        """Whether more than half of an object is left out: unmatched, it is no mistake."""
        return self.void > self.area


@dataclass(frozen=True, eq=False)
class Overlaps:
    """The objects of one scene, and every pair of one class that has elements in common."""

    predicted: ObjectSide
    reference: ObjectSide
    first: np.ndarray
    """Index of a pair's predicted object."""
    second: np.ndarray
    """Index of its reference object."""
    iou: np.ndarray
    """Intersection over union of the compared elements, float64, above 0."""

    @property
    def judged(self) -> np.ndarray:
        """How many of a pair's two objects would be a mistake if unmatched, int64."""
        one, two = self.predicted.mostly_void[self.first], self.reference.mostly_void[self.second]
        return np.asarray(2 - one.astype(np.int64) - two)

    @property
    def classes(self) -> list[int]:
        """Class values that either side has."""
        both = np.union1d(self.predicted.objects.classes, self.reference.objects.classes)
        return [int(value) for value in both]


def overlaps(
    table: OverlapTable,
    predicted: Objects,
    reference: Objects,
    scale: SizeScale,
    *,
    stuff: Collection[int] = (),
    minimum: Minimum | None = None,
) -> Overlaps:
    """What matching needs to know of a scene's finished table.

    Ids without any element are no objects. Objects below the minimum become no object on their own
    side, before anything is matched: a large prediction over a removed reference is a mistake.

    Args:
        table: of the whole scene (`add`), so that every object is whole.
        predicted: class and score of each predicted id.
        reference: class of each reference id.
        scale: of the scene.
        stuff: classes whose objects are one segment per scene (Kirillov et al. 2019), each side's.
        minimum: the smallest object, of the prediction and of the reference.

    Raises:
        SceneError: an id of the table has no class.
    """
    columns = {name: getattr(table, name) for name in OverlapTable.names()}
    for side, objects in (("predicted", predicted), ("reference", reference)):
        columns[side] = _one_segment(columns[side], objects, stuff, side)
        columns[side] = _large(columns, side, scale, minimum or Minimum())
    table = OverlapTable.from_columns(**columns)
    one = _side(predicted, table.predicted, table.reference, table.count, "predicted")
    two = _side(reference, table.reference, table.predicted, table.count, "reference")
    both = (table.predicted > 0) & (table.reference > 0)
    first = np.searchsorted(one.objects.ids, table.predicted[both])
    second = np.searchsorted(two.objects.ids, table.reference[both])
    common = table.count[both]
    union = one.area[first] + two.area[second] - common
    same = one.objects.classes[first] == two.objects.classes[second]
    return Overlaps(one, two, first[same], second[same], (common / union)[same])


def _one_segment(column: np.ndarray, objects: Objects, stuff: Collection[int], side: str) -> np.ndarray:
    """Ids of a column; those of a class of stuff become the smallest of them."""
    ids = np.unique(column[column > 0])
    found = objects.take(ids, side)
    new = ids.copy()
    for value in stuff:
        new[found.classes == value] = ids[found.classes == value].min(initial=np.iinfo(np.int64).max)
    return _renamed(column, ids, new)


def _large(columns: dict[str, np.ndarray], side: str, scale: SizeScale, minimum: Minimum) -> np.ndarray:
    """Ids of a side's column; those of objects below the minimum become 0."""
    column = columns[side]
    ids = np.unique(column[column > 0])
    count = _sums(column, columns["count"], ids)
    units = _sums(column, columns["size"], ids)
    size = np.array([scale.size(n) for n in units.tolist()])
    return _renamed(column, ids, np.where((count >= minimum.elements) & (size >= minimum.size), ids, 0))


def _side(objects: Objects, own: np.ndarray, other: np.ndarray, count: np.ndarray, side: str) -> ObjectSide:
    """The objects in a column, with their elements in and outside the other side's void."""
    ids = np.unique(own[own > 0])
    areas = (_sums(own[where], count[where], ids) for where in (other >= 0, other < 0))
    return ObjectSide(objects.take(ids, side), *areas)


def _renamed(column: np.ndarray, ids: np.ndarray, new: np.ndarray) -> np.ndarray:
    """A column whose ``ids`` (ascending, all above 0 that it has) are replaced by ``new``."""
    out = column.copy()
    out[column > 0] = new[np.searchsorted(ids, column[column > 0])]
    return out


def _sums(column: np.ndarray, values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Sum of values by id, int64: scenes are too large for float64 to count exactly."""
    sums = np.zeros(len(ids), dtype=np.int64)
    np.add.at(sums, np.searchsorted(ids, column[column > 0]), values[column > 0])
    return sums
