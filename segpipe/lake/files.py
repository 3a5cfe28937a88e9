"""Rasters and NIfTI files below a folder or an object store's prefix, listed as a stream."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from heapq import merge
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import IO, Any

from segpipe.config.scan import Lake
from segpipe.errors import RequestError
from segpipe.lake.entry import PLAIN_SUFFIXES, LakeEntry, place_name, stamp
from segpipe.sources.base import reason
from segpipe.sources.discover import FOLDER_SUFFIXES, WILDCARDS
from segpipe.sources.identity import REMOTE_BESIDE, members
from segpipe.sources.remote import PATIENCE
from segpipe.sources.uri import PICTURE_SUFFIXES

STORES = ("s3://", "gs://", "az://")
"""Whose prefixes can be listed."""
UNFINISHED = (".part", ".tmp", ".crdownload")
"""Files that somebody is still writing."""
SIDECARS = (".aux.xml", ".ovr", ".msk")
"""What lies beside a raster and belongs to it."""
PAGE = 1000
"""Keys of an object store that are held at once."""
RUN = 10_000
"""Names of one folder that are sorted in memory; more are sorted on disk."""


@dataclass(frozen=True)
class Wanted:
    """Which paths below a place are scenes."""

    base: str
    """Folder or URL without wildcards."""
    pattern: tuple[str, ...]
    """Of the path below, by segments; empty: any."""
    suffixes: tuple[str, ...]
    """One of which a name has, in lower case."""
    plain: tuple[str, ...]
    """Suffixes that are no part of a scene's name."""

    @property
    def head(self) -> tuple[str, ...]:
        """The folders that the pattern names: nothing else has to be listed."""
        folders = self.pattern[:-1]
        free = (n for n, part in enumerate(folders) if WILDCARDS & set(part))
        return folders[: next(free, len(folders))]

    def takes(self, below: str) -> bool:
        """Whether a path below the base is a scene."""
        parts = below.split("/")
        name = parts[-1].lower()
        if name.endswith((*UNFINISHED, *SIDECARS)) or not name.endswith(self.suffixes):
            return False
        hidden = any(part.startswith(".") for part in parts)
        return not hidden and (not self.pattern or matches(parts, self.pattern))


def wanted(lake: Lake) -> Wanted:
    """What a lake asks for.

    Raises:
        RequestError: two globs.
    """
    base, pattern = _split_glob(lake.location.removeprefix("file://"))
    if pattern and lake.pattern:
        raise RequestError(
            f"lake.pattern: {lake.pattern}: found a second glob, {lake.location} is one already; valid: one"
        )
    parts = pattern or tuple(p for p in lake.pattern.split("/") if p not in ("", "."))
    if ".." in parts:
        raise RequestError(f"lake.pattern: {lake.pattern}: expected a glob below the location, without ..")
    if not parts:
        return Wanted(base, (), FOLDER_SUFFIXES, PLAIN_SUFFIXES)
    literal = _suffix(parts[-1])
    known = (*FOLDER_SUFFIXES, *PICTURE_SUFFIXES)
    return Wanted(
        base,
        parts,
        (literal.lower(),) if literal else known,
        (literal,) if literal else PLAIN_SUFFIXES,
    )


def list_files(lake: Lake) -> Iterator[LakeEntry]:
    """The files of a lake, in the order of their paths.

    Hidden files and folders, such that are being written, and sidecars are left out; links to folders are
    not followed.

    Raises:
        RequestError: the location is not there, or cannot be listed.
    """
    what = wanted(lake)
    if what.base.startswith(STORES):
        yield from _in_store(what)
    elif "://" in what.base:
        raise RequestError(
            f"lake.location: {lake.location}: cannot be listed; valid: a folder, a glob, or a prefix of "
            f"{', '.join(STORES)}; an http address for kind stac only"
        )
    else:
        yield from _in_folder(what)


def matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a path's segments match a glob's; ``**`` stands for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**" and len(pattern) > 1:
        return matches(parts, pattern[1:]) or (len(parts) > 1 and matches(parts[1:], pattern))
    if pattern[0] == "**":
        return bool(parts)
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and matches(parts[1:], pattern[1:])


def local_folder(location: str, kind: str) -> Path:
    """The local folder of a lake, absolute.

    Raises:
        RequestError: a URL, or there is no such folder.
    """
    if "://" in location.removeprefix("file://"):
        or_ = ", or kind files with a pattern such as sub-*/**/*_T1w.nii.gz" if kind == "bids" else ""
        raise RequestError(
            f"lake.location: {location}: scenes of kind {kind} are listed in local folders only; valid: "
            f"such a folder{or_}"
        )
    folder = Path(location.removeprefix("file://")).expanduser().absolute()
    if not folder.is_dir():
        raise RequestError(f"lake.location: {location}: no such folder")
    return folder


