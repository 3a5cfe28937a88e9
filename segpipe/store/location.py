"""Folders and URLs of object stores, alike; files that are there whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import obstore
from obstore.store import LocalStore, ObjectStore, from_url

from segpipe.errors import DamagedError, FullError, RequestError, SegpipeError, StoppedError


def is_url(location: str) -> bool:
    """Whether a location is an object store's rather than a local folder."""
    return "://" in location


def join(location: str, *parts: str) -> str:
    """A location below another, for folders and URLs alike."""
    return "/".join([location.rstrip("/"), *parts])


def open_store(location: str) -> ObjectStore:
    """An object store rooted at a folder (made if absent) or URL.

    Raises:
        RequestError: the folder cannot be made or written, or the URL is not understood.
    """
    if is_url(location):
        try:
            return from_url(location)
        except (ValueError, obstore.exceptions.BaseError) as error:
            raise RequestError(f"outputs.dir: {location}: cannot be opened ({error})") from error
    try:
        folder = Path(location).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        return LocalStore(folder)
    except OSError as error:
        raise RequestError(
            f"outputs.dir: {location}: cannot be made ({error.strerror}); give a folder that can be written"
        ) from error


def check_writable(location: str) -> None:
    """Write and remove a small object, so that an unwritable output is known before any work.

    Raises:
        RequestError: naming the location and the cause.
    """
    store = open_store(location)
    name = f".segpipe-write-test-{secrets.token_hex(8)}"  # its own: another run may be looking too
    try:
        obstore.put(store, name, b"")
        obstore.delete(store, name)
    except (OSError, obstore.exceptions.BaseError) as error:
        raise RequestError(
            f"outputs.dir: {location}: cannot be written ({store_reason(error)}); "
            "give a folder that can be written"
        ) from error


def store_reason(error: Exception) -> str:
    """The part of a store's message that a person reads: its code, or the first line."""
    text = str(error)
    code = re.search(r"<Code>(\w+)</Code>.*?<Message>([^<]*)", text, re.DOTALL)
    if code:
        return f"{code[1]}: {code[2]}"
    line = text.split("\n\nDebug source")[0]
    return " ".join(line.split())[:250]


@contextmanager
def store_named(out: str) -> Iterator[None]:
    """Tell a failure of the store in one line that names it, also where no scene is to blame."""
    try:
        yield
    except obstore.exceptions.BaseError as error:
        raise SegpipeError(f"outputs.dir: {out}: {store_reason(error)}; run the job again") from error


def read_object(objects: ObjectStore, path: str) -> bytes | None:
    """The content of an object, or None where it is absent."""
    try:
        return bytes(obstore.get(objects, path).bytes())
    except FileNotFoundError:
        return None


@dataclass(frozen=True)
class Mark:
    """What tells that a file is as it was."""

    size: int
    """Bytes."""
    sha256: str
    """Hexadecimal."""

    @classmethod
    def of(cls, data: bytes | memoryview) -> Mark:
        """Of a file's content."""
        return cls(len(data), hashlib.sha256(data).hexdigest())


PIECE = 8 * 2**20
"""Bytes of an object read at once."""


def hash_object(objects: ObjectStore, path: str) -> Mark:
    """Size and checksum of an object, read in pieces.

    Raises:
        FileNotFoundError: it is absent.
    """
    digest, size = hashlib.sha256(), 0
    for piece in obstore.get(objects, path).stream(min_chunk_size=PIECE):
        digest.update(piece)
        size += len(piece)
    return Mark(size, digest.hexdigest())


STORE_FOLDER = ".store"
"""Below an output location: what runs keep, to resume."""
SEAL = 65
"""Bytes of a seal: a line break and a SHA-256 in hexadecimal."""


def sealed(path: str, data: bytes) -> bytes:
    """Content with a checksum behind it, of the object's name too: under another name it is damaged."""
    return data + b"\n" + hashlib.sha256(path.encode() + b"\0" + data).hexdigest().encode()


def unsealed(path: str, data: bytes) -> bytes:
    """The content that was `sealed`.

    Raises:
        DamagedError: it is not what was written under this name.
    """
    content = data[:-SEAL]
    if data != sealed(path, content):
        raise DamagedError(f"{path}: damaged, or of an earlier version of segpipe")
    return content


def make_durable(location: str, paths: Sequence[str]) -> None:
    """Flush files of a local folder, and the folders they lie in, to the disk: what names them comes after.

    Without ``SEGPIPE_FSYNC=0``, which suits scratch disks, a power loss then never leaves a name without its
    content. Object stores are durable when they answer.
    """
    if is_url(location) or os.environ.get("SEGPIPE_FSYNC") == "0":
        return
    root = Path(location).absolute()
    files = [root / path for path in paths]
    folders = {
        folder for file in files for folder in file.parents if folder == root or root in folder.parents
    }
    for path in (*files, *sorted(folders, reverse=True)):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The system's code, which the store's library gives in its message only."""
_NO_ROOM = 2**20
"""Bytes: on a disk with less, what fails to be written fails for that."""


@contextmanager
def told_when_full(location: str | Path, draft: Path | None = None) -> Iterator[None]:
    """Writing below a location: a full disk is reported in one line, whichever library wrote.

    Args:
        location: folder or URL.
        draft: folder of what is being written. GDAL takes back what it had no room for, and has no code for
            it: where as much again as is there would not fit, that is why.

    Raises:
        FullError: naming the folder.
    """
    try:
        yield
    except (FullError, StoppedError, RequestError):
        raise
    except Exception as error:  # of whichever library writes: what is no full disk is raised as it is
        found = _OS_ERROR.search(str(error))
        code = int(found[1]) if found else getattr(error, "errno", None)
        room = None if is_url(str(location)) else _room(Path(location))
        files = [] if draft is None else [path for path in draft.rglob("*") if path.is_file()]
        needed = _NO_ROOM + 2 * sum(path.stat().st_size for path in files)
        if code not in _FULL and (room is None or room >= needed):
            raise
        left = "" if room is None else f" ({room:,} bytes are left)"
        raise FullError(
            f"{location}: no space left on the disk{left}; make room and run the same job again, which goes "
            "on from what is done"
        ) from error


def _room(folder: Path) -> int | None:
    """Free bytes of the disk of a folder, which need not be there yet."""
    there = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()), None)
    return None if there is None else shutil.disk_usage(there).free


def free_bytes(location: str) -> int | None:
    """What is free where outputs go; None: an object store does not say."""
    return None if is_url(location) else _room(Path(location))


def delete_objects(objects: ObjectStore, paths: Sequence[str]) -> None:
    """Delete objects, whoever else is at it; one that is gone already is no error."""
    try:
        obstore.delete(objects, paths)
    except FileNotFoundError:  # somebody else was faster, maybe not with all of them
        for path in paths:
            with suppress(FileNotFoundError):
                obstore.delete(objects, path)


DRAFT = ".draft-"
"""In the hidden name of what is written and has not its own name yet; random letters follow."""


def sweep_drafts(folder: Path, pattern: str = f".*{DRAFT}*") -> None:
    """Remove drafts that killed writers left in a local folder; at those of a day nobody is any more.

    Args:
        folder: not its subfolders, unless the pattern has them.
        pattern: of their names.
    """
    for path in folder.glob(pattern):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime < 86_400:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file that others see whole or not at all.

    Raises:
        FullError: the disk is full.
    """
    with told_when_full(path.parent):
        _write_atomic(path, data)


def _write_atomic(path: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{DRAFT}")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)  # there only if it did not become the file
