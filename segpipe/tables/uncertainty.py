"""The tables of uncertainty and calibration, as data frames."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from segpipe.metrics.calibration import BINS, LEVELS, Calibration
from segpipe.metrics.intensity import Cell, Intensity
from segpipe.tables.frames import MEASURED, NOTHING_COMPARED, ClassLike, Found
from segpipe.tables.intensity import SceneIntensity, intensity_table

ALL = -1
"""Class value of the rows over all classes."""
ALL_CLASSES = "(all classes)"


def uncertainty_table(results: Iterable[SceneIntensity], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Uncertainty by scene, region, predicted class and channel, as shares of 1.

    Columns as in the intensity table; the rows named ``(all classes)``, without a value, are over all
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
    if result.intensity is None:
        return result
    sums: dict[tuple[int, int, int], Cell] = {}
    for (region, _, channel), cell in sorted(result.intensity.cells.items()):
        key = (region, ALL, channel)
        sums[key] = sums[key] + cell if key in sums else cell
    cells = {**result.intensity.cells, **sums}
    return replace(result, intensity=Intensity(result.intensity.point, cells))


def calibration_table(results: Iterable[Found[Calibration]]) -> pd.DataFrame:
    """Confidence against accuracy by scene: a row a bin, and one over all (without ``low`` and ``high``).

    Columns: ``low`` and ``high``, the bin's ends; ``count``, elements with a valid pixel and a
    reference; ``confidence``, their mean; ``accuracy``, the share that is right; ``ece``, the expected
    calibration error (15 bins), on the row over all.
    """
    numbers = ("low", "high", "count", "confidence", "accuracy", "ece")
    rows = [row for result in results for row in _calibration_rows(result)]
    table = pd.DataFrame(rows, columns=["scene", *numbers, "state", "reason"])
    table["reason"] = table["reason"].fillna("")
    types = {"scene": "str", **dict.fromkeys(numbers, "float64"), "state": "str", "reason": "str"}
    return table.astype(types)


def _calibration_rows(result: Found[Calibration]) -> list[dict[str, Any]]:
    found = result.value
    if found is None:
        return [{"scene": result.scene, "state": result.state, "reason": result.reason}]
    sums = zip(found.count.tolist(), found.confidence.tolist(), found.right.tolist(), strict=True)
    rows = [
        {"scene": result.scene, "low": i / BINS, "high": (i + 1) / BINS, **_means(*row)}
        for i, row in enumerate(sums)
    ]
    over_all = _means(*(int(column.sum()) for column in (found.count, found.confidence, found.right)))
    return [*rows, {"scene": result.scene, **over_all, "ece": found.error}]


def _means(count: int, confidence: int, right: int) -> dict[str, Any]:
    if not count:
        nothing = {"confidence": math.nan, "accuracy": math.nan, "reason": NOTHING_COMPARED}
        return {"count": 0, "state": MEASURED, **nothing}
    return {
        "count": count,
        "confidence": confidence / LEVELS / count,
        "accuracy": right / count,
        "state": MEASURED,
    }
