"""Who is at a scene: leases by create-if-absent, and a sign of life for each holder.

``leases/<name>/<generation>`` names its holder; it is made only if it is absent, which every store does in
one step. A holder's sign of life is one object, ``holders/<id>``, written every few seconds: when it is
old, whoever makes the next generation has taken the lease over, and only one can. (A conditional
overwrite by ETag would do too, but local file systems have none.) Ages are differences of times that
the store itself has set, so clocks of machines do not matter.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

import obstore
from obstore.store import ObjectStore

from segpipe.store.location import read_object

BEATS = 4
"""Signs of life within the time after which a holder counts as gone."""


class Holder:
    """One process that takes leases."""

    def __init__(self, objects: ObjectStore, name: str, patience: float) -> None:
        """
        Args:
            objects: the lake's ledger.
            name: of the flow run: a retry of it is the same holder and has its leases at once.
            patience: seconds without a sign of life after which a holder counts as gone.
        """
        self.objects = objects
        self.name = name
        self.patience = patience
        self._held: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def alive(self) -> Iterator[Holder]:
        """Give signs of life from now until the block ends; leases still held then are given back."""
        ended = threading.Event()
        self._beat()
        thread = threading.Thread(target=self._beat_until, args=(ended,), name="lease", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()
            for lease in list(self._held):
                self.give_back(lease)
            _delete(self.objects, f"holders/{self.name}")

    def take(self, lease: str) -> bool:
        """Take a lease; False: somebody else has it and is alive, or was faster."""
        newest, holder = self._newest(lease)
        if holder == self.name:
            generation = newest
        else:
            if holder is not None and not self._gone(holder):
                return False
            generation = newest + 1
            body = json.dumps({"holder": self.name}).encode()
            try:
                obstore.put(self.objects, _path(lease, generation), body, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
        with self._lock:
            self._held[lease] = generation
        return True

    def give_back(self, lease: str) -> None:
        """Give a lease back: its generation and what older ones are left of it."""
        with self._lock:
            mine = self._held.pop(lease)
        for generation in range(mine, 0, -1):
            if not _delete(self.objects, _path(lease, generation)):
                break

    def _newest(self, lease: str) -> tuple[int, str | None]:
        """The newest generation (0: none) and who made it."""
        paths = [m["path"] for chunk in obstore.list(self.objects, f"leases/{lease}") for m in chunk]
        if not paths:
            return 0, None
        path = max(paths)
        told = json.loads(read_object(self.objects, path) or b"{}")
        return int(path.rsplit("/", 1)[1]), told.get("holder")

    def _gone(self, holder: str) -> bool:
        """Whether a holder gave no sign of life for long, by the store's clock."""
        try:
            seen: datetime = obstore.head(self.objects, f"holders/{holder}")["last_modified"]
            now: datetime = obstore.head(self.objects, f"holders/{self.name}")["last_modified"]
        except FileNotFoundError:
            return True
        return (now - seen).total_seconds() > self.patience

    def _beat(self) -> None:
        obstore.put(self.objects, f"holders/{self.name}", b"")

    def _beat_until(self, ended: threading.Event) -> None:
        while not ended.wait(self.patience / BEATS):
            with suppress(OSError, obstore.exceptions.BaseError):  # the next one may get through
                self._beat()


def _path(lease: str, generation: int) -> str:
    return f"leases/{lease}/{generation:08d}"


def _delete(objects: ObjectStore, path: str) -> bool:
    try:
        obstore.head(objects, path)
        obstore.delete(objects, path)
    except FileNotFoundError:
        return False
    return True
