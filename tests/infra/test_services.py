"""The services that the other tests, and people, start: real processes on loopback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import obstore
import psutil
import pytest
from obstore.exceptions import AlreadyExistsError, PreconditionError
from obstore.store import S3Store

from tests.services.loopback import Services
from tests.services.processes import Part, ServiceError

ROOT = Path(__file__).parents[2]
FLOW = """
from prefect import flow, task

@task
def double(x): return 2 * x

@flow(name="doubles")
def doubles(): return [double(n) for n in range(3)]

doubles()
"""
READ = "import rasterio, sys; print(int(rasterio.open(sys.argv[1]).read().sum()))"


def needs_postgres() -> None:
    if not shutil.which("initdb") and not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.skip("needs the Debian package `postgresql`")


def python(services: Services, code: str, *arguments: str) -> str:
    """What a process that uses the services prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=services.environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def counted(services: Services, what: str) -> int:
    """How many rows of a kind the Prefect server has, asked of its API."""
    request = urllib.request.Request(
        f"{services.api}/{what}/count", b"{}", {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return int(json.load(response))


def alive(parts: list[Part]) -> list[str]:
    """Processes that belong to parts: by id, group, or their folder in the command line."""
    groups = {part.pid for part in parts}
    found = []
    for process in psutil.process_iter(["status", "cmdline"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) in groups:
                found.append(f"{process.pid} {process.info['cmdline']}")
        except ProcessLookupError:
            continue
    return found


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("services")
    with Services(folder, parts=("prefect", "store")) as running:
        yield running
        parts = list(running.parts.values())
        assert len(alive(parts)) >= 2
    assert alive(parts) == []
    assert not (folder / "services.json").exists()


@pytest.fixture
def lake(services: Services) -> S3Store:
    v = services.variables
    return S3Store(
        "lake",
        endpoint=v["AWS_ENDPOINT_URL"],
        access_key_id=v["AWS_ACCESS_KEY_ID"],
        secret_access_key=v["AWS_SECRET_ACCESS_KEY"],
        region=v["AWS_REGION"],
        client_options={"allow_http": True},
    )


@pytest.mark.slow
def test_a_flow_run_is_recorded_on_the_server(services: Services) -> None:
    before = counted(services, "flow_runs")
    python(services, FLOW)
    assert counted(services, "flow_runs") == before + 1
    assert (services.home / "prefect.db").exists()


def test_the_env_file_is_what_a_shell_needs(services: Services) -> None:
    """A shell that reads it finds the buckets, with nothing but the environment."""
    code = """
from obstore.store import from_url
import obstore
for bucket in ("lake", "runs"):
    store = from_url(f"s3://{bucket}")
    obstore.put(store, "env/x", b"12345")
    print(obstore.head(store, "env/x")["size"])
"""
    command = f". {services.folder}/env && exec {sys.executable} -c '{code}'"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.stdout.split() == ["5", "5"], done.stderr


def test_of_many_creators_one_wins(lake: S3Store) -> None:
    """What leases rest on: `mode="create"` is create-if-absent, `e_tag` is compare-and-swap."""

    def race(name: str, mode: object) -> list[int]:
        start, winners = threading.Barrier(6), []

        def put(number: int) -> None:
            start.wait()
            try:
                obstore.put(lake, name, b"by %d" % number, mode=mode)  # type: ignore[call-overload]
                winners.append(number)
            except (AlreadyExistsError, PreconditionError):
                pass

        threads = [threading.Thread(target=put, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return winners

    for number in range(10):
        name = f"lease/{number}"
        (winner,) = race(name, "create")
        assert bytes(obstore.get(lake, name).bytes()) == b"by %d" % winner
        with pytest.raises(AlreadyExistsError):
            obstore.put(lake, name, b"late", mode="create")
        seen = obstore.put(lake, name, b"heartbeat")["e_tag"]
        (winner,) = race(name, {"e_tag": seen})
        assert bytes(obstore.get(lake, name).bytes()) == b"by %d" % winner
        with pytest.raises(PreconditionError):
            obstore.put(lake, name, b"late", mode={"e_tag": seen})


def test_gdal_reads_the_store(services: Services, lake: S3Store, tmp_path: Path) -> None:
    import rasterio

    pixels = np.arange(64 * 64, dtype=np.uint16).reshape(1, 64, 64)
    path = tmp_path / "scene.tif"
    with rasterio.open(path, "w", driver="GTiff", width=64, height=64, count=1, dtype="uint16") as dataset:
        dataset.write(pixels)
    obstore.put(lake, "gdal/scene.tif", path)
    for name in ("/vsis3/lake/gdal/scene.tif", "s3://lake/gdal/scene.tif"):
        assert int(python(services, READ, name)) == 4095 * 4096 // 2


def test_a_service_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    services = Services(
        tmp_path, parts=("store", "prefect"), settings={"PREFECT_SERVER_LOGGING_LEVEL": "LOUD"}
    )
    with pytest.raises(ServiceError, match=r"prefect: ended while starting .*prefect\.log"):
        services.start()
    assert services.parts == {}


@pytest.mark.slow
def test_everything_on_postgres_from_the_command_line(tmp_path: Path) -> None:
    """Start, a run by a worker, a killed Dask worker, stop: 40 s on a quiet machine."""
    needs_postgres()
    folder = tmp_path / "services"

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "tests.services", *arguments, "--folder", str(folder)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=240)

    started = command("start", "--database", "postgres")
    assert started.returncode == 0, started.stderr
    record = json.loads((folder / "services.json").read_text())
    parts = [Part(**part) for part in record["parts"]]
    try:
        assert command("status").returncode == 0
        again = command("start")
        assert again.returncode == 1 and "services run already" in again.stderr
        environment = {**os.environ, **record["environment"]}
        done = subprocess.run([sys.executable, "-c", FLOW], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        url = record["database"].replace("+asyncpg", "")
        rows = subprocess.run(
            ["psql", url, "-Atc", "select count(*) from flow_run"], capture_output=True, text=True
        )
        print("select count(*) from flow_run:", rows.stdout.strip())
        assert rows.stdout.strip() == "1", rows.stderr
        next(p for p in parts if p.name == "dask-worker-1").process().kill()
        gone = command("status")
        assert gone.returncode == 1 and "dask-worker-1    gone" in gone.stdout
    finally:
        stopped = command("stop")
    assert stopped.returncode == 0, stopped.stderr
    assert alive(parts) == []
    assert not Path(record["cluster"]).exists()


@pytest.mark.slow
def test_parts_are_killed_and_come_back(tmp_path: Path) -> None:
    """A worker runs a deployment; after a restart the server has its history, and the cluster its worker."""
    from distributed import Client

    deploy = """
import sys
from prefect import flow
f = flow.from_source(sys.argv[1], entrypoint="doubles.py:doubles")
f.deploy(name="one", work_pool_name="cpu", build=False, print_next_steps=False, ignore_warnings=True)
from prefect.deployments import run_deployment
print(run_deployment("doubles/one", timeout=120, poll_interval=1).state_name)
"""
    (tmp_path / "doubles.py").write_text(FLOW.replace("\ndoubles()\n", "\n"))
    with Services(tmp_path / "services", pools=("cpu",)) as services:
        assert python(services, deploy, str(tmp_path)).split()[-1] == "Completed"
        parts = list(services.parts.values())
        with Client(services.dask, timeout=30) as client:
            client.wait_for_workers(2, timeout=30)
            services.kill("dask-worker-1")
            assert client.submit(sum, [1, 2, 3]).result(timeout=30) == 6
            services.restart("dask-worker-1")
            client.wait_for_workers(2, timeout=30)
        services.kill("prefect")
        services.restart("prefect")
        assert counted(services, "flow_runs") == 1
        parts += services.parts.values()
    assert alive(parts) == []
