"""A run: its folder, what happened to each scene, and the report made of it.

``<out>/<job>/<run>/`` is a view of the stages in the store: it can be made again from them. The
run's name is the time it began and a fingerprint of everything it depends on, so the same request
finds its own folder again, and a finished one is not done twice.
"""

from __future__ import annotations

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import obstore
import pandas as pd

from segpipe import ANSWER_VERSION, ENGINE_VERSION
from segpipe.classes import load_classes, with_found
from segpipe.config import Format, Job
from segpipe.errors import RequestError
from segpipe.export.bids import write_bids
from segpipe.export.manifest import MANIFEST, hash_files, write_manifest
from segpipe.groups import load_groups
from segpipe.map_files import has_nodata, no_data_value
from segpipe.measure import TALLY_VERSION, Measured
from segpipe.models.card import Card, Class
from segpipe.models.weights import weights_fingerprint
from segpipe.prompts.phrases import phrase_classes
from segpipe.report.page import page_paths, render_pages
from segpipe.report.pictures import Previews, load_previews
from segpipe.report.record import (
    ClassInfo,
    ModelSummary,
    RunRecord,
    SceneRecord,
    dump_record,
    load_record,
)
from segpipe.report.results import results_json
from segpipe.report.tables import (
    write_atomic,
    write_table,
)
from segpipe.run_tables import read_measured, run_tables
from segpipe.scene import model_parts, read_card
from segpipe.settings import Settings
from segpipe.sources.base import SceneRef
from segpipe.sources.common import matches
from segpipe.sources.mosaic import SCHEME as MOSAIC
from segpipe.sources.remote import is_remote, remote_identity
from segpipe.sources.stack import SCHEME as STACK
from segpipe.sources.stack import stack_files
from segpipe.store import is_url, join, open_store

T = TypeVar("T")

PACKAGES = ("segpipe", "torch", "prefect", "zarr", "rasterio", "nibabel", "numpy", "monai")
"""Versions that a report names."""


@dataclass(frozen=True)
class Run:
    """One application of a job to scenes. Small and picklable."""

    out: str
    job: str
    name: str
    started: str

    @property
    def location(self) -> str:
        """Folder or URL of the run."""
        return join(self.out, self.job, self.name)

    @property
    def report(self) -> str:
        """Where the page is."""
        return join(self.location, "report.html")


@contextmanager
def local_folder(run: Run) -> Iterator[Path]:
    """The run's folder to write files into; for a URL a temporary one that is uploaded at the end."""
    if not is_url(run.location):
        folder = Path(run.location)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="segpipe-") as name:
        yield Path(name)
        store = open_store(run.location)
        last = [Path(name) / MANIFEST, Path(name) / "run.json"]  # who sees the record finds the rest
        for path in [p for p in sorted(Path(name).rglob("*")) if p not in last] + last:
            if path.is_file():
                obstore.put(store, path.relative_to(name).as_posix(), path)


