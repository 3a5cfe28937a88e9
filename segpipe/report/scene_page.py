"""One scene as the report shows it: pictures, slices, bars, confusion, how it was computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from segpipe.pictures.archive import LegendEntry, Panel, Previews, SliceStack
from segpipe.report.charts import Bars, Matrix, class_bars, confusion_matrix
from segpipe.report.phrase_view import phrase_captions
from segpipe.tables import units
from segpipe.tables.record import ClassInfo, SceneRecord

Picture = tuple[Panel, tuple[LegendEntry, ...]]
"""A panel with its legend."""


@dataclass(frozen=True, kw_only=True)
class SceneView:
    """Everything a template says of one scene."""

    scene: SceneRecord
    facts: tuple[str, ...]
    pictures: tuple[Picture, ...]
    slices: SliceStack | None
    legend: tuple[LegendEntry, ...]
    """Of the slices."""
    bars: tuple[Bars, ...]
    matrix: Matrix | None
    notes: tuple[str, ...]
    details: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]
    phrases: tuple[Picture, ...] = ()
    """Of a prompted run: a picture of each phrase with objects."""


def scene_view(
    scene: SceneRecord,
    previews: Previews | None,
    tables: Mapping[str, pd.DataFrame],
    classes: Sequence[ClassInfo],
    asked: pd.DataFrame | None = None,
) -> SceneView:
    """A scene with its part of the tables.

    Args:
        scene: of the record.
        previews: None: it is shown without pictures.
        tables: its own rows, by the name of the table; empty: its bars and matrix are shown elsewhere.
        classes: of the run.
        asked: of a prompted run, its own rows of `phrase_table`: the numbers under pictures of phrases.
    """
    timings = [(k, units.duration(v)) for k, v in scene.timings.items()]
    details = (
        ("Plan", _pairs(scene.plan)),
        ("Time", (*timings, ("attempts", str(scene.attempts)))),
        ("Keys", (*scene.keys.items(), ("reused", ", ".join(scene.reused) or "nothing"))),
        ("Source", (("uri", scene.uri),)),
    )
    regions = tables.get("regions")
    return SceneView(
        scene=scene,
        facts=_facts(scene),
        pictures=_pictures(previews) if previews else (),
        slices=previews.slices if previews else None,
        legend=previews.legend if previews else (),
        bars=() if regions is None else class_bars(regions, tables.get("metrics"), classes),
        matrix=confusion_matrix(tables.get("confusion"), classes),
        notes=(*scene.notes, *(previews.notes if previews else ())),
        details=details,
        phrases=_phrases(previews, asked, classes) if previews else (),
    )


def _pictures(previews: Previews) -> tuple[Picture, ...]:
    legends = {"labels": previews.legend, "difference": previews.difference_legend}
    return tuple((p, legends.get(p.key, ())) for p in previews.panels)


def _phrases(
    previews: Previews, asked: pd.DataFrame | None, classes: Sequence[ClassInfo]
) -> tuple[Picture, ...]:
    """Pictures of phrases under ``23 objects, 190 ha``; the phrase is the title, and beside its colour."""
    numbers = {} if asked is None else phrase_captions(asked)
    colors = {c.name: c.color for c in classes}
    pictures = []
    for panel in previews.phrases:
        said = ". ".join(filter(None, (numbers.get(panel.title, ""), panel.caption)))
        legend = (LegendEntry(panel.title, colors.get(panel.title, "")),)
        pictures.append((replace(panel, caption=said), legend))
    return tuple(pictures)


def _facts(scene: SceneRecord) -> tuple[str, ...]:
    geometry = scene.geometry
    if geometry is None:
        return ()
    elements = "pixels" if geometry.kind == "raster" else "voxels"
    facts = [" × ".join(f"{n:,}" for n in geometry.shape) + f" {elements}"]
    if geometry.spacing:
        values = [f"{v:.4g}" for v in geometry.spacing]
        same = len(set(values)) == 1
        facts.append(f"{values[0] if same else ' × '.join(values)} {geometry.unit}".strip())
    if geometry.kind == "raster":
        facts.append(geometry.crs or "no CRS")
    elif geometry.orientation:
        facts.append(f"orientation {geometry.orientation}")
    if scene.timings:
        facts.append(units.duration(sum(scene.timings.values())))
    if scene.reused:
        facts.append(f"reused: {', '.join(scene.reused)}")
    return tuple(facts)


def _pairs(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """A plan's entries as words: bytes and ratios readable, lists as sizes."""
    result = []
    for key, value in values.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            if "bytes" in key or key.startswith("memory"):
                text = units.byte_size(value)
            else:
                text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        elif isinstance(value, list | tuple):
            text = " × ".join(str(v) for v in value)
        elif isinstance(value, Mapping):
            text = ", ".join(f"{k} {v}" for k, v in value.items())
        else:
            text = "—" if value is None else str(value)
        result.append((key.replace("_", " "), text))
    return tuple(result)
