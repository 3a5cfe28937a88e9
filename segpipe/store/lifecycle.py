"""What lies in a store and what may go: sizes, ages, pins, leftovers; who refers to a stage, others tell."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote

import obstore
from obstore.store import ObjectStore

from segpipe.errors import DamagedError, RequestError
from segpipe.store.location import (
    STORE_FOLDER,
    delete_objects,
    is_url,
    join,
    open_store,
    read_object,
    sealed,
    unsealed,
)
from segpipe.store.stage import Stage

DAY = 86_400.0
GRACE = 3_600.0
"""Seconds after its last use in which a stage does not go because the store is large."""
_USES, _PINS, _STOPS = "uses", "pins", "stop"
_GENERATION = re.compile(r"(?:(?:receipts|parts)-)?([0-9a-f]{16}|0)(?:/|\.json$)")
_DRAFT = re.compile(r"#\d+$")
"""How the local store names a file that it is still writing."""


@dataclass(frozen=True)
class StoredStage:
    """A stage as it lies in the store."""

    key: str
    size: int
    """Bytes."""
    files: int
    used: float
    """When something of it was written last, in seconds since 1970."""
    scene: str
    """As the stage says; empty: it does not."""

    @property
    def kind(self) -> str:
        """``ingest``, ``predict``, ``measure``, …"""
        return self.key.rpartition("-")[0]


@dataclass(frozen=True)
class Leftover:
    """An object that nothing refers to: of a writer that was killed, or of a stage that was dropped."""

    path: str
    """Below the output location."""
    size: int
    written: float
    """In seconds since 1970."""


@dataclass(frozen=True)
class Use:
    """Stages that a run needs of one scene, as it noted when it began with the scene."""

    job: str
    mark: str
    """The end of the run's name, which the same request has again."""
    scene: str
    keys: tuple[str, ...]
    noted: float
    """In seconds since 1970."""


def store_of(out: str) -> ObjectStore:
    """The store of an output location.

    Raises:
        RequestError: there is none.
    """
    if not is_url(out) and not (Path(out) / STORE_FOLDER).is_dir():
        raise RequestError(f"{out}: no {STORE_FOLDER} here; give the `outputs.dir` of runs")
    return open_store(join(out, STORE_FOLDER))


def stage_keys(out: str) -> list[str]:
    """Keys of all stages."""
    found = obstore.list_with_delimiter(store_of(out))["common_prefixes"]
    return sorted({name.rstrip("/") for name in found} - {_USES, _PINS, _STOPS})


def look_at(out: str, key: str) -> tuple[StoredStage, list[Leftover]]:
    """A stage, and what lies in its folder of generations that are not in force, or half written."""
    stage = Stage(out, key)
    record = stage.read_json("stage.json") or {}
    token = record.get("token", "0")
    size = files = 0
    used = 0.0
    left = []
    for chunk in obstore.list(stage.objects):
        for meta in chunk:
            written = meta["last_modified"].timestamp()
            generation = _GENERATION.match(meta["path"])
            if generation and generation[1] != token:
                left.append(Leftover(f"{STORE_FOLDER}/{key}/{meta['path']}", meta["size"], written))
                continue
            size, files, used = size + meta["size"], files + 1, max(used, written)
    scene = record.get("scene") or (stage.read_json("info.json") or {}).get("scene", "")
    return StoredStage(key, size, files, used, scene), left + drafts(out, f"{STORE_FOLDER}/{key}")


def drafts(out: str, below: str) -> list[Leftover]:
    """Files of a local folder that somebody is writing, or was when he was killed; no listing shows them."""
    if is_url(out):
        return []
    found = []
    for path in (Path(out) / below).rglob("*#*"):
        with suppress(FileNotFoundError):
            stat = path.stat()
            if _DRAFT.search(path.name):
                found.append(Leftover(path.relative_to(out).as_posix(), stat.st_size, stat.st_mtime))
    return found


def small_leftovers(out: str) -> list[Leftover]:
    """Requests to stop that nobody took back."""
    found = []
    for chunk in obstore.list(store_of(out), _STOPS):
        for meta in chunk:
            path = f"{STORE_FOLDER}/{meta['path']}"
            found.append(Leftover(path, meta["size"], meta["last_modified"].timestamp()))
    return found


