"""Names instead of paths, in what a run tells of the machine it was made on (`outputs.hide_paths`)."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from segpipe.tables.record import RunRecord

_PATHS = re.compile(r"(?:^(?:file://|mosaic:|stack:)?|(?<=\|))(/(?:(?!: )[^|])+)(?=\||$)")
"""Absolute paths of a URI, of a stack or a mosaic too; of no message."""
_FOLDERS = re.compile(r"""(?<![\w.:/~-])/(?:[^/\s"'|:;,<>()]+/)+""")
"""Folders of absolute paths within a text; no part of a URL."""
_RECORDS = TypeAdapter(RunRecord)


def hide_paths(value: Any) -> Any:
    """A JSON value whose texts have file names, and folders' own names, where they have absolute paths."""
    own = (Path.cwd(), Path.home(), Path(tempfile.gettempdir()))
    folders = {str(Path(path).parent) for text in _texts(value) for path in _PATHS.findall(text)}
    known = sorted({*folders, *map(str, own)} - {"/"}, key=len, reverse=True)

    def hide(part: Any) -> Any:
        if isinstance(part, str):
            for folder in known:
                part = part.replace(f"{folder}/", "")
            return _FOLDERS.sub("", part)
        if isinstance(part, Mapping):
            return {hide(key): hide(inner) for key, inner in part.items()}
        return [hide(inner) for inner in part] if isinstance(part, list | tuple) else part

    return hide(value)


def hide_record(record: RunRecord) -> RunRecord:
    """The record of a run, without absolute paths."""
    return _RECORDS.validate_python(hide_paths(_RECORDS.dump_python(record, mode="json")))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
