"""Prefect's home in a folder of the session, a real server, and the fixtures of whole runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HOME = Path(tempfile.mkdtemp(prefix="segpipe-tests-"))
# Before anything imports prefect, which reads its settings once.
os.environ["PREFECT_HOME"] = str(HOME / "prefect")
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["PREFECT_LOGGING_COLORS"] = "false"
os.environ.pop("PREFECT_API_URL", None)
sys.path.append(str(Path(__file__).parent))  # for the tests' own modules, such as world

from hypothesis import HealthCheck, settings  # noqa: E402
from world import Ended, World, environment, make_world  # noqa: E402

from segpipe_flows.server import free_port  # noqa: E402

# A busy machine is slow: no example fails for that.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Scenes, references, regions and models that every test may read and none may change."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """``here("plan", "job.yaml")``: the same command line in this process, for what ends before a flow."""
    from segpipe.cli.main import execute

    def run(*arguments: str) -> Ended:
        capfd.readouterr()
        code = execute(list(arguments))
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="module")
def messages() -> Iterator[list[tuple[str, int, str]]]:
    """What was wrong, the exit code and the message; printed at the end of the module."""
    rows: list[tuple[str, int, str]] = []
    yield rows
    print("\n\n| wrong input | exit code | message |\n|---|---|---|")
    for what, code, line in rows:
        print(f"| {what} | {code} | `{line}` |")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: on small tensors, several mostly wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The API of a real Prefect server on SQLite, started once."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = (HOME / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        env=environment(PREFECT_HOME=str(HOME / "server"), PREFECT_SERVER_UI_ENABLED="false"),
        stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        _wait_for(url, process)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        assert process.poll() is None, (HOME / "server.log").read_text()
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.2)
    raise TimeoutError((HOME / "server.log").read_text())