def fingerprint(job: Job, card: Card | None, settings: Settings, scenes: Sequence[SceneRef]) -> str:
    """Hash of everything a run's results depend on: what was asked, the model, and the inputs' state.

    Runner, workers, memory and block size are left out: they change no result.
    """
    asked = job.model_dump(mode="json")
    for key in ("runner", "workers", "least", "address", "cluster", "retries", "batch_minutes"):
        asked["compute"].pop(key)
    for key in ("memory", "block", "store"):
        asked["tiling"].pop(key)
    asked["outputs"] = {k: asked["outputs"][k] for k in ("formats", "scores", "uncertainty")}
    files, prompts = [s.uri for s in scenes], job.prompts
    asked["prompts"].pop("cache")
    grounder = read_card(prompts.grounder) if prompts.grounder else None
    if job.regions is not None:
        files += [job.regions.path, *([job.regions.name] if job.regions.name else [])]
    if job.reference is not None:
        files += [job.reference.path]
    files += [path for path in (job.labels, job.classes, job.measure.groups, prompts.path) if path]
    files += [prompts.earlier] if prompts.earlier else []
    prompted = card is not None and card.answers_prompts
    parts = {
        "asked": asked,
        "model": model_parts(card) if card else None,
        "card": card.model_dump(mode="json") if card else None,
        "grounder": [grounder.model_dump(mode="json"), model_parts(grounder)] if grounder else None,
        "settings": [settings.device_class, settings.precision, settings.batch],
        "inputs": [_state(uri) for uri in files],
        "versions": [ENGINE_VERSION, TALLY_VERSION, *([ANSWER_VERSION] if prompted else [])],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _state(uri: str) -> list[Any]:
    """A path with what tells that it changed: size and time of the file, or of a folder's or glob's files."""
    if uri.startswith(STACK):
        return [uri, *(_state(part) for part in stack_files(uri))]
    location = uri.removeprefix(MOSAIC).split("#")[0]
    if is_remote(location):
        return [uri, remote_identity(location)[0]]
    path = Path(location)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file())
    elif path.exists():
        files = [path]
    else:
        files = [] if is_url(location) else [p for p in matches(location) if p.is_file()]
    return [uri, *([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files)]


def open_run(job: Job, mark: str) -> tuple[Run, RunRecord | None]:
    """The run of this fingerprint: a new one, or the folder of the same request before.

    Returns:
        The run, and its record where it has ended and its files are still there.
    """
    store = open_store(join(job.outputs.dir, job.name))
    found = obstore.list_with_delimiter(store)["common_prefixes"]
    for folder in sorted(found, reverse=True):
        name = folder.rstrip("/")
        if name.endswith(f"-{mark}"):
            record = _read_record(store, name)
            started = record.started if record else now()
            if record is not None and not _files_are_there(store, name, record):
                record = None
            return Run(job.outputs.dir, job.name, name, started), record
    started = now()
    stamp = datetime.fromisoformat(started).strftime("%Y%m%d-%H%M%S")
    return Run(job.outputs.dir, job.name, f"{stamp}-{mark}", started), None


def _read_record(store: obstore.store.ObjectStore, name: str) -> RunRecord | None:
    try:
        return load_record(bytes(obstore.get(store, f"{name}/run.json").bytes()))
    except FileNotFoundError:
        return None


def _files_are_there(store: obstore.store.ObjectStore, name: str, record: RunRecord) -> bool:
    """Whether nobody took a page, table or picture out of a run's folder."""
    there = {meta["path"] for chunk in obstore.list(store, f"{name}/") for meta in chunk}
    files = {*page_paths(record), "results.json", "regions.csv", "regions.parquet"}
    files |= {file for scene in record.done for file in scene.files.values()}
    return {f"{name}/{file}" for file in files} <= there


def now() -> str:
    """Local time, ISO 8601 with its offset."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def finish_run(
    run: Run, job: Job, settings: Settings, scenes: Sequence[SceneRecord], notes: Sequence[str] = ()
) -> RunRecord:
    """Write tables, ``run.json`` and the page of a run whose scenes have all ended."""
    model = model_summary(read_card(job.model)) if job.model else None
    listed = _class_infos(phrase_classes(job.prompts)) if job.prompts.asked else ()
    device = {"device": settings.device_class, "precision": settings.precision} if model else {}
    given = [] if model else ["labels measured as given: no model was run"]
    measured = read_measured(run.out, scenes)
    record = RunRecord(
        job_name=job.name,
        run_id=run.name,
        started=run.started,
        finished=now(),
        job=job.model_dump(mode="json"),
        model=model,
        classes=listed if model else _given_classes(job, measured),
        versions={**_versions(), **device},
        scenes=tuple(scenes),
        groups=load_groups(groups, [s.name for s in scenes]) if (groups := job.measure.groups) else {},
        notes=tuple(n for n in (job.description, *given, *notes) if n),
    )
    _write(run, record, measured)
    return record


def _given_classes(job: Job, measured: Mapping[str, Measured]) -> tuple[ClassInfo, ...]:
    """The classes listed; where none are, the values found in any scene."""
    if job.classes:
        return _class_infos(load_classes(job.classes))
    return _class_infos(with_found((), {v for m in measured.values() for v in m.values}))


def write_run(run: Run, record: RunRecord) -> None:
    """Tables, page and record of a run, from its stages alone; the record last."""
    _write(run, record, read_measured(run.out, record.scenes))


def _write(run: Run, record: RunRecord, measured: Mapping[str, Measured]) -> None:
    tables = run_tables(record, measured)
    keys = {s.name: s.keys["previews"] for s in record.done}

    def previews(scene: str) -> Previews | None:
        pictures = measured[scene].stage.read_bytes(keys[scene])
        return None if pictures is None else load_previews(pictures)

    with local_folder(run) as folder:
        written = ["results.json"]
        for name, table in tables.items():
            written += [path.name for path in write_table(table, folder / name)]
        write_atomic(folder / "results.json", results_json(record.job_name, record.run_id, tables).encode())
        for path, text in render_pages(record, previews, tables):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / path, text.encode())
            written.append(path)
        _write_account(run, folder, record, measured, written)
        write_atomic(folder / "run.json", dump_record(record).encode())


def _write_account(
    run: Run, folder: Path, record: RunRecord, measured: Mapping[str, Measured], written: Sequence[str]
) -> None:
    """Catalogue and derivatives, where the run has any, and the manifest of all its files.

    Args:
        folder: where to write (the run's own, or one that is uploaded).
        written: paths of the run's files that are there already.
    """
    paths, copies = list(written), {}
    if any("item" in scene.files for scene in record.done):
        from segpipe.export.stac import CATALOG, run_catalog  # here: runs of volumes never need pystac

        write_atomic(folder / CATALOG, run_catalog(record).encode())
        paths.append(CATALOG)
    if Format.bids.value in record.job.get("outputs", {}).get("formats", ()):
        gaps = record.legend and any(has_nodata(m) for m in measured.values())
        nodata = no_data_value(c.value for c in record.legend) if gaps else None
        derived = write_bids(run.location, folder, record, nodata)
        paths, copies = [*paths, *derived.written], derived.copies
    write_manifest(run.location, folder, record, hash_files(folder, paths), copies)


def read_tables(run: Run) -> tuple[pd.DataFrame, pd.DataFrame | None, pd.DataFrame | None]:
    """Regions, metrics and summary of a finished run; the latter two None without a reference."""
    store = open_store(run.location)
    tables: list[pd.DataFrame | None] = []
    for name in ("regions", "metrics", "summary"):
        try:
            data = bytes(obstore.get(store, f"{name}.parquet").bytes())
        except FileNotFoundError:
            tables.append(None)
            continue
        tables.append(pd.read_parquet(io.BytesIO(data)))
    regions, metrics, summary = tables
    assert regions is not None
    return regions, metrics, summary


def _class_infos(classes: Sequence[Class]) -> tuple[ClassInfo, ...]:
    return tuple(
        ClassInfo(c.value, c.name, c.color, c.background, not (c.thing or c.background)) for c in classes
    )


def model_summary(card: Card) -> ModelSummary:
    """What a report says of the model."""
    return ModelSummary(
        name=card.name,
        title=card.title,
        provider=f"{card.provider.value} {card.architecture or ''}".strip(),
        data=card.data,
        scores=card.scores,
        limits=card.limits,
        licence=card.licence,
        source=card.source,
        weights=card.weights,
        fingerprint=weights_fingerprint(card),
        classes=_class_infos(card.classes),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def load_run(location: str) -> tuple[Run, RunRecord]:
    """A run by its folder or URL, with its record.

    Raises:
        RequestError: no run lies there.
    """
    base = location.rstrip("/")
    out, job, name = base.rsplit("/", 2) if base.count("/") >= 2 else ("", "", base)
    record = None
    if is_url(base) or Path(base).is_dir():
        record = _read_record(open_store(join(out, job) if job else str(Path(base).parent)), name)
    if record is None:
        raise RequestError(f"{location}: no run here (no run.json); give a folder <out>/<job>/<run>")
    if not job:
        folder = Path(base).absolute()
        out, job = str(folder.parent.parent), folder.parent.name
    return Run(out, job, name, record.started), record
