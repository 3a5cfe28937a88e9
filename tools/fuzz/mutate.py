"""Change inputs at random, half of the time so that they stay what a parser takes: its checks come after.

An input is one file, or several parts with `PART` between them.
"""

# ruff: noqa: E501  (data)
from __future__ import annotations

import gzip
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import yaml

PART = b"\0--part--\0"
"""Stands between the files that an input consists of."""
DEPTH = 3000
"""Of nesting: beyond Python's recursion limit."""
ODD_TEXTS = (
    "", " ", "0", "-1", "-0", "1e400", "NaN", "inf", "true", "null", "~", "~nouser/x", "..", "/", "a/../b", "x" * 5000,
    "a\0b", "a\nb\r\nc", "\x1b[31m", "\x7f", "\ud800", "\u202e", "ä", "e\u0301", "٣", "²", "𝟛", "=1+1", "{}", "[]", "%s", "@x",
    "2026-13-45", "#frame=1", "EPSG:0", "1" * 5000, "0x10", "1_000", "1,5", ":", "*", "?", "[",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 255, 65536, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e308, 1e-320,
    float("nan"), float("inf"), -float("inf"), [], {}, [[]], [None], {"": None}, {"a": {"a": 1}},
)  # fmt: skip
ODD_NUMBERS = (
    0,
    1,
    2,
    127,
    128,
    255,
    256,
    32767,
    32768,
    65535,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64 - 1,
)
ODD_FLOATS = (0.0, -0.0, 1.0, -1.0, 1e30, 1e-30, float("nan"), float("inf"), -float("inf"))
TOKENS = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|\"[^\"]*\"|>[^<>]+<|[A-Za-z_]{2,}")


def mutate(data: bytes, form: str, random: Random) -> bytes:
    """Change one part of an input.

    Args:
        data: the input.
        form: of its parts, with spaces between: ``json``, ``yaml``, ``csv``, ``text``, ``gzip`` or
            ``bytes``; the last stands for all further ones.
        random: what decides.
    """
    parts, forms = data.split(PART), form.split()
    place = random.randrange(len(parts))
    structured = STRUCTURED.get(forms[min(place, len(forms) - 1)])
    change = structured if structured is not None and random.random() < 0.6 else mutate_bytes
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        parts[place] = change(parts[place], random)
    return PART.join(parts)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flip, cut, repeat, insert, or write an odd number."""
    found = bytearray(data)
    if not found:
        return random.randbytes(random.randrange(1, 40))
    at = random.randrange(min(len(found), random.choice((64, 600, len(found)))))
    match random.randrange(7):
        case 0:
            found[at] ^= 1 << random.randrange(8)
        case 1:
            found[at] = random.randrange(256)
        case 2:
            del found[at:]
        case 3:
            del found[at : at + random.randrange(1, 17)]
        case 4:
            found[at:at] = found[at : at + random.randrange(1, 65)] * random.choice((1, 2, 30))
        case 5:
            found[at:at] = random.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
        case _:
            number = _odd_number(random)
            at -= at % len(number)
            found[at : at + len(number)] = number
    return bytes(found)


def _odd_number(random: Random) -> bytes:
    order = random.choice("<>")
    if random.random() < 0.3:
        return struct.pack(order + random.choice("fd"), random.choice(ODD_FLOATS))
    size = random.choice((1, 2, 4, 8))
    value = random.choice(ODD_NUMBERS) % (1 << 8 * size)
    return value.to_bytes(size, "little" if order == "<" else "big")


def mutate_text(data: bytes, random: Random) -> bytes:
    """Replace a number, a word or what stands between quotes or tags; or double or drop a line."""
    if random.random() < 0.2:
        lines = data.split(b"\n")
        at = random.randrange(len(lines))
        lines[at : at + 1] = random.choice(([], [lines[at]] * 2, [lines[at], random.choice(lines)]))
        return b"\n".join(lines)
    found = list(TOKENS.finditer(data))
    if not found:
        return mutate_bytes(data, random)
    match = random.choice(found)
    odd = random.choice((*ODD_TEXTS, random.choice(found)[0].decode("latin-1")))
    new = odd.encode("utf-8", "surrogatepass")
    first, last = data[match.start() : match.start() + 1], data[match.end() - 1 : match.end()]
    if first in (b'"', b">"):
        new = first + new.replace(first, b"").replace(last, b"") + last
    return data[: match.start()] + new + data[match.end() :]


def mutate_csv(data: bytes, random: Random) -> bytes:
    """Replace, double or drop a cell, a row or a column's name."""
    rows = [line.split(b",") for line in data.splitlines()] or [[b""]]
    row = random.choice(rows)
    at = random.randrange(len(row))
    match random.randrange(5):
        case 0:
            del row[at]
        case 1:
            row.insert(at, row[at])
        case 2:
            rows.insert(random.randrange(len(rows)), list(row))
        case 3:
            row[at] = b'"' + random.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
        case _:
            row[at] = random.choice(ODD_TEXTS).encode("utf-8", "surrogatepass")
    return b"\n".join(map(b",".join, rows)) + b"\n"


