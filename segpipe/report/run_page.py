"""The report's pages, drawn from a run's record, tables and pictures.

A run of one scene is one page with everything inside. A run of more is an index, ``report.html``,
with a thumbnail a scene, and a page for each scene that is done. Every page holds all it shows: a
content security policy forbids it to load anything, and allows no script but its own. Every text is
escaped by the templates; the same input gives the same bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import pandas as pd

from segpipe.pictures.archive import Previews
from segpipe.regions.base import SCENE
from segpipe.report.cells import ROWS, Definition, PageTable, needed, of_metric, page_table
from segpipe.report.charts import LISTED, Bar, Bars, class_bars, confusion_matrix
from segpipe.report.markdown import HEADLINES
from segpipe.report.overview import figures, scene_scores, scene_table
from segpipe.report.phrase_view import PhraseView, phrase_view, phrases_sentence
from segpipe.report.scene_page import scene_view
from segpipe.report.templates import data_uri, relative, render
from segpipe.tables import units
from segpipe.tables.frames import describe_column
from segpipe.tables.record import ClassInfo, ModelSummary, RunRecord, SceneRecord

INDEX = "report.html"
FAILURES = 10
"""Failed scenes told at once; the others are folded away."""
INDEX_ROWS = 500
"""Rows of a table in the index of many scenes; pages of scenes show `ROWS`."""
FREQUENT = "mIoU of classes with"
"""Beginning of the name of the mean over classes with enough reference."""
CLASSES_TOLD = 4
"""Classes whose objects are counted in words."""
OBJECTS_SHOWN = 300
"""Rows of the table of instances on any page: the largest; a scene may have millions."""
HIDDEN = ("confusion",)
"""Tables that are shown as a figure."""
TITLES = {"asked": "What was asked, by scene"}
"""Of tables that are not called by their file's name."""
OF_AN_OBJECT = (
    "scene", "id", "class", "also", "score", "candidate", "predicted_iou", "stability", "source", "region",
    *units.SIZES, *(f"mask_{size}" for size in units.SIZES),
)  # fmt: skip
"""Columns that come first of objects that were prompted for."""
Tables = Mapping[str, pd.DataFrame]
"""By name of the file without its ending: regions, and any others."""


@dataclass(frozen=True)
class _Card:
    label: str
    value: str
    detail: str
    _: KW_ONLY
    unit: str = ""
    definition: str = ""
    interval: str = ""
    bad: bool = False


def scene_path(name: str) -> str:
    """A scene's page, from the run's folder."""
    return f"scenes/{name}/report.html"


def page_paths(record: RunRecord) -> list[str]:
    """The pages of a run, from its folder."""
    return [INDEX, *(scene_path(s.name) for s in record.mapped if len(record.scenes) > 1)]


def render_pages(
    record: RunRecord, previews: Callable[[str], Previews | None], tables: Tables
) -> Iterator[tuple[str, str]]:
    """Path in the run's folder and text of every page, one after the other.

    Args:
        record: of the run; ``files`` of its scenes are relative to its folder.
        previews: by scene name, asked once for each; None: shown without pictures.
        tables: ``regions``, in SI units, and those there are of ``metrics``, ``summary``,
            ``agreement``, ``confusion``, …
    """
    shown = {name: frame for name, frame in tables.items() if name == "regions" or len(frame)}
    if len(record.scenes) == 1:
        views = [
            scene_view(s, previews(s.name), {}, record.legend, shown.get("asked")) for s in record.mapped
        ]
        yield INDEX, _index(record, shown, views, {})
        return
    parts = {
        name: {str(scene): rows for scene, rows in frame.groupby("scene", sort=False)}
        for name, frame in shown.items()
        if "scene" in frame
    }
    thumbnails: dict[str, str] = {}
    for number, scene in enumerate(record.mapped):
        pictures = previews(scene.name)
        if pictures is not None:
            thumbnails[scene.name] = data_uri("webp", pictures.thumbnail)
        own = {name: part[scene.name] for name, part in parts.items() if scene.name in part}
        around = (record.mapped[number - 1] if number else None, *record.mapped[number + 1 : number + 2])
        yield scene_path(scene.name), _scene(record, scene, pictures, own, around)
    yield INDEX, _index(record, shown, [], thumbnails)


