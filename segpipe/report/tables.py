"""The tables: regions, metrics and their summary, as data frames and as files.

Counts are in elements of the scene, areas and volumes in SI. A number that is not there is empty,
and `state` says why; 0 is only ever a measured 0.
"""

from __future__ import annotations

import io
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from segpipe.metrics.overlap import (
    CaseCounts,
    Counts,
    accuracy,
    class_counts,
    mean,
    ratio,
)
from segpipe.metrics.tally import NODATA, NOT_REQUESTED, SizeScale, Tally
from segpipe.regions.base import FULL, SCENE

MEASURED = "measured"
NO_DATA = "no_data"
FAILED = "failed"
NOT_REQUESTED_STATE = "not_requested"

MIN_REFERENCE = 1000
"""Elements of the reference from which a class counts in the summary's mean without rare ones."""
NOT_A_CLASS = "no class of the model"
NOTHING_COMPARED = "no element with both a valid pixel and a reference"

SIZE_COLUMNS = {"m2": "area_m2", "mm3": "volume_mm3", "px": "area_px"}


class ClassLike(Protocol):
    """What the tables need of a class: a card's `Class` has it."""

    @property
    def value(self) -> int:
        """Value in label maps."""
        ...

    @property
    def name(self) -> str:
        """What people read."""
        ...

    @property
    def background(self) -> bool:
        """Left out of means."""
        ...


@dataclass(frozen=True)
class SceneResult:
    """What measuring left of one scene."""

    scene: str
    regions: tuple[str, ...]
    """Names, by index; of a failed scene as far as they are known."""
    attempts: int
    """How often the scene's hardest batch was tried; 1: at once."""
    tally: Tally | None = None
    """Sum over the scene's tiles; None: the scene failed."""
    scale: SizeScale | None = None
    """Of the scene; None with ``tally`` None."""
    outside: tuple[int, ...] = ()
    """Fixed-point cover of each region beyond the scene; left out: none."""
    reason: str = ""
    """Why it failed, in one line."""


