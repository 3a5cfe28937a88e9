"""What workers look at before they go on: a request to stop, and whether the lease is still theirs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import obstore
from obstore.store import ObjectStore

from segpipe.errors import LeaseLostError, StoppedError
from segpipe.store.location import STORE_FOLDER, delete_objects, join, open_store, read_object


@lru_cache(maxsize=16)
def _stops(out: str) -> ObjectStore:
    """The folder of requests to stop; it is looked at before every block, so the client is kept."""
    return open_store(join(out, STORE_FOLDER, "stop"))


@dataclass(frozen=True)
class StopToken:
    """The name under which the workers of one run are asked to stop. Small and picklable."""

    out: str
    """Output location of the job."""
    name: str
    """Of one attempt at one run: a retry has another."""

    def request(self) -> None:
        """Ask every worker to stop before its next block."""
        obstore.put(_stops(self.out), self.name, b"")

    def forget(self) -> None:
        """Take the request back: a flow run that was suspended goes on under the same name."""
        delete_objects(_stops(self.out), [self.name])

    @property
    def requested(self) -> bool:
        """Whether somebody asked the run to stop."""
        try:
            obstore.head(_stops(self.out), self.name)
        except FileNotFoundError:
            return False
        return True

    def check(self) -> None:
        """Raises StoppedError where somebody asked the run to stop; what is committed stays."""
        if self.requested:
            raise StoppedError("the run was asked to stop; run it again to resume")


def lease_path(lease: str, generation: int) -> str:
    """The object that names the holder of a generation of a lease."""
    return f"leases/{lease}/{generation:08d}"


@dataclass(frozen=True)
class Fence:
    """A lease as it was taken, for whoever commits something in its name. Small and picklable."""

    location: str
    """Of the leases."""
    lease: str
    generation: int
    """The fencing token: whoever takes the lease over has a greater one."""
    holder: str
    """This attempt of the process that took it."""

    def check(self) -> None:
        """Raises LeaseLostError where another has the lease now: asked before each commit."""
        store = _leases(self.location)
        # In this order: who took it over removes our generation before its own.
        taken = read_object(store, lease_path(self.lease, self.generation + 1)) is not None
        mine = read_object(store, lease_path(self.lease, self.generation))
        if taken or mine is None or json.loads(mine).get("attempt") != self.holder:
            raise LeaseLostError(f"the lease {self.lease} was taken over: nothing more is written")


@lru_cache(maxsize=16)
def _leases(location: str) -> ObjectStore:
    return open_store(location)
