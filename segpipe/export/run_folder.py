"""The folder of a run: where it lies, how files get into it, and the manifest of what it holds.

The manifest has sizes and checksums, so that a copy can be checked years later. A scene's files are hashed by
whoever wrote them, before they go anywhere: ``scenes/<scene>/manifest.json``, paths relative to the run. This
seal is the last of a scene's files, and only files that it names are believed (`sealed_files`). The run's own
``manifest.json`` joins these, and hashes what else is there. So nothing that was uploaded is downloaded
again, and making a report anew never takes over a file that changed meanwhile.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from pydantic import TypeAdapter
from typing_extensions import TypedDict

from segpipe.config.parsing import parse_json
from segpipe.errors import DamagedError, RequestError
from segpipe.store.location import (
    Mark,
    hash_object,
    is_url,
    join,
    open_store,
    read_object,
    sweep_drafts,
    told_when_full,
    write_atomic,
)
from segpipe.store.stop import Fence

if TYPE_CHECKING:
    from segpipe.tables.record import RunRecord


@dataclass(frozen=True)
class RunFolder:
    """One application of a job to scenes. Small and picklable."""

    out: str
    job: str
    name: str
    started: str
    fence: Fence | None = None
    """Of a scan's run: proves that it is still its own."""

    def check(self) -> None:
        """Raises LeaseLostError where another scan has taken the run over: asked before each commit."""
        if self.fence is not None:
            self.fence.check()

    @property
    def location(self) -> str:
        """Folder or URL of the run."""
        return join(self.out, self.job, self.name)

    @property
    def report(self) -> str:
        """Where the page is."""
        return join(self.location, "report.html")


@contextmanager
def local_folder(run: RunFolder) -> Iterator[Path]:
    """The run's folder to write files into; for a URL a temporary one that is uploaded at the end."""
    run.check()
    if not is_url(run.location):
        folder = Path(run.location)
        folder.mkdir(parents=True, exist_ok=True)
        sweep_drafts(folder)
        with told_when_full(folder):
            yield folder
        return
    with tempfile.TemporaryDirectory(prefix="segpipe-") as name:
        yield Path(name)
        run.check()
        store = open_store(run.location)
        last = [Path(name) / MANIFEST, Path(name) / "run.json"]  # who sees the record finds the rest
        paths = [p for p in [*sorted(set(Path(name).rglob("*")) - set(last)), *last] if p.is_file()]
        while paths:
            ours = {p: obstore.put(store, p.relative_to(name).as_posix(), p)["e_tag"] for p in paths}
            if all(obstore.head(store, p.relative_to(name).as_posix())["e_tag"] == ours[p] for p in paths):
                return
            # another run of the same request put files of its own meanwhile: who is last puts all of them


def now() -> str:
    """Local time, ISO 8601 with its offset."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


MANIFEST = "manifest.json"
ITEM = "item.json"
RECORD = "run.json"
"""Written after the manifest, so not in it."""
READERS = 8
_NOT_OURS = re.compile(r"(^|/)\.|^compare-")
"""Hidden files, and comparisons, which are made again whenever somebody likes."""


Marks = dict[str, Mark]
"""By path relative to the run's folder."""


