"""Processes that read the files of strangers, so that none of them can harm the one that asks.

A file that makes its library crash, swell or hang costs a reader, which is replaced, and the one scene.
A reader writes nothing, opens only files below the folders of the scenes that it is given
(`segpipe.process.sandbox`), and connects to nobody unless its scene lies behind a URL. Requests and answers
are JSON; pixels come through memory that both share. Readers are started by `subprocess`: Dask's workers
may have no children of `multiprocessing`, and a copy of a process that has threads is none to rely on.

``SEGPIPE_TRUSTED_FILES=1`` leaves all of this out: files are read in the process itself. It belongs to a
machine whose files have one author, so no job can ask for it; `run.json` says so.
"""

from __future__ import annotations

import atexit
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.errors import RequestError, SceneError, SegpipeError
from segpipe.process.cpus import cpu_count

TRUSTED = "SEGPIPE_TRUSTED_FILES"
SECONDS = "SEGPIPE_READER_SECONDS"
MOST_SECONDS = 600.0
"""For one answer; a server that says nothing is given up by GDAL after one minute."""
LENGTH = struct.Struct("=I")
ERRORS: dict[str, type[SegpipeError]] = {"SceneError": SceneError, "RequestError": RequestError}
NOT_ASKED = ("PREFECT", "PYTEST", "_")
"""Beginnings of variables that no reader asks for: of any other, readers with another value are replaced."""


def trusted() -> bool:
    """Whether files are read in this process."""
    return os.environ.get(TRUSTED) == "1" or os.name != "posix"


@dataclass(frozen=True)
class Access:
    """What a reader may touch."""

    roots: frozenset[str]
    """Folders, resolved, below which it reads files."""
    network: bool = False
    links: bool = False
    """Whether GDAL's VRT driver is there, for the text of a VRT that was checked or written here."""

    def covers(self, other: Access) -> bool:
        """Whether a reader with this access can do what asks for another."""
        same = (self.network, self.links) == (other.network, other.links)
        return same and all(any(Path(r).is_relative_to(own) for own in self.roots) for r in other.roots)


def roots_of(paths: Iterable[Path]) -> frozenset[str]:
    """The folders that hold some files, and what links beside them with the same stem point to."""
    found = set()
    for path in paths:
        folder = path if path.is_dir() else path.parent
        found.add(folder.resolve())
        stem = "" if path.is_dir() else path.name.split(".")[0]
        if folder.is_dir():
            entries = (e for e in os.scandir(folder) if e.is_symlink() and e.name.startswith(stem))
            found |= {Path(entry.path).resolve().parent for entry in entries}
    return frozenset(str(f) for f in found)


