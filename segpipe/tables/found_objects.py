"""The tables of a model's objects: a row an object, how many where, and panoptic quality."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from segpipe.geometry.geometry import Geometry
from segpipe.metrics.tally import SizeScale
from segpipe.objects.average_precision import average_precision, detections
from segpipe.objects.matching import ABOVE_HALF, ObjectCounts, match
from segpipe.objects.overlap_table import Minimum, Objects, Overlaps, OverlapTable, overlaps
from segpipe.objects.panoptic import Quality, panoptic_counts, panoptic_quality
from segpipe.objects.region_members import Members
from segpipe.objects.table import ObjectTable
from segpipe.sources.labels import IdRule
from segpipe.tables.frames import FAILED, MEASURED, SIZE_COLUMNS, ClassLike

if TYPE_CHECKING:
    from segpipe.pipeline.measure import Measured

EDGES = ("z", "y", "x")


@dataclass(frozen=True)
class SceneFound:
    """What measuring left of one scene's objects."""

    scene: str
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
    def of(cls, scene: str, measured: Measured, values: Mapping[int, int | None] | None = None) -> SceneFound:
        """Of a scene's numbers."""
        scale = SizeScale.from_dict(measured.scale)
        return cls(
            scene, measured.found, measured.members, measured.regions, scale, measured.geometry,
            measured.objects, measured.rule, values or {}, facts=measured.facts,
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


def found_table(
    scenes: Sequence[SceneFound], classes: Sequence[ClassLike], smallest: int, stuff: Collection[int] = ()
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
    scene: SceneFound, classes: Sequence[ClassLike], smallest: int, stuff: Collection[int]
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
        pairs = match(matched, ABOVE_HALF)
        place = matched.predicted.objects.ids[matched.first[pairs]] - 1
        partner, iou = np.full(count, -1), np.full(count, np.nan)
        partner[place] = matched.reference.objects.ids[matched.second[pairs]]
        iou[place] = matched.iou[pairs]
        frame["partner"] = pd.Series(partner, dtype="Int64").mask(partner < 0)
        frame["iou"] = iou
    return frame if scene.facts is None else frame.merge(scene.facts, on="id", how="left", validate="1:1")


def _homes(scene: SceneFound, classes: np.ndarray, stuff: Collection[int]) -> list[str]:
    if scene.members is None:
        return [""] * len(classes)
    homes = np.where(np.isin(classes, [*stuff]), -1, scene.members.homes(len(classes)))
    return [scene.regions[home] if home > 0 else "" for home in homes.tolist()]


def with_counts(regions: pd.DataFrame, scenes: Sequence[SceneFound], things: Collection[int]) -> pd.DataFrame:
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


def scene_overlaps(scene: SceneFound, stuff: Sequence[int], smallest: int) -> Overlaps:
    """The scene's objects and the reference's, with their classes."""
    assert scene.table is not None and scene.overlaps is not None and scene.scale is not None
    objects = scene.table.objects
    predicted = Objects.of(objects.ids, objects.classes, objects.scores)
    reference = Objects.of(*scene.true_classes)
    return overlaps(
        scene.overlaps, predicted, reference, scene.scale, stuff=stuff, minimum=Minimum(elements=smallest)
    )


def panoptic_table(
    scenes: Sequence[SceneFound], classes: Sequence[ClassLike], stuff: Sequence[int], smallest: int
) -> pd.DataFrame:
    """Panoptic quality by scene and class, and its means over classes (``class`` all, things, stuff).

    ``tp``, ``fp``, ``fn`` are objects matched at an IoU of more than 0.5; ``pq`` = ``sq`` · ``rq`` (Kirillov
    et al. 2019). ``ap`` is COCO's average precision of the class, ranked by the objects' scores.
    """
    columns = (
        "scene",
        "class",
        "tp",
        "fp",
        "fn",
        "pq",
        "sq",
        "rq",
        "ap",
        "ap50",
        "smallest",
        "state",
        "reason",
    )
    rows: list[dict[str, Any]] = []
    listed = [c for c in classes if not c.background]
    for scene in scenes:
        head = {"scene": scene.scene, "smallest": smallest}
        if scene.table is None or scene.overlaps is None:
            rows.append({**head, "class": "all", "state": FAILED, "reason": scene.reason})
            continue
        matched = scene_overlaps(scene, stuff, smallest)
        things = [c.value for c in listed if c.value not in stuff]
        found = panoptic_quality([panoptic_counts(matched)], things, list(stuff))
        precision = average_precision([detections(matched)])
        groups = {"all": found.all, "things": found.things, "stuff": found.stuff}
        for name, quality in groups.items() if stuff else [("all", found.all)]:
            rows.append({**head, "class": name, **_quality(quality)})
        for c in listed:
            row = {
                **head,
                "class": c.name,
                **_quality(found.by_class[c.value]),
                **_counts(found.counts[c.value]),
            }
            ap = precision.get(c.value)
            rows.append(row if ap is None or c.value in stuff else {**row, "ap": ap.ap, "ap50": ap.ap50})
    table = pd.DataFrame(rows, columns=list(columns))
    table["reason"] = table["reason"].fillna("")
    whole = dict.fromkeys(("tp", "fp", "fn", "smallest"), "Int64")
    floats = dict.fromkeys(("pq", "sq", "rq", "ap", "ap50"), "float64")
    text = dict.fromkeys(("scene", "class", "state", "reason"), "str")
    return table.astype({**whole, **floats, **text})


def _quality(quality: Quality) -> Mapping[str, Any]:
    return {
        "pq": quality.pq, "sq": quality.sq, "rq": quality.rq, "state": MEASURED, "reason": quality.reason,
    }  # fmt: skip


def _counts(counts: ObjectCounts) -> Mapping[str, Any]:
    return {"tp": counts.tp, "fp": counts.fp, "fn": counts.fn}
