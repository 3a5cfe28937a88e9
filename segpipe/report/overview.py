"""What the index says over scenes: a row each, distributions, and Bland–Altman plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from segpipe.regions.base import SCENE
from segpipe.report.cells import MISSING, Head, PageCell, number_cell
from segpipe.report.figures import LEAST_SCENES, SizePairs, Strip, bland_altman, distribution
from segpipe.tables import units
from segpipe.tables.frames import SIZE_COLUMNS
from segpipe.tables.record import ClassInfo, RunRecord, SceneRecord
from segpipe.tables.scene_tables import ALL_CLASSES

CLASSES = 12
"""Rows of a distribution: the classes with the largest sizes."""
PLOTS = 6
"""Classes with a Bland–Altman plot: the largest again."""
_THREE = partial(units.number, places=3)


@dataclass(frozen=True)
class SceneRow:
    """A scene in the index."""

    scene: SceneRecord
    cells: tuple[PageCell, ...]
    """Under `SceneIndex.heads`."""


@dataclass(frozen=True)
class SceneIndex:
    """All scenes: failed ones first, then the worst."""

    heads: tuple[Head, ...]
    rows: tuple[SceneRow, ...]
    order: str
    """In words; empty: as in the job. The first column is what they are in order of."""


@dataclass(frozen=True)
class Figure:
    """A figure with its words."""

    title: str
    definition: str
    """Id of what explains it."""
    svg: Markup
    caption: str


def whole_scenes(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of whole scenes."""
    return frame[frame["region"] == SCENE]


def foreground(frame: pd.DataFrame, classes: Sequence[ClassInfo]) -> pd.DataFrame:
    """The rows of classes that are not background."""
    return frame[~frame["class"].isin([c.name for c in classes if c.background])]


def largest_classes(regions: pd.DataFrame, column: str, classes: Sequence[ClassInfo]) -> list[str]:
    """Classes that are not background and have any of this size, by their sum over whole scenes."""
    rows = foreground(whole_scenes(regions), classes)
    sums = rows.groupby("class", sort=False)[column].sum()
    return [str(name) for name in sums[sums > 0].sort_values(ascending=False, kind="stable").index]


def scene_scores(metrics: pd.DataFrame | None, classes: Sequence[ClassInfo]) -> pd.DataFrame:
    """Per whole scene: ``miou`` and ``dice``, means over the classes defined, and the ``weakest`` class.

    ``iou`` is that of the weakest. Indexed by scene; empty without metrics.
    """
    columns = ["miou", "dice", "weakest", "iou"]
    if metrics is None or metrics.empty:
        return pd.DataFrame(columns=columns)
    known = [c.name for c in classes if not c.background]
    rows = whole_scenes(metrics)
    rows = rows[rows["class"].isin(known)]
    means = rows.groupby("scene", sort=False)[["iou", "dice"]].mean()
    defined = rows[rows["iou"].notna()].sort_values("iou", kind="stable").drop_duplicates("scene")
    weakest = defined.set_index("scene")[["class", "iou"]].rename(columns={"class": "weakest"})
    return means.rename(columns={"iou": "miou"}).join(weakest)[columns]


def scene_entropy(uncertainty: pd.DataFrame | None) -> dict[str, float]:
    """Mean entropy over each whole scene, a share of its largest value; empty where it was not mapped."""
    if uncertainty is None or uncertainty.empty:
        return {}
    rows = whole_scenes(uncertainty)
    rows = rows[(rows["class"] == ALL_CLASSES) & (rows["channel"] == "entropy")]
    return {str(k): float(v) for k, v in rows.set_index("scene")["mean"].items()}


