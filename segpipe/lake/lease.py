"""Who is at a scene: leases by create-if-absent, and a sign of life for each holder.

``leases/<name>/<generation>`` names its holder; it is made only if it is absent, which every store does in
one step. A holder's sign of life is one object, ``holders/<id>``, written every few seconds: when it is
old, whoever makes the next generation has taken the lease over, and only one can. (A conditional
overwrite by ETag would do too, but local file systems have none.) Ages are differences of times that
the store itself has set, so clocks of machines do not matter.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

import obstore
from obstore.store import ObjectStore
from pydantic import TypeAdapter

from segpipe.config.parsing import parse_json
from segpipe.store.location import read_object
from segpipe.store.stop import Fence, lease_path

_LEASES = TypeAdapter(dict[str, str])

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
        self.attempt = secrets.token_hex(8)
        """Of this process: a retry of its flow run takes its leases over, and it writes nothing more."""
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
            retried = [self.give_back(lease) for lease in list(self._held)]
            if not any(retried):  # else the heartbeat is the retry's
                _delete(self.objects, f"holders/{self.name}")

    def take(self, lease: str) -> bool:
        """Take a lease; False: somebody else has it and is alive, or was faster."""
        generation, holder, attempt = self._newest(lease)
        if attempt != self.attempt:
            if holder not in (None, self.name) and not self._gone(holder):
                return False
            generation += 1
            body = json.dumps({"holder": self.name, "attempt": self.attempt}).encode()
            try:
                obstore.put(self.objects, lease_path(lease, generation), body, mode="create")
            except obstore.exceptions.AlreadyExistsError:
                return False
        with self._lock:
            self._held[lease] = generation
        return True

    def fence(self, lease: str, location: str) -> Fence:
        """Return what proves, before each commit, that a lease is still held.

        Args:
            lease: one that was taken.
            location: of the lake's ledger.
        """
        return Fence(location, lease, self._held[lease], self.attempt)

    def give_back(self, lease: str) -> bool:
        """Give a lease back: what older generations left of it, then its own.

        Returns:
            Whether another attempt of the same flow run had taken it over.
        """
        with self._lock:
            mine = self._held.pop(lease)
        _, holder, attempt = self._newest(lease)
        own = self._told(lease_path(lease, mine))
        if own.get("attempt") == self.attempt:  # else what is there is another's, who may count anew
            for path in self._generations(lease):
                if path <= lease_path(lease, mine):
                    _delete(self.objects, path)
        return holder == self.name and attempt != self.attempt

    def _generations(self, lease: str) -> list[str]:
        listed = obstore.list(self.objects, f"leases/{lease}")
        return sorted(meta["path"] for chunk in listed for meta in chunk)

    def _newest(self, lease: str) -> tuple[int, str | None, str]:
        """The newest generation (0: none), who made it, and which attempt of that."""
        paths = self._generations(lease)
        if not paths:
            return 0, None, ""
        told = self._told(paths[-1])
        return int(paths[-1].rsplit("/", 1)[1]), told.get("holder"), told.get("attempt", "")

    def _told(self, path: str) -> dict[str, str]:
        """Who has a lease; a damaged one is nobody's, and the next generation replaces it."""
        try:
            return _LEASES.validate_python(parse_json(read_object(self.objects, path) or b"{}"))
        except ValueError:
            return {}

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


def _delete(objects: ObjectStore, path: str) -> bool:
    try:
        obstore.head(objects, path)
        obstore.delete(objects, path)
    except FileNotFoundError:
        return False
    return True
