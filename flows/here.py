"""A run in this process, as the command line makes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import httpx
from prefect import State
from prefect.client.orchestration import get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from segpipe.config.job import Job
from segpipe.config.loading import ModelT, as_request
from segpipe.errors import RequestError, SegpipeError
from segpipe.redact import plain_secrets
from segpipe.runs.check import ResolvedJob
from segpipe_flows.server import free_port, local_server

DRAIN_SECONDS = 10.0


def check_server() -> None:
    """Ask whether the server that the environment or profile names is there.

    Raises:
        RequestError: nothing answers.
        SegpipeError: it lets nobody in with these credentials.
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
        with server_in_use():
            client.api_version()  # unlike its health, it is told to who may ask


_HANDED_ON: ContextVar[ResolvedJob | None] = ContextVar("handed on", default=None)


def handed_on(job: Job) -> ResolvedJob | None:
    """The job as it was resolved in this process before its flow began; None where it was not."""
    resolved = _HANDED_ON.get()
    return resolved if resolved and resolved.job.model_dump() == job.model_dump() else None


def request_of(model: type[ModelT], given: ModelT | Mapping[str, Any], origin: str) -> ModelT:
    """The request of a flow: as it is, or the plain values that a form or a schedule sends.

    Raises:
        RequestError: it is wrong; or has a secret, which Prefect keeps in its database as it is.
    """
    found = plain_secrets(given) if isinstance(given, Mapping) else []
    if found:
        raise RequestError(
            f"{origin}: {found[0]}: a URL with a password or signature, which Prefect would keep in its "
            "database; valid: the name of a variable of the workers' environment in its place, such as "
            "https://host/scene.tif?${SIGNATURE}; delete this flow run"
        )
    return as_request(model, given, origin)


def run_here(
    flow: Callable[..., Any], *parameters: object, resolved: ResolvedJob | None = None
) -> State[Any]:
    """Run a flow on the server that settings name, or on one that ends with the run.

    Args:
        flow: to be called.
        parameters: of the flow.
        resolved: its job, where that is checked already; the flow does not check it again (`handed_on`).

    Raises:
        SegpipeError: the server does not start, or is gone before the end.
    """
    _HANDED_ON.set(resolved)
    own = nullcontext() if get_current_settings().api.url is not None else _own_server()
    with own, server_in_use():
        state: State[Any] = flow(*parameters, return_state=True)
    return state


@contextmanager
def server_in_use() -> Iterator[None]:
    """Around what asks the server, and cannot go on without.

    Raises:
        SegpipeError: the server did not answer, or refused.
    """
    try:
        yield
    except httpx.HTTPError as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise SegpipeError(
            f"the Prefect server at {get_current_settings().api.url} is gone or refuses ({reason}); what is "
            "done stays, the same command goes on; `segpipe doctor` looks at address and credentials"
        ) from error


@contextmanager
def _own_server() -> Iterator[None]:
    """Unlike Prefect's temporary server, it outlives a Ctrl-C and has the whole history in the end."""
    with (
        local_server("127.0.0.1", free_port()) as api,
        temporary_settings({PREFECT_API_URL: api}),
    ):
        try:
            yield
        finally:
            for worker in (APILogWorker, EventsWorker):  # what they hold is still to be sent
                worker.drain_all(timeout=DRAIN_SECONDS)
