"""Tables of objects: a row an object, counts by region, panoptic quality, and matches by IoU threshold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from segpipe.geometry.geometry import Geometry
from segpipe.metrics.tally import SizeScale
from segpipe.objects import matching
from segpipe.objects.average_precision import average_precision, detections
from segpipe.objects.overlap_table import Minimum, Objects, Overlaps, OverlapTable, overlaps
from segpipe.objects.table import Members, ObjectTable
from segpipe.sources.labels import OBJECT, IdRule
from segpipe.tables.frames import (
    FAILED,
    MEASURED,
    SIZE_COLUMNS,
    ClassLike,
    SceneValue,
    column_types,
    table_of_rows,
)

if TYPE_CHECKING:
    from segpipe.pipeline.measure import Measured

EDGES = ("z", "y", "x")
THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""Of IoU: COCO's 0.50, 0.55 … 0.95."""
GivenObjects = SceneValue[tuple[OverlapTable, SizeScale]]
"""Objects of a scene whose labels are given as ids, and of its reference."""


@dataclass(frozen=True)
class SceneDetections:
    """What measuring left of one scene's objects."""

    scene: str
    _: KW_ONLY
    table: ObjectTable | None = None
    """None: the scene failed."""
    members: Members | None = None
    regions: tuple[str, ...] = ()
    scale: SizeScale | None = None
    geometry: Geometry | None = None
    overlaps: OverlapTable | None = None
    """With the reference's objects; None: there are none."""
    rule: IdRule | None = None
    """Of the reference."""
    values: Mapping[int, int | None] = field(default_factory=dict)
    """What the job calls the reference's classes (`Reference.values`)."""
    reason: str = ""
    """Why it failed."""
    facts: pd.DataFrame | None = None
    """Further columns, by ``id``; None: there are none."""

    @classmethod
    def of(
        cls, scene: str, measured: Measured, values: Mapping[int, int | None] | None = None
    ) -> SceneDetections:
        """Of a scene's numbers."""
        scale = SizeScale.from_dict(measured.scale)
        return cls(
            scene, table=measured.found, members=measured.members, regions=measured.regions, scale=scale,
            geometry=measured.geometry, overlaps=measured.objects, rule=measured.rule, values=values or {},
            facts=measured.facts,
        )  # fmt: skip

    @property
    def true_classes(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the reference's objects, ascending, and the class of each; int64."""
        assert self.overlaps is not None and self.rule is not None
        true = np.unique(self.overlaps.reference[self.overlaps.reference > 0])
        divisor = self.rule.divisor
        if not divisor:
            return true, np.full(len(true), self.rule.value)
        given = true // divisor
        classes = given.copy()
        for before, after in self.values.items():
            if after is not None:  # elements of a class without a value are not compared: they have no id
                classes[given == before] = after
        return true, classes


def detections_table(
    scenes: Sequence[SceneDetections],
    classes: Sequence[ClassLike],
    smallest: int,
    stuff: Collection[int] = (),
) -> pd.DataFrame:
    """A row an object that the model found.

    Columns: ``scene``, ``id`` in the file of instances, ``class``, ``value``, ``score`` (empty where the
    model gives none), ``count`` of elements, its size, ``touches_edge``, ``region`` with most of it (empty:
    none but the scene, and for ``stuff``, whose one segment is at home nowhere), the centroid in world
    coordinates and the bounding box in elements (first and one past the last); with a reference the
    ``partner``'s id and the ``iou`` of a match above 0.5.
    """
    parts = [_objects(s, classes, smallest, stuff) for s in scenes if s.table is not None]
    if not parts:
        return pd.DataFrame(
            columns=["scene", "id", "class", "value", "score", "count", "touches_edge", "region"]
        )
    return pd.concat(parts, ignore_index=True)


def _objects(
    scene: SceneDetections, classes: Sequence[ClassLike], smallest: int, stuff: Collection[int]
) -> pd.DataFrame:
    assert scene.table is not None and scene.scale is not None
    objects, names = scene.table.objects, {c.value: c.name for c in classes}
    count = len(objects)
    frame = pd.DataFrame(
        {
            "scene": pd.Series([scene.scene] * count, dtype="str"),
            "id": objects.ids,
            "class": pd.Series([names.get(v, str(v)) for v in objects.classes.tolist()], dtype="str"),
            "value": objects.classes,
            "score": objects.scores,
            "count": objects.elements,
            SIZE_COLUMNS[scene.scale.unit]: [scene.scale.size(n) for n in scene.table.size.tolist()],
            "touches_edge": objects.touches_edge,
            "region": pd.Series(_homes(scene, objects.classes, stuff), dtype="str"),
        }
    )
    if scene.geometry is not None:
        world = scene.geometry.to_world(scene.table.centroids)
        for axis, name in enumerate(("x", "y", "z")[: world.shape[1]]):
            frame[f"centre_{name}"] = world[:, axis]
    for axis, name in enumerate(EDGES[-objects.start.shape[1] :]):
        frame[f"first_{name}"], frame[f"end_{name}"] = objects.start[:, axis], objects.stop[:, axis]
    if scene.overlaps is not None:
        matched = scene_overlaps(scene, (), smallest)
        pairs = matching.match(matched, matching.ABOVE_HALF)
        place = matched.predicted.objects.ids[matched.first[pairs]] - 1
        _add_partners(frame, place, matched.reference.objects.ids[matched.second[pairs]], matched.iou[pairs])
    return frame if scene.facts is None else frame.merge(scene.facts, on="id", how="left", validate="1:1")


def _homes(scene: SceneDetections, classes: np.ndarray, stuff: Collection[int]) -> list[str]:
    if scene.members is None:
        return [""] * len(classes)
    homes = np.where(np.isin(classes, [*stuff]), -1, scene.members.homes(len(classes)))
    return [scene.regions[home] if home > 0 else "" for home in homes.tolist()]


def with_counts(
    regions: pd.DataFrame, scenes: Sequence[SceneDetections], things: Collection[int]
) -> pd.DataFrame:
    """The region table with ``objects``: how many objects of a class have most of themselves in a region.

    In the whole scene all are counted. Empty where nothing was measured, and for values that are no
    ``things``: background and stuff are not counted.
    """
    known: dict[tuple[str, str, int], int] = {}
    for scene in scenes:
        if scene.table is None or scene.members is None:
            continue
        classes = scene.table.objects.classes
        homes = scene.members.homes(len(classes))
        for index, name in enumerate(scene.regions):
            here = classes if index == 0 else classes[homes == index]
            values, counts = np.unique(here, return_counts=True)
            known |= {(scene.scene, name, int(v)): int(n) for v, n in zip(values, counts, strict=True)}
    keys = zip(regions["scene"], regions["region"], regions["value"], strict=True)
    numbers = [known.get((s, r, -1 if pd.isna(v) else int(v)), 0) for s, r, v in keys]
    counted = (regions["state"] == MEASURED) & regions["value"].isin([*things])
    objects = pd.Series(numbers, index=regions.index, dtype="Int64").where(counted)
    found = regions.copy()
    found.insert(list(found.columns).index("count") + 1, "objects", objects)
    return found


def scene_overlaps(scene: SceneDetections, stuff: Sequence[int], smallest: int) -> Overlaps:
    """The scene's objects and the reference's, with their classes."""
    assert scene.table is not None and scene.overlaps is not None and scene.scale is not None
    objects = scene.table.objects
    predicted = Objects.of(objects.ids, objects.classes, objects.scores)
    reference = Objects.of(*scene.true_classes)
    return overlaps(
        scene.overlaps, predicted, reference, scene.scale, stuff=stuff, minimum=Minimum(elements=smallest)
    )


def panoptic_table(
    scenes: Sequence[SceneDetections], classes: Sequence[ClassLike], stuff: Sequence[int], smallest: int
) -> pd.DataFrame:
    """Return panoptic quality by scene and class, and its means over classes (``class`` all, things, stuff).

    ``tp``, ``fp``, ``fn`` are objects matched at an IoU of more than 0.5; ``pq`` = ``sq`` · ``rq`` (Kirillov
    et al. 2019). ``ap`` is COCO's average precision of the class, ranked by the objects' scores.
    """
    listed = [c for c in classes if not c.background]
    rows = (row for scene in scenes for row in _panoptic_rows(scene, listed, stuff, smallest))
    return table_of_rows(rows, column_types("panoptic"))


def _panoptic_rows(
    scene: SceneDetections, classes: Sequence[ClassLike], stuff: Sequence[int], smallest: int
) -> Iterator[dict[str, Any]]:
    head = {"scene": scene.scene, "smallest": smallest}
    if scene.table is None or scene.overlaps is None:
        yield {**head, "class": "all", "state": FAILED, "reason": scene.reason}
        return
    matched = scene_overlaps(scene, stuff, smallest)
    things = [c.value for c in classes if c.value not in stuff]
    quality = matching.panoptic_quality([matching.panoptic_counts(matched)], things, list(stuff))
    precision = average_precision([detections(matched)])
    groups = {"all": quality.all, "things": quality.things, "stuff": quality.stuff}
    for name, mean in groups.items() if stuff else [("all", quality.all)]:
        yield {**head, "class": name, "state": MEASURED, **_quality(mean)}
    for c in classes:
        counts, ap = quality.counts[c.value], precision.get(c.value)
        row = {**head, "class": c.name, "state": MEASURED, **_quality(quality.by_class[c.value])}
        row |= {"tp": counts.tp, "fp": counts.fp, "fn": counts.fn}
        yield row if ap is None or c.value in stuff else {**row, "ap": ap.ap, "ap50": ap.ap50}


def _quality(quality: matching.Quality) -> dict[str, Any]:
    return {"pq": quality.pq, "sq": quality.sq, "rq": quality.rq, "reason": quality.reason}


# ------------------------------------------------------------------ labels that are given as ids


def _given_overlaps(table: OverlapTable, scale: SizeScale, smallest: int) -> Overlaps:
    """The objects of at least so many elements, all of one class and without scores."""
    sides = [np.unique(column[column > 0]) for column in (table.predicted, table.reference)]
    one, two = (Objects.of(ids, np.full(len(ids), OBJECT)) for ids in sides)
    return overlaps(table, one, two, scale, minimum=Minimum(elements=smallest))


def objects_table(results: Iterable[GivenObjects], smallest: int) -> pd.DataFrame:
    """Matched objects by scene and IoU threshold, and a row over all thresholds (``threshold`` empty).

    ``tp``, ``fp``, ``fn`` are objects; ``mean_iou`` is of the matched ones. The row over all thresholds
    has COCO's average precision ``ap`` (0.50:0.95), ``ap50`` and ``ap75`` (objects have no scores here,
    so it is of one operating point) and panoptic quality ``pq`` = ``sq`` · ``rq`` (Kirillov et al. 2019).
    Objects under ``smallest`` elements are left out on both sides.
    """
    rows = (row for result in results for row in _match_rows(result, smallest))
    return table_of_rows(rows, column_types("objects"))


def _match_rows(result: GivenObjects, smallest: int) -> Iterator[dict[str, Any]]:
    head: dict[str, Any] = {"scene": result.scene, "smallest": smallest}
    if result.value is None:
        yield {**head, "state": result.state, "reason": result.reason}
        return
    head["state"] = MEASURED
    scene = _given_overlaps(*result.value, smallest)
    quality = matching.panoptic_quality([matching.panoptic_counts(scene)], [OBJECT], []).all
    found = average_precision([detections(scene)]).get(OBJECT)
    row = {**head, **_quality(quality)}
    yield row if found is None else {**row, "ap": found.ap, "ap50": found.ap50, "ap75": found.ap75}
    for threshold in THRESHOLDS:
        for c in matching.object_counts(scene, threshold).values():
            row = {**head, "threshold": threshold, "tp": c.tp, "fp": c.fp, "fn": c.fn, "reason": c.reason}
            ratios = {"precision": c.precision, "recall": c.recall, "f1": c.f1, "mean_iou": c.mean_iou}
            yield row | ratios


def instances_table(results: Iterable[GivenObjects], smallest: int) -> pd.DataFrame:
    """A row an object: whose it is, its id, its size, and its partner at an IoU of more than 0.5.

    ``partner`` and ``iou`` are empty where there is none; ``count`` is of the elements compared.
    """
    parts = [_instances(r.scene, _given_overlaps(*r.value, smallest)) for r in results if r.value]
    known = column_types("instances")
    types = {name: known[name] for name in ("scene", "side", "id", "count", "partner", "iou")}
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(types))
    return table[list(types)].astype(types)


def _instances(name: str, scene: Overlaps) -> pd.DataFrame:
    pairs = matching.match(scene, matching.ABOVE_HALF)
    frames = []
    for side, own, whose, other, its in (
        (scene.predicted, scene.first, "predicted", scene.reference, scene.second),
        (scene.reference, scene.second, "reference", scene.predicted, scene.first),
    ):
        frame = pd.DataFrame({"id": side.objects.ids, "count": side.area})
        _add_partners(frame, own[pairs], other.objects.ids[its[pairs]], scene.iou[pairs])
        frames.append(frame.assign(scene=name, side=whose))
    return pd.concat(frames, ignore_index=True)


def _add_partners(frame: pd.DataFrame, place: np.ndarray, partners: np.ndarray, ious: np.ndarray) -> None:
    """Add the columns ``partner`` and ``iou`` to the rows at these places; both are empty elsewhere."""
    partner, iou = np.full(len(frame), -1), np.full(len(frame), np.nan)
    partner[place], iou[place] = partners, ious
    frame["partner"] = pd.Series(partner, dtype="Int64").mask(partner < 0)
    frame["iou"] = iou
