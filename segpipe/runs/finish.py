"""Finish a run: write its tables, page, catalogue, manifest and record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from segpipe.config.card import Card, Class, nodata_of
from segpipe.config.classes import load_classes, with_found
from segpipe.config.job import Format, Job
from segpipe.config.loading import load_groups
from segpipe.export.bids import write_bids
from segpipe.export.hide_paths import hide_record
from segpipe.export.maps import has_nodata
from segpipe.export.run_folder import RunFolder, local_folder, now, write_manifest
from segpipe.models.weights import weights_fingerprint
from segpipe.pictures.archive import Previews, load_previews
from segpipe.pipeline.measure import Measured
from segpipe.prompts.phrases import phrase_classes
from segpipe.report.run_page import render_pages
from segpipe.runs.check import ResolvedJob
from segpipe.runs.references import mark_of
from segpipe.sources.readers import TRUSTED, trusted
from segpipe.store.lifecycle import forget_uses
from segpipe.store.location import write_atomic
from segpipe.tables.record import ClassInfo, ModelSummary, RunRecord, SceneRecord, dump_record
from segpipe.tables.run_tables import read_measured, run_tables
from segpipe.tables.table_files import columns_json, results_json, write_table

PACKAGES = ("segpipe", "torch", "prefect", "zarr", "rasterio", "nibabel", "numpy", "monai")
"""Versions that a report names."""


def finish_run(
    run: RunFolder, resolved: ResolvedJob, scenes: Sequence[SceneRecord], notes: Sequence[str] = ()
) -> RunRecord:
    """Write tables, ``run.json`` and the page of a run whose scenes have all ended."""
    job, settings = resolved.job, resolved.settings
    model = model_summary(resolved.card) if resolved.card else None
    listed = _class_infos(phrase_classes(job.prompts)) if job.prompts.asked else ()
    device = {"device": settings.device_class, "precision": settings.precision} if model else {}
    given = [] if model else ["labels measured as given: no model was run"]
    if trusted():
        given.append(f"files were opened in the process that computed, which trusts them ({TRUSTED}=1)")
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
    if job.outputs.hide_paths:
        record = hide_record(record)
    _write(run, record, measured)
    if not record.failed:  # else the same request goes on with what is stored
        forget_uses(run.out, run.job, mark_of(run.name))
    return record


def _given_classes(job: Job, measured: Mapping[str, Measured]) -> tuple[ClassInfo, ...]:
    """The classes listed; where none are, the values found in any scene."""
    if job.classes:
        return _class_infos(load_classes(job.classes))
    return _class_infos(with_found((), {v for m in measured.values() for v in m.values}))


def write_run(run: RunFolder, record: RunRecord) -> None:
    """Tables, page and record of a run, from its stages alone; the record last."""
    _write(run, record, read_measured(run.out, record.scenes))


def _write(run: RunFolder, record: RunRecord, measured: Mapping[str, Measured]) -> None:
    tables = run_tables(record, measured)
    keys = {s.name: s.keys["previews"] for s in record.mapped}

    def previews(scene: str) -> Previews | None:
        pictures = measured[scene].stage.read_bytes(keys[scene])
        return None if pictures is None else load_previews(pictures)

    with local_folder(run) as folder:
        written = ["results.json", "columns.json"]
        for name, table in tables.items():
            run.check()
            written += [path.name for path in write_table(table, folder / name)]
        write_atomic(folder / "results.json", results_json(record.job_name, record.run_id, tables).encode())
        write_atomic(folder / "columns.json", columns_json(tables).encode())
        for path, text in render_pages(record, previews, tables):
            run.check()
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / path, text.encode())
            written.append(path)
        run.check()
        _write_account(run, folder, record, measured, written)
        run.check()
        write_atomic(folder / "run.json", dump_record(record).encode())


def _write_account(
    run: RunFolder, folder: Path, record: RunRecord, measured: Mapping[str, Measured], written: Sequence[str]
) -> None:
    """Catalogue and derivatives, where the run has any, and the manifest of all its files.

    Args:
        folder: where to write (the run's own, or one that is uploaded).
        written: paths of the run's files that are there already.
    """
    paths, copies = list(written), {}
    if any("item" in scene.files for scene in record.mapped):
        from segpipe.export.stac import CATALOG, run_catalog  # here: runs of volumes never need pystac

        write_atomic(folder / CATALOG, run_catalog(record).encode())
        paths.append(CATALOG)
    if Format.bids.value in record.job.get("outputs", {}).get("formats", ()):
        gaps = record.legend and any(has_nodata(m) for m in measured.values())
        nodata = nodata_of(c.value for c in record.legend) if gaps else None
        derived = write_bids(run.location, folder, record, nodata)
        paths, copies = [*paths, *derived.written], derived.copies
    run.check()
    write_manifest(run.location, folder, record, paths, copies)


def _class_infos(classes: Sequence[Class]) -> tuple[ClassInfo, ...]:
    return tuple(
        ClassInfo(c.value, c.name, c.color, c.background, not (c.thing or c.background)) for c in classes
    )


def model_summary(card: Card) -> ModelSummary:
    """What a report says of the model."""
    return ModelSummary(
        name=card.name,
        title=card.title,
        provider=f"{card.provider} {card.architecture or ''}".strip(),
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