def region_table(results: Iterable[SceneResult], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Area or volume by scene, region and class, in the order given.

    Every class has a row in every region. Columns: ``count``, elements, a share of those on a
    polygon's edge; ``area_m2``, ``volume_mm3`` or ``area_px``, whichever the scenes have;
    ``share`` of the seen part of the region, by size; ``seen``, share of the region with valid
    pixels; ``touches_edge``, whether elements of the class lie on the scene's border.
    """
    results = list(results)
    units = {r.scale.unit for r in results if r.scale is not None}
    sizes = [column for unit, column in SIZE_COLUMNS.items() if unit in units]
    columns: dict[str, str] = {
        "scene": "str",
        "region": "str",
        "class": "str",
        "value": "Int64",
        "count": "float64",
        **dict.fromkeys(sizes, "float64"),
        "share": "float64",
        "state": "str",
        "seen": "float64",
        "touches_edge": "boolean",
        "attempts": "Int64",
    }
    rows = [row for result in results for row in _region_rows(result, classes)]
    return _frame(rows, columns)


def _region_rows(result: SceneResult, classes: Sequence[ClassLike]) -> list[dict[str, Any]]:
    if result.tally is None or result.scale is None:
        return [
            _head(result, name, c.value, c.name, FAILED) for name in result.regions or ("",) for c in classes
        ]
    known = {c.value: c.name for c in classes}
    sums: dict[tuple[int, int], list[int]] = {}
    for region, label, _, cover, size, edge in result.tally.rows():
        cell = sums.setdefault((region, label), [0, 0, 0])
        for i, n in enumerate((cover, size, edge)):
            cell[i] += n
    here: dict[int, list[int]] = {}
    for region, label in sums:
        here.setdefault(region, []).append(label)
    column = SIZE_COLUMNS[result.scale.unit]
    rows = []
    for index, name in enumerate(result.regions):
        labels = here.get(index, [])
        valid = [sums[index, v] for v in labels if v != NODATA]
        covered = sum(cell[0] for cell in valid)
        whole = covered + (result.outside[index] if result.outside else 0)
        whole += sums.get((index, NODATA), [0])[0]
        seen = ratio(covered, whole) if whole else 0.0
        for value in _values(known, labels):
            state = MEASURED if covered else NO_DATA
            row = _head(result, name, value, known.get(value, str(value)), state)
            row["seen"] = seen
            if covered:
                cover, size, edge = sums.get((index, value), [0, 0, 0])
                row["count"] = cover / FULL
                row[column] = result.scale.size(size)
                row["share"] = ratio(size, sum(cell[1] for cell in valid))
                row["touches_edge"] = edge > 0
            rows.append(row)
    return rows


def metric_table(results: Iterable[SceneResult], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Overlap with the reference by scene, region and class, in the order given.

    ``tp``, ``fp`` and ``fn`` are elements with a valid pixel and a reference; a ratio over zero is
    empty, and ``reason`` says why. A value that the reference has and the model has not gets a row
    too: it counts as wrong in the pixel accuracy, and not in any mean over classes.
    """
    columns: dict[str, str] = {
        "scene": "str",
        "region": "str",
        "class": "str",
        "value": "Int64",
        **dict.fromkeys(("tp", "fp", "fn", "iou", "dice", "precision", "recall"), "float64"),
        "reason": "str",
        "state": "str",
        "attempts": "Int64",
    }
    rows = [row for result in results for row in _metric_rows(result, classes)]
    return _frame(rows, columns)


def _metric_rows(result: SceneResult, classes: Sequence[ClassLike]) -> list[dict[str, Any]]:
    known = {c.value: c.name for c in classes}
    if result.tally is None:
        return [
            _head(result, region, c.value, c.name, FAILED, reason=result.reason)
            for region in result.regions or ("",)
            for c in classes
        ]
    counts = class_counts(result.tally)
    asked = not bool((result.tally.reference == NOT_REQUESTED).any())
    here: dict[int, list[int]] = {}
    for region, value in counts:
        here.setdefault(region, []).append(value)
    rows = []
    for index, name in enumerate(result.regions):
        compared = index in here
        state = (MEASURED if compared else NO_DATA) if asked else NOT_REQUESTED_STATE
        reason = (NOTHING_COMPARED if asked else "no reference") if not compared else ""
        for value in _values(known, here.get(index, [])):
            row = _head(result, name, value, known.get(value, str(value)), state, reason=reason)
            if compared:
                row |= _overlap(counts.get((index, value), Counts()))
                if value not in known:
                    row["reason"] = "; ".join(filter(None, (NOT_A_CLASS, row["reason"])))
            rows.append(row)
    return rows


def _overlap(counts: Counts) -> dict[str, Any]:
    return {
        "tp": counts.tp / FULL,
        "fp": counts.fp / FULL,
        "fn": counts.fn / FULL,
        "iou": counts.iou,
        "dice": counts.dice,
        "precision": counts.precision,
        "recall": counts.recall,
        "reason": counts.reason,
    }


def _head(result: SceneResult, region: str, value: int, name: str, state: str, **more: Any) -> dict[str, Any]:
    return {
        "scene": result.scene,
        "region": region,
        "class": name,
        "value": value,
        "state": state,
        "attempts": result.attempts,
        **more,
    }


def _values(known: dict[int, str], found: Iterable[int]) -> list[int]:
    """Values of the classes in their order, then others that were found, by value."""
    return [*known, *sorted({v for v in found if v >= 0} - known.keys())]


@dataclass(frozen=True)
class _Cell:
    """One row of the metric table, as whole numbers again."""

    scene: str
    region: str
    value: int
    counts: Counts


def summary_table(
    metrics: pd.DataFrame, classes: Sequence[ClassLike], min_reference: int = MIN_REFERENCE
) -> pd.DataFrame:
    """The means of a metric table, with what they average and what they could not.

    Columns: ``metric``; ``class``, empty for means over classes; ``over``, what is averaged, from
    the inside out; ``region``, ``scene`` (whole scenes) or ``regions`` (every region of every scene
    counts the same); ``value``; and of the cells (scene × region × class) that entered:
    ``n_defined``, ``n_missed`` and ``n_hallucinated`` (among the defined, at 0), ``n_undefined``
    (absent in both, or nothing to compare: left out of the mean); ``n_failed``, scenes that failed
    (left out too). Empty when no scene was compared with a reference.
    """
    columns = {
        **dict.fromkeys(("metric", "class", "over", "region"), "str"),
        "value": "float64",
        **dict.fromkeys(("n_defined", "n_missed", "n_hallucinated", "n_undefined", "n_failed"), "Int64"),
    }
    asked = metrics[metrics["state"] != NOT_REQUESTED_STATE]
    failed = int(asked.loc[asked["state"] == FAILED, "scene"].nunique())
    kept = asked[asked["state"] != FAILED]
    if not len(kept) and not failed:
        return _frame([], columns)
    cells = [
        _Cell(scene, region, int(value), _fixed(tp, fp, fn))
        for scene, region, value, tp, fp, fn in zip(
            *(kept[name] for name in ("scene", "region", "value", "tp", "fp", "fn")), strict=True
        )
    ]
    rows = _means([c for c in cells if c.region == SCENE], classes, True, failed, min_reference)
    regions = [c for c in cells if c.region != SCENE]
    if regions:
        rows += _means(regions, classes, False, failed, min_reference)
    return _frame(rows, columns)


def _means(
    everything: Sequence[_Cell],
    classes: Sequence[ClassLike],
    whole_scenes: bool,
    failed: int,
    min_reference: int,
) -> list[dict[str, Any]]:
    """Rows of the summary over whole scenes, or over the regions in them."""
    means = [c for c in classes if not c.background]
    wanted = {c.value for c in means}
    cells = [cell for cell in everything if cell.value in wanted]
    frequent = [c for c in cells if c.counts.actual >= min_reference * FULL]
    left_out = [c.name for c in classes if c.background]
    of = f"classes (without {', '.join(left_out)})" if left_out else "classes"
    only = "scenes" if whole_scenes else "regions, then scenes"
    then = f"then {only}"
    rows: list[dict[str, Any]] = []

    def put(metric: str, over: str, value: float, tested: Iterable[Counts], name: str = "") -> None:
        n = CaseCounts.of(tested)
        scope = SCENE if whole_scenes else "regions"
        row = {"metric": metric, "class": name, "over": over, "region": scope, "value": value}
        row |= {"n_defined": n.defined, "n_missed": n.missed, "n_hallucinated": n.hallucinated}
        rows.append(row | {"n_undefined": n.undefined, "n_failed": failed})

    put("mIoU", f"{of}, {then}", _nested(cells, _iou), [c.counts for c in cells])
    put("mean Dice", f"{of}, {then}", _nested(cells, _dice), [c.counts for c in cells])
    pooled = _pooled(cells, wanted)
    put("pooled mIoU", f"{of}, of sums over {only}", mean(map(_iou, pooled)), pooled)
    put("pooled mean Dice", f"{of}, of sums over {only}", mean(map(_dice, pooled)), pooled)
    parts = [sum((c.counts for c in p), Counts()) for p in _grouped(everything)]
    right = accuracy(c.counts for c in everything)
    put("pixel accuracy", f"all compared elements of all {only}", right, parts)
    many = f"{of} with at least {min_reference} reference elements in it, {then}"
    title = f"mIoU of classes with reference ≥ {min_reference}"
    put(title, many, _nested(frequent, _iou), [c.counts for c in frequent])
    for c in means:
        own = [cell for cell in cells if cell.value == c.value]
        put("mean IoU", only, _nested(own, _iou), [o.counts for o in own], c.name)
        put("mean Dice", only, _nested(own, _dice), [o.counts for o in own], c.name)
    return rows


def _iou(counts: Counts) -> float:
    return counts.iou


def _dice(counts: Counts) -> float:
    return counts.dice


def _fixed(tp: float, fp: float, fn: float) -> Counts:
    """Elements as whole 1/65536 again, which is what they were; nothing compared is nothing."""
    tp, fp, fn = (0.0 if math.isnan(v) else v for v in (tp, fp, fn))
    return Counts(round(tp * FULL), round(fp * FULL), round(fn * FULL))


def _grouped(cells: Iterable[_Cell]) -> list[list[_Cell]]:
    """Cells of one region of one scene together, in order of first appearance."""
    groups: dict[tuple[str, str], list[_Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.scene, cell.region), []).append(cell)
    return list(groups.values())


def _nested(cells: Sequence[_Cell], score: Callable[[Counts], float]) -> float:
    """Mean over classes, then over regions, then over scenes, of what is defined at each level."""
    scenes: dict[str, list[float]] = {}
    for group in _grouped(cells):
        inner = mean(score(cell.counts) for cell in group)
        scenes.setdefault(group[0].scene, []).append(inner)
    return mean(mean(values) for values in scenes.values())


def _pooled(cells: Sequence[_Cell], values: Iterable[int]) -> list[Counts]:
    """Counts of each class, summed over regions and scenes."""
    return [sum((cell.counts for cell in cells if cell.value == value), Counts()) for value in sorted(values)]


def _frame(rows: list[dict[str, Any]], columns: dict[str, str]) -> pd.DataFrame:
    """A data frame with these columns and types, also without rows."""
    data = {}
    for name, dtype in columns.items():
        empty = "" if dtype == "str" else math.nan if dtype == "float64" else pd.NA
        data[name] = pd.Series([row.get(name, empty) for row in rows], dtype=dtype)
    return pd.DataFrame(data)


def csv_bytes(table: pd.DataFrame) -> bytes:
    """CSV: UTF-8, line feeds, floats in the fewest digits that read back the same."""
    return table.to_csv(index=False, lineterminator="\n").encode("utf-8")


def parquet_bytes(table: pd.DataFrame) -> bytes:
    """The same as Parquet, with the columns' types."""
    target = io.BytesIO()
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    pq.write_table(arrow, target, compression="zstd")
    return target.getvalue()


def write_table(table: pd.DataFrame, path_stem: str | Path) -> tuple[Path, Path]:
    """Write ``<stem>.csv`` and ``<stem>.parquet``, each all or nothing.

    The same table gives the same bytes.
    """
    csv, parquet = Path(f"{path_stem}.csv"), Path(f"{path_stem}.parquet")
    csv.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(csv, csv_bytes(table))
    write_atomic(parquet, parquet_bytes(table))
    return csv, parquet


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that others see whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
