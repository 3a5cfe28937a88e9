"""What a target is, and what it may end in."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from segpipe.errors import SegpipeError
from tools.fuzz.mutate import PART

MOST = 400
"""Characters of a line of an error; what a file says may be quoted, but not all of it."""


@dataclass(frozen=True)
class Target:
    """One parser."""

    name: str
    read: Callable[[Path], None]
    """Reads the files of a folder as segpipe does."""
    files: tuple[str, ...]
    """Names of the files that the parts of an input are written to."""
    form: str = "bytes"
    """Of the parts; see `tools.fuzz.mutate.mutate`."""
    several: bool = False
    """Whether an error may have several lines: one a mistake, as of YAML."""
    walled: bool = False
    """Whether only reader processes read such files: too much memory is an error there."""
    mutants: int = 20
    """In the slice of `make test`."""


class UnclearError(Exception):
    """An error that a user cannot read: it has no text, several lines, or bytes of a terminal."""


@contextmanager
def scratch() -> Iterator[Path]:
    """A new folder in memory where the system has such: no cache knows its files."""
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="segpipe-fuzz-", dir=memory))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def execute(target: Target, data: bytes) -> None:
    """Let a target read an input; return where it is read, or refused by a clear error.

    Raises:
        UnclearError: the error is none that a user can read.
        Exception: what no reader named; a finding.
    """
    before = Path.cwd()
    with scratch() as folder:
        for name, part in zip(target.files, data.split(PART), strict=False):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(part)
        os.chdir(folder)
        try:
            target.read(folder)
        except SegpipeError as error:
            try:
                check_text(str(error), several=target.several)
            except UnclearError as unclear:
                raise unclear from error  # which says where it is from
        except MemoryError:
            if not target.walled:
                raise
        finally:
            os.chdir(before)


def check_text(text: str, *, several: bool) -> None:
    """Check what an error says.

    Raises:
        UnclearError: it cannot be read.
    """
    lines = text.split("\n")
    if not text.strip() or (len(lines) > 1 and not several) or not all(line.strip() for line in lines):
        raise UnclearError(f"found {len(lines)} lines: {text[:MOST]!r}")


def joined(parts: Sequence[bytes]) -> bytes:
    """An input of several files."""
    return PART.join(parts)
