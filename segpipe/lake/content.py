"""A hash of what a scene holds, for lakes whose files are touched or uploaded again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segpipe.sources.remote import is_remote

CHUNK = 1 << 20
"""Bytes read at once."""


def content_hash(uri: str) -> str:
    """SHA-256 of a scene's file, or of the names and contents of its folder's files; streamed.

    Raises:
        OSError, obstore.exceptions.BaseError: it cannot be read.
    """
    total = hashlib.sha256()
    for part in uri.removeprefix("stack:").split("|"):
        location = part.partition("#")[0]
        if is_remote(location):
            _add(total, _remote(location))
            continue
        path = Path(location)
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if len(files) > 1:
                total.update(file.name.encode())
            _add(total, _local(file))
    return total.hexdigest()


def _add(total: Any, chunks: Iterator[bytes]) -> None:
    for chunk in chunks:
        total.update(chunk)


def _local(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            yield chunk


def _remote(uri: str) -> Iterator[bytes]:
    from obstore import get
    from obstore.store import from_url

    folder, _, name = uri.rpartition("/")
    for chunk in get(from_url(folder), name).stream(min_chunk_size=CHUNK):
        yield bytes(chunk)