def choose(
    stages: Sequence[StoredStage],
    pinned: Collection[str],
    released: Collection[str],
    older: float | None = None,
    size: int | None = None,
) -> list[StoredStage]:
    """The stages that go, the one that was not used for longest first.

    Args:
        stages: all of the store.
        pinned: keys that stay.
        released: keys that go whatever their age.
        older: seconds since the last use from which a stage goes; None: at no age.
        size: bytes that the store may keep; None: any.
    """
    now = time.time()
    free = sorted((s for s in stages if s.key not in pinned), key=lambda s: s.used)
    total = sum(stage.size for stage in stages)
    gone = []
    for stage in free:
        is_old = older is not None and now - stage.used >= older
        is_too_much = size is not None and total > size and now - stage.used >= GRACE
        if stage.key in released or is_old or is_too_much:
            gone.append(stage)
            total -= stage.size
    return gone


def remove_stage(out: str, key: str) -> None:
    """Remove a stage with all that lies in its folder; its record first."""
    stage = Stage(out, key)
    stage.drop()
    paths = [meta["path"] for chunk in obstore.list(stage.objects) for meta in chunk]
    delete_objects(stage.objects, paths)
    if not is_url(out):
        shutil.rmtree(Path(out) / STORE_FOLDER / key, ignore_errors=True)


def remove_leftovers(out: str, left: Iterable[Leftover]) -> None:
    """Remove leftovers, whoever else is at it."""
    if is_url(out):
        delete_objects(open_store(out), [item.path for item in left])
        return
    for item in left:
        path = Path(out) / item.path
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def check_stage(out: str, key: str, *, repair: bool = False) -> list[str]:
    """Hold all that a stage has committed against its receipts and checksums.

    Args:
        out: the output location.
        key: of the stage.
        repair: take back what is damaged, so that the next run makes it again.

    Returns:
        What is damaged, a line each.
    """
    stage, lines = Stage(out, key), []
    token = (stage.read_json("stage.json") or {}).get("token", "0")
    for chunk in obstore.list(stage.objects):
        for meta in chunk:
            generation = _GENERATION.match(meta["path"])
            is_array = not meta["path"].startswith(("receipts-", "parts-"))  # receipts tell of those
            if generation and (is_array or generation[1] != token):
                continue
            try:
                stage.read_bytes(meta["path"])
            except DamagedError as error:
                lines.append(str(error))
                if repair:
                    delete_objects(stage.objects, [meta["path"]])
    return lines + [f"{join(out, STORE_FOLDER, key)}: {name}" for name in stage.scrub(repair=repair)]


def note_use(out: str, use: Use) -> None:
    """Note what a run needs of a scene: until the run has its record, that stays."""
    path = f"{_USES}/{quote(use.job, safe='')}/{use.mark}/{quote(use.scene, safe='')}.json"
    obstore.put(open_store(join(out, STORE_FOLDER)), path, sealed(path, json.dumps(use.keys).encode()))


def uses(out: str) -> Iterator[Use]:
    """What runs noted; what is damaged of it is gone, and its stages are as old as they are."""
    store = store_of(out)
    for chunk in obstore.list(store, _USES):
        for meta in chunk:
            data = read_object(store, meta["path"])
            with suppress(DamagedError):
                keys = json.loads(unsealed(meta["path"], data or b""))
                job, mark, scene = meta["path"].split("/")[1:]
                noted = meta["last_modified"].timestamp()
                yield Use(unquote(job), mark, unquote(scene.removesuffix(".json")), tuple(keys), noted)


def forget_uses(out: str, job: str, mark: str) -> None:
    """Take back what a run noted: its record says it now."""
    store = open_store(join(out, STORE_FOLDER))
    listed = obstore.list(store, f"{_USES}/{quote(job, safe='')}/{mark}")
    delete_objects(store, [meta["path"] for chunk in listed for meta in chunk])


def pins(out: str) -> list[str]:
    """Names of the runs and scenes whose stages stay until somebody unpins them."""
    listed = obstore.list(store_of(out), _PINS)
    return sorted(unquote(meta["path"].rpartition("/")[2]) for chunk in listed for meta in chunk)


def pin(out: str, name: str) -> None:
    """Keep the stages of a run or scene, whatever their age."""
    obstore.put(store_of(out), f"{_PINS}/{quote(name, safe='')}", b"")


def unpin(out: str, name: str) -> None:
    """Let go of a run or scene again.

    Raises:
        RequestError: it is not pinned.
    """
    if name not in (pinned := pins(out)):
        raise RequestError(f"unpin: {name!r} is not pinned; there are: {', '.join(pinned) or 'none'}")
    delete_objects(store_of(out), [f"{_PINS}/{quote(name, safe='')}"])