def _index(record: RunRecord, tables: Tables, views: Sequence[Any], thumbnails: Mapping[str, str]) -> str:
    classes, regions, metrics = record.legend, tables["regions"], tables.get("metrics")
    many = len(record.scenes) > 1
    links = {s.name: relative(scene_path(s.name)) for s in record.mapped} if many else {}
    totals = class_bars(regions, metrics, classes)
    charts = figures(regions, metrics, classes, links) if many else []
    matrix = confusion_matrix(tables.get("confusion"), classes)
    scenes = scene_table(record, regions, metrics, ROWS, tables.get("uncertainty")) if many else None
    also = {c.definition for c in charts} | ({"confusion"} if matrix else set())
    return render(
        "page.html",
        record=record,
        root="./",
        lead=_lead(record),
        finding=_finding(record, totals, tables),
        cards=[*_cards(record, totals, tables.get("summary")), *_object_cards(tables)],
        totals=totals,
        asked=_asked(tables, record.scenes, classes),
        failed=record.failed[:ROWS],
        told=FAILURES,
        scenes=scenes,
        thumbnails=thumbnails,
        links=links,
        views=views,
        charts=charts,
        matrix=matrix,
        tables=_tables(tables, record, INDEX_ROWS if many else ROWS, many),
        definitions=_definitions(tables, also),
        files=sorted(f"{name}.csv" for name in tables),
        listed=LISTED,
        model=_model(record.model) if record.model else (),
        provenance=_provenance(record),
        job=json.dumps(record.job, indent=2, ensure_ascii=False, default=str),
    )


def _scene(
    record: RunRecord,
    scene: SceneRecord,
    previews: Previews | None,
    tables: Tables,
    around: Sequence[SceneRecord | None],
) -> str:
    view = scene_view(scene, previews, tables, record.legend, tables.get("asked"))
    root = "../" * scene_path(scene.name).count("/")
    neighbours = [
        (word, other.name, relative(scene_path(other.name), root))
        for word, other in zip(("Previous", "Next"), around, strict=False)
        if other is not None
    ]
    return render(
        "scene.html",
        record=record,
        root=root,
        view=view,
        asked=_asked(tables, (scene,), record.legend),
        neighbours=neighbours,
        tables=_tables(tables, record, ROWS),
        definitions=_definitions(tables, {"confusion"} if view.matrix else set()),
        listed=LISTED,
        provenance=_provenance(record),
    )


def _tables(tables: Tables, record: RunRecord, limit: int, many: bool = False) -> list[PageTable]:
    """Those that are shown as tables; of ``many`` scenes the lowest IoU first, of one without its name."""
    result = []
    for name, frame in tables.items():
        if name in HIDDEN or (name == "asked" and not many):
            continue
        note, most = "", limit
        if not many:
            frame = frame.drop(columns="scene", errors="ignore")
        if name == "instances":
            most = min(limit, OBJECTS_SHOWN)
            frame, note = _largest_first(frame), "largest first"
        elif many and name == "metrics":
            frame, note = frame.sort_values("iou", kind="stable"), "lowest IoU first"
        title = TITLES.get(name) or name.replace("_", " ").capitalize()
        result.append(page_table(name, title, frame, record.legend, most, note))
    return result


def _largest_first(frame: pd.DataFrame) -> pd.DataFrame:
    """Objects by size, by elements where scenes have sizes of several kinds; what was asked comes first."""
    sizes = [c for c in units.SIZES if c in frame and frame[c].notna().any()]
    frame = frame.sort_values(sizes[0] if len(sizes) == 1 else "count", ascending=False, kind="stable")
    if "predicted_iou" not in frame:
        return frame
    first = [c for c in OF_AN_OBJECT if c in frame]
    return frame[[*first, *(c for c in frame.columns if c not in first)]]


def _asked(tables: Tables, scenes: Sequence[SceneRecord], classes: Sequence[ClassInfo]) -> PhraseView | None:
    table = tables.get("asked")
    return None if table is None else phrase_view(table, tables.get("instances"), scenes, classes)


def _definitions(tables: Tables, also: Collection[str]) -> list[Definition]:
    shown = [(str(column), name) for name in tables if name not in HIDDEN for column in tables[name]]
    columns = (describe_column(*pair) for pair in shown)
    metrics = set(tables["summary"]["metric"]) if "summary" in tables else set()
    return needed({*also, *tables, *(c.definition for c in columns if c)}, metrics)


def _lead(record: RunRecord) -> str:
    done = "measured, labels as given"
    if record.model:
        done = f"segmented with {record.model.title or record.model.name}"
    count = len(record.scenes)
    took = units.duration(units.between(record.started, record.finished))
    return f"{count:,} scene{'' if count == 1 else 's'} {done}, {units.moment(record.started)}, in {took}."


