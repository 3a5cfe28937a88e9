"""A run's tables, that of its phrases among them, from what measuring left of each scene."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeVar

import pandas as pd

from segpipe.errors import RequestError
from segpipe.metrics.intensity import Channel, Intensity
from segpipe.metrics.tally import SizeScale, Tally
from segpipe.objects.overlap_table import OverlapTable
from segpipe.pipeline.measure import Measured, load_measured
from segpipe.regions.base import SCENE
from segpipe.store.stage import Stage
from segpipe.tables import object_tables, overlap_tables, scene_tables, units
from segpipe.tables.frames import FAILED, NO_REFERENCE, SIZE_COLUMNS, SceneValue, column_types, table_of_rows
from segpipe.tables.record import AskedPhrase, RunRecord, SceneRecord
from segpipe.tables.summary import summary_table

T = TypeVar("T")


def read_measured(out: str, scenes: Sequence[SceneRecord]) -> dict[str, Measured]:
    """Return the measurements of every scene whose map is written, by its name.

    Raises:
        RequestError: a scene's tallies are gone from the store.
    """
    found = {}
    for scene in (s for s in scenes if s.mapped):
        stage = Stage(out, scene.keys["measure"])
        if stage.read_json("info.json") is None:
            raise RequestError(
                f"scene {scene.name}: its tallies ({stage.key}) are gone from the store; run the job again"
            )
        found[scene.name] = load_measured(stage)
    return found


def run_tables(record: RunRecord, measured: Mapping[str, Measured]) -> dict[str, pd.DataFrame]:
    """Return every table that the job asked for, by its file's name."""
    classes, job, scenes = record.legend, record.job, record.scenes
    measure = job.get("measure", {})
    results = [part for s in scenes for part in _tallies(s, measured.get(s.name), "size")]
    tables = {"regions": overlap_tables.region_table(results, classes)}
    if job.get("reference"):
        results = [part for s in scenes for part in _tallies(s, measured.get(s.name), "size", "reference")]
        metrics = tables["metrics"] = overlap_tables.metric_table(results, classes)
        blocks: list[Tally] = []
        if len(scenes) == 1 and measured and _missed(scenes[0], "size", "reference") is None:
            receipts = next(iter(measured.values())).stage.receipts()
            blocks = [Tally.from_json(receipt) for _, receipt in sorted(receipts.items())]
        tables["summary"] = summary_table(metrics, classes, groups=record.groups or None, blocks=blocks)
        tables["agreement"] = overlap_tables.agreement_table(metrics)
        tables["confusion"] = overlap_tables.confusion_table(results, classes)
    if measure.get("intensity"):
        parts = _values(scenes, measured, lambda m: _intensities(m, m.channels, m.intensity), "intensity")
        parts += _no_regions(scenes)
        tables["intensity"] = scene_tables.intensity_table(parts, classes)
    if measure.get("surface"):
        tables["surface"] = scene_tables.surface_table(
            _values(scenes, measured, lambda m: m.surfaces, "reference", "surface"), classes
        )
    tables |= _object_tables(record, measured, tables["regions"])
    if record.prompted:
        tables["asked"] = phrase_table(record, tables["regions"], tables.get("instances"))
    if job.get("outputs", {}).get("uncertainty"):
        parts = _values(scenes, measured, lambda m: _intensities(m, m.doubts, m.uncertainty))
        parts += _no_regions(scenes)
        tables["uncertainty"] = scene_tables.uncertainty_table(parts, classes)
        if job.get("reference"):
            tables["calibration"] = scene_tables.calibration_table(
                _values(scenes, measured, lambda m: m.calibration, "reference")
            )
    return tables


def _object_tables(
    record: RunRecord, measured: Mapping[str, Measured], regions: pd.DataFrame
) -> dict[str, pd.DataFrame]:
    """Return the tables of objects that a model detected, with counts by region, or that are given."""
    classes, measure = record.legend, record.job.get("measure", {})
    values = {int(k): v for k, v in (record.job.get("reference") or {}).get("values", {}).items()}
    detected = [
        object_tables.SceneDetections.of(scene.name, measured[scene.name], values)
        if scene.name in measured and "size" not in scene.unmeasured
        else object_tables.SceneDetections(scene.name, reason=scene.error)
        for scene in record.scenes
    ]
    if any(scene.table is not None for scene in detected):
        smallest = measure["smallest"]
        things = [c.value for c in classes if not (c.background or c.stuff)]
        stuff = [c.value for c in classes if c.stuff]
        tables = {
            "regions": object_tables.with_counts(regions, detected, things),
            "instances": object_tables.detections_table(detected, classes, smallest, stuff),
        }
        if any(scene.overlaps is not None for scene in detected):
            tables["panoptic"] = object_tables.panoptic_table(detected, classes, stuff, smallest)
        return tables
    if not measure.get("objects"):
        return {}
    given = _values(record.scenes, measured, _given_objects, "reference")
    smallest = measure["smallest"]
    return {
        "objects": object_tables.objects_table(given, smallest),
        "instances": object_tables.instances_table(given, smallest),
    }