def scene_table(
    record: RunRecord,
    regions: pd.DataFrame,
    metrics: pd.DataFrame | None,
    limit: int,
    uncertainty: pd.DataFrame | None = None,
) -> SceneIndex:
    """At most ``limit`` scenes with the numbers one looks for first.

    Worst first, by mIoU; without a reference the least sure first, by entropy.
    """
    scores = scene_scores(metrics, record.legend)
    whole = whole_scenes(regions)
    columns: list[tuple[Head, Callable[[str], PageCell]]] = []
    if len(scores):
        columns += [
            (Head("mIoU", numeric=True, definition="miou"), _number(scores["miou"].to_dict())),
            (Head("Mean Dice", numeric=True, definition="dice"), _number(scores["dice"].to_dict())),
            (Head("Weakest class"), _weakest(scores)),
        ]
    doubt = scene_entropy(uncertainty)
    if doubt:
        columns.append((Head("Entropy", numeric=True, definition="uncertainty"), _number(doubt)))
    if any(s.asked for s in record.scenes):
        columns.append(
            (Head("Phrases found", numeric=True, definition="asked"), _phrases_found(record.scenes))
        )
    for column in units.SIZES:
        if column in whole and (names := largest_classes(regions, column, record.legend)):
            sizes = whole[whole["class"] == names[0]].set_index("scene")[column]
            unit = units.size_unit(column, sizes.dropna().tolist())
            head = Head(names[0], unit=unit.symbol, numeric=True, definition="size")
            columns.append((head, _number(sizes.to_dict(), partial(units.size, unit=unit))))
    seen = whole.groupby("scene", sort=False)["seen"].first().to_dict() if "seen" in whole else {}
    columns.append((Head("Seen", numeric=True, definition="share"), _number(seen, units.percent)))
    times = {s.name: sum(s.timings.values()) if s.timings else math.nan for s in record.scenes}
    columns.append((Head("Time", numeric=True), _number(times, units.duration)))
    order: Sequence[SceneRecord] = record.done
    if len(scores):
        last = scores["miou"].fillna(math.inf).to_dict()
        order = sorted(order, key=lambda s: last.get(s.name, math.inf))
    elif doubt:
        order = sorted(order, key=lambda s: -doubt.get(s.name, 0.0))
    shown = (*record.failed, *order)[:limit]
    rows = tuple(SceneRow(s, tuple(draw(s.name) for _, draw in columns)) for s in shown)
    order_said = "lowest mIoU first" if len(scores) else "highest entropy first" if doubt else ""
    return SceneIndex(tuple(head for head, _ in columns), rows, order_said)


def _number(values: Mapping[Any, Any], form: Callable[[float], str] = _THREE) -> Callable[[str], PageCell]:
    return lambda scene: number_cell(float(values.get(scene, math.nan)), form)


def _phrases_found(scenes: Sequence[SceneRecord]) -> Callable[[str], PageCell]:
    """``3 of 5`` phrases of a scene, in order of the first number."""
    asked = {s.name: [a.outcome == "found" for a in s.asked] for s in scenes if s.asked}

    def draw(scene: str) -> PageCell:
        hits = asked.get(scene)
        if hits is None:
            return MISSING
        return PageCell(f"{sum(hits):,} of {len(hits):,}", str(sum(hits)), tone="num")

    return draw


def _weakest(scores: pd.DataFrame) -> Callable[[str], PageCell]:
    known = {
        name: f"{weakest} {units.number(iou, 3)}"
        for name, weakest, iou in scores[["weakest", "iou"]].itertuples(name=None)
        if isinstance(weakest, str)
    }
    return lambda scene: PageCell(known.get(scene, "—"), tone="" if scene in known else "muted")


def figures(
    regions: pd.DataFrame,
    metrics: pd.DataFrame | None,
    classes: Sequence[ClassInfo],
    links: Mapping[str, str],
) -> list[Figure]:
    """Distributions of scores and sizes over whole scenes, and Bland–Altman plots; from 3 scenes on.

    Args:
        regions: the region table.
        metrics: the metric table; None without a reference.
        classes: of the run.
        links: scene to its page.
    """
    found: list[Figure] = []
    for column in units.SIZES:
        if column not in regions:
            continue
        names = largest_classes(regions, column, classes)
        if metrics is not None:
            found += _scores(metrics, column, classes, names, links)
        found += _sizes(whole_scenes(regions), column, names, links)
        if metrics is not None:
            found += _agreements(whole_scenes(metrics), column, names, links)
    return found


def _strips(rows: pd.DataFrame, column: str, names: Sequence[str]) -> list[Strip]:
    strips = []
    for name in names[:CLASSES]:
        own = rows[rows["class"] == name]
        kept = own[np.isfinite(own[column].to_numpy(dtype=np.float64, na_value=np.nan))]
        if len(kept) >= LEAST_SCENES:
            scenes, values = kept["scene"].astype(str).tolist(), kept[column].astype(float).tolist()
            strips.append(Strip(name, tuple(scenes), tuple(values), len(own) - len(kept)))
    return strips