def _finding(record: RunRecord, totals: Sequence[Bars], tables: Tables) -> str:
    """The run's result in a sentence or two: the largest class, how well it was found, what is worst."""
    parts = []
    for unit, top in _largest(totals):
        parts.append(f"The largest class is {top.name}: {top.size} {unit}, {top.share} of what was measured.")
    if "asked" in tables:
        parts.insert(0, phrases_sentence(tables["asked"]))
    rows = _headline_rows(tables.get("summary"))
    mean = next((r for r in rows if r["metric"] == "mIoU"), None)
    if mean is not None and math.isfinite(mean["value"]):
        interval = _interval(mean)
        parts.append(f"mIoU is {units.number(mean['value'], 3)}{f' ({interval})' if interval else ''}.")
        scores = scene_scores(tables.get("metrics"), record.legend)["miou"].dropna().to_dict()
        if len(scores) > 1:
            worst = min(scores, key=scores.__getitem__)
            parts.append(f"The weakest scene is {worst} with {units.number(scores[worst], 3)}.")
    return " ".join(filter(None, parts))


def _largest(totals: Sequence[Bars]) -> Iterator[tuple[str, Bar]]:
    """Yield the unit and the largest class that is not background, of each kind of size."""
    for group in totals:
        present = [b for b in group.bars if not b.background and b.length > 0]
        if present:
            yield group.unit, max(present, key=lambda b: b.length)


def _interval(row: Mapping[Any, Any]) -> str:
    between = units.interval(row)
    return f"95 % interval {between} over {row.get('interval', 'resamples')}" if between else ""


def _cards(record: RunRecord, totals: Sequence[Bars], summary: pd.DataFrame | None) -> list[_Card]:
    failed = len(record.failed)
    reused = sum(1 for s in record.done if "predict" in s.reused)
    state = f"{failed} failed" if failed else "none failed"
    if reused:
        state += f"; {reused} reused from the store"
    count = f"{len(record.done):,}"
    cards = [_Card("Scenes done", count, state, unit=f"of {len(record.scenes):,}", bad=bool(failed))]
    cards.extend(_metric_card(row) for row in _headline_rows(summary))
    for unit, top in _largest(totals):
        detail = f"the largest class: {top.share} of what was measured"
        cards.append(_Card(top.name, top.size, detail, unit=unit, definition="size"))
    return cards


def _object_cards(tables: Tables) -> list[_Card]:
    """How many objects of which classes a model found, and the mean panoptic quality of scenes."""
    regions, cards = tables["regions"], []
    if "objects" in regions:
        whole = regions[regions["region"] == SCENE]
        found = whole.groupby("class", sort=False)["objects"].sum(min_count=1).dropna()
        counts = found[found > 0].sort_values(ascending=False, kind="stable")
        named = ", ".join(f"{n:,} {name}" for name, n in counts.head(CLASSES_TOLD).items())
        more = f" and {len(counts) - CLASSES_TOLD} classes more" if len(counts) > CLASSES_TOLD else ""
        cards.append(_Card("Objects", f"{int(found.sum()):,}", named + more))
    if "panoptic" in tables:
        scenes = tables["panoptic"]
        mean = scenes.loc[scenes["class"] == "all", ["pq", "sq", "rq"]].mean()
        defined = int(scenes.loc[scenes["class"] == "all", "pq"].notna().sum())
        parts = f"SQ {units.number(mean['sq'], 3)}, RQ {units.number(mean['rq'], 3)}"
        detail = f"over classes, then {defined:,} scene{'' if defined == 1 else 's'} · {parts}"
        cards.append(_Card("Panoptic quality", units.number(mean["pq"], 3), detail, definition="pq"))
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
    found = of_metric(name)
    return _Card(
        label, units.number(value, 3), f"over {over} · {', '.join(counts)}",
        definition=found.id if found else "", interval=_interval(row),
    )  # fmt: skip


def _model(model: ModelSummary) -> list[tuple[str, str]]:
    pairs = {
        "Card": model.name, "Provider": model.provider, "Trained on": model.data, "Scores": model.scores,
        "Classes": ", ".join(f"{c.value} {c.name}" for c in model.classes), "Licence": model.licence,
        "Source": model.source, "Weights": model.weights, "Fingerprint": model.fingerprint,
    }  # fmt: skip
    return [(k, v) for k, v in pairs.items() if v]


def _provenance(record: RunRecord) -> list[tuple[str, list[tuple[str, str]]]]:
    run = [("Job", record.job_name), ("Run", record.run_id)]
    run += [("Started", record.started), ("Finished", record.finished)]
    return [("Run", run), ("Versions", sorted(record.versions.items()))]
