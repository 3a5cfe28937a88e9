"""The report: one HTML page with everything inside, drawn from the run's record and tables.

It loads nothing: a content security policy forbids it, and allows no script but the page's own.
Every text is escaped by the template; the same input gives the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import pandas as pd
from PIL import Image

from segpipe.regions.base import SCENE
from segpipe.report import units
from segpipe.report.cells import ROWS, page_table
from segpipe.report.pictures import LegendEntry, Panel, Previews
from segpipe.report.record import ModelSummary, RunRecord, SceneRecord
from segpipe.report.shares import LISTED, Bars, class_bars

_HERE = Path(__file__).parent
SECTIONS = 16
"""Scenes shown with pictures; every further one has its row and its ``preview.png``."""
THUMBNAILS = 200
HEADLINES = ("mIoU", "mean Dice", "pixel accuracy")
"""Metrics shown as cards, of those over all classes; the summary table has every one."""
_WEBP_QUALITY = 88
FREQUENT = "mIoU of classes with"
"""Beginning of the name of the mean over classes with enough reference."""


@dataclass(frozen=True)
class _Card:
    label: str
    value: str
    unit: str
    detail: str
    bad: bool = False


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    alt: str
    src: str
    width: int
    height: int
    legend: tuple[LegendEntry, ...]


@dataclass(frozen=True)
class _Section:
    scene: SceneRecord
    anchor: str
    facts: tuple[str, ...]
    panels: tuple[_Figure, ...]
    bars: tuple[Bars, ...]
    measured: bool
    """Whether the region table has rows of it."""
    notes: tuple[str, ...]
    details: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


@dataclass(frozen=True)
class _IndexRow:
    scene: SceneRecord
    anchor: str
    thumbnail: str
    size: str
    seconds: str
    time: str


def render_page(
    record: RunRecord,
    previews: Mapping[str, Previews],
    regions: pd.DataFrame,
    metrics: pd.DataFrame | None = None,
    summary: pd.DataFrame | None = None,
) -> str:
    """The text of ``report.html``.

    Args:
        record: of the run; ``files`` of its scenes are relative to the page's folder.
        previews: by scene name; a scene without one is shown without pictures.
        regions: the region table, in SI units.
        metrics: the metric table; None without a reference.
        summary: the means; None without a reference.
    """
    classes = record.legend
    shown = record.done[:SECTIONS]
    anchors = {scene.name: f"scene-{i + 1}" for i, scene in enumerate(shown)}
    totals = class_bars(regions, metrics, classes)
    css, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = _environment().get_template("page.html")
    return page.render(
        record=record,
        lead=_lead(record),
        cards=_cards(record, totals, summary),
        totals=totals,
        failed=record.failed[:ROWS],
        index=_index(record, previews, anchors) if len(record.scenes) > 1 else (),
        sections=_sections(record, anchors, previews, regions, metrics),
        left_out=len(record.done) - len(shown),
        tables=[
            page_table(name, name.capitalize(), f"{name}.csv", frame, classes)
            for name, frame in (("regions", regions), ("metrics", metrics), ("summary", summary))
            if frame is not None
        ],
        listed=LISTED,
        compared=metrics is not None,
        model=_model(record.model) if record.model else (),
        provenance=_provenance(record),
        job=json.dumps(record.job, indent=2, ensure_ascii=False, default=str),
        css=css,
        js=script,
        script_hash=f"sha256-{digest}",
    )


def _sections(
    record: RunRecord,
    anchors: Mapping[str, str],
    previews: Mapping[str, Previews],
    regions: pd.DataFrame,
    metrics: pd.DataFrame | None,
) -> list[_Section]:
    """The scenes shown with pictures."""
    by_scene = _split(regions)
    compared = {} if metrics is None else _split(metrics)
    result = []
    for scene in (s for s in record.done if s.name in anchors):
        rows = by_scene.get(scene.name, regions.iloc[:0])
        bars: tuple[Bars, ...] = ()
        if len(record.done) > 1:  # of a single scene the totals above say the same
            bars = class_bars(rows, compared.get(scene.name), record.legend)
        anchor = anchors[scene.name]
        result.append(_section(scene, anchor, previews.get(scene.name), bars, measured=len(rows) > 0))
    return result


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["color"] = _color
    environment.filters["relative"] = _relative
    return environment


def _color(text: str) -> str:
    """A colour that is safe inside a style attribute."""
    return text if re.fullmatch(r"#[0-9a-fA-F]{6}", text) else "#808080"


def _relative(path: str) -> str:
    """A link below the page's folder: quoting the colon keeps any scheme out."""
    return "./" + quote(path.lstrip("/"), safe="/")


