"""A laptop's deployment: a local Prefect server, and this process as its worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

STARTUP_SECONDS = 120
STOP_SECONDS = 20


def serve_locally(host: str, port: int) -> None:
    """Serve the flows of this package on a server at ``host:port``, which is started if none answers."""
    api = f"http://{host}:{port}/api"
    with _server(host, port, api):
        os.environ["PREFECT_API_URL"] = api  # before prefect is imported and reads its settings
        prefect = import_module("prefect")
        module_path = import_module("prefect.types.entrypoint").EntrypointType.MODULE_PATH
        segment = import_module("flows.segment").segment
        prefect.serve(segment.to_deployment(name="segment", entrypoint_type=module_path))


@contextmanager
def _server(host: str, port: int, api: str) -> Iterator[None]:
    """A server that answers; one that was started here ends with the block."""
    if _answers(api):
        yield
        return
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
    # the pages ask the server they came from, not the default port
    server = subprocess.Popen(command, env={**os.environ, "PREFECT_SERVER_UI_API_URL": "/api"})
    try:
        end = time.monotonic() + STARTUP_SECONDS
        while not _answers(api):
            if server.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"the Prefect server at {api} did not start")
            time.sleep(0.5)
        yield
    finally:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


def _answers(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
