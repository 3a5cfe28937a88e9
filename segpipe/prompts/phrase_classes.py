"""The classes of a prompted run: one for each phrase, the same in every scene."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from segpipe.config.card import Class
from segpipe.config.classes import color_of
from segpipe.config.prompts import PromptOptions
from segpipe.errors import RequestError
from segpipe.prompts.inputs.prompts import parse_phrases
from segpipe.prompts.inputs.rows import read_attributes

UNNAMED = "unnamed"
"""Class of objects of which nobody said what they are."""
OTHER = Class(value=0, name="none of these", color="#000000", background=True)


def phrase_classes(options: PromptOptions) -> tuple[Class, ...]:
    """Background, then phrases in the order of text, file and earlier labels; `UNNAMED` last, where needed.

    Raises:
        RequestError: a text without a phrase, or a file of prompts that cannot be read.
    """
    names = list(parse_phrases(options.text).phrases) if options.text else []
    unnamed = options.everything
    if options.path:
        found = _of_file(options.path, options.layer, file_mark(options.path))
        names += [name for name in found if name]
        unnamed |= "" in found
    if options.earlier:
        names += options.names.values()
        unnamed = True
    known = {name.casefold(): name for name in reversed(names)}
    ordered = list(dict.fromkeys(known[name.casefold()] for name in names))
    if unnamed:
        ordered.append(UNNAMED)
    return (
        OTHER,
        *(Class(value=v, name=name, color=color_of(v)) for v, name in enumerate(ordered, start=1)),
    )


def value_of(phrase: str, classes: Sequence[Class]) -> int:
    """Class value of a phrase; of `UNNAMED` where it is empty."""
    wanted = (phrase or UNNAMED).casefold()
    return next(c.value for c in classes if c.name.casefold() == wanted)


def file_mark(path: str) -> str:
    """SHA-256 of a file.

    Raises:
        RequestError: it is not there.
    """
    if not Path(path).is_file():
        raise RequestError(f"prompts.path: {path} does not exist; give GeoJSON, GeoPackage or CSV")
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=16)
def _of_file(path: str, layer: str, mark: str) -> tuple[str, ...]:
    """Phrases of a file's prompts, none twice; empty where a prompt has none."""
    source = Path(path).name
    if Path(path).suffix.lower() == ".csv":
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [row[name] for row in rows] for name in (rows[0] if rows else ()) if name}
        attributes = read_attributes(columns, len(rows), source)
    else:
        from segpipe.prompts.inputs.files import read_layer

        frame = read_layer(path, layer)
        columns = {c: frame[c].tolist() for c in frame.columns if c != frame.geometry.name}
        attributes = read_attributes(columns, len(frame), source)
    return tuple(dict.fromkeys(attributes.phrases))