def _split(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    if frame.empty or "scene" not in frame:
        return {}
    return {str(name): rows for name, rows in frame.groupby("scene", sort=False)}


def _lead(record: RunRecord) -> str:
    model = ""
    if record.model:
        model = f" with {record.model.title or record.model.name}"
    count = len(record.scenes)
    took = units.duration(units.between(record.started, record.finished))
    return (
        f"{count:,} scene{'' if count == 1 else 's'} segmented{model}, "
        f"{units.moment(record.started)}, in {took}."
    )


def _cards(record: RunRecord, totals: Sequence[Bars], summary: pd.DataFrame | None) -> list[_Card]:
    failed = len(record.failed)
    reused = sum(1 for s in record.done if "predict" in s.reused)
    state = f"{failed} failed" if failed else "none failed"
    if reused:
        state += f"; {reused} reused from the store"
    count = f"{len(record.done):,}"
    cards = [_Card("Scenes done", count, f"of {len(record.scenes):,}", state, bool(failed))]
    cards.extend(_metric_card(row) for row in _headline_rows(summary))
    for group in totals:
        present = [b for b in group.bars if not b.background and b.length > 0]
        if present:
            top = max(present, key=lambda b: b.length)
            detail = f"the largest class: {top.share} of what was measured"
            cards.append(_Card(top.name, top.size, group.unit, detail))
    return cards


def _headline_rows(summary: pd.DataFrame | None) -> list[dict[Any, Any]]:
    """The means of whole scenes; that of frequent classes only where it says something else."""
    if summary is None or summary.empty:
        return []
    rows = summary[(summary["region"] == SCENE) & (summary["class"].fillna("") == "")]
    frequent = rows["metric"].str.startswith(FREQUENT)
    everything = rows.loc[rows["metric"] == "mIoU", "n_defined"]
    differs = not rows.loc[frequent, "n_defined"].isin(everything).any()
    kept = rows["metric"].isin(HEADLINES) | (frequent & differs)
    return rows[kept].to_dict("records")


def _metric_card(row: Mapping[Any, Any]) -> _Card:
    name = str(row.get("metric", ""))
    value = float(row.get("value", math.nan))
    over = str(row.get("over", ""))
    counts = []
    for key, word in (
        ("n_defined", "defined"),
        ("n_missed", "missed"),
        ("n_hallucinated", "hallucinated"),
        ("n_undefined", "undefined"),
        ("n_failed", "scenes failed"),
    ):
        number = row.get(key)
        if number is not None and not pd.isna(number) and (number or key == "n_defined"):
            plural = word if number != 1 else word.replace("scenes", "scene")
            counts.append(f"{int(number):,} {plural}")
    label = name if name.startswith("mIoU") else name[:1].upper() + name[1:]
    return _Card(label, units.number(value, 3), "", f"over {over} · {', '.join(counts)}")


def _section(
    scene: SceneRecord,
    anchor: str,
    previews: Previews | None,
    bars: tuple[Bars, ...],
    measured: bool,
) -> _Section:
    panels = tuple(_figure(p, previews) for p in previews.panels) if previews else ()
    notes = (*scene.notes, *(previews.notes if previews else ()))
    timings = [(k, units.duration(v)) for k, v in scene.timings.items()]
    details = (
        ("Plan", _pairs(scene.plan)),
        ("Time", (*timings, ("attempts", str(scene.attempts)))),
        ("Keys", (*scene.keys.items(), ("reused", ", ".join(scene.reused) or "nothing"))),
        ("Source", (("uri", scene.uri),)),
    )
    return _Section(scene, anchor, _facts(scene), panels, bars, measured, notes, details)


def _figure(panel: Panel, previews: Previews) -> _Figure:
    legend = {"labels": previews.legend, "difference": previews.difference_legend}.get(panel.key, ())
    return _Figure(panel.title, panel.caption, panel.alt, _source(panel), panel.width, panel.height, legend)


def _source(panel: Panel) -> str:
    """The picture as a data URI: photographs as WebP, a fifth of the bytes; flat maps as PNG."""
    if panel.key == "difference":
        return _data_uri("png", panel.png)
    return _webp(panel.png)


def _webp(content: bytes) -> str:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(content)).save(buffer, "WEBP", quality=_WEBP_QUALITY, method=4)
    return _data_uri("webp", buffer.getvalue())


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _facts(scene: SceneRecord) -> tuple[str, ...]:
    geometry = scene.geometry
    if geometry is None:
        return ()
    facts = [_extent(scene)]
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


def _extent(scene: SceneRecord) -> str:
    if scene.geometry is None:
        return "—"
    elements = "pixels" if scene.geometry.kind == "raster" else "voxels"
    return " × ".join(f"{n:,}" for n in scene.geometry.shape) + f" {elements}"


def _index(
    record: RunRecord, previews: Mapping[str, Previews], anchors: Mapping[str, str]
) -> list[_IndexRow]:
    rows: list[_IndexRow] = []
    for scene in (*record.failed, *record.done)[:ROWS]:
        picture = previews.get(scene.name) if len(rows) < THUMBNAILS else None
        thumbnail = _webp(picture.thumbnail) if picture else ""
        seconds = sum(scene.timings.values())
        anchor = anchors.get(scene.name, "")
        time = units.duration(seconds) if scene.timings else "—"
        rows.append(_IndexRow(scene, anchor, thumbnail, _extent(scene), f"{seconds:.3f}", time))
    return rows


def _model(model: ModelSummary) -> list[tuple[str, str]]:
    pairs = [
        ("Card", model.name),
        ("Provider", model.provider),
        ("Trained on", model.data),
        ("Scores", model.scores),
        ("Classes", ", ".join(f"{c.value} {c.name}" for c in model.classes)),
        ("Licence", model.licence),
        ("Source", model.source),
        ("Weights", model.weights),
        ("Fingerprint", model.fingerprint),
    ]
    return [(k, v) for k, v in pairs if v]


def _provenance(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    run = [
        ("Job", record.job_name),
        ("Run", record.run_id),
        ("Started", record.started),
        ("Finished", record.finished),
    ]
    return [("Run", run), ("Versions", sorted(record.versions.items()))]


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
