"""A laptop's deployment: a local Prefect server, and this process as its worker."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib import import_module

STARTUP_SECONDS = 120


def serve_locally(host: str, port: int) -> None:
    """Serve the flows of this package on a server at ``host:port``, which is started if none answers."""
    api = f"http://{host}:{port}/api"
    server = None
    if not _answers(api):
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", host, "--port", str(port)]
        server = subprocess.Popen(command)
        _wait_for(api)
    os.environ["PREFECT_API_URL"] = api  # before prefect is imported and reads its settings
    prefect = import_module("prefect")
    segment = import_module("flows.segment").segment
    try:
        prefect.serve(segment.to_deployment(name="segment", tags=["segpipe"]))
    finally:
        if server is not None:
            server.terminate()
            server.wait()


def _answers(api: str) -> bool:
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError):
        return False


def _wait_for(api: str) -> None:
    end = time.monotonic() + STARTUP_SECONDS
    while not _answers(api):
        if time.monotonic() > end:
            raise SystemExit(f"the Prefect server at {api} did not start in {STARTUP_SECONDS} s")
        time.sleep(0.5)