def mutate_json(data: bytes, random: Random) -> bytes:
    """Replace a value of JSON by an odd one, nest it, drop or double a key."""
    return _mutated(data, random, json.loads, lambda value: json.dumps(value))


def mutate_yaml(data: bytes, random: Random) -> bytes:
    """Do the same with YAML."""
    return _mutated(data, random, yaml.safe_load, lambda value: yaml.safe_dump(value, sort_keys=False))


def _mutated(data: bytes, random: Random, load: Callable[[str], Any], dump: Callable[[Any], str]) -> bytes:
    if data.count(b"[") + data.count(b"{") > DEPTH // 3:
        return mutate_bytes(data, random)
    try:
        tree = [load(data.decode())]
    except (ValueError, RecursionError, yaml.YAMLError, OverflowError, TypeError, AttributeError):
        return mutate_text(data, random)
    if random.random() < 0.05:
        deep, shut = random.choice((("[", "]"), ('{"a":', "}")))
        return (deep * DEPTH + "0" + shut * DEPTH).encode()
    holder, key = random.choice(list(_places(tree)))
    old = holder[key]
    match random.randrange(8):
        case 0:
            holder[key] = [old]
        case 1:
            holder[key] = {random.choice(ODD_TEXTS): old}
        case 2 if isinstance(holder, dict):
            del holder[key]
            if random.random() < 0.5:
                holder[random.choice(ODD_TEXTS)] = old
        case 2 if holder is not tree:
            holder[key:] = random.choice(([], [old, old], [old] * 200))
        case 3 if isinstance(old, str):
            holder[key] = old + random.choice(ODD_TEXTS)
        case 4 if isinstance(old, int | float):
            holder[key] = random.choice((str(old), -old, old * 1000, old + 0.5 if abs(old) < 1e300 else 0))
        case 5 | 6:
            holder[key] = random.choice(ODD_TEXTS)
        case _:
            holder[key] = random.choice(ODD_VALUES)
    try:
        text = dump(tree[0])
    except (RecursionError, ValueError, yaml.YAMLError):
        return mutate_text(data, random)
    if isinstance(holder, dict) and key in holder and random.random() < 0.1:
        name = json.dumps(key)
        text = text.replace(f"{name}:", f"{name}: 1, {name}:", 1)  # the key twice
    return text.encode("utf-8", "surrogatepass")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield all containers with each of their keys."""
    waiting = [value]
    while waiting:
        holder = waiting.pop()
        items = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
        for key, inner in items[:500]:
            yield holder, key
            if isinstance(inner, dict | list):
                waiting.append(inner)


def mutate_gzip(data: bytes, random: Random) -> bytes:
    """Change what is compressed."""
    try:
        plain = gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return mutate_bytes(data, random)
    return gzip.compress(mutate_bytes(plain, random), 1, mtime=0)


STRUCTURED: dict[str, Callable[[bytes, Random], bytes]] = {
    "json": mutate_json,
    "yaml": mutate_yaml,
    "csv": mutate_csv,
    "text": mutate_text,
    "gzip": mutate_gzip,
}
