"""The containers' entry points, run here without containers: server, worker, Dask."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from world import World

from segpipe_flows.server import free_port

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "infra" / "docker"
USER, PASSWORD = "operator", "only for this test"
STOP_SECONDS = 20.0
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def environment(folder: Path, **more: str) -> dict[str, str]:
    """As an image has it: `prefect` and `dask` on the path, a home and a scratch folder of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "SEGPIPE", "DASK"))}
    return {
        **kept,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "PREFECT_HOME": str(folder / "home"),
        "TMPDIR": str(folder),
        "SEGPIPE_HEALTH_FILE": str(folder / "health"),
        **more,
    }


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    log: Path
    environment: dict[str, str]

    def healthy(self, seconds: float = 0) -> bool:
        """What the image's HEALTHCHECK says."""
        ask = [sys.executable, str(DOCKER / "health.py"), "--wait", str(seconds)]
        return (
            subprocess.run(ask, env=self.environment, stderr=subprocess.DEVNULL, check=False).returncode == 0
        )

    def wait_healthy(self, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while not self.healthy(1):
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()

    def stop(self) -> float:
        """Seconds from SIGTERM to the end."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(STOP_SECONDS)
        return time.monotonic() - began


def in_read_only_tree(folder: Path, command: str) -> list[str]:
    """The command where nothing but ``folder`` can be written, as containers have it.

    Only root may make such a tree of mounts; elsewhere it is the command alone.
    """
    if os.geteuid() or shutil.which("unshare") is None:
        return [command]
    mounts = 'mount --bind "$1" "$1" && mount -o remount,ro,bind / && cd "$1" && ! touch "$2" 2>/dev/null'
    here = str(ROOT / "written-by-a-test")
    return ["unshare", "--mount", "sh", "-c", f'{mounts} && exec "$3"', "sh", str(folder), here, command]


@contextmanager
def script(name: str, folder: Path, **more: str) -> Iterator[Running]:
    folder.mkdir(parents=True, exist_ok=True)
    log, variables = folder / "log", environment(folder, **more)
    with log.open("wb") as output:
        process = subprocess.Popen(
            in_read_only_tree(folder, str(DOCKER / name)),
            env=variables, cwd=folder, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            # a container's first process has it; one that a script started in the background does not
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )  # fmt: skip
    try:
        yield Running(process, log, variables)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def auth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The secret, as a file that is mounted."""
    path = tmp_path_factory.mktemp("secrets") / "prefect_auth"
    path.write_text(f"{USER}:{PASSWORD}\n")
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, auth: Path) -> Iterator[tuple[str, Running]]:
    port = free_port()
    more = {
        "SEGPIPE_HOST": "127.0.0.1",
        "SEGPIPE_PORT": str(port),
        "PREFECT_SERVER_API_AUTH_STRING_FILE": str(auth),
    }
    with script("server.sh", tmp_path_factory.mktemp("server"), **more) as running:
        running.wait_healthy()
        yield f"http://127.0.0.1:{port}/api", running
        assert running.stop() < STOP_SECONDS
        assert not running.healthy()


def run(name: str, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(DOCKER / name)],
        env=environment(folder, **more), capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("server.sh", {}, "PREFECT_SERVER_API_AUTH_STRING: not set"),
        (
            "server.sh",
            {"PREFECT_SERVER_API_AUTH_STRING_FILE": "/no/such/file"},
            "PREFECT_SERVER_API_AUTH_STRING_FILE: cannot read /no/such/file",
        ),
        ("worker.sh", {}, "PREFECT_API_URL: not set"),
        ("dask-worker.sh", {}, "SEGPIPE_DASK_SCHEDULER: not set"),
        (
            "dask-worker.sh",
            {"SEGPIPE_DASK_SCHEDULER": "tcp://127.0.0.1:1", "SEGPIPE_GPUS": "4"},
            "SEGPIPE_GPUS: found 4",
        ),
    ],
)
def test_what_is_missing_is_said_in_a_line(
    name: str, more: dict[str, str], said: str, tmp_path: Path
) -> None:
    done = run(name, tmp_path, **more)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: {said}")
    assert len(done.stderr.splitlines()) == 1