class Reader:
    """One process that reads. One thread asks it at a time."""

    def __init__(self, access: Access) -> None:
        """Start it."""
        self.access = access
        self.sources: set[str] = set()
        """Tokens of the sources that it holds open."""
        self.environment = _environment()
        self._socket, theirs = socket.socketpair()
        self._memory = _shared_memory()
        self._view: mmap.mmap | None = None
        self._errors, errors = os.pipe()
        # A library that talks without end must not make its process wait for us.
        os.set_blocking(errors, False)
        os.set_blocking(self._errors, False)
        limits = {"roots": sorted(access.roots), "network": access.network}
        code = (
            "from segpipe.sources.reader_process import serve; "
            f"serve({theirs.fileno()}, {self._memory}, {limits!r})"
        )
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            pass_fds=(theirs.fileno(), self._memory),
            env=_child_environment(access),
        )
        theirs.close()
        os.close(errors)

    def ask(self, request: dict[str, Any], into: Sequence[np.ndarray] = ()) -> tuple[dict[str, Any], bytes]:
        """Ask, and wait for the answer.

        Args:
            request: JSON.
            into: contiguous arrays that the answer fills.

        Returns:
            The answer, and the bytes that came with it.

        Raises:
            SceneError, RequestError: what the reader raised.
            EOFError: it ended; says how.
        """
        self._drain()
        size = sum(array.nbytes for array in into)
        if size > (len(self._view) if self._view is not None else 0):
            os.ftruncate(self._memory, size)
            self._view = mmap.mmap(self._memory, size)
        text = json.dumps({**request, "size": size, "folder": os.getcwd()}).encode()  # noqa: PTH109
        try:
            self._socket.settimeout(float(os.environ.get(SECONDS, MOST_SECONDS)))
            self._socket.sendall(LENGTH.pack(len(text)) + text)
            answer = json.loads(self._receive(LENGTH.unpack(self._receive(LENGTH.size))[0]))
            body = self._receive(answer.get("bytes", 0))
        except TimeoutError:
            self.end()
            raise EOFError(f"gave no answer within {self._socket.gettimeout():g} s") from None
        except (ConnectionError, EOFError):
            raise EOFError(self._how_it_ended()) from None
        if "error" in answer:
            raise ERRORS[answer["error"]](answer["text"])
        start = 0
        for array in into:
            assert self._view is not None
            found = np.frombuffer(self._view, array.dtype, array.size, start)
            array[...] = found.reshape(array.shape)
            start += array.nbytes
        return answer, body

    def end(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._socket.close()

    def __del__(self) -> None:
        for descriptor in (self._memory, self._errors):
            os.close(descriptor)

    def _receive(self, count: int) -> bytes:
        parts = []
        while count:
            part = self._socket.recv(min(count, 1 << 20))
            if not part:
                raise EOFError
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def _drain(self) -> bytes:
        """What it said on its standard error since the last time."""
        said = b""
        try:
            while part := os.read(self._errors, 1 << 16):
                said += part
        except BlockingIOError:
            pass
        return said

    def _how_it_ended(self) -> str:
        try:
            code = self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            code = 0
        self.end()
        said = self._drain().decode(errors="replace").strip().splitlines()
        if code < 0:
            return f"ended by {signal.Signals(-code).name}"
        return f"ended: {said[-1].strip()}" if said else f"ended with exit code {code}"


class Readers:
    """The readers of this process: as many as there are requests at a time, up to the number of CPUs."""

    def __init__(self) -> None:
        self._most = max(2, cpu_count())
        self.forget()

    def forget(self) -> None:
        """Begin without readers: a forked process has a copy of its parent's, which it must not ask."""
        self._idle: list[Reader] = []
        self._busy = 0
        self._change = threading.Condition()

    def ask(
        self,
        told: str,
        access: Access,
        request: dict[str, Any],
        *,
        token: str = "",
        into: Sequence[np.ndarray] = (),
    ) -> tuple[dict[str, Any], bytes]:
        """Ask any reader with this access, best one that has the source open.

        Args:
            told: what the file is called in errors.
            access: what the reader must be able to touch.
            request: JSON.
            token: of the source.
            into: contiguous arrays that the answer fills.

        Returns:
            The answer, and the bytes that came with it.

        Raises:
            SceneError: the reader ended; or as it raised.
            RequestError: as it raised.
        """
        reader = self._take(access, token)
        alive = True
        try:
            answer = reader.ask(request, into)
            if token:
                reader.sources.add(token)
            return answer
        except EOFError as error:
            alive = False
            raise SceneError(f"{told}: cannot be read: the process that reads it {error}") from None
        finally:
            self._give_back(reader if alive else None)

    def close(self, token: str) -> None:
        """Let idle readers close a source; a busy one does when it has opened some others."""
        with self._change:
            holding = [r for r in self._idle if token in r.sources]
            self._idle = [r for r in self._idle if r not in holding]
            self._busy += len(holding)
        for reader in holding:
            reader.sources.discard(token)
            try:
                reader.ask({"do": "close", "token": token})
            except EOFError:
                self._give_back(None)
            else:
                self._give_back(reader)

    def end(self) -> None:
        """End all idle readers; the others end when this process does."""
        with self._change:
            idle, self._idle = self._idle, []
        for reader in idle:
            reader.end()

    def _take(self, access: Access, token: str) -> Reader:
        with self._change:
            while True:
                fitting = [
                    r for r in self._idle if r.access.covers(access) and r.environment == _environment()
                ]
                if fitting:
                    chosen = next((r for r in fitting if token in r.sources), fitting[-1])
                    self._idle.remove(chosen)
                    self._busy += 1
                    return chosen
                if len(self._idle) + self._busy < self._most:
                    break
                if self._idle:
                    self._idle.pop(0).end()
                    break
                self._change.wait()
            self._busy += 1
            known = {root for r in self._idle for root in r.access.roots}
        with ExitStack() as unless_started:
            unless_started.callback(self._give_back, None)
            reader = Reader(_widened(access, known))
            unless_started.pop_all()
        return reader

    def _give_back(self, reader: Reader | None) -> None:
        with self._change:
            self._busy -= 1
            if reader is not None:
                self._idle.append(reader)
            self._change.notify()


def _widened(access: Access, known: set[str]) -> Access:
    """The access with the folders that hold both its own and a known one: a lake needs few readers."""
    forbidden = {Path("/"), Path.home(), *Path.home().parents, Path(tempfile.gettempdir()).resolve()}
    roots = set(access.roots)
    for root in access.roots:
        for other in known:
            common = Path(os.path.commonpath([root, other]))
            if common not in forbidden and len(common.parts) > 2:
                roots.add(str(common))
    return Access(frozenset(roots), access.network, access.links)


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(NOT_ASKED)}


def _child_environment(access: Access) -> dict[str, str]:
    """Of a reader: this process's modules, one thread in each library, and no driver beyond its needs."""
    found = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if not access.links:
        skipped = found.get("GDAL_SKIP", "")
        found["GDAL_SKIP"] = f"{skipped},VRT" if skipped else "VRT"
    return found


def _shared_memory() -> int:
    """A file that lies in memory where the system has such, and has no name."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("segpipe-pixels", 0)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


readers = Readers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=readers.forget)
atexit.register(readers.end)
