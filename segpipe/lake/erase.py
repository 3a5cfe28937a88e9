"""What is kept of one subject or scene, found and removed: in store, runs, ledgers and Prefect's history.

A stage and a scene's folder are removed whole; a run of other scenes too is written again without this one.
What cannot be removed from here is listed, and so is what still names the subject.
"""

from __future__ import annotations

import json
import re
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from segpipe.errors import RequestError, SegpipeError
from segpipe.export.run_folder import RunFolder
from segpipe.lake.ledger import LAKE_FOLDER
from segpipe.runs.finish import write_run
from segpipe.store.location import STORE_FOLDER, is_url
from segpipe.tables.record import RunRecord, SceneRecord, load_record

ERASED = "erased"
"""Stands in Prefect's history where the subject stood."""
HOLD_TEXTS = ("artifact", "artifact_collection", "event_resources", "events", "log")
"""Tables of Prefect whose rows go: they hold pictures, or are of one thing only."""
PIECE = 1 << 24
"""Bytes of a file looked through at once."""


@dataclass
class Erased:
    """What was removed, and what was not."""

    removed: list[tuple[str, str]] = field(default_factory=list)
    """What it was, and where."""
    left: list[tuple[str, str]] = field(default_factory=list)
    """Where, and why."""


class Subject:
    """A subject of BIDS (``sub-01``) or a scene, by its name."""

    def __init__(self, name: str) -> None:
        """Of a name.

        Raises:
            RequestError: it names nothing.
        """
        if not re.search(r"\w", name):
            raise RequestError(f"{name!r}: give a subject such as sub-01, or a scene's name")
        self.name = name
        self._bids = name.startswith("sub-")
        inside = r"[A-Za-z0-9]" if self._bids else r"[\w-]"
        self._pattern = re.compile(rf"(?<!{inside}){re.escape(name)}(?!{inside})")
        self._bytes = re.compile(self._pattern.pattern.encode())

    def is_named(self, text: str) -> bool:
        """Whether a text names it, as a word of its own."""
        return bool(self._pattern.search(text))

    def is_scene(self, scene: SceneRecord) -> bool:
        """Whether a scene is its: a scene by its whole name, a subject also by the path of its file."""
        return scene.name == self.name or (self._bids and self.is_named(f"{scene.name} {scene.uri}"))

    def is_recorded(self, text: str) -> bool:
        """Whether a record of ours (JSON) is of it."""
        return self.is_named(text) if self._bids else json.dumps(self.name) in text

    def is_path(self, below: Path) -> bool:
        """Whether a path in the folder of results is its: a scene's folder, or a file named by BIDS."""
        parts = below.parts[2:]
        if self._bids:
            return any(map(self.is_named, parts))
        return any(pair == ("scenes", self.name) for pair in pairwise(parts))

    def is_in(self, path: Path) -> bool:
        """Whether a file names it."""
        tail = b""
        with path.open("rb") as file:
            while piece := file.read(PIECE):
                if self._bytes.search(tail + piece):
                    return True
                tail = piece[-len(self.name) - 1 :]
        return False

    def without(self, text: str) -> str:
        """The text with another word in its place."""
        return self._pattern.sub(ERASED, text)


def erase(name: str, folder: str, home: Path, server: str | None, *, dry_run: bool) -> Erased:
    """Remove what is kept of a subject or scene.

    Args:
        name: of the subject (``sub-01``) or scene.
        folder: of results, `outputs.dir` of the jobs.
        home: Prefect's own folder, with its database.
        server: address of a Prefect server in use, whose history is listed as out of reach.
        dry_run: only find it.

    Raises:
        RequestError: there is no such folder.
    """
    root = Path(folder).absolute()
    if is_url(folder) or not root.is_dir():
        raise RequestError(f"--in {folder}: no folder on this machine; give a job's outputs.dir")
    subject, found = Subject(name), Erased()
    runs = [*_runs(root, subject)]
    scenes = [scene for _, record in runs for scene in record.scenes if subject.is_scene(scene)]
    for stage in _stages(root, subject, scenes):
        _remove(stage, "stage", found, dry_run)
    _erase_files(root, subject, found, dry_run)  # before the runs, whose manifests name what is there
    for path, record in runs:
        _erase_run(root, path, record, subject, found, dry_run)
    _erase_history(home / "prefect.db", subject, found, dry_run)
    if server:
        found.left.append((server, "delete its flow runs, artifacts and events of this subject there"))
    if not dry_run:
        found.left += [
            (str(path.relative_to(root)), "still names it")
            for path in _files(root)
            if subject.is_path(path.relative_to(root)) or subject.is_in(path)
        ]
    return found


def _runs(root: Path, subject: Subject) -> Iterator[tuple[Path, RunRecord]]:
    """Finished runs with a scene of the subject."""
    for path in sorted(root.glob("*/*/run.json")):
        record = load_record(path.read_bytes())
        if any(subject.is_scene(scene) for scene in record.scenes):
            yield path.parent, record


