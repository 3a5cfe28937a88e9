"""Names of scenes from their places in a lake: the same in every scan, unlike for unlike places."""

from __future__ import annotations

import hashlib
import re

from segpipe.sources.discover import FOLDER_SUFFIXES, LONGEST_NAME, safe_name
from segpipe.sources.uri import PICTURE_SUFFIXES

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
