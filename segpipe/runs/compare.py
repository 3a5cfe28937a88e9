"""Two runs held against each other: what changed, what was set otherwise, and what is not like with like."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import pandas as pd

from segpipe.errors import RequestError, SegpipeError
from segpipe.geometry.alignment import same_grid
from segpipe.report.comparison import Comparison, Difference, render_comparison
from segpipe.report.run_changes import (
    BOTH,
    KEY,
    NO_REGION,
    SIDES,
    RunSide,
    class_totals,
    compare_tables,
    side_by_side,
)
from segpipe.runs.find_run import load_run, read_tables
from segpipe.sources import open_source
from segpipe.sources.base import reason
from segpipe.store.location import check_writable, is_url, join, open_store, write_atomic
from segpipe.tables.record import GeometrySummary, RunRecord, SceneRecord
from segpipe.tables.table_files import csv_bytes, parquet_bytes

_LISTED = 3
"""Names told in a warning; the table has all."""
_SHOWN = 400
"""Characters shown of a value that differs."""


def compare_runs(before: str, after: str, out: str = "") -> Comparison:
    """Compare two finished runs, and write ``compare.csv``, ``compare.parquet`` and ``compare.html``.

    Args:
        before: folder or URL of the first run.
        after: of the second; changes are after − before.
        out: folder or URL of the three files; empty: ``compare-<first run>`` in the second run's folder.

    Raises:
        RequestError: one of the two is no run, its tables are gone, they have nothing in common, or ``out``
            cannot be written.
    """
    first, second = _load(before), _load(after)
    rows = compare_tables(first, second)
    if not (rows["state"] == BOTH).any():
        raise RequestError(f"{before} and {after}: {_nothing_in_common(first, second)}")
    found = Comparison(
        before=first.record,
        after=second.record,
        places=(first.location, second.location),
        rows=rows,
        totals=class_totals(rows),
        differences=tuple(_differences(first.record, second.record)),
        warnings=tuple(_warnings(first, second, rows)),
        notes=tuple(_notes(first, second)),
        location=out.rstrip("/") or join(second.location, f"compare-{first.name}"),
    )
    _write(found)
    return found


def _write(found: Comparison) -> None:
    files = {
        "compare.csv": csv_bytes(found.rows),
        "compare.parquet": parquet_bytes(found.rows),
        "compare.html": render_comparison(found).encode(),
    }
    try:
        check_writable(found.location)
    except RequestError as error:
        raise RequestError(str(error).replace("outputs.dir", "out", 1)) from error
    store = open_store(found.location)
    for name, data in files.items():
        if is_url(found.location):
            obstore.put(store, name, data)
        else:
            write_atomic(Path(found.location) / name, data)


def _load(location: str) -> RunSide:
    run, record = load_run(location)
    try:
        obstore.head(open_store(run.location), "regions.parquet")
    except FileNotFoundError as error:
        raise RequestError(
            f"{location}: regions.parquet is not there; make it again with `segpipe report {location}`"
        ) from error
    regions, metrics, _ = read_tables(run)
    try:
        return RunSide(run.location, record, side_by_side(regions, metrics))
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{location}: regions.parquet or metrics.parquet is no table of a run ({reason(error)}); make it "
            f"again with `segpipe report {location}`"
        ) from error


# ------------------------------------------------------------------ what differs


def _differences(before: RunRecord, after: RunRecord) -> Iterator[Difference]:
    """Model, job and versions, key by key."""
    first, second = (_facts(record) for record in (before, after))
    for key in (*first, *(k for k in second if k not in first)):
        old, new = first.get(key, "—"), second.get(key, "—")
        if old != new:
            yield Difference(key, *(textwrap.shorten(v, _SHOWN, placeholder=" …") for v in (old, new)))


def _facts(record: RunRecord) -> dict[str, str]:
    """What a run was made with, flat."""
    model = record.model
    facts = {"model": model.name if model else "none: labels measured as given"}
    if model:
        facts |= {f"model.{k}": getattr(model, k) for k in ("provider", "weights", "fingerprint")}
    facts["classes"] = ", ".join(f"{c.value} {c.name}" for c in record.legend)
    facts |= {f"job.{key}": value for key, value in _flat(record.job)}
    return facts | {f"version of {name}": value for name, value in sorted(record.versions.items())}


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """``{"tiling": {"blend": "trim"}}`` as (``tiling.blend``, ``trim``)."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], {}):
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


def _notes(before: RunSide, after: RunSide) -> Iterator[str]:
    """Where the work of the two runs parts, by the keys of their stages."""
    if before.location == after.location:
        yield "The two are the same run."
    pairs = [(a, b) for _, a, b in _common(before, after) if a.state == b.state == "done"]
    for stage, what in (("labels", "Label maps"), ("measure", "Measurements (labels, regions, reference)")):
        other = sum(a.keys.get(stage) != b.keys.get(stage) for a, b in pairs)
        where = f"another key in {other} of {len(pairs)}" if other else f"the same key in {len(pairs)}"
        yield f"{what}: {where} scenes done in both runs."


def _common(before: RunSide, after: RunSide) -> Iterator[tuple[str, SceneRecord, SceneRecord]]:
    theirs = after.scenes
    return ((name, own, theirs[name]) for name, own in before.scenes.items() if name in theirs)


def _nothing_in_common(before: RunSide, after: RunSide) -> str:
    first, second = (_some(sorted(side.scenes)) or "none" for side in (before, after))
    common = [name for name, *_ in _common(before, after)]
    if not common:
        return f"no scene in common: before {first}; after {second}; give two runs over the same scenes"
    return (
        f"nothing measured in both: each scene in common ({_some(common)}) failed in one of the runs, has no "
        "valid pixel, or has other classes; give two runs that measure the same classes"
    )


