"""The tables of objects: how many were found at which overlap, and which is which, as data frames."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pandas as pd

from segpipe.metrics.tally import SizeScale
from segpipe.objects.average_precision import average_precision, detections
from segpipe.objects.matching import ABOVE_HALF, match, object_counts
from segpipe.objects.overlap_table import Minimum, Objects, Overlaps, OverlapTable, overlaps
from segpipe.objects.panoptic import panoptic_counts, panoptic_quality
from segpipe.sources.labels import OBJECT
from segpipe.tables.frames import MEASURED, Found

THRESHOLDS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
"""Of IoU: COCO's 0.50, 0.55 … 0.95."""


SceneObjects = Found[tuple[OverlapTable, SizeScale]]


def scene_overlaps(table: OverlapTable, scale: SizeScale, smallest: int) -> Overlaps:
    """The objects of at least so many elements, all of one class and without scores."""
    sides = [np.unique(column[column > 0]) for column in (table.predicted, table.reference)]
    one, two = (Objects.of(ids, np.full(len(ids), OBJECT)) for ids in sides)
    return overlaps(table, one, two, scale, minimum=Minimum(elements=smallest))


def objects_table(results: Iterable[SceneObjects], smallest: int) -> pd.DataFrame:
    """Matched objects by scene and IoU threshold, and a row over all thresholds (``threshold`` empty).

    ``tp``, ``fp``, ``fn`` are objects; ``mean_iou`` is of the matched ones. The row over all thresholds
    has COCO's average precision ``ap`` (0.50:0.95), ``ap50`` and ``ap75`` (objects have no scores here,
    so it is of one operating point) and panoptic quality ``pq`` = ``sq`` · ``rq`` (Kirillov et al. 2019).
    Objects under ``smallest`` elements are left out on both sides.
    """
    counts = ("tp", "fp", "fn")
    numbers = ("precision", "recall", "f1", "mean_iou", "ap", "ap50", "ap75", "pq", "sq", "rq")
    order = ["scene", "threshold", *counts, *numbers, "smallest", "state", "reason"]
    rows = [row for result in results for row in _rows(result, smallest)]
    table = pd.DataFrame(rows, columns=order)
    table["reason"] = table["reason"].fillna("")
    whole = dict.fromkeys((*counts, "smallest"), "Int64")
    floats = dict.fromkeys(("threshold", *numbers), "float64")
    return table.astype({"scene": "str", **whole, **floats, "state": "str", "reason": "str"})


def _rows(result: SceneObjects, smallest: int) -> Iterator[dict[str, Any]]:
    head: dict[str, Any] = {"scene": result.scene, "smallest": smallest}
    if result.value is None:
        yield {**head, "state": result.state, "reason": result.reason}
        return
    head["state"] = MEASURED
    scene = scene_overlaps(*result.value, smallest)
    quality = panoptic_quality([panoptic_counts(scene)], [OBJECT], []).all
    found = average_precision([detections(scene)]).get(OBJECT)
    row = {**head, "pq": quality.pq, "sq": quality.sq, "rq": quality.rq, "reason": quality.reason}
    yield row if found is None else {**row, "ap": found.ap, "ap50": found.ap50, "ap75": found.ap75}
    for threshold in THRESHOLDS:
        for c in object_counts(scene, threshold).values():
            row = {**head, "threshold": threshold, "tp": c.tp, "fp": c.fp, "fn": c.fn, "reason": c.reason}
            ratios = {"precision": c.precision, "recall": c.recall, "f1": c.f1, "mean_iou": c.mean_iou}
            yield row | ratios


def instances_table(results: Iterable[SceneObjects], smallest: int) -> pd.DataFrame:
    """A row an object: whose it is, its id, its size, and its partner at an IoU of more than 0.5.

    ``partner`` and ``iou`` are empty where there is none; ``count`` is of the elements compared.
    """
    parts = [_instances(r.scene, scene_overlaps(*r.value, smallest)) for r in results if r.value]
    types = {"scene": "str", "side": "str", "id": "Int64", "count": "Int64", "partner": "Int64"}
    empty = pd.DataFrame(columns=[*types, "iou"])
    table = pd.concat(parts, ignore_index=True) if parts else empty
    return table[list(empty.columns)].astype({**types, "iou": "float64"})


def _instances(name: str, scene: Overlaps) -> pd.DataFrame:
    pairs = match(scene, ABOVE_HALF)
    frames = []
    for side, own, whose, other, its in (
        (scene.predicted, scene.first, "predicted", scene.reference, scene.second),
        (scene.reference, scene.second, "reference", scene.predicted, scene.first),
    ):
        frame = pd.DataFrame({"id": side.objects.ids, "count": side.area})
        partner, iou = np.full(len(frame), -1), np.full(len(frame), np.nan)
        partner[own[pairs]], iou[own[pairs]] = other.objects.ids[its[pairs]], scene.iou[pairs]
        frame["partner"] = pd.Series(partner, dtype="Int64").mask(partner < 0)
        frame["iou"] = iou
        frames.append(frame.assign(scene=name, side=whose))
    return pd.concat(frames, ignore_index=True)
