"""What became of a lake's scenes: done, in quarantine, or tried; kept beside the results.

``<out>/.lake/<scan>-<mark>/`` holds a small object for each scene, named by the scene with its content
(`LakeEntry.digest`): ``done/``, ``quarantine/``, ``tries/``. The mark is a fingerprint of what is done with a
scene: with another model or other regions every scene is new.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import obstore
from obstore.store import ObjectStore
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from segpipe.config.parsing import parse_json
from segpipe.errors import DamagedError
from segpipe.lake.entry import LakeEntry
from segpipe.sources.base import reason
from segpipe.store.location import delete_objects, join, open_store, read_object, sealed, unsealed
from segpipe.tables.record import SceneRecord

LAKE_FOLDER = ".lake"
TRIES = "tries"
"""Folder of the tries that have not ended well: begun, and maybe failed."""
PAGE = 1000
"""Objects asked for at once in a listing."""

_log = logging.getLogger(__name__)
_SCENES = TypeAdapter(SceneRecord)
_OBJECTS = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Quarantined:
    """A scene that is left alone until somebody releases it, or its content changes."""

    digest: str
    name: str
    uri: str
    reason: str
    since: str
    """ISO 8601."""
    tries: int


class _Tried(TypedDict, total=False):
    tries: int
    open: str


class _Quarantine(TypedDict):
    name: str
    uri: str
    reason: str
    at: str
    tries: int


class _Begun(TypedDict):
    started: str


KINDS: dict[str, TypeAdapter[Any]] = {
    "records": _SCENES,
    "quarantine": TypeAdapter(_Quarantine),
    "open": TypeAdapter(_Begun),
    TRIES: TypeAdapter(_Tried),
}
"""What the objects of a folder must hold to be believed."""


class Known:
    """Digests that need no work, in a temporary file: memory does not follow the lake."""

    def __init__(self, ledger: Ledger, table: sqlite3.Connection) -> None:
        self._ledger = ledger
        self._table = table

    def state(self, digest: str) -> str | None:
        """``done``, ``quarantine``, or None for what is new."""
        state = self._state(digest)
        return None if state == TRIES else state

    def tried(self, found: LakeEntry) -> LakeEntry:
        """A scene with the tries that were begun before, and whether a process died at the last one."""
        told = self._ledger.tries(found) if self._state(found.digest) == TRIES else {}
        return replace(found, tries=told.get("tries", 0), suspect=bool(told.get("open")))

    def _state(self, digest: str) -> str | None:
        row = self._table.execute("SELECT state FROM known WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else str(row[0])


@dataclass(frozen=True)
class Ledger:
    """The record of one scan's lake."""

    out: str
    name: str
    """Of the scan, with the mark of what it does."""

    def __getstate__(self) -> dict[str, Any]:
        return {"out": self.out, "name": self.name}

    @property
    def location(self) -> str:
        """The ledger's folder or URL."""
        return join(self.out, LAKE_FOLDER, self.name)

    @cached_property
    def objects(self) -> ObjectStore:
        """The same, opened."""
        return open_store(self.location)

    @contextmanager
    def known(self) -> Iterator[Known]:
        """What needs no work, as the ledger is now."""
        with closing(sqlite3.connect("")) as table:  # a temporary file that goes with the connection
            table.execute("CREATE TABLE known (digest TEXT PRIMARY KEY, state TEXT) WITHOUT ROWID")
            for state in (TRIES, "quarantine", "done"):
                for page in obstore.list(self.objects, state, chunk_size=PAGE):
                    rows = [(_stem(meta["path"]), state) for meta in page]
                    table.executemany("INSERT OR REPLACE INTO known VALUES (?, ?)", rows)
            yield Known(self, table)

    def is_done(self, digest: str) -> bool:
        """Whether a scene is done: asked again once its lease is held."""
        return self._read(f"done/{digest}.json") is not None

    def record(self, found: LakeEntry, run: str) -> SceneRecord | None:
        """What a scene is that an open run has done; None: it has not."""
        told = self._read(f"records/{run}/{found.digest}.json") if self.is_done(found.digest) else None
        return None if told is None else _SCENES.validate_python(told)

    def finish(self, found: LakeEntry, record: SceneRecord, run: str) -> None:
        """A scene is done; what it failed of before is forgotten. Its record first, the receipt last.

        Raises:
            LeaseLostError: another scan has the scene or the run now.
        """
        found.check()
        self._write(f"records/{run}/{found.digest}.json", _dump(record))
        if found.same:
            self._write(f"done/{found.same}.json", {**_told(found), "run": run})
        found.check()
        self._write(f"done/{found.digest}.json", {**_told(found), "run": run})
        self._delete(f"{TRIES}/{found.digest}.json")

    def alias(self, found: LakeEntry, same: str) -> None:
        """A scene that is done under another digest: the next scan need not look into it."""
        found.check()
        self._write(f"done/{found.digest}.json", {**_told(found), "same": same})

    def tries(self, found: LakeEntry) -> dict[str, Any]:
        """What is recorded of a scene's tries: how many were begun (``tries``), whose is ``open``."""
        return self._read(f"{TRIES}/{found.digest}.json") or {}

    def begin(self, found: LakeEntry) -> None:
        """Count a try, before any work: a process that dies at the scene cannot count it afterwards.

        A second call for the same try changes nothing.

        Raises:
            LeaseLostError: another scan has the scene or the run now.
        """
        found.check()
        before = self.tries(found)
        if before.get("open") != found.attempt:
            told = {**_told(found), "tries": before.get("tries", 0) + 1, "open": found.attempt}
            self._write(f"{TRIES}/{found.digest}.json", told)

    def forgive(self, found: LakeEntry) -> None:
        """Take a begun try back: its process was told to stop, which says nothing of the scene.

        Raises:
            LeaseLostError: another scan has the scene or the run now.
        """
        found.check()
        before = self.tries(found)
        if before.get("open") == found.attempt:
            if before["tries"] > 1:
                told = {**before, "tries": before["tries"] - 1, "open": ""}
                self._write(f"{TRIES}/{found.digest}.json", told)
            else:
                self._delete(f"{TRIES}/{found.digest}.json")

    def fail(self, found: LakeEntry, record: SceneRecord, run: str, most: int) -> bool:
        """A scene failed; it goes into quarantine if its cause does not pass or after ``most`` tries.

        Returns:
            Whether it is in quarantine now.

        Raises:
            LeaseLostError: another scan has the scene or the run now.
        """
        found.check()
        self._write(f"records/{run}/{found.digest}.json", _dump(record))
        before = self.tries(found)
        count = before.get("tries", 0) + (not before.get("open"))  # an open one was counted as it began
        told = {**_told(found), "reason": record.error, "tries": count}
        if record.may_pass and count < most:
            self._write(f"{TRIES}/{found.digest}.json", told)
            return False
        self._write(f"quarantine/{found.digest}.json", told)
        self._delete(f"{TRIES}/{found.digest}.json")
        return True

    def quarantined(self) -> list[Quarantined]:
        """The scenes in quarantine, by name."""
        found = []
        for path in self._paths("quarantine"):
            told = self._read(path)
            if told is not None:
                parts = (told["name"], told["uri"], told["reason"], told["at"], told["tries"])
                found.append(Quarantined(_stem(path), *parts))
        return sorted(found, key=lambda q: (q.name, q.digest))

    def release(self, scene: Quarantined) -> None:
        """Take a scene out of quarantine: the next scan tries it as if it were new."""
        self._delete(f"quarantine/{scene.digest}.json")

    def records(self, run: str) -> list[SceneRecord]:
        """What became of an open run's scenes so far, by name."""
        told = map(self._read, self._paths(f"records/{run}"))
        found = [_SCENES.validate_python(record) for record in told if record is not None]
        return sorted(found, key=lambda record: record.name)

    def open_runs(self) -> list[str]:
        """Runs that were begun and not ended, the oldest first."""
        return sorted(map(_stem, self._paths("open")))

    def begin_run(self, run: str, started: str) -> None:
        """A run is begun: until it has ended, the scan that finds it abandoned takes it on."""
        self._write(f"open/{run}.json", {"started": started})

    def started(self, run: str) -> str:
        """When an open run was begun, ISO 8601."""
        told = self._read(f"open/{run}.json")
        return str(told["started"]) if told else ""

    def end_run(self, run: str) -> None:
        """A run has its report, which holds its records now."""
        for page in obstore.list(self.objects, f"records/{run}", chunk_size=PAGE):
            delete_objects(self.objects, [meta["path"] for meta in page])
        self._delete(f"open/{run}.json")

    def _paths(self, folder: str) -> Iterator[str]:
        """The objects of a folder of the ledger."""
        for page in obstore.list(self.objects, folder, chunk_size=PAGE):
            yield from (meta["path"] for meta in page)

    def _read(self, path: str) -> dict[str, Any] | None:
        data = read_object(self.objects, path)
        if data is None:
            return None
        try:  # one of an earlier version ends without a checksum
            told = parse_json(data if data.endswith(b"}") else unsealed(path, data))
            kind = next((k for folder, k in KINDS.items() if path.startswith(f"{folder}/")), _OBJECTS)
            kind.validate_python(told)
        except (DamagedError, ValueError) as error:
            _log.warning("%s: %s: damaged, and so as good as not there (%s)", self.name, path, reason(error))
            return None
        return dict(told)

    def _write(self, path: str, told: dict[str, Any]) -> None:
        obstore.put(self.objects, path, sealed(path, json.dumps(told, sort_keys=True).encode()))

    def _delete(self, path: str) -> None:
        delete_objects(self.objects, [path])


@dataclass(frozen=True)
class Receipts:
    """Finishes scenes of a run where they are done: what a scan that was stopped had done is done."""

    ledger: Ledger
    run: str
    founds: dict[str, LakeEntry]
    """By the names their records have."""

    def begin(self, name: str) -> None:
        """A try at a scene begins."""
        self.ledger.begin(self.founds[name])

    def finish(self, record: SceneRecord) -> None:
        """A scene is done."""
        self.ledger.finish(self.founds[record.name], record, self.run)

    def of(self, name: str) -> SceneRecord | None:
        """What became of a scene that this run has done; None: it has not."""
        return self.ledger.record(self.founds[name], self.run)


def _told(found: LakeEntry) -> dict[str, Any]:
    at = datetime.now(UTC).isoformat(timespec="seconds")
    return {"name": found.name, "uri": str(found.uri), "identity": found.identity, "at": at}


def _dump(record: SceneRecord) -> Any:
    return _SCENES.dump_python(record, mode="json")


def _stem(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".json")
