"""A run's tables, from what measuring left of each scene."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import pandas as pd

from segpipe.errors import RequestError
from segpipe.metrics.tally import SizeScale, Tally
from segpipe.objects.overlap_table import OverlapTable
from segpipe.pipeline.measure import Measured, load_measured
from segpipe.store.stage import Stage
from segpipe.tables.agreement import agreement_table
from segpipe.tables.found_objects import SceneFound, found_table, panoptic_table, with_counts
from segpipe.tables.frames import NO_REFERENCE, Found
from segpipe.tables.intensity import SceneIntensity, intensity_table
from segpipe.tables.matched_objects import instances_table, objects_table
from segpipe.tables.overlap_tables import SceneResult, confusion_table, metric_table, region_table
from segpipe.tables.phrases import asked_table
from segpipe.tables.record import RunRecord, SceneRecord
from segpipe.tables.summary import summary_table
from segpipe.tables.surface import surface_table
from segpipe.tables.uncertainty import calibration_table, uncertainty_table

T = TypeVar("T")


def read_measured(out: str, scenes: Sequence[SceneRecord]) -> dict[str, Measured]:
    """What measuring left of every scene that is done, by its name.

    Raises:
        RequestError: a scene's tallies are gone from the store.
    """
    return {scene.name: _measured(out, scene) for scene in scenes if scene.state == "done"}


def run_tables(record: RunRecord, measured: Mapping[str, Measured]) -> dict[str, pd.DataFrame]:
    """Every table that the job asked for, by its file's name."""
    classes, job, scenes = record.legend, record.job, record.scenes
    measure = job.get("measure", {})
    results = [_result(scene, measured.get(scene.name)) for scene in scenes]
    tables = {"regions": region_table(results, classes)}
    if job.get("reference"):
        metrics = tables["metrics"] = metric_table(results, classes)
        blocks: list[Tally] = []
        if len(scenes) == 1 and measured:
            receipts = next(iter(measured.values())).stage.receipts()
            blocks = [Tally.from_json(receipt) for _, receipt in sorted(receipts.items())]
        tables["summary"] = summary_table(metrics, classes, groups=record.groups or None, blocks=blocks)
        tables["agreement"] = agreement_table(metrics)
        tables["confusion"] = confusion_table(results, classes)
    if measure.get("intensity"):
        tables["intensity"] = intensity_table([_intensity(s, measured.get(s.name)) for s in scenes], classes)
    if measure.get("surface"):
        tables["surface"] = surface_table(_found(scenes, measured, lambda m: m.surfaces), classes)
    tables |= _of_objects(record, measured, tables["regions"])
    if record.prompted:
        tables["asked"] = asked_table(record, tables["regions"], tables.get("instances"))
    if job.get("outputs", {}).get("uncertainty"):
        found = [_uncertainty(s, measured.get(s.name)) for s in scenes]
        tables["uncertainty"] = uncertainty_table(found, classes)
        if job.get("reference"):
            tables["calibration"] = calibration_table(_found(scenes, measured, lambda m: m.calibration))
    return tables


def _of_objects(
    record: RunRecord, measured: Mapping[str, Measured], regions: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """The tables of objects: those a model found, with their numbers in the regions, or those given."""
    classes, measure = record.legend, record.job.get("measure", {})
    found = [_found_objects(scene, measured.get(scene.name), record.job) for scene in record.scenes]
    if any(scene.table is not None for scene in found):
        smallest = measure["smallest"]
        things = [c.value for c in classes if not (c.background or c.stuff)]
        stuff = [c.value for c in classes if c.stuff]
        tables = {
            "regions": with_counts(regions, found, things),
            "instances": found_table(found, classes, smallest, stuff),
        }
        if any(scene.overlaps is not None for scene in found):
            tables["panoptic"] = panoptic_table(found, classes, stuff, smallest)
        return tables
    if not measure.get("objects"):
        return {}
    given = _found(record.scenes, measured, _objects)
    smallest = measure["smallest"]
    return {"objects": objects_table(given, smallest), "instances": instances_table(given, smallest)}


def _measured(out: str, scene: SceneRecord) -> Measured:
    stage = Stage(out, scene.keys["measure"])
    if stage.read_json("info.json") is None:
        raise RequestError(
            f"scene {scene.name}: its tallies ({stage.key}) are gone from the store; run the job again"
        )
    return load_measured(stage)


def _result(scene: SceneRecord, measured: Measured | None) -> SceneResult:
    if measured is None:
        return SceneResult(scene.name, (), scene.attempts, reason=scene.error)
    scale = SizeScale.from_dict(measured.scale)
    return SceneResult(scene.name, measured.regions, scene.attempts, measured.tally, scale, measured.outside)


def _intensity(scene: SceneRecord, measured: Measured | None) -> SceneIntensity:
    if measured is None:
        return SceneIntensity(scene.name, reason=scene.error)
    return SceneIntensity(scene.name, measured.regions, measured.channels, measured.intensity)


def _uncertainty(scene: SceneRecord, measured: Measured | None) -> SceneIntensity:
    if measured is None:
        return SceneIntensity(scene.name, reason=scene.error)
    return SceneIntensity(scene.name, measured.regions, measured.doubts, measured.uncertainty)


def _found_objects(scene: SceneRecord, measured: Measured | None, job: Mapping[str, Any]) -> SceneFound:
    if measured is None:
        return SceneFound(scene.name, reason=scene.error)
    values = (job.get("reference") or {}).get("values", {})
    return SceneFound.of(scene.name, measured, {int(k): v for k, v in values.items()})


def _objects(measured: Measured) -> tuple[OverlapTable, SizeScale] | None:
    return None if measured.objects is None else (measured.objects, SizeScale.from_dict(measured.scale))


def _found(
    scenes: Sequence[SceneRecord], measured: Mapping[str, Measured], pick: Callable[[Measured], T | None]
) -> list[Found[T]]:
    """One thing of every scene's measurements."""
    parts = []
    for scene in scenes:
        if scene.name not in measured:
            parts.append(Found[T](scene.name, None, scene.error, failed=True))
            continue
        value = pick(measured[scene.name])
        parts.append(Found(scene.name, value, NO_REFERENCE if value is None else ""))
    return parts
