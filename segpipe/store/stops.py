"""Requests to stop, beside the stages in the working store, where every worker of a run can read them."""

from __future__ import annotations

from functools import lru_cache

import obstore
from obstore.store import ObjectStore

from segpipe.store.location import delete_objects, join, open_store
from segpipe.store.stage import STORE_FOLDER


@lru_cache(maxsize=16)
def _stops(out: str) -> ObjectStore:
    """Where requests to stop lie; asked before every block, so the client is kept."""
    return open_store(join(out, STORE_FOLDER, "stop"))


def request_stop(out: str, run: str) -> None:
    """Ask every worker of a run to stop before its next block."""
    obstore.put(_stops(out), run, b"")


def forget_stop(out: str, run: str) -> None:
    """Take back a request to stop: a flow run that was suspended goes on under the same name."""
    delete_objects(_stops(out), [run])


def stop_requested(out: str, run: str) -> bool:
    """Whether somebody asked this run to stop."""
    try:
        obstore.head(_stops(out), run)
    except FileNotFoundError:
        return False
    return True
