"""A scene as a listing tells of it, before anything of it is opened."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from segpipe.sources.remote import public_uri


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
        place = public_uri(self.uri)  # a signature is another one in each listing
        parts = [place, self.identity] if place == self.uri else [place, self.name, self.identity]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]
