"""Tables that a job asks for beyond regions and overlap: intensity, uncertainty, calibration, surfaces."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pandas as pd

from segpipe.metrics.intensity import PERCENTILES, Cell, Channel, Intensity, statistics
from segpipe.metrics.tally import BINS, LEVELS, Calibration
from segpipe.tables.frames import (
    FAILED,
    MEASURED,
    NO_DATA,
    NOTHING_COMPARED,
    ClassLike,
    SceneValue,
    column_types,
    table_of_rows,
)

NUMBERS = ("n", "mean", "sd", "min", "max", *(f"p{p:02d}" for p in PERCENTILES), "bin")
ABSENT = "no valid pixel of the class in the region"
ALL = -1
"""Class value of the rows over all classes."""
ALL_CLASSES = "(all classes)"
DISTANCES = {
    "hausdorff": "hausdorff",
    "hausdorff95": "hd95",
    "symmetric": "assd",
    "to_reference": "asd_to_reference",
    "to_prediction": "asd_to_prediction",
    "dice": "surface_dice",
}
"""Field of `segpipe.metrics.surface_distances.Distances` to the column's name."""
BOUNDARY = ("iou", "f1", "precision", "recall")
NOT_DEFINED = "not_defined"
"""State of a scene whose grid has no lengths to measure distances with."""
SceneSurfaces = SceneValue[Mapping[str, Any]]
"""As `segpipe.pipeline.surfaces.measure_surfaces` gives it."""


# ------------------------------------------------------------------ intensity and uncertainty


class Intensities(NamedTuple):
    """The statistics that measuring left of one scene."""

    regions: tuple[str, ...]
    """Names, by index."""
    channels: tuple[Channel, ...]
    intensity: Intensity


SceneIntensity = SceneValue[Intensities]


