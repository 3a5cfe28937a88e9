"""A Prefect server for one process: where none is named, a run starts its own and takes it along."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

STARTUP_SECONDS = 120.0
STOP_SECONDS = 20.0


@contextmanager
def local_server(host: str, port: int, *, quiet: bool = False) -> Iterator[str]:
    """The API's URL of the server at ``host:port``: the one that answers there, or one for this block.

    It has a session of its own: Ctrl-C in a terminal must end what reports to the server before it.
    """
    api = f"http://{host}:{port}/api"
    if answers(api):
        yield api
        return
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    # the pages ask the server they came from, not the default port
    environment = {**os.environ, "PREFECT_SERVER_UI_API_URL": "/api", "PREFECT_API_URL": api}
    output = subprocess.DEVNULL if quiet else None
    server = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + STARTUP_SECONDS
        while not answers(api):
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the Prefect server at {api} did not start; try `prefect server start`")
            time.sleep(0.2)
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
