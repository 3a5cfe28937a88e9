"""Ask the workers of a run to stop, through the store that all of them see."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import obstore
from obstore.store import ObjectStore

from segpipe.errors import StoppedError
from segpipe.store.location import STORE_FOLDER, delete_objects, join, open_store


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