def intensity_table(results: Iterable[SceneIntensity], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Return intensities by scene, region, class and channel, in the order given.

    The numbers are in ``unit``, and percentiles are right within ``bin``, the width of the histogram's bins.
    A class that is not in a region has n 0 and no other number. A failed scene has one row a class.
    """
    known = {c.value: c.name for c in classes}
    rows = (row for result in results for row in _intensity_rows(result, known))
    return table_of_rows(rows, column_types("intensity"))


def _intensity_rows(result: SceneIntensity, known: dict[int, str]) -> Iterator[dict[str, Any]]:
    if result.value is None:
        failed = {"scene": result.scene, "state": FAILED, "reason": result.reason}
        for value, name in known.items():
            yield {**failed, "class": name, "value": value}
        return
    regions, channels, intensity = result.value
    cells = intensity.cells
    present: dict[int, set[int]] = {}
    for place, value, _ in cells:
        present.setdefault(place, set()).add(value)
    for index, region in enumerate(regions):
        here = present.get(index, set())
        for value in (*known, *sorted(here - known.keys())):
            for number, channel in enumerate(channels):
                row: dict[str, Any] = {"scene": result.scene, "region": region, "value": value}
                row |= {"class": known.get(value, str(value)), "channel": channel.name, "unit": channel.unit}
                cell = cells.get((index, value, number))
                if cell is None:
                    state = MEASURED if here else NO_DATA
                    yield {**row, "n": 0.0 if here else None, "state": state, "reason": ABSENT}
                    continue
                s = statistics(cell, intensity.point, channel.scaling)
                numbers = (s.n, s.mean, s.sd, s.min, s.max, *s.percentiles, s.bin)
                yield {**row, **dict(zip(NUMBERS, numbers, strict=True)), "state": MEASURED}


def uncertainty_table(results: Iterable[SceneIntensity], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Return uncertainty by scene, region, predicted class and channel, as shares of 1.

    Columns are those of the intensity table; the rows named ``(all classes)``, without a value, are over all
    classes of the region: what scenes are ranked for review by.
    """
    table = intensity_table([_with_all(r) for r in results], classes)
    over_all = table["value"] == ALL
    table.loc[over_all, "class"] = ALL_CLASSES
    table.loc[over_all, "value"] = pd.NA
    table.loc[table["unit"] != "", "unit"] = "share"
    return table


def _with_all(result: SceneIntensity) -> SceneIntensity:
    """The same with a cell over all classes for each region and channel."""
    if result.value is None:
        return result
    point, before = result.value.intensity.point, result.value.intensity.cells
    sums: dict[tuple[int, int, int], Cell] = {}
    for (region, _, channel), cell in sorted(before.items()):
        key = (region, ALL, channel)
        sums[key] = sums[key] + cell if key in sums else cell
    return replace(result, value=result.value._replace(intensity=Intensity(point, {**before, **sums})))


# ------------------------------------------------------------------ calibration


def calibration_table(results: Iterable[SceneValue[Calibration]]) -> pd.DataFrame:
    """Return confidence against accuracy by scene: a row a bin, and one over all bins.

    The row over all has no ``low`` and ``high``; it has ``ece``, the expected calibration error (15 bins).
    """
    rows = (row for result in results for row in _calibration_rows(result))
    return table_of_rows(rows, column_types("calibration"))


def _calibration_rows(result: SceneValue[Calibration]) -> list[dict[str, Any]]:
    bins = result.value
    if bins is None:
        return [{"scene": result.scene, "state": result.state, "reason": result.reason}]
    sums = zip(bins.count.tolist(), bins.confidence.tolist(), bins.right.tolist(), strict=True)
    rows = [
        {"scene": result.scene, "low": i / BINS, "high": (i + 1) / BINS, **_means(*row)}
        for i, row in enumerate(sums)
    ]
    over_all = _means(*(int(column.sum()) for column in (bins.count, bins.confidence, bins.right)))
    return [*rows, {"scene": result.scene, **over_all, "ece": bins.error}]


def _means(count: int, confidence: int, right: int) -> dict[str, Any]:
    means = {"count": count, "state": MEASURED, "confidence": math.nan, "accuracy": math.nan}
    if not count:
        return means | {"reason": NOTHING_COMPARED}
    return means | {"confidence": confidence / LEVELS / count, "accuracy": right / count}


# ------------------------------------------------------------------ surfaces


def surface_table(results: Iterable[SceneSurfaces], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Return surface distances by scene and class, background left out, in the order given.

    ``…_element`` are by DeepMind's surface elements, ``…_voxel`` by MONAI's edge voxels;
    ``hausdorff``, ``hd95``, ``assd`` and the directed ``asd`` are in ``unit``; ``surface_dice`` is at
    ``tolerance``, ``boundary_…`` at ``width``, both in ``unit`` too. Empty where not defined: ``reason``.
    """
    known = {c.value: c.name for c in classes if not c.background}
    rows = (row for result in results for row in _surface_rows(result, known))
    return table_of_rows(rows, column_types("surface"))


def _surface_rows(result: SceneSurfaces, known: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    found = result.value or {}
    measured = {int(value): surface for value, surface in found.get("classes", {}).items()}
    for value in (*known, *sorted(measured.keys() - known.keys())):
        row: dict[str, Any] = {"scene": result.scene, "class": known.get(value, str(value)), "value": value}
        row |= {"unit": found.get("unit", ""), "width": found.get("width")}
        surface = measured.get(value)
        if surface is None:
            state = NOT_DEFINED if found else result.state
            yield {**row, "state": state, "reason": found.get("reason") or result.reason}
            continue
        for kind in ("element", "voxel"):
            row |= {f"{column}_{kind}": surface[kind][field] for field, column in DISTANCES.items()}
        row |= {f"boundary_{name}": surface["boundary"][name] for name in BOUNDARY}
        yield {**row, "tolerance": surface["tolerance"], "state": MEASURED, "reason": surface["reason"]}