def _stages(root: Path, subject: Subject, scenes: list[SceneRecord]) -> list[Path]:
    """Stages that runs record for its scenes, and those that name it themselves, of runs that never ended."""
    keys = {key for scene in scenes for key in scene.keys.values()}
    uris = {json.dumps(scene.uri) for scene in scenes}

    def is_its(stage: Path) -> bool:
        made = [path for name in ("stage.json", "info.json") if (path := stage / name).is_file()]
        text = "".join(path.read_text(errors="replace") for path in made)
        return stage.name in keys or subject.is_recorded(text) or any(uri in text for uri in uris)

    return [stage for stage in sorted((root / STORE_FOLDER).glob("*")) if stage.is_dir() and is_its(stage)]


def _erase_run(
    root: Path, path: Path, record: RunRecord, subject: Subject, found: Erased, dry_run: bool
) -> None:
    """Remove a run of this subject alone; make one of others too again without it."""
    gone = {scene.name for scene in record.scenes if subject.is_scene(scene)}
    scenes = tuple(scene for scene in record.scenes if scene.name not in gone)
    if not scenes:
        _remove(path, "run", found, dry_run)
        return
    for name in sorted(gone):
        _remove(path / "scenes" / name, "scene of a run", found, dry_run)
    found.removed.append(("rows of tables, pages", str(path.relative_to(root))))
    if dry_run:
        return
    job = dict(record.job)
    job["scenes"] = [uri for uri in job.get("scenes", []) if not subject.is_named(str(uri))]
    groups = {scene: group for scene, group in record.groups.items() if scene not in gone}
    for page in path.glob("scenes/*/report.html"):  # they have links to each other
        page.unlink()
    run = RunFolder(str(root), path.parent.name, path.name, record.started)
    try:
        write_run(run, replace(record, scenes=scenes, job=job, groups=groups))
    except SegpipeError as error:  # stages of the others are gone: their numbers stay nowhere but in files
        found.left.append((str(path.relative_to(root)), f"its tables cannot be made again ({error})"))


def _erase_files(root: Path, subject: Subject, found: Erased, dry_run: bool) -> None:
    """Remove files named for it, such as derivatives, and what a ledger has of it."""
    for entry in sorted((root / LAKE_FOLDER).glob("*/**/*.json")):
        if subject.is_recorded(entry.read_text(errors="replace")):
            _remove(entry, "entry of a ledger", found, dry_run)
            ledger = root / LAKE_FOLDER / entry.relative_to(root / LAKE_FOLDER).parts[0]
            _remove(ledger / "leases" / entry.stem, "lease", found, dry_run)
    for comparison in sorted(root.glob("*/*/compare-*")):
        if any(map(subject.is_in, _files(comparison))):
            _remove(comparison, "comparison", found, dry_run)
    begun = {path for path in root.glob("[!.]*/*") if not (path / "run.json").exists()}
    for path in sorted(root.glob("[!.]*/*/**/*")):
        unfinished = path.is_file() and begun & set(path.parents) and subject.is_in(path)
        if unfinished or subject.is_path(path.relative_to(root)):
            _remove(path, "file", found, dry_run)


def _erase_history(database: Path, subject: Subject, found: Erased, dry_run: bool) -> None:
    """Remove rows of Prefect's own database on this machine, and the name where a row is of others too."""
    if not database.is_file():
        return
    try:
        with closing(sqlite3.connect(database, timeout=30)) as history:
            history.create_function("names_it", 1, lambda text: subject.is_named(str(text or "")))
            history.create_function(
                "without", 1, lambda text: subject.without(text) if isinstance(text, str) else text
            )
            count = sum(_erase_rows(history, table, dry_run) for table in _tables(history))
            if count:
                found.removed.append((f"{count} rows of Prefect's history", str(database)))
            if count and not dry_run:
                history.commit()
                history.execute("VACUUM")
                history.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    except sqlite3.Error as error:
        found.left.append((str(database), f"cannot be written ({error}); stop the server that uses it"))


def _tables(history: sqlite3.Connection) -> list[str]:
    rows = history.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE '%VIRTUAL%'")
    return [str(name) for (name,) in rows if not str(name).startswith("sqlite_")]


def _erase_rows(history: sqlite3.Connection, table: str, dry_run: bool) -> int:
    """Rows that name it: removed, or without it."""
    columns = [f'"{row[1]}"' for row in history.execute(f'PRAGMA table_info("{table}")')]
    where = " OR ".join(f"names_it({column})" for column in columns)
    (count,) = history.execute(f'SELECT count(*) FROM "{table}" WHERE {where}').fetchone()
    if count and not dry_run:
        if table in HOLD_TEXTS:
            history.execute(f'DELETE FROM "{table}" WHERE {where}')
        else:
            changes = ", ".join(f"{column} = without({column})" for column in columns)
            history.execute(f'UPDATE "{table}" SET {changes} WHERE {where}')
    return int(count)


def _files(root: Path) -> Iterator[Path]:
    """Files that may name a subject: of the store's, whose arrays are large, only the records."""
    for path in root.rglob("*"):
        if path.is_file() and (STORE_FOLDER not in path.parts or path.suffix == ".json"):
            yield path


def _remove(path: Path, what: str, found: Erased, dry_run: bool) -> None:
    """Remove a file or folder, or tell why it stays."""
    if not path.exists():
        return
    try:
        if not dry_run:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        found.left.append((str(path), f"cannot be removed ({error.strerror})"))
        return
    found.removed.append((what, str(path)))
