"""A run in this process, as the command line makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from prefect import State
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows.server import free_port, local_server
from segpipe.config.job import Job
from segpipe.errors import RequestError
from segpipe.runs.check import ResolvedJob

DRAIN_SECONDS = 10.0


def check_server() -> None:
    """Ask whether the server that the environment or profile names is there.

    Raises:
        RequestError: nothing answers.
    """
    url = get_current_settings().api.url
    if url is None:
        return
    with get_client(sync_client=True) as client:
        if client.api_healthcheck() is not None:
            raise RequestError(
                f"PREFECT_API_URL: no Prefect server answers at {url}; start one with "
                "`prefect server start`, or unset it for a temporary one"
            )


_HANDED_ON: ContextVar[ResolvedJob | None] = ContextVar("handed on", default=None)


def handed_on(job: Job) -> ResolvedJob | None:
    """The job as it was resolved in this process before its flow began; None where it was not."""
    resolved = _HANDED_ON.get()
    return resolved if resolved is not None and resolved.job == job else None


def run_here(
    flow: Callable[..., Any], *parameters: object, resolved: ResolvedJob | None = None
) -> State[Any]:
    """Run a flow on the server that settings name, or on one that ends with the run.

    Args:
        flow: to be called.
        parameters: of the flow.
        resolved: its job, where that is checked already; the flow does not check it again (`handed_on`).
    """
    _HANDED_ON.set(resolved)
    with nullcontext() if get_current_settings().api.url is not None else _own_server():
        state: State[Any] = flow(*parameters, return_state=True)
    return state


@contextmanager
def _own_server() -> Iterator[None]:
    """Unlike Prefect's temporary server, it outlives a Ctrl-C and has the whole history in the end."""
    with (
        local_server("127.0.0.1", free_port(), quiet=True) as api,
        temporary_settings({PREFECT_API_URL: api}),
    ):
        try:
            yield
        finally:
            for worker in (APILogWorker, EventsWorker):  # what they hold is still to be sent
                worker.drain_all(timeout=DRAIN_SECONDS)
