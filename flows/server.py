"""A Prefect server for one process: where none is named, a run starts its own and takes it along."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from segpipe.errors import RequestError, SegpipeError
from segpipe.redact import clean

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


def wait_for_server(api: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server that was started answers.

    Args:
        api: URL of its API.
        server: its process.
        log: file of what it prints.

    Raises:
        SegpipeError: it ended, or does not answer within STARTUP_SECONDS.
    """
    end = time.monotonic() + STARTUP_SECONDS
    while not answers(api):
        late = time.monotonic() > end
        if late or server.poll() is not None:
            what = f"does not answer within {STARTUP_SECONDS:g} s" if late else "did not start"
            raise SegpipeError(
                f"the Prefect server at {api} {what} ({_cause(log)}); it needs a database that answers, by "
                f"default a file in PREFECT_HOME, else PREFECT_API_DATABASE_CONNECTION_URL; its log: {log}"
            )
        time.sleep(0.2)


def _cause(log: Path) -> str:
    """The last error that a server's log has in a line of its own, or its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b: ", line)]
    return clean((errors or lines or ["it printed nothing"])[-1])


@contextmanager
def local_server(host: str, port: int) -> Iterator[str]:
    """The API's URL of the server at ``host:port``: the one that answers there, or one for this block.

    What the server prints is kept where it did not start, and while it runs.

    Raises:
        RequestError: no server can listen there, or PREFECT_HOME cannot be written.
        SegpipeError: the server did not start.
    """
    api = f"http://{host}:{port}/api"
    if answers(api):
        yield api
        return
    _check_address(host, port)
    _check_home()
    descriptor, name = tempfile.mkstemp(prefix="segpipe-server-", suffix=".log")
    os.close(descriptor)
    log = Path(name)
    server = start_server(host, port, log=log)
    try:
        wait_for_server(api, server, log)
        yield api
        log.unlink(missing_ok=True)
    finally:
        server.terminate()
        try:
            server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()


def _check_address(host: str, port: int) -> None:
    """Raises RequestError: nothing of this machine can listen there."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address[:2], family=family).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(
            f"{host}:{port}: no Prefect server answers there, and none can be started ({reason}); give an "
            "address of this machine and a port that nobody listens on"
        ) from error


def _check_home() -> None:
    """Raises RequestError: a server could keep nothing in Prefect's folder."""
    home = Path(os.environ.get("PREFECT_HOME", "~/.prefect")).expanduser()
    try:
        home.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=home).close()
    except OSError as error:
        raise RequestError(
            f"PREFECT_HOME: {home}: cannot be written ({error.strerror}); give a folder that can be written"
        ) from error


def answers(api: str) -> bool:
    """Whether a Prefect server is there; its health is `true`."""
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=2) as response:
            return json.load(response) is True
    except (OSError, http.client.HTTPException, ValueError):
        return False


def free_port() -> int:
    """A port of this machine nobody listens on, and that the system gives to nobody else for a minute.

    It lingers (TIME_WAIT) by a connection that has ended: servers, which set SO_REUSEADDR, may have it at
    once, while whoever asks for just any port gets another.
    """
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), probe.accept()[0]:
            return port  # the accepted side is closed first: that is the one that lingers