def local_file(path: Path, name: str) -> LakeEntry | None:
    """A file as a scene; None where it has gone, or is no file.

    Raises:
        RequestError: it cannot be looked at.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RequestError(f"lake.location: {path}: {reason(error)}") from error
    if not stat.S_ISREG(status.st_mode):
        return None
    files = members(path)
    try:
        told = stamp(files)
    except FileNotFoundError:
        return None
    return LakeEntry(
        name=name,
        uri=str(path),
        identity={"files": told},
        size=sum(size for _, size, _, _ in told),
        modified=datetime.fromtimestamp(max(mtime for _, _, mtime, _ in told) / 1e9, UTC),
        files=tuple(map(str, files)),
        earlier={"size": status.st_size, "mtime_ns": status.st_mtime_ns},
    )


def sorted_names(folder: Path) -> Iterator[str]:
    """Names of what is in a folder, sorted, folders with a ``/`` behind; hidden ones are left out.

    However many there are, only `RUN` of them are in memory at once.

    Raises:
        RequestError: the folder cannot be listed. One that has gone yields nothing.
    """
    try:
        entries = os.scandir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise RequestError(
            f"lake.location: {folder}: cannot be listed ({error.strerror}); valid: folders that can be read"
        ) from error
    runs: list[Iterator[str]] = []
    with ExitStack() as files, entries:
        names = (
            entry.name + "/" * entry.is_dir(follow_symlinks=False)
            for entry in entries
            if not entry.name.startswith(".")
        )
        while batch := sorted(islice(names, RUN)):
            if len(batch) < RUN:
                runs.append(iter(batch))
                break
            file: IO[str] = files.enter_context(TemporaryFile("w+", encoding="utf-8"))
            file.writelines(json.dumps(name) + "\n" for name in batch)
            file.seek(0)
            runs.append(map(json.loads, file))
        del batch
        yield from merge(*runs)


def _suffix(name: str) -> str:
    """The suffix that the last part of a glob fixes; empty where it fixes none."""
    known = sorted((*FOLDER_SUFFIXES, *PICTURE_SUFFIXES), key=len, reverse=True)
    found = next((name[-len(s) :] for s in known if name.lower().endswith(s)), PurePosixPath(name).suffix)
    return "" if WILDCARDS & set(found) else found


def _split_glob(location: str) -> tuple[str, tuple[str, ...]]:
    """A location's folders without wildcards, and the rest of it."""
    scheme, mark, path = location.rpartition("://")
    if not mark and Path(location).expanduser().exists():
        return location, ()  # its name has a bracket
    parts = path.split("/")
    first = next((n for n, part in enumerate(parts) if WILDCARDS & set(part)), None)
    if first is None:
        return location, ()
    folders = "/".join(parts[:first])
    return scheme + mark + (folders or ("/" if path.startswith("/") else "")), tuple(parts[first:])


def _in_folder(what: Wanted) -> Iterator[LakeEntry]:
    base = Path(what.base or ".").expanduser().absolute()
    if base.is_file():
        found = local_file(base, place_name(base.name, what.plain))
        yield from [found] if found else []
        return
    if not base.is_dir():
        raise RequestError(
            f"lake.location: {base}: no such folder; valid: a folder, a glob, or a prefix such as "
            "s3://bucket/scenes"
        )
    for below in _walk(base, "".join(f"{part}/" for part in what.head)):
        if what.takes(below):
            found = local_file(base / below, place_name(below, what.plain))
            yield from [found] if found else []


def _walk(base: Path, folder: str) -> Iterator[str]:
    """Paths of the files in a folder (``""`` or ending in ``/``) of the base and below it, sorted."""
    for name in sorted_names(base / folder):
        if name.endswith("/"):
            yield from _walk(base, folder + name)
        else:
            yield folder + name


def _in_store(what: Wanted) -> Iterator[LakeEntry]:
    # Imported here: only a lake needs it.
    from obstore import list as list_objects
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    base = what.base.rstrip("/")
    try:
        store = from_url(base, retry_config=PATIENCE)
        last: LakeEntry | None = None
        for page in list_objects(store, "/".join(what.head) or None, chunk_size=PAGE):
            for item in page:
                uri = f"{base}/{item['path']}"
                if last and uri.removeprefix(last.uri) in REMOTE_BESIDE:  # listed behind its scene
                    beside = [*last.identity.get("beside", ()), [item["path"], item["size"], item["e_tag"]]]
                    last = replace(last, identity={**last.identity, "beside": beside})
                elif what.takes(item["path"]):
                    yield from [last] if last else []
                    last = _object(base, item, what.plain)
        yield from [last] if last else []
    except (BaseError, OSError, ValueError) as error:
        raise RequestError(
            f"lake.location: {what.base}: cannot be listed ({str(error).splitlines()[0]}); valid: a bucket "
            "that the environment's credentials and endpoint (such as AWS_ENDPOINT_URL) can list"
        ) from error


def _object(base: str, item: Any, plain: tuple[str, ...]) -> LakeEntry:
    modified: datetime = item["last_modified"]
    told = {"etag": item["e_tag"]} if item["e_tag"] else {"mtime": modified.isoformat()}
    return LakeEntry(
        name=place_name(item["path"], plain),
        uri=f"{base}/{item['path']}",
        identity={"size": item["size"], **told},
        size=item["size"],
        modified=modified,
    )