def test_a_worker_without_its_server_gives_up(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    done = run("worker.sh", tmp_path, PREFECT_API_URL=url, SEGPIPE_WAIT="1")
    assert done.returncode == 1
    assert f"{url}/health" in done.stderr and "refused" in done.stderr


@pytest.mark.slow
def test_the_server_lets_in_who_has_the_secret(server: tuple[str, Running]) -> None:
    api, running = server
    assert httpx.get(f"{api}/health").json() is True  # probes need none
    for auth, status in [(None, 401), ((USER, "wrong"), 401), ((USER, PASSWORD), 200)]:
        for path in ("work_pools/filter", "flow_runs/filter", "block_types/filter"):
            assert httpx.post(f"{api}/{path}", json={}, auth=auth).status_code == status, (path, auth)
    pages = httpx.get(f"{api.removesuffix('/api')}/ui-settings").json()
    assert pages["api_url"] == "/api" and pages["auth"] == "BASIC"
    assert PASSWORD not in running.log.read_text()


@pytest.mark.slow
def test_a_worker_deploys_runs_and_ends(
    server: tuple[str, Running], auth: Path, world: World, tmp_path: Path
) -> None:
    api, _ = server
    more = {"PREFECT_API_URL": api, "SEGPIPE_POOL": "cpu", "SEGPIPE_HEALTH_PORT": str(free_port())}
    with script("worker.sh", tmp_path / "wrong", **more, PREFECT_API_AUTH_STRING="operator:wrong") as refused:
        assert refused.process.wait(300) != 0
        assert "401 Unauthorized" in refused.log.read_text()
    with script(
        "worker.sh",
        tmp_path / "worker",
        **more,
        PREFECT_API_AUTH_STRING_FILE=str(auth),
        SEGPIPE_DEPLOY="true",
        SEGPIPE_WORKER_NAME="first",
        SEGPIPE_GPUS="3",
    ) as running:
        running.wait_healthy(600)
        with httpx.Client(base_url=api, auth=(USER, PASSWORD)) as client:
            end = time.monotonic() + 120
            while not (seen := client.post("/work_pools/cpu/workers/filter", json={}).json()):
                assert time.monotonic() < end, running.log.read_text()
                time.sleep(0.5)
            assert [(w["name"], w["status"]) for w in seen] == [("first", "ONLINE")]
            pools = {p["name"]: p for p in client.post("/work_pools/filter", json={}).json()}
            assert {"cpu", "gpu"} <= pools.keys()
            assert pools["cpu"]["type"] == "process" and pools["gpu"]["concurrency_limit"] == 3
            deployed = {d["name"] for d in client.post("/deployments/filter", json={}).json()}
            assert {"segment", "prompt", "train"} <= deployed
            job = yaml.safe_load(
                world.job(tmp_path / "worker" / "out", compute={"threads": "auto"}).read_text()
            )
            [segment] = client.post(
                "/deployments/filter", json={"deployments": {"name": {"any_": ["segment"]}}}
            ).json()
            start = f"/deployments/{segment['id']}/create_flow_run"
            end = time.monotonic() + 600
            # the server says 503 while SQLite is locked; Prefect's own client asks again, too
            while (made := client.post(start, json={"parameters": {"job": job}})).status_code == 503:
                assert time.monotonic() < end, made.text
                time.sleep(0.5)
            assert made.status_code == 201, made.text
            while (state := client.get(f"/flow_runs/{made.json()['id']}").json()["state"])[
                "type"
            ] not in FINAL:
                assert time.monotonic() < end, running.log.read_text()
                time.sleep(0.5)
            assert state["type"] == "COMPLETED", (state, running.log.read_text())
        assert running.stop() < STOP_SECONDS
        assert not running.healthy()


@pytest.mark.slow
def test_dask_forms_a_cluster_and_a_gpu_is_offered(tmp_path: Path) -> None:
    from distributed import Client

    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    seen = tmp_path / "driver"  # stands for the driver's own command, which lists a line for each GPU
    seen.mkdir()
    (seen / "nvidia-smi").write_text(
        "#!/bin/sh\n[ \"$1\" = --list-gpus ] && echo 'GPU 0: a GPU (UUID: GPU-0)'\n"
    )
    (seen / "nvidia-smi").chmod(0o755)
    with_gpu = f"{seen}{os.pathsep}{environment(tmp_path)['PATH']}"
    worker = {"SEGPIPE_DASK_SCHEDULER": address, "SEGPIPE_MEMORY": "1GiB"}
    with (
        script(
            "dask-scheduler.sh",
            tmp_path / "scheduler",
            SEGPIPE_HOST="127.0.0.1",
            SEGPIPE_DASK_PORT=str(port),
            SEGPIPE_DASHBOARD_PORT=str(free_port()),
        ) as scheduler,
        script(
            "dask-worker.sh", tmp_path / "cpu", **worker,
            SEGPIPE_GPUS="0", SEGPIPE_WORKERS="1", SEGPIPE_DASHBOARD_PORT=str(free_port()),
        ) as first,
        script(
            "dask-worker.sh", tmp_path / "gpu", **worker,
            PATH=with_gpu, SEGPIPE_DASHBOARD_PORT=str(free_port()),
        ) as second,
    ):  # fmt: skip
        scheduler.wait_healthy()
        with Client(address, timeout="30s", set_as_default=False) as client:
            client.wait_for_workers(2, timeout=60)
            offers = sorted(
                (w["resources"].get("GPU", 0), w["nthreads"], w["memory_limit"])
                for w in client.scheduler_info(n_workers=-1)["workers"].values()
            )
            assert offers == [(0, 1, 1024**3), (1, 1, 1024**3)]
            home = client.submit(os.getenv, "TMPDIR", resources={"GPU": 1}).result(timeout=60)
            assert home == str(tmp_path / "gpu"), "work for a GPU goes where one is"
        first.wait_healthy()
        second.wait_healthy()
        for running in (second, first, scheduler):
            assert running.stop() < STOP_SECONDS
        assert not scheduler.healthy()
