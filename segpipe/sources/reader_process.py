"""What a reader does (`segpipe.sources.readers`): it restricts itself, then opens, reads and closes."""

from __future__ import annotations

import json
import mmap
import os
import signal
import socket
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import segpipe
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.process.sandbox import limit_files, limit_memory, restrict_access
from segpipe.redact import seal
from segpipe.sources import open_in_process
from segpipe.sources.base import Source
from segpipe.sources.isolated import describe
from segpipe.sources.readers import LENGTH

MOST_SOURCES = 16
"""Held open; the one used longest ago is closed."""
MEMORY = "SEGPIPE_READER_MEMORY"
MEMORY_BYTES = 4 * 2**30
"""Of private memory beside that of the box that is read, unless the variable says otherwise."""
COPIES = 4
"""Of a box, while it is read: values of each band, masks, and a change of type."""
SYSTEM = ("/usr", "/lib", "/lib64", "/opt", "/dev", "/proc", "/sys", "/etc")
CREDENTIALS = (".aws", ".azure", ".config/gcloud")
"""Below the home folder: what a store's client looks for."""


def serve(channel: int, memory: int, limits: dict[str, Any]) -> None:
    """Answer requests until the other end closes.

    What a library raises that its reader does not name ends the process: the other end sees that and says so.

    Args:
        channel: descriptor of a socket.
        memory: descriptor of what both processes share.
        limits: ``roots`` and ``network`` of a `segpipe.sources.readers.Access`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other end gets the signal, and closes the channel
    limit_files()
    restrict_access(_readable(limits["roots"], limits["network"]), network=limits["network"])
    with socket.socket(fileno=channel) as connection:
        worker = _Worker(memory)
        while head := connection.recv(LENGTH.size, socket.MSG_WAITALL):
            request = json.loads(connection.recv(LENGTH.unpack(head)[0], socket.MSG_WAITALL))
            try:
                answer, body = worker.answer(request)
            except (SceneError, RequestError) as error:
                answer, body = {"error": type(error).__name__, "text": str(error)}, b""
            text = json.dumps({**answer, "bytes": len(body)}).encode()
            connection.sendall(LENGTH.pack(len(text)) + text + body)


def _readable(roots: list[str], network: bool) -> list[Path]:
    """What a reader may read: its scenes, libraries, and what a store's client looks for."""
    found = [*roots, *SYSTEM, *segpipe.__path__, sys.prefix, sys.base_prefix, *(p for p in sys.path if p)]
    paths = [Path(p) for p in found]
    if network:
        paths += [Path.home() / name for name in CREDENTIALS]
        paths += [Path(v) for v in os.environ.values() if v.startswith("/") and Path(v).is_file()]
    return paths


class _Worker:
    """The sources that are open, by token."""

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._view: mmap.mmap | None = None
        self._open: OrderedDict[str, Source] = OrderedDict()

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        """Do what is asked for.

        Raises:
            SceneError, RequestError: as the sources raise.
        """
        os.chdir(request["folder"])
        limit_memory(int(os.environ.get(MEMORY, MEMORY_BYTES)) + COPIES * request["size"])
        actions: dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], bytes]]] = {
            "open": self._opened,
            "read": self._read,
            "close": self._close,
            "groups": _groups,
            "layers": _layers,
            "layer": _layer,
        }
        try:
            return actions[request["do"]](request)
        except MemoryError:
            raise SceneError(f"{request['uri']}: cannot be read within the memory of a reader") from None

    def _opened(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        return describe(self._source(request)), b""

    def _source(self, request: dict[str, Any]) -> Source:
        token = request["token"]
        if token not in self._open:
            self._open[token] = open_in_process(
                seal(request["uri"]), band_names=request["names"], copy=request["copy"]
            )
            if len(self._open) > MOST_SOURCES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(token)
        return self._open[token]

    def _read(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        source = self._source(request)
        if source.identity != request["identity"]:
            raise SceneError(f"{source.uri}: changed since it was opened; run the job again")
        pixels = source.read(Box(tuple(request["start"]), tuple(request["stop"])), tuple(request["channels"]))
        if self._view is None or len(self._view) < request["size"]:
            self._view = mmap.mmap(self._memory, request["size"])
        start = 0
        for array in (pixels.values, pixels.valid):
            place = np.frombuffer(self._view, array.dtype, array.size, start)
            place.reshape(array.shape)[...] = array
            start += array.nbytes
        return {}, b""

    def _close(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        if request["token"] in self._open:
            self._open.pop(request["token"]).close()
        return {}, b""


def _groups(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    from segpipe.sources.dicom.series import group_files  # loads pydicom

    groups, broken = group_files(Path(request["uri"]), request["names"])
    return {"groups": [[*key, files] for key, files in groups.items()], "broken": broken}, b""


def _layers(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    from segpipe.sources import vectors  # loads geopandas

    return {"layers": vectors.layers_here(request["uri"])}, b""


def _layer(request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    from segpipe.sources import vectors

    return {}, vectors.frame_bytes(request["uri"], request["layer"])
