"""Files behind a URL: which URLs we know, what identifies such a file, and local copies of volumes."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path
from shutil import copyfileobj, rmtree
from tempfile import mkdtemp
from threading import Lock
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen
from weakref import finalize

from segpipe.errors import SceneError
from segpipe.redact import address, public_uri
from segpipe.sources.base import reason
from segpipe.sources.uri import reveal

__all__ = ["REMOTE_SCHEMES", "Copy", "fetch", "is_remote", "public_uri", "remote_identity"]

REMOTE_SCHEMES = ("s3://", "gs://", "az://", "https://", "http://")
"""What GDAL opens in place."""
PATIENCE: Any = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
"""With a store that does not answer; obstore's own is minutes."""
COPIES_BYTES = 4 * 2**30
"""Of the copies that a process keeps; those that somebody reads stay beyond."""
PART_BYTES = 8 * 2**20
"""Held in memory of a file that is fetched."""


def is_remote(uri: str) -> bool:
    """Whether the URI names a file that is not on a local disk."""
    return uri.startswith(REMOTE_SCHEMES)


def remote_identity(uri: str) -> tuple[dict[str, Any], str | None]:
    """Address, size, time and ETag of a remote file, from a HEAD request.

    Returns:
        The identity, and a note where the server tells nothing and the address must do.
    """
    try:
        return _look(uri), None
    except SceneError as error:
        told = str(error).removeprefix(f"{uri}: ")[:120]
        note = f"identified by its address alone, a change will not be seen ({told})"
        return {"uri": address(uri)}, note


@lru_cache(maxsize=10_000)
def remote_hash(uri: str, _told: str) -> str:
    """SHA-256 of a remote file, streamed; remembered while its store tells the same of it.

    Raises:
        SceneError: it cannot be read.
    """
    from obstore import get
    from obstore.exceptions import BaseError

    store, name = _store(uri)
    digest = hashlib.sha256()
    try:
        for part in get(store, name).stream(min_chunk_size=PART_BYTES):
            digest.update(part)
    except (BaseError, OSError) as error:
        raise SceneError(f"{uri}: cannot be fetched: {reason(error)}") from error
    return digest.hexdigest()


class Copy:
    """A local copy of a file, which goes with the last who holds this."""

    def __init__(self, uri: str) -> None:
        """Fetch it.

        Raises:
            SceneError: it is not there, or its store does not answer.
        """
        from obstore import get
        from obstore.exceptions import BaseError

        folder = mkdtemp(prefix="segpipe-copy-")
        finalize(self, rmtree, folder, ignore_errors=True)
        if _is_signed(uri):
            self.path = Path(folder) / (Path(urlsplit(reveal(uri)).path).name or "file")
            self.identity = _download(uri, self.path)
            return
        store, name = _store(uri)
        self.path = Path(folder) / name
        try:
            found = get(store, name)
            with self.path.open("wb") as file:
                for part in found.stream(min_chunk_size=PART_BYTES):
                    file.write(part)
        except (BaseError, OSError) as error:
            raise SceneError(f"{uri}: cannot be fetched: {reason(error)}") from error
        self.identity = _told(uri, found.meta)
        """As of `remote_identity`."""


def _is_signed(uri: str) -> bool:
    """Whether it is an HTTP URL with a query, which no store's path has."""
    return uri.startswith(("http://", "https://")) and "?" in reveal(uri)


def _download(uri: str, path: Path) -> dict[str, Any]:
    """Write what a signed URL has to a file; its identity.

    Raises:
        SceneError: the server does not answer, or says no.
    """
    try:
        with urlopen(reveal(uri), timeout=PATIENCE["retry_timeout"].total_seconds()) as answer:
            with path.open("wb") as file:
                copyfileobj(answer, file, PART_BYTES)
            told = answer.headers
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
        raise SceneError(f"{uri}: cannot be fetched: {reason(error)}") from error
    size, modified = path.stat().st_size, told["Last-Modified"]
    return {"uri": address(uri), "size": size, "mtime": modified, "etag": told["ETag"]}


_kept: list[Copy] = []
"""The latest copies, the one used last at the end."""
_lock = Lock()


def fetch(uri: str) -> Copy:
    """A volume's copy on the local disk.

    NIfTI files are mostly compressed as a whole, so they cannot be read by ranges. A scene is opened to be
    planned, read and exported: a process keeps the copies that it used last, up to `COPIES_BYTES`.

    Raises:
        SceneError: it is not there, or its store does not answer.
    """
    if _is_signed(uri):  # nobody tells whether it is still the same: fetched each time
        return Copy(uri)
    with _lock:  # one at a time: whoever waits for this very file must not fetch it too
        identity = _look(uri)
        copy = next((c for c in _kept if c.identity == identity), None)
        if copy is None:
            copy = Copy(uri)
        else:
            _kept.remove(copy)
        _kept.append(copy)
        while len(_kept) > 1 and sum(c.identity["size"] for c in _kept) > COPIES_BYTES:
            del _kept[0]
    return copy


def _look(uri: str) -> dict[str, Any]:
    """What a HEAD request tells of a file.

    Raises:
        SceneError: it tells nothing.
    """
    # Imported here: only a lake needs it.
    from obstore import head
    from obstore.exceptions import BaseError

    store, name = _store(uri)
    try:
        return _told(uri, head(store, name))
    except (BaseError, OSError) as error:  # obstore's own, and Python's for what is not there
        raise SceneError(f"{uri}: {reason(error)}") from error


def _store(uri: str) -> tuple[Any, str]:
    """The folder of a file as a store, and the file's name.

    Raises:
        SceneError: the URL has a query, as signed ones do, which is part of no store's path.
    """
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    place, _, query = reveal(uri).partition("?")
    folder, _, name = place.rpartition("/")
    if query:
        raise SceneError(f"{uri}: the URL has a query")
    try:
        if uri.startswith(("http://", "https://")):
            return from_url(folder, client_options={"allow_http": True}, retry_config=PATIENCE), name
        return from_url(folder, retry_config=PATIENCE), name
    except (BaseError, ValueError) as error:
        raise SceneError(f"{uri}: {reason(error)}") from error


def _told(uri: str, meta: Any) -> dict[str, Any]:
    modified = meta["last_modified"].isoformat()
    told = {"uri": address(uri), "size": meta["size"], "mtime": modified, "etag": meta["e_tag"]}
    return {**told, "version": meta["version"]} if meta.get("version") else told