# ------------------------------------------------------------------ like with like?


def _warnings(before: RunSide, after: RunSide, rows: pd.DataFrame) -> Iterator[str]:
    """Why a change may come from something else than the model or its settings."""
    yield from _other_scenes(before, after)
    moved = []
    for name, own, other in _common(before, after):
        if own.state == other.state == "done" and (text := _other_grid(before, after, own, other)):
            moved.append(name)
            yield f"scene {name}: other geometry: {text}"
    yield from _other_settings(before.record, after.record)
    yield from _other_measure(rows[~rows["scene"].isin(moved)])
    first, second = ({c.name: c.value for c in side.record.legend} for side in (before, after))
    if not (before.open_classes or after.open_classes) and set(first) != set(second):
        only = [_some(sorted(a.keys() - b.keys())) or "none" for a, b in ((first, second), (second, first))]
        yield f"other classes: only before: {only[0]}; only after: {only[1]}"
    renamed = [name for name in first if second.get(name, first[name]) != first[name]]
    if renamed:
        yield f"{len(renamed)} classes have another value in label maps: {_some(renamed)}; matched by name"


def _other_scenes(before: RunSide, after: RunSide) -> Iterator[str]:
    for side, own, other in (("before", before, after), ("after", after, before)):
        only = [name for name in own.scenes if name not in other.scenes]
        if only:
            yield f"other scenes: {len(only)} only {side}: {_some(only)}"
        if own.failed:
            yield f"{len(own.failed)} scenes failed {side}: {_some(sorted(own.failed))}"
    files = [f"{name} ({a.uri} → {b.uri})" for name, a, b in _common(before, after) if a.uri != b.uri]
    if files:
        yield f"{len(files)} scenes of the same name come from another file: {_some(files)}"


def _other_grid(before: RunSide, after: RunSide, own: SceneRecord, other: SceneRecord) -> str:
    """How two scenes of one name differ in place, in words; empty: they do not.

    The label files tell it, where both runs have one and the scene was not the same to the bit; else
    shape, spacing and CRS as recorded.
    """
    ingest = own.keys.get("ingest")
    if ingest and ingest == other.keys.get("ingest"):
        return ""
    if own.geometry != other.geometry:
        return f"{_words(own.geometry)} → {_words(other.geometry)}"
    files = [
        join(side.location, scene.files["labels"])
        for side, scene in ((before, own), (after, other))
        if "labels" in scene.files
    ]
    if len(files) < len(SIDES):
        return ""
    try:
        first, second = (open_source(file) for file in files)
    except SegpipeError:
        return ""  # taken away, or behind a URL that cannot be read in place
    with first, second:
        try:
            same_grid(first.geometry, second.geometry)
        except SegpipeError:
            return f"{_words(own.geometry)} in both, at another place"
    return ""


def _words(geometry: GeometrySummary | None) -> str:
    if geometry is None:
        return "unknown"
    parts = [" × ".join(map(str, geometry.shape))]
    if geometry.spacing:
        parts.append(f"{' × '.join(f'{v:g}' for v in geometry.spacing)} {geometry.unit}".strip())
    return ", ".join([*parts, *(p for p in (geometry.crs, geometry.orientation) if p)])


def _other_settings(before: RunRecord, after: RunRecord) -> Iterator[str]:
    """Region layer and reference as asked for."""
    for key, name in (("regions", "region layer"), ("reference", "reference")):
        first, second = (record.job.get(key) for record in (before, after))
        if first != second:
            asked = ([v for k, v in _flat(s or {}) if (k, v) != ("divisor", "0")] for s in (first, second))
            sides = [", ".join(values) or "none" for values in asked]
            yield f"other {name}: {' → '.join(sides)}"


def _other_measure(rows: pd.DataFrame) -> Iterator[str]:
    """What the numbers tell of regions and reference that changed under the same name."""
    lacking = rows[(rows["state_before"] == NO_REGION) | (rows["state_after"] == NO_REGION)]
    regions = lacking[KEY[:2]].drop_duplicates()
    if len(regions):
        yield f"{len(regions):,} regions are in one run only: {_some_rows(regions)}"
    groups = rows.groupby(KEY[:2], sort=False)
    count = groups[[f"count_{side}" for side in SIDES]].sum()
    seen = groups[[f"seen_{side}" for side in SIDES]].first()
    whole = count.to_numpy() / seen.where(seen > 0).to_numpy()
    for values, text in (
        (whole, "have another size: the layer is not the same"),
        (seen.to_numpy(), "are seen to another part: the valid pixels are not the same"),
    ):
        defined = ~np.isnan(values).any(axis=1)
        other = defined & ~np.isclose(values[:, 0], values[:, 1], rtol=1e-9, atol=0)
        if other.any():
            yield f"{other.sum():,} regions {text}: {_some_rows(seen.index[other].to_frame())}"
    truth = [rows[f"tp_{side}"] + rows[f"fn_{side}"] for side in SIDES]
    changed = rows[truth[0].notna() & truth[1].notna() & (truth[0] != truth[1])]
    if len(changed):
        yield f"{len(changed):,} rows have another amount of reference (tp + fn): {_some_rows(changed[KEY])}"


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more."""
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _some_rows(keys: pd.DataFrame) -> str:
    """`_some` of the names in columns of `KEY`: ``water in north of scene1``."""
    first = [" of ".join(names[::-1]) for names in keys.head(_LISTED).itertuples(index=False)]
    return _some([*first, *[""] * (len(keys) - len(first))])