def _listed(strips: Sequence[Strip], names: Sequence[str]) -> str:
    """What a distribution leaves out, in words."""
    lost = {s.undefined for s in strips}
    parts = []
    if len(lost) == 1 and (number := lost.pop()):
        parts.append(f"{number} scene{'' if number == 1 else 's'} without a number left out.")
    elif any(s.undefined for s in strips):
        parts.append(f"Left out, without a number: {', '.join(f'{s.label} {s.undefined}' for s in strips)}.")
    if len(names) > CLASSES:
        parts.append(f"Shown are the {CLASSES} largest of {len(names)} classes.")
    return " ".join(parts)


def _scores(
    metrics: pd.DataFrame,
    size: str,
    classes: Sequence[ClassInfo],
    names: Sequence[str],
    links: Mapping[str, str],
) -> list[Figure]:
    """IoU of rasters, Dice of volumes: what each field reads."""
    column, label = ("dice", "Dice") if size == "volume_mm3" else ("iou", "IoU")
    rows = foreground(whole_scenes(metrics), classes)
    if column not in rows:
        return []
    missed = [c.name for c in classes if not c.background and c.name not in names]
    strips = _strips(rows, column, [*names, *missed])
    if not strips:
        return []
    title = f"{label} by class over scenes"
    svg = distribution(strips, (0.0, 1.0), partial(units.number, places=2), links, title)
    caption = f"The number at the right is the median. {_listed(strips, [*names, *missed])}"
    return [Figure(title, "box", svg, caption)]


def _sizes(rows: pd.DataFrame, column: str, names: Sequence[str], links: Mapping[str, str]) -> list[Figure]:
    strips = _strips(rows, column, names)
    if not strips:
        return []
    unit = units.size_unit(column, [v for s in strips for v in s.values])
    strips = [replace(s, values=tuple(v * unit.factor for v in s.values)) for s in strips]
    title = f"{units.SIZES[column].capitalize()} by class over scenes"
    axis = (0.0, max(max(s.values) for s in strips))
    svg = distribution(strips, axis, partial(units.number, places=unit.decimals), links, title)
    caption = f"In {unit.symbol}; the number at the right is the median. {_listed(strips, names)}"
    return [Figure(title, "box", svg, caption)]


def size_pairs(rows: pd.DataFrame, column: str, names: Sequence[str]) -> list[SizePairs]:
    """Predicted and reference sizes of each class, in SI, over scenes that have it in either map."""
    ending = next(unit for unit, name in SIZE_COLUMNS.items() if name == column)
    sides = [f"predicted_{ending}", f"reference_{ending}"]
    if not set(sides) <= set(rows.columns):
        return []
    found = []
    for name in names:
        own = rows[rows["class"] == name].dropna(subset=sides)
        own = own[own[sides].sum(axis=1) > 0]
        if len(own) >= LEAST_SCENES:
            predicted, reference = (tuple(own[s].astype(float).tolist()) for s in sides)
            found.append(
                SizePairs(
                    label=name, unit=ending, scenes=tuple(own["scene"].astype(str)), predicted=predicted,
                    reference=reference,
                )
            )  # fmt: skip
    return found


def _agreements(
    rows: pd.DataFrame, column: str, names: Sequence[str], links: Mapping[str, str]
) -> list[Figure]:
    result = []
    for pairs in size_pairs(rows, column, names)[:PLOTS]:
        unit = units.size_unit(column, [*pairs.predicted, *pairs.reference])
        lower, middle, upper = (units.size(v, unit) for v in pairs.limits)
        sides = (pairs.predicted, pairs.reference)
        predicted, reference = (tuple(v * unit.factor for v in side) for side in sides)
        shown = replace(pairs, unit=unit.symbol, predicted=predicted, reference=reference)
        svg = bland_altman(shown, partial(units.number, places=unit.decimals), links)
        outside = int(((pairs.differences < pairs.limits[0]) | (pairs.differences > pairs.limits[2])).sum())
        caption = (
            f"{len(pairs.scenes):,} scenes: mean difference {middle} {unit.symbol}, limits of agreement "
            f"{lower} to {upper} {unit.symbol}; {outside} outside."
        )
        result.append(Figure(f"Bland–Altman: {pairs.label}", "difference", svg, caption))
    return result