def hash_file(path: Path) -> Mark:
    """Size and checksum of a local file, read in pieces."""
    with path.open("rb") as file:
        return Mark(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def hash_files(folder: Path, paths: Iterable[str]) -> Marks:
    """Marks of files below a local folder, by their paths relative to it."""
    return {path: hash_file(folder / path) for path in paths}


def own_files(folder: Path, below: str) -> list[str]:
    """Paths of files, relative to a run's folder, in order; what somebody is still writing is left out.

    Args:
        folder: local, of the run.
        below: relative to it.
    """
    return sorted(_sizes(open_store(str(folder)), below))


@dataclass(frozen=True)
class Seal:
    """What a scene's own manifest says of it."""

    source: Mapping[str, Any]
    """Its ``uri`` and the ``identity`` of its content."""
    keys: Mapping[str, str]
    """Of the stages that the files were made from."""
    names: Mapping[str, str]
    """What files are, to their paths relative to the run's folder."""


def write_seal(folder: Path, scene: str, seal: Seal, paths: Iterable[str]) -> None:
    """Write a scene's own manifest, the last of its files.

    A run of the same request may replace files meanwhile; then they are hashed again.

    Args:
        folder: local, of the run.
        scene: its name.
        seal: without marks.
        paths: of the scene's files.
    """
    listed = sorted(paths)
    while True:
        before = [(folder / path).stat().st_ino for path in listed]
        marks = hash_files(folder, listed)
        told = {"source": seal.source, "keys": seal.keys, "names": seal.names, "files": _listed(marks)}
        write_atomic(folder / "scenes" / scene / MANIFEST, _json({**told, "sha256": _digest(told)}))
        if [(folder / path).stat().st_ino for path in listed] == before:
            return


def sealed_files(folder: Path, scene: str, keys: Mapping[str, str]) -> dict[str, str] | None:
    """A scene's files, if all of them are as they were sealed, of these stages; None: write them.

    Args:
        folder: local, of the run.
        scene: its name.
        keys: as `Seal.keys`.
    """
    path = folder / "scenes" / scene / MANIFEST
    told = _unsealed(path.read_bytes()) if path.exists() else None
    if told is None or told["keys"] != keys:
        return None
    try:
        marks = hash_files(folder, told["files"])
    except OSError:  # one is missing
        return None
    names: dict[str, str] = told["names"]
    return names if _listed(marks) == told["files"] else None


def _unsealed(data: bytes) -> dict[str, Any] | None:
    """The content of a scene's manifest; None: it is damaged, or of an earlier version."""
    try:
        told: dict[str, Any] = json.loads(data)
        return told if told.pop("sha256", "") == _digest(told) else None
    except (ValueError, AttributeError):
        return None


def _digest(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_seals(location: str, record: RunRecord) -> dict[str, tuple[dict[str, Any], Mark]]:
    """The manifests of scenes that are done, with their own marks, by their paths.

    Raises:
        DamagedError: one is missing or damaged: nothing tells then which files of the scene are whole.
    """
    store = open_store(location)

    def read(scene: str) -> tuple[dict[str, Any], Mark]:
        path = f"scenes/{scene}/{MANIFEST}"
        data = read_object(store, path)
        told = None if data is None else _unsealed(data)
        if data is None or told is None:
            raise DamagedError(
                f"{join(location, path)}: missing, damaged or of an earlier version; run the job again, "
                "which writes the scene's files again"
            )
        return told, Mark.of(data)

    with ThreadPoolExecutor(READERS) as pool:
        names = [scene.name for scene in record.mapped]
        paths = [f"scenes/{name}/{MANIFEST}" for name in names]
        return dict(zip(paths, pool.map(read, names), strict=True))


def write_manifest(
    location: str, folder: Path, record: RunRecord, written: Collection[str], copies: Mapping[str, str]
) -> None:
    """Write ``manifest.json`` of a run into a local folder.

    A run of the same request may write files of its own meanwhile, so those that were written are hashed
    again afterwards: whose manifest is the last has seen the last of the files.

    Args:
        location: the run's folder or URL; what lies there and has no mark yet is hashed.
        folder: where the file is written (the run's own, or one that is uploaded).
        record: of the run.
        written: paths of files that were written into the folder just now.
        copies: files that are copies of others, to these.
    """
    while True:
        known = hash_files(folder, written)
        write_atomic(folder / MANIFEST, _json(_manifest(location, record, known, copies)))
        if hash_files(folder, written) == known:
            return


def _manifest(location: str, record: RunRecord, known: Marks, copies: Mapping[str, str]) -> dict[str, Any]:
    store = open_store(location)
    found: Marks = {}
    scenes = []
    seals = read_seals(location, record)
    for scene, (path, (told, mark)) in zip(record.mapped, seals.items(), strict=True):
        scenes.append({"name": scene.name, **told["source"], "keys": dict(scene.keys)})
        found |= {path: mark, **{file: Mark(**listed) for file, listed in told["files"].items()}}
    found |= known
    found |= {path: found[origin] for path, origin in copies.items() if origin in found}
    # what nobody sealed below a scene is left of an attempt that failed
    rest = [p for p in _sizes(store) if p not in found and not p.startswith((MANIFEST, RECORD, "scenes/"))]
    with ThreadPoolExecutor(READERS) as pool:
        found |= zip(rest, pool.map(lambda path: hash_object(store, path), rest), strict=True)
    return {
        "job": record.job_name,
        "run": record.run_id,
        "checksums": "sha256",
        "scenes": scenes,
        "files": _listed(found),
    }


class _File(TypedDict):
    size: int
    sha256: str


class _Files(TypedDict):
    files: dict[str, _File]


_MANIFESTS = TypeAdapter(_Files)


def check_manifest(location: str) -> list[str]:
    """What is missing from a run or has changed since it ended, a line each; empty: all is as it was.

    Every file is read, in pieces.

    Args:
        location: folder or URL of the run.

    Raises:
        RequestError: there is no manifest, or it is damaged.
    """
    store = open_store(location)
    found = read_object(store, MANIFEST)
    if found is None:
        raise RequestError(f"{location}: no {MANIFEST} here; `segpipe report` on a finished run writes it")
    try:
        listed = _MANIFESTS.validate_python(parse_json(found))["files"]
    except ValueError as error:
        raise RequestError(
            f"{location}/{MANIFEST}: damaged ({' '.join(str(error).split())[:200]})"
        ) from error
    there = _sizes(store)

    def fault(item: tuple[str, _File]) -> str:
        path, mark = item
        if path not in there:
            return f"{path}: missing"
        if there[path] != mark["size"]:
            return f"{path}: found {there[path]} bytes, was {mark['size']}"
        sha256 = hash_object(store, path).sha256
        return "" if sha256 == mark["sha256"] else f"{path}: found SHA-256 {sha256}, was {mark['sha256']}"

    with ThreadPoolExecutor(READERS) as pool:
        return [line for line in pool.map(fault, listed.items()) if line]


def is_whole(location: str, files: Collection[str]) -> bool:
    """Whether a finished run has every file of its manifest, with its size, and these; nothing is read.

    Args:
        location: folder or URL of the run.
        files: paths of further files that it must have.
    """
    store = open_store(location)
    there, found = _sizes(store), read_object(store, MANIFEST)
    try:
        listed = json.loads(found or b"")["files"]
        return there.keys() >= {*files} and all(there.get(p) == mark["size"] for p, mark in listed.items())
    except (ValueError, KeyError, TypeError):  # there is none, or it is damaged
        return False


def _sizes(store: obstore.store.ObjectStore, below: str | None = None) -> dict[str, int]:
    """The run's files and their bytes."""
    listed = (meta for chunk in obstore.list(store, below) for meta in chunk)
    return {m["path"]: m["size"] for m in listed if not _NOT_OURS.search(m["path"])}


def _listed(marks: Marks) -> dict[str, dict[str, Any]]:
    return {path: asdict(mark) for path, mark in sorted(marks.items())}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()
