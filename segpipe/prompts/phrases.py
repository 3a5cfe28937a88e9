"""Read phrases, and make the classes of a prompted run from them: the same in every scene."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from segpipe.config.card import Class
from segpipe.config.classes import color_of
from segpipe.config.job import Identity
from segpipe.config.prompts import PromptOptions
from segpipe.errors import RequestError
from segpipe.sources.identity import file_identity, members

UNNAMED = "unnamed"
"""Class of objects of which nobody said what they are."""
OTHER = Class(value=0, name="none of these", color="#000000", background=True)


@dataclass(frozen=True)
class Phrases:
    """What is looked for in words."""

    phrases: tuple[str, ...]
    """In the order and the spelling in which they first came."""
    notes: tuple[str, ...]
    """What was left out, and why."""


def parse_phrases(text: str | Sequence[str]) -> Phrases:
    """Phrases from the field's syntax, ``lake . dock . field``, from lines, or from a list of either.

    A full stop or a new line ends a phrase, but a stop between two digits is a decimal point. White
    space around and inside is single spaces; the same phrase in other letters (case) is the same.

    Raises:
        RequestError: there is no phrase in it.
    """
    items = [text] if isinstance(text, str) else list(text)
    parts = [part for item in items for part in _split(item)]
    cleaned = [" ".join(unicodedata.normalize("NFC", part).split()) for part in parts]
    known: dict[str, str] = {}
    repeated: dict[str, None] = {}
    empty, wordless = 0, []
    for phrase in cleaned:
        if not phrase:
            empty += 1
        elif not any(c.isalnum() for c in phrase):
            wordless.append(phrase)
        elif known.setdefault(phrase.casefold(), phrase) is not phrase:
            repeated[known[phrase.casefold()]] = None
    notes = []
    if repeated:
        notes.append(f"named more than once, looked for once: {', '.join(map(repr, repeated))}")
    if wordless:
        notes.append(f"no words, left out: {', '.join(map(repr, wordless))}")
    if empty:
        notes.append(f"{empty} empty {'phrase' if empty == 1 else 'phrases'} left out")
    if not known:
        raise RequestError(f"text: found no phrase in {text!r}; valid: phrases such as 'lake . dock . field'")
    return Phrases(tuple(known.values()), tuple(notes))


def _split(item: str) -> list[str]:
    """The parts of one text; the end of a phrase at the end of a text begins no further one."""
    parts = re.split(r"(?<!\d)\.|\.(?!\d)|[\r\n]+", item)
    if len(parts) > 1 and not parts[-1].strip():
        parts.pop()
    return parts


def phrase_classes(options: PromptOptions) -> tuple[Class, ...]:
    """Background, then phrases in the order of text, file and earlier labels; `UNNAMED` last, where needed.

    Raises:
        RequestError: a text without a phrase, or a file of prompts that cannot be read.
    """
    names = list(parse_phrases(options.text).phrases) if options.text else []
    unnamed = options.everything
    if options.path:
        found = _phrases_of_file(options.path, options.layer, file_fingerprint(options.path))
        names += [name for name in found if name]
        unnamed |= "" in found
    if options.earlier:
        names += options.names.values()
        unnamed = True
    known = {name.casefold(): name for name in reversed(names)}
    ordered = list(dict.fromkeys(known[name.casefold()] for name in names))
    if unnamed:
        ordered.append(UNNAMED)
    return (OTHER, *(Class(value=v, name=name, color=color_of(v)) for v, name in enumerate(ordered, start=1)))


def value_of(phrase: str, classes: Sequence[Class]) -> int:
    """Class value of a phrase; of `UNNAMED` where it is empty."""
    wanted = (phrase or UNNAMED).casefold()
    return next(c.value for c in classes if c.name.casefold() == wanted)


def file_fingerprint(path: str) -> str:
    """SHA-256 of a file and its sidecars.

    Raises:
        RequestError: it is not there.
    """
    if not Path(path).is_file():
        raise RequestError(f"prompts.path: {path} does not exist; give GeoJSON, GeoPackage or CSV")
    found = file_identity(members(Path(path)), Identity.content)
    return hashlib.sha256(repr([f.get("sha256") or f["said"] for f in found]).encode()).hexdigest()


@lru_cache(maxsize=16)
def _phrases_of_file(path: str, layer: str, fingerprint: str) -> tuple[str, ...]:
    """Phrases of a file's prompts, none twice; empty where a prompt has none."""
    from segpipe.prompts.inputs.prompt_files import read_file_attributes

    return tuple(dict.fromkeys(read_file_attributes(Path(path), layer).phrases))
