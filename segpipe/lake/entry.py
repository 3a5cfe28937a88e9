"""A scene as a listing tells of it, before anything of it is opened: its name, its identity, its hash."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from segpipe.config.job import Identity
from segpipe.redact import address, whole
from segpipe.sources.discover import FOLDER_SUFFIXES, LONGEST_NAME, safe_name
from segpipe.sources.identity import file_identity
from segpipe.sources.uri import PICTURE_SUFFIXES
from segpipe.store.stop import Fence


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
    files: tuple[str, ...] = ()
    """Local files that hold it; empty: what the listing says is its identity."""
    earlier: dict[str, Any] = field(default_factory=dict)
    """What an earlier version took for its identity."""
    same: str = ""
    """Digest under its `identity_of`, once it is taken."""
    tries: int = 0
    """That were begun before."""
    suspect: bool = False
    """Whether the process that tried it last has died at it."""
    fences: tuple[Fence, ...] = ()
    """Of its own lease and its run's, once it is taken."""

    @property
    def digest(self) -> str:
        """Names the scene with its content in the lake's ledger: 32 hexadecimal digits."""
        return self.digest_of(self.identity)

    def digest_of(self, identity: dict[str, Any]) -> str:
        """The digest under another identity."""
        place = address(self.uri)  # a signature is another one in each listing
        parts = [place, identity] if place == whole(self.uri) else [place, self.name, identity]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def identity_of(self, how: Identity) -> dict[str, Any]:
        """Its identity as stage keys ask it: what the listing says only tells that nothing has changed since.

        Raises:
            SceneError: a file has gone.
        """
        if not self.files and how is Identity.sampled:
            return self.identity
        parts = [part.partition("#")[0] for part in self.uri.removeprefix("stack:").split("|")]
        return {"files": file_identity(self.files or parts, how)}

    @property
    def attempt(self) -> str:
        """Which process is at it."""
        return self.fences[0].holder if self.fences else "-"

    def check(self) -> None:
        """Raises LeaseLostError where another scan has it, or its run, now: asked before each commit."""
        for fence in self.fences:
            fence.check()


def stamp(files: Iterable[str | Path]) -> list[list[Any]]:
    """Name, size and times of files: what is the same twice needs no look inside.

    Raises:
        OSError: one has gone.
    """
    looked = ((path, os.stat(path)) for path in files)  # noqa: PTH116 (a million of them)
    return [[str(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns] for path, s in looked]


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
