"""`segpipe doctor` against things that are really broken: servers, folders, stores, packages."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import obstore
import prefect
import pytest
import typer
from obstore.store import from_url
from rich.console import Console
from typer.testing import CliRunner

from segpipe.cli.doctor import doctor_command, line_of, table_of
from segpipe.doctor import Finding, State, machine
from segpipe.doctor.machine import check_engine, check_folder, check_packages
from segpipe.doctor.services import check_credentials, check_dask, check_prefect, check_store
from segpipe_flows.server import free_port
from tests.services.loopback import Services
from tests.services.processes import start, stop, wait_until

AUTH = "operator:correct horse"


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """A Prefect server that wants a password, and an object store."""
    settings = {"PREFECT_SERVER_API_AUTH_STRING": AUTH, "PREFECT_API_AUTH_STRING": AUTH}
    folder = tmp_path_factory.mktemp("doctor")
    with Services(folder, parts=("prefect", "store"), settings=settings) as running:
        yield running


@pytest.fixture
def on_store(services: Services, monkeypatch: pytest.MonkeyPatch) -> Services:
    for key, value in services.variables.items():
        if key.startswith("AWS_"):
            monkeypatch.setenv(key, value)
    return services


def assert_failed(finding: Finding, found: str, advice: str) -> None:
    assert finding.state is State.fail, finding
    assert found in finding.found and advice in finding.advice, finding
    print(line_of(finding))


# The command.


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(doctor_command)
    done = CliRunner().invoke(app, list(arguments), env={"SEGPIPE_DASK_ADDRESS": ""})
    return done.exit_code, done.stdout


def test_a_machine_that_can_do_a_run(tmp_path: Path) -> None:
    """This one: it runs all the other tests."""
    code, printed = run("--out", str(tmp_path / "runs"), "--json")
    findings = {row["name"]: row for row in json.loads(printed)}
    assert [name for name, row in findings.items() if row["state"] == "fail"] == []
    assert code == 0
    assert set(findings) == {
        "python", "packages", "machine", "gpu", "torch", "onnxruntime", "gdal", "gzip", "output", "prefect",
        "credentials", "self-test",
    }  # fmt: skip
    assert not (tmp_path / "runs").exists()  # nothing is left behind
    assert all(row["advice"] for row in findings.values() if row["state"] != "ok")


def test_a_failing_line_is_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, printed = run("--out", str(tmp_path / "file" / "runs"), "--no-self-test")
    assert code == 1
    (line,) = [line for line in printed.splitlines() if line.startswith("fail")]
    assert line.startswith(f"fail output: {tmp_path}/file/runs: Not a directory -> give a folder")


def test_a_terminal_shows_a_table() -> None:
    findings = [Finding("a", State.ok, "there"), Finding("b", State.fail, "gone", "[fetch] it")]
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    console.print(table_of(findings))
    text = console.file.getvalue()
    assert "\x1b[32mok" in text and "\x1b[1;31mfail" in text and "[fetch] it" in text


# The engine: the answer is known by the threshold alone.


def test_a_network_that_answers_otherwise_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels = machine.drawn_raster(tmp_path / "scene.tif")
    wrong = int(((pixels > 100) != (pixels > 120)).sum())
    assert 1000 < wrong < pixels.size
    monkeypatch.setattr(machine, "threshold_card", partial(machine.threshold_card, limit=120.0))
    assert_failed(check_engine(), f"{wrong} of {pixels.size} pixels wrong", "cannot be trusted")


# What is installed.


def fake_package(folder: Path, name: str, number: str) -> Path:
    """A folder that says that a package is there in this version."""
    info = folder / f"{name}-{number}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n")
    return folder


def test_a_package_that_is_too_old_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(fake_package(tmp_path, "zarr", "2.18.1")))
    assert_failed(check_packages(), "zarr 2.18.1", "pip install 'zarr<4,>=3.1.5'")


@pytest.mark.slow
def test_a_folder_of_another_proj_is_noticed(tmp_path: Path) -> None:
    code = "from segpipe.doctor.machine import check_gdal; import json; print(json.dumps(check_gdal()))"
    environment = {**os.environ, "PROJ_DATA": str(tmp_path), "PROJ_LIB": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_failed(
        Finding(*json.loads(done.stdout))._replace(state=State.fail), "EPSG:32616", "unset PROJ_LIB"
    )


def test_an_unwritable_folder() -> None:
    assert_failed(check_folder("/proc/runs"), "/proc/runs: No such file or directory", "outputs.dir")


# Prefect.


def test_nobody_listens() -> None:
    api = f"http://127.0.0.1:{free_port()}/api"
    finding = check_prefect({"PREFECT_API_URL": api})
    assert_failed(finding, f"{api}: no Prefect server answers", "prefect server start")


@pytest.mark.slow
def test_a_server_that_wants_a_password(services: Services) -> None:
    name = {"PREFECT_API_URL": services.api}
    assert_failed(check_prefect(name), "HTTP 401, no credentials given", "PREFECT_API_AUTH_STRING")
    wrong = check_prefect({**name, "PREFECT_API_AUTH_STRING": "operator:wrong secret"})
    assert_failed(wrong, "HTTP 401, PREFECT_API_AUTH_STRING not accepted", "user:password")
    assert "secret" not in wrong.found + wrong.advice
    right = check_prefect({**name, "PREFECT_API_AUTH_STRING": AUTH})
    assert right.state is State.ok and f"server {prefect.__version__}" in right.found, right


def test_the_server_of_the_active_profile(services: Services, tmp_path: Path) -> None:
    profile = f'[profiles.team]\nPREFECT_API_URL = "{services.api}"\nPREFECT_API_AUTH_STRING = "{AUTH}"\n'
    (tmp_path / "profiles.toml").write_text(f'active = "team"\n\n{profile}')
    finding = check_prefect({"PREFECT_HOME": str(tmp_path)})
    assert finding.state is State.ok and services.api in finding.found, finding


def test_an_address_that_is_no_api(services: Services) -> None:
    """The pages answer at every path, with HTML; the object store with another error."""
    for url in (services.ui, services.store_url):
        finding = check_prefect({"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": AUTH})
        assert_failed(finding, url, "address of the API")


def test_a_server_of_another_version() -> None:
    """There is one version of Prefect here: a server that says to be an older one."""

    class Old(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"true" if self.path == "/api/health" else b'"3.4.1"'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Old) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        finding = check_prefect({"PREFECT_API_URL": f"http://127.0.0.1:{server.server_port}/api"})
        server.shutdown()
    assert finding.state is State.warn and "server 3.4.1" in finding.found
    assert "prefect==3.4.1 here" in finding.advice and prefect.__version__ in finding.advice


# Dask.


def test_dask_without_a_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("segpipe.doctor.services.SECONDS", 1.0)
    address = f"tcp://127.0.0.1:{free_port()}"
    assert_failed(check_dask(address), f"{address}: no scheduler answers", "dask scheduler")


@pytest.mark.slow
def test_dask_workers(tmp_path: Path) -> None:
    """One that is as this process; none; one with another version: 15 s, for every process loads Dask."""
    with Services(tmp_path / "services", parts=("dask",), dask_workers=1) as services:
        finding = check_dask(services.dask)
        assert finding.state is State.ok and "1 workers, 1 threads, 0 GPU" in finding.found, finding
        services.kill("dask-worker-0")
        assert_failed(check_dask(services.dask), "0 workers", f"dask worker {services.dask}")
        folder = fake_package(tmp_path / "packages", "zarr", "2.18.1")
        command = [sys.executable, "-m", "dask", "worker", services.dask, "--no-nanny", "--no-dashboard"]
        command += ["--resources", "GPU=2", "--local-directory", str(tmp_path)]
        environment = {**services.environment, "PYTHONPATH": str(folder)}
        worker = start("worker", command, environment, tmp_path / "log")
        try:
            wait_until(worker, lambda: "Registered to:" in worker.output(), 60)
            finding = check_dask(services.dask)
        finally:
            stop([worker])
        assert_failed(finding, "zarr 2.18.1 (here 3.", "same versions on all workers")
        assert "2 GPU" in finding.found


# Object stores.


def test_a_store_that_works(on_store: Services) -> None:
    finding = check_store("s3://lake/some/prefix")
    assert finding.state is State.ok and "create-if-absent holds" in finding.found, finding
    assert list(obstore.list(from_url("s3://lake"))) == []  # nothing is left behind


def test_a_bucket_that_is_not_there(on_store: Services) -> None:
    assert_failed(
        check_store("s3://pond"), "s3://pond: cannot be listed (NoSuchBucket", "make it, or correct"
    )


def test_wrong_credentials(on_store: Services) -> None:
    def count(actions: str) -> None:
        """How many requests moto lets through before it asks who is there."""
        url, kind = f"{on_store.store_url}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, actions.encode(), kind, method="POST"), timeout=10)

    count("0")
    try:
        assert_failed(check_store("s3://lake"), "(InvalidAccessKeyId", "correct AWS_ACCESS_KEY_ID")
    finally:
        count("inf")


def test_a_store_that_nobody_runs(on_store: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert_failed(check_store("s3://lake"), "error sending request", "correct AWS_ENDPOINT_URL")
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    assert_failed(check_store("s3://lake"), "builder error", "AWS_ALLOW_HTTP=true")
    assert_failed(check_store("smb://lake"), "smb://lake: cannot be opened", "look at the address")


@pytest.mark.parametrize("number", [401, 403, 404])
def test_a_number_in_an_address_is_no_answer(
    number: int, on_store: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = next(p for p in range(number * 10, number * 10 + 10) if nobody_has(p))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    assert_failed(check_store(f"s3://metadata-{number}"), f":{port}/", "correct AWS_ENDPOINT_URL")


def nobody_has(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "wants credentials"), (403, "refuses"), (404, "make it")]
)
def test_a_store_that_answers_with_a_status_alone(
    status: int, advice: str, on_store: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        finding = check_store("s3://lake")
        server.shutdown()
    assert_failed(finding, f"{status}", advice)


def test_credentials_are_named_and_never_shown(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    pair = {"AWS_ACCESS_KEY_ID": "AKIAsecret", "AWS_SECRET_ACCESS_KEY": "hunter2secret"}
    assert check_credentials(home)[1:3] == (State.ok, "S3: none; GCS: none; Azure: none")
    both = check_credentials(home | pair)
    assert both.state is State.ok and "S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in both.found
    assert "secret" not in " ".join(both)
    half = check_credentials(home | {"AWS_ACCESS_KEY_ID": "AKIAsecret"})
    assert_failed(half, "S3: AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY is not: set both")
    plain = check_credentials(home | pair | {"AWS_ENDPOINT_URL": "http://store:9000"})
    assert_failed(plain, "S3", "set AWS_ALLOW_HTTP=true")
    gone = check_credentials(home | {"GOOGLE_APPLICATION_CREDENTIALS": str(tmp_path / "gone.json")})
    assert_failed(gone, "GCS: GOOGLE_APPLICATION_CREDENTIALS", "a file that is not there")
    azure = check_credentials(home | {"AZURE_STORAGE_ACCOUNT_KEY": "secret"})
    assert_failed(azure, "Azure: AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCOUNT_NAME is not")
    (tmp_path / ".aws").mkdir()
    (tmp_path / ".aws" / "credentials").write_text("[default]\naws_access_key_id = AKIAsecret\n")
    assert_failed(check_credentials(home), ".aws/credentials", "export-credentials")
