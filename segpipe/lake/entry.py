"""A scene as a listing tells of it, before anything of it is opened: its name, its identity, its hash."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from segpipe.redact import address, seal, whole
from segpipe.sources.discover import FOLDER_SUFFIXES, LONGEST_NAME, safe_name
from segpipe.sources.remote import is_remote
from segpipe.sources.uri import PICTURE_SUFFIXES, reveal


@dataclass(frozen=True)
class LakeEntry:
    """One scene of a lake."""

    name: str
    """From its place in the lake, so the same in every scan; safe as a folder's name."""
    uri: str
    """What `segpipe.sources.open_source` opens."""
    identity: dict[str, Any]
    """What changes when the content does: ETag and size; without an ETag size and time; of a folder of
    slices those of every file, hashed."""
    size: int
    """Bytes; 0 where the listing does not say."""
    modified: datetime | None
    """When its newest part was written, with a time zone; None: unknown, taken as long ago."""

    @property
    def digest(self) -> str:
        """Names the scene with its content in the lake's ledger: 32 hexadecimal digits."""
        place = address(self.uri)  # a signature is another one in each listing
        parts = [place, self.identity] if place == whole(self.uri) else [place, self.name, self.identity]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]


DIGITS = 12
"""Of the hash behind a name that does not say its place: a million such names stay apart."""

PLAIN_SUFFIXES = (".tif", ".nii.gz")
"""Left out of a name; other suffixes stay in it, so that a.jp2 is not called as a.tif beside it is."""

_HASHED = re.compile(rf"-[0-9a-f]{{{DIGITS}}}$")


def place_name(below: str, plain: tuple[str, ...] = PLAIN_SUFFIXES) -> str:
    """A name, safe as a folder's, for a place such as ``2026/07/scene.tif``: ``2026__07__scene``.

    It comes from the place alone, for a listing of a million keys remembers none. Where the place cannot be
    read from the name again (other characters, ``__`` in a folder's name, too long), a hash of the place is
    put behind. So two places never share a name, save for two of the suffixes in ``plain``.

    Args:
        below: path below the lake's location, with ``/``.
        plain: suffixes that are left out of the name.
    """
    suffix = next((s for s in plain if below.endswith(s)), "")
    stem = below.removesuffix(suffix)
    parts = stem.split("/")
    name = "__".join(parts)
    told = (
        safe_name(name) == name
        and not any("__" in p or p[:1] in ("_", "") or p[-1:] == "_" for p in parts)
        and not _HASHED.search(name)
        # a.jp2.tif would be called as a.jp2 is.
        and not (suffix and stem.lower().endswith((*FOLDER_SUFFIXES, *PICTURE_SUFFIXES)))
    )
    if told:
        return name
    digest = hashlib.sha256(below.encode("utf-8", "surrogateescape")).hexdigest()[:DIGITS]
    return f"{safe_name(name[: LONGEST_NAME - DIGITS - 1])}-{digest}"


CHUNK = 1 << 20
"""Bytes read at once."""


def content_hash(uri: str) -> str:
    """SHA-256 of a scene's file, or of the names and contents of its folder's files; streamed.

    Raises:
        OSError, obstore.exceptions.BaseError: it cannot be read.
    """
    total = hashlib.sha256()
    for part in whole(uri).removeprefix("stack:").split("|"):
        location = seal(part.partition("#")[0])
        if is_remote(location):
            _add_remote(total, location)
            continue
        path = Path(location)
        files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if len(files) > 1:
                total.update(file.name.encode())
            with file.open("rb") as stream:
                hashlib.file_digest(stream, lambda: total)  # goes on with this one
    return total.hexdigest()


def _add_remote(total: Any, uri: str) -> None:
    from obstore import get
    from obstore.store import from_url

    folder, _, name = reveal(uri).rpartition("/")
    for chunk in get(from_url(folder), name).stream(min_chunk_size=CHUNK):
        total.update(chunk)
