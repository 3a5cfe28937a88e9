"""Which runs refer to which stages of a store, and which of these must stay."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import obstore

from segpipe.config.job import Keep
from segpipe.errors import RequestError
from segpipe.export.run_folder import RECORD, RunFolder
from segpipe.pipeline.scene import MeasurableScene
from segpipe.store.lifecycle import (
    Leftover,
    StoredStage,
    Use,
    choose,
    look_at,
    note_use,
    pins,
    small_leftovers,
    stage_keys,
    uses,
)
from segpipe.store.location import DRAFT, STORE_FOLDER, is_url, join, open_store, read_object
from segpipe.store.stage import Stage
from segpipe.tables.record import RunRecord, load_record

_DRAFT = re.compile(rf"^\.(.+{re.escape(DRAFT)}\w{{8}}|segpipe-write-test-[0-9a-f]{{16}})$")
"""Hidden files and folders of `segpipe.export.staging` and `segpipe.store.location`."""
KEPT = {"ingest": Keep.image, "predict": Keep.labels, "labels": Keep.labels}
"""Stages of a record that `outputs.keep` keeps."""


@dataclass(frozen=True)
class Reference:
    """A run's reference to a stage."""

    key: str
    run: str
    """Name of the run; of one without a record ``…-`` and the mark that its name ends with."""
    scene: str
    pinned: str
    """Why the stage stays for it: unfinished, keep, report; empty: it may go."""
    used: float
    """When, in seconds since 1970."""


def note_stages(run: RunFolder, scene: MeasurableScene, *more: Stage) -> None:
    """Note the stages of a scene that a run begins with, and further ones: they stay until it is finished."""
    found = [getattr(scene, field.name) for field in fields(scene)]
    found = [getattr(value, "stage", value) for value in found]
    keys = {stage.key for stage in (*found, *more) if isinstance(stage, Stage)}
    note_use(run.out, Use(run.job, mark_of(run.name), scene.ref.name, tuple(sorted(keys)), 0.0))


def mark_of(run: str) -> str:
    """The end of a run's name, which the same request has again."""
    return run.rpartition("-")[2]


def references(out: str) -> list[Reference]:
    """What all runs of an output location refer to.

    Raises:
        RequestError: a run's record cannot be read, so that nobody knows what it refers to.
    """
    finished: dict[tuple[str, str], float] = {}
    found: list[Reference] = []
    for job, name, record, written in _records(out):
        if not record.failed:  # else the same request goes on with what is stored
            finished[job, mark_of(name)] = max(written, finished.get((job, mark_of(name)), 0.0))
        keep = set(record.job.get("outputs", {}).get("keep", ()))
        for scene in record.mapped:
            for stage, key in scene.keys.items():
                why = "report" if stage == "measure" else ""
                why = "keep" if stage in KEPT and KEPT[stage].value in keep else why
                found.append(Reference(key, name, scene.name, why, written))
    for use in uses(out):
        if use.noted > finished.get((use.job, use.mark), 0.0):
            found += [Reference(k, f"…-{use.mark}", use.scene, "unfinished", use.noted) for k in use.keys]
    return found


def _records(out: str) -> Iterator[tuple[str, str, RunRecord, float]]:
    store = open_store(out)
    for job in obstore.list_with_delimiter(store)["common_prefixes"]:
        if job.startswith("."):
            continue
        for folder in obstore.list_with_delimiter(store, job)["common_prefixes"]:
            path = f"{folder.rstrip('/')}/{RECORD}"
            data = read_object(store, path)
            if data is None:
                continue
            try:
                record = load_record(data)
            except RequestError as error:
                raise RequestError(f"{join(out, path)}: {error}; repair or remove that run first") from error
            written = obstore.head(store, path)["last_modified"].timestamp()
            yield job.strip("/"), folder.rstrip("/").rpartition("/")[2], record, written


def drafts_of_runs(out: str) -> list[Leftover]:
    """Hidden drafts in the folders of runs, and beside them: of writers at work, or of killed ones."""
    if is_url(out):
        return []  # an object is there whole or not at all
    found = []
    for path in [*Path(out).glob(".*"), *Path(out).glob("[!.]*/**/.*")]:
        if path.name != STORE_FOLDER and _DRAFT.match(path.name):
            stat = path.stat()
            size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else 0
            found.append(Leftover(path.relative_to(out).as_posix(), size or stat.st_size, stat.st_mtime))
    return found


@dataclass(frozen=True, kw_only=True)
class Survey:
    """All stages of an output location, who refers to them, and what nobody refers to."""

    out: str
    stages: tuple[StoredStage, ...]
    """With the scene and the last use that references say."""
    references: dict[str, tuple[Reference, ...]]
    """By key."""
    leftovers: tuple[Leftover, ...]
    pins: tuple[str, ...]

    def pinned(self, key: str, scene: str = "", without: str = "") -> str:
        """Why a stage stays; empty: it may go.

        Args:
            key: of the stage.
            scene: that the stage is of.
            without: name of a run whose references do not count.
        """
        found = self.references.get(key, ())
        names = [n for n in self.pins if n == scene or any(n == r.scene or _is_named(r, n) for r in found)]
        why = [r.pinned for r in found if r.pinned and not (without and _is_named(r, without))]
        return ", ".join(dict.fromkeys([*(f"pin {name}" for name in names), *why]))

    def going(self, older: float | None, size: int | None, run: str) -> list[StoredStage]:
        """The stages that retention removes (`segpipe.store.lifecycle.choose`).

        Args:
            older: seconds since the last use.
            size: bytes that may stay.
            run: name of a run that is let go of: what nobody else refers to goes; empty: none.

        Raises:
            RequestError: there is no such run.
        """
        known = [r for found in self.references.values() for r in found]
        if run and not any(_is_named(r, run) for r in known):
            names = ", ".join(sorted({r.run for r in known})) or "none"
            raise RequestError(f"--run: found {run!r}, which refers to nothing in the store; valid: {names}")
        pinned = {s.key for s in self.stages if self.pinned(s.key, s.scene, run)}
        own = {key for key, found in self.references.items() if run and all(_is_named(r, run) for r in found)}
        return choose(self.stages, pinned, own, older, size)


def _is_named(reference: Reference, name: str) -> bool:
    unfinished = reference.run.startswith("…") and mark_of(name) == mark_of(reference.run)
    return name == reference.run or unfinished


def survey(out: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Survey:
    """Look at all of a store.

    Args:
        out: the output location.
        progress: told the stages that were looked at, and how many there are.

    Raises:
        RequestError: as `references`; or there is no store.
    """
    keys, found = stage_keys(out), by_key(references(out))
    stages, left = [], [*small_leftovers(out), *drafts_of_runs(out)]
    for number, key in enumerate(keys, start=1):
        stage, more = look_at(out, key)
        left += more
        progress(number, len(keys))
        if not stage.files:
            continue  # dropped: an empty folder
        mine = found.get(key, ())
        scene = stage.scene or ", ".join(sorted({r.scene for r in mine}))
        stages.append(replace(stage, scene=scene, used=max([stage.used, *(r.used for r in mine)])))
    return Survey(
        out=out, stages=tuple(stages), references=found, leftovers=tuple(left), pins=tuple(pins(out))
    )


def by_key(found: Sequence[Reference]) -> dict[str, tuple[Reference, ...]]:
    """References by key."""
    listed: dict[str, list[Reference]] = {}
    for reference in found:
        listed.setdefault(reference.key, []).append(reference)
    return {key: tuple(of_key) for key, of_key in listed.items()}
