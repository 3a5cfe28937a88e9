"""Exit code 0 never without the work done: what goes wrong around segpipe is a line and another code."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from world import PROGRAM, Ended, World, command, environment, write_yaml

from segpipe_flows.server import free_port, start_server, wait_for_server

DATABASE = "PREFECT_API_DATABASE_CONNECTION_URL"


def assert_told(ended: Ended, code: int, *words: str) -> None:
    """It ended with this code, and the last line of stderr says why; nothing of ours is a traceback."""
    assert ended.code == code, ended
    assert "Traceback" not in ended.err, ended.err
    line = ended.err.rstrip().splitlines()[-1]
    assert line.startswith("error: ") and all(word in line for word in words), ended.err
    print(line)


@pytest.fixture
def job(world: World, tmp_path: Path) -> str:
    return str(world.job(tmp_path / "out"))


@pytest.fixture
def scan(world: World, tmp_path: Path) -> str:
    data = {
        "name": "lake",
        "lake": {"location": str(world.folder), "pattern": "scene*.tif", "settle_seconds": 0},
        "model": str(world.models / "nearest.yaml"),
        "compute": {"device": "cpu", "threads": 1},
        "outputs": {"dir": str(tmp_path / "out")},
    }
    return str(write_yaml(tmp_path / "scan.yaml", data))


# ------------------------------------------------------------------ Prefect's own files


@pytest.mark.parametrize(("name", "below"), [("run", "."), ("run", "below"), ("scan", ".")])
def test_a_home_that_cannot_be_written(name: str, below: str, job: str, scan: str, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    home = tmp_path / "home" / below
    ended = command(name, {"run": job, "scan": scan}[name], PREFECT_HOME=str(home))
    assert_told(ended, 2, f"PREFECT_HOME: {home}: cannot be written", "give a folder")


def test_a_database_that_is_none(job: str, tmp_path: Path) -> None:
    (tmp_path / "prefect.db").write_text("words, and no database")
    url = f"sqlite+aiosqlite:///{tmp_path / 'prefect.db'}"
    ended = command("run", job, TMPDIR=str(tmp_path), **{DATABASE: url})
    assert_told(ended, 1, "did not start (sqlalchemy.exc.DatabaseError", "file is not a database", DATABASE)
    [log] = tmp_path.glob("segpipe-server-*.log")  # what the line names is there to be read
    assert f"its log: {log}" in ended.err and "Traceback" in log.read_text()


def test_a_database_that_does_not_answer(job: str, tmp_path: Path) -> None:
    url = f"postgresql+asyncpg://user:hunter2@127.0.0.1:{free_port()}/prefect"
    ended = command("run", job, TMPDIR=str(tmp_path), **{DATABASE: url})
    assert_told(ended, 1, "did not start (ConnectionRefusedError", DATABASE)
    assert "hunter2" not in ended.err


def test_a_setting_that_prefect_refuses(job: str) -> None:
    ended = command("run", job, PREFECT_LOGGING_LEVEL="LOUD")
    assert_told(ended, 2, "LoggingSettings: level: Input should be 'DEBUG'")


# ------------------------------------------------------------------ a server that is not there, or not ours


def test_an_address_where_nobody_is(scan: str) -> None:
    api = f"http://127.0.0.1:{free_port()}/api"
    ended = command("scan", scan, api=api)
    assert_told(ended, 2, f"PREFECT_API_URL: no Prefect server answers at {api}")


@pytest.mark.slow
def test_a_server_that_lets_nobody_in_and_one_that_goes(world: World, job: str, tmp_path: Path) -> None:
    api = f"http://127.0.0.1:{free_port()}/api"
    (host, port), log = api.removeprefix("http://").removesuffix("/api").split(":"), tmp_path / "server.log"
    settings = {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_API_AUTH_STRING": "user:hunter2"}
    server = start_server(host, int(port), environment=settings, log=log)
    try:
        wait_for_server(api, server, log)
        for arguments in (["run", job], ["serve", "--port", port]):
            assert_told(command(*arguments, api=api), 1, f"{api} is gone or refuses", "401 Unauthorized")
        slow = str(world.job(tmp_path / "slow", card="convolutions", scenes=[str(world / "large.tif")]))
        variables = environment(api, PREFECT_API_AUTH_STRING="user:hunter2", PREFECT_CLIENT_MAX_RETRIES="0")
        run = subprocess.Popen([PROGRAM, "run", slow], env=variables, stderr=subprocess.PIPE, text=True)
        assert run.stderr is not None
        seen = next(line for line in run.stderr if "Beginning flow run" in line)
        server.kill()
        last = [line for line in run.stderr if line.startswith("error: ")]
        assert run.wait(240) == 1 and f"{api} is gone" in last[0], (seen, last)
    finally:
        server.kill()
        server.wait()


# ------------------------------------------------------------------ segpipe serve


@pytest.mark.parametrize("port", ["99999999", "65536", "0", "-1"])
def test_a_port_that_no_machine_has(port: str) -> None:
    ended = command("serve", "--port", port)
    assert ended.code == 2 and "Invalid value for '--port'" in ended.err, ended
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("host", ["nobody.invalid", "a" * 70, "192.0.2.1"])
def test_a_host_that_is_not_this_machine(host: str) -> None:
    assert_told(
        command("serve", "--host", host), 2, f"{host}:4200: no Prefect server answers", "give an address"
    )


class _Other(BaseHTTPRequestHandler):
    """Answers every path, as pages with a fallback do."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<html></html>")

    def log_message(self, *_: object) -> None: ...


@contextmanager
def _pages() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Other) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@contextmanager
def _greeter() -> Iterator[int]:
    """Speaks at once, and no HTTP."""

    def greet(listener: socket.socket) -> None:
        while True:
            try:
                with listener.accept()[0] as peer:
                    peer.sendall(b"SSH-2.0-other\r\n")
            except OSError:  # closed: the test is over
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=greet, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1]


@pytest.mark.parametrize("other", [_pages, _greeter])
def test_a_port_that_somebody_else_has(other: Callable[[], AbstractContextManager[int]]) -> None:
    with other() as port:
        ended = command("serve", "--port", str(port))
    assert_told(ended, 2, f"127.0.0.1:{port}: no Prefect server answers there", "Address already in use")


# ------------------------------------------------------------------ whatever ends the process


@pytest.mark.parametrize("code", ["", "0", "'gone'", "3"])
def test_a_library_that_ends_the_process_has_not_done_the_work(code: str) -> None:
    program = (
        "import sys\n"
        "from segpipe.cli import main as cli\n"
        "@cli.app.command()\n"
        f"def leave(): sys.exit({code})\n"
        "sys.argv[1:] = ['leave']\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert_told(Ended(done.returncode, done.stdout, done.stderr), 1, "before the work was done")