def _given_objects(measured: Measured) -> tuple[OverlapTable, SizeScale] | None:
    return None if measured.objects is None else (measured.objects, SizeScale.from_dict(measured.scale))


def _tallies(scene: SceneRecord, measured: Measured | None, *needs: str) -> list[overlap_tables.SceneTallies]:
    """What a scene has in a table that needs these parts; what is not measured is a failed row each class."""
    if measured is None:
        return [overlap_tables.SceneTallies(scene.name, regions=(), reason=scene.error)]
    if (reason := _missed(scene, *needs)) is not None:
        regions = () if "size" in scene.unmeasured else measured.regions
        return [overlap_tables.SceneTallies(scene.name, regions=regions, reason=reason)]
    found = [overlap_tables.SceneTallies.of(scene.name, measured)]
    if "regions" in scene.unmeasured:
        reason = scene.unmeasured["regions"]
        found.append(overlap_tables.SceneTallies(scene.name, regions=measured.damaged, reason=reason))
    return found


def _missed(scene: SceneRecord, *parts: str) -> str | None:
    """Why one of these parts was not measured; None: all were."""
    return next((scene.unmeasured[part] for part in parts if part in scene.unmeasured), None)


def _intensities(
    measured: Measured, channels: tuple[Channel, ...], intensity: Intensity | None
) -> scene_tables.Intensities | None:
    return None if intensity is None else scene_tables.Intensities(measured.regions, channels, intensity)


def _values(
    scenes: Sequence[SceneRecord],
    measured: Mapping[str, Measured],
    pick: Callable[[Measured], T | None],
    *needs: str,
) -> list[SceneValue[T]]:
    """Return what is picked of every scene's measurements, which needs these parts of them."""
    parts = []
    for scene in scenes:
        if scene.name not in measured:
            parts.append(SceneValue[T](scene.name, None, scene.error, failed=True))
            continue
        if (reason := _missed(scene, "size", *needs)) is not None:
            parts.append(SceneValue[T](scene.name, None, reason, failed=True))
            continue
        value = pick(measured[scene.name])
        parts.append(SceneValue(scene.name, value, NO_REFERENCE if value is None else ""))
    return parts


def _no_regions(scenes: Sequence[SceneRecord]) -> list[scene_tables.SceneIntensity]:
    """A failed row each class for the regions that could not be measured."""
    missed = [(s.name, s.unmeasured["regions"]) for s in scenes if "regions" in s.unmeasured]
    return [SceneValue(name, None, reason, failed=True) for name, reason in missed]


SCENE_FAILED = "scene failed"
"""Outcome where the scene failed: what became of the phrase is unknown."""
GIVEN = "from prompts"
"""Outcome of classes that no text asked for: their objects come from prompts of files or from points."""
FOUND = "found"
PHRASE_COUNTS = ("found", "below", "small", "merged")


def phrase_table(
    record: RunRecord, regions: pd.DataFrame, instances: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A row a scene and phrase, in the order asked; classes that only prompts of files name come last.

    Numbers of failed scenes are empty; ``mean_score`` is NaN where no object has a score.

    Args:
        record: of the run.
        regions: the region table, with ``objects``.
        instances: the table of objects; left out: ``mean_score`` is NaN.
    """
    asked = dict.fromkeys(a.phrase for scene in record.scenes for a in scene.asked)
    named = (c.name for c in record.legend if not c.background)
    phrases = list(dict.fromkeys((*asked, *named))) if record.prompted else []
    sizes = [c for c in units.SIZES if c in regions and regions[c].notna().any()]
    whole = regions[regions["region"] == SCENE]
    measured = {(r["scene"], r["class"]): r for r in whole.to_dict("records") if r["state"] != FAILED}
    scores = _mean_scores(instances)
    rows = []
    for scene in record.scenes:
        told = {a.phrase: a for a in scene.asked}
        for phrase in phrases:
            here = measured.get((scene.name, phrase), {})
            row = {"scene": scene.name, **_fate(scene, phrase, told.get(phrase))}
            row |= {c: here.get(c) for c in ("objects", *sizes)}
            rows.append(row | {"mean_score": scores.get((scene.name, phrase))})
    kept = [unit for unit, column in SIZE_COLUMNS.items() if column in sizes]
    return table_of_rows(rows, column_types("asked", kept))


def _fate(scene: SceneRecord, phrase: str, asked: AskedPhrase | None) -> dict[str, Any]:
    if asked is not None:
        return asdict(asked)
    failed = scene.state == "failed"
    return {
        "phrase": phrase, "outcome": SCENE_FAILED if failed else GIVEN,
        "means": "", "note": scene.error if failed else "",
    }  # fmt: skip


def _mean_scores(instances: pd.DataFrame | None) -> dict[tuple[str, str], float]:
    """Mean score of the objects by scene and class; without those that have none."""
    if instances is None or not {"scene", "class", "score"} <= set(instances):
        return {}
    scored = instances.dropna(subset=["score"])
    means = scored.groupby(["scene", "class"])["score"].mean().reset_index()
    rows = zip(means["scene"], means["class"], means["score"], strict=True)
    return {(str(scene), str(name)): float(mean) for scene, name, mean in rows}
