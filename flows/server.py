"""A Prefect server for one process: where none is named, a run starts its own and takes it along."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

STARTUP_SECONDS = 120.0
STOP_SECONDS = 20.0


def start_server(
    host: str, port: int, *, environment: Mapping[str, str] | None = None, log: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a Prefect server as a process with a session of its own; `wait_for_server` waits for it.

    Ctrl-C in a terminal must end what reports to the server before it.

    Args:
        host: address it listens on.
        port: port it listens on.
        environment: settings over those of this process, such as PREFECT_HOME or
            PREFECT_SERVER_DATABASE_CONNECTION_URL.
        log: file for what it prints, appended to; left out: it prints where this process does.
    """
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    # the pages ask the server they came from, not the default port
    own = {"PREFECT_SERVER_UI_API_URL": "/api", "PREFECT_API_URL": f"http://{host}:{port}/api"}
    output = log.open("ab") if log else None
    try:
        return subprocess.Popen(
            command,
            env={**os.environ, **own, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    finally:
        if output is not None:
            output.close()


def wait_for_server(api: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server that was started answers.

    Raises:
        SystemExit: it ended, or does not answer within STARTUP_SECONDS.
    """
    end = time.monotonic() + STARTUP_SECONDS
    while not answers(api):
        if server.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the Prefect server at {api} did not start; try `prefect server start`")
        time.sleep(0.2)


@contextmanager
def local_server(host: str, port: int, *, quiet: bool = False) -> Iterator[str]:
    """The API's URL of the server at ``host:port``: the one that answers there, or one for this block."""
    api = f"http://{host}:{port}/api"
    if answers(api):
        yield api
        return
    server = start_server(host, port, log=Path(os.devnull) if quiet else None)
    try:
        wait_for_server(api, server)
        yield api
    finally:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


def answers(api: str) -> bool:
    """Whether a Prefect server is there."""
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def free_port() -> int:
    """A port of this machine nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
