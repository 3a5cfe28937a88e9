"""Everything a deployment of segpipe talks to, as processes on loopback of this machine."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from segpipe_flows.server import answers, free_port
from tests.services import postgres
from tests.services.processes import KILL_SECONDS, Part, ServiceError, end, start, stop, wait_until

HOST = "127.0.0.1"
PARTS = ("prefect", "store", "dask", "worker")
BUCKETS = ("lake", "runs")
POOLS = {"cpu": None, "gpu": 1}
"""Work pools and how many flow runs each takes at once; there is one GPU."""
STARTUP_SECONDS = 300.0
"""On a busy machine; a Prefect server takes 5 to 10 s on a quiet one."""


class Services:
    """Services in a folder, for the length of a block: ``with Services(folder) as s: s.environment``.

    Args:
        folder: For logs, Prefect's home, and the database.
        database: ``sqlite`` or ``postgres``.
        parts: Some of `PARTS`; ``worker`` needs ``prefect``.
        dask_workers: Processes of one thread each.
        pools: Names of work pools; each has a worker of its own.
        settings: Environment over that of this process, for every service, such as
            PREFECT_SERVER_API_AUTH_STRING.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        database: str = "sqlite",
        parts: Sequence[str] = PARTS,
        dask_workers: int = 2,
        pools: Sequence[str] = tuple(POOLS),
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.folder = Path(folder).absolute()
        self.home = self.folder / "prefect"
        self.parts: dict[str, Part] = {}
        self._cluster: Path | None = None
        self._ports = {name: free_port() for name in ("prefect", "store", "dask", "postgres")}
        ports = self._ports
        self.ui = f"http://{HOST}:{ports['prefect']}"
        self.api = f"{self.ui}/api"
        self.store_url = f"http://{HOST}:{ports['store']}"
        self.dask = f"tcp://{HOST}:{ports['dask']}"
        self.database_url = f"sqlite+aiosqlite:///{self.home / 'prefect.db'}"
        # In the order of their start.
        self._wanted: list[str] = []
        if database == "postgres" and "prefect" in parts:
            self.database_url = postgres.database_url(ports["postgres"])
            self._wanted.append("postgres")
        self._wanted += [name for name in ("prefect", "store") if name in parts]
        if "dask" in parts:
            self._wanted += ["dask-scheduler", *(f"dask-worker-{n}" for n in range(dask_workers))]
        if "worker" in parts:
            self._wanted += [f"worker-{pool}" for pool in pools]
        self.variables = {
            "PREFECT_HOME": str(self.home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_COLORS": "false",
            **({"PREFECT_API_URL": self.api} if "prefect" in parts else {}),
            **(store_variables(self.store_url) if "store" in parts else {}),
            **({"SEGPIPE_DASK_ADDRESS": self.dask} if "dask" in parts else {}),
            **(settings or {}),
        }
        """The environment variables with which a process uses these services."""

    @property
    def environment(self) -> dict[str, str]:
        """All of the environment of such a process."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "AWS_"))}
        return {**inherited, **self.variables}

    def __enter__(self) -> Services:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start all that is wanted, and wait until each answers.

        Raises:
            ServiceError: one does not start; what had started is ended.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        workers = [name for name in self._wanted if name.startswith("worker-")]
        others = [name for name in self._wanted if name not in workers and name != "postgres"]
        # Each group needs the one before it; within a group all start side by side.
        try:
            for group in ([n for n in self._wanted if n == "postgres"], others, workers):
                for name in group:
                    self._launch(name)
                for name in group:
                    self._wait(name)
        except BaseException:  # Ctrl-C too: nothing is left behind
            self.stop()
            raise

    def stop(self) -> list[str]:
        """End all; return the names of those that had to be killed."""
        killed = end_parts(self.folder, self.parts.values(), self._cluster)
        self.parts, self._cluster = {}, None
        return killed

    def kill(self, name: str) -> None:
        """End a part and what it started at once, as a machine does that loses power."""
        end(self.parts[name].family(), signal.SIGKILL, KILL_SECONDS)

    def restart(self, name: str) -> None:
        """Start a part again at the same address. The object store comes back empty: it is in memory."""
        stop([self.parts[name]])
        self._launch(name)
        self._wait(name)

    def _launch(self, name: str) -> None:
        log = self.folder / "logs" / f"{name}.log"
        if name == "postgres":
            self._cluster = self._cluster or postgres.make_cluster()
            part = postgres.start_cluster(self._cluster, self._ports[name], self.environment, log)
        else:
            own = {}
            if name == "prefect":  # its pages ask the server they came from, not the default port
                own = {
                    "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database_url,
                    "PREFECT_SERVER_UI_API_URL": "/api",
                }
            if name.startswith("worker-"):
                self._make_pool(name.removeprefix("worker-"))
            addresses = {"prefect": self.api, "store": self.store_url, "dask-scheduler": self.dask}
            command = [sys.executable, "-m", *self._command(name)]
            part = start(name, command, self.environment | own, log, address=addresses.get(name, ""))
        self.parts[name] = part
        self._write()  # after each: `stop` finds what a start left behind that was killed

    def _command(self, name: str) -> list[str]:
        """The module that is a part, and its arguments."""
        if name == "prefect":
            return ["prefect", "server", "start", "--host", HOST, "--port", str(self._ports["prefect"])]
        if name == "store":
            return ["moto.server", "-H", HOST, "-p", str(self._ports["store"])]
        if name == "dask-scheduler":
            port = str(self._ports["dask"])
            return ["dask", "scheduler", "--host", HOST, "--port", port, "--no-dashboard"]
        if name.startswith("dask-worker-"):
            # No nanny: a worker that is killed stays away. No memory limit: it would pause, not fail.
            options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
            folder = str(self.folder / "dask")
            return ["dask", "worker", self.dask, *options, "--name", name, "--local-directory", folder]
        pool = name.removeprefix("worker-")
        return ["prefect", "worker", "start", "--pool", pool, "--type", "process", "--name", name]

    def _wait(self, name: str) -> None:
        part = self.parts[name]
        ready = {
            "postgres": lambda: postgres.is_ready(self._ports["postgres"]),
            "prefect": lambda: answers(self.api),
            "store": lambda: _listens(self._ports["store"]),
            "dask-scheduler": lambda: _listens(self._ports["dask"]),
        }
        line = "Registered to:" if name.startswith("dask") else "started!"
        wait_until(part, ready.get(name, lambda: line in part.output()), STARTUP_SECONDS)
        if name == "store":
            for bucket in BUCKETS:
                httpx.put(f"{self.store_url}/{bucket}").raise_for_status()

    def _make_pool(self, pool: str) -> None:
        """Make a work pool with its limit; its worker gives it its settings when it starts."""
        body = {"name": pool, "type": "process", "concurrency_limit": POOLS.get(pool)}
        auth = self.variables.get("PREFECT_API_AUTH_STRING", ":").split(":", 1)
        answer = httpx.post(f"{self.api}/work_pools/", json=body, auth=(auth[0], auth[1]), timeout=30)
        if answer.status_code != 409:  # it is there, from an earlier start in this folder
            answer.raise_for_status()

    def _write(self) -> None:
        """Write what a later command, or a shell, needs to find the services."""
        record = {
            "parts": [asdict(part) for part in self.parts.values()],
            "database": self.database_url,
            "cluster": str(self._cluster) if self._cluster else None,
            "environment": self.variables,
        }
        (self.folder / "services.json").write_text(json.dumps(record, indent=2) + "\n")
        lines = [f"export {key}={shlex.quote(value)}\n" for key, value in self.variables.items()]
        (self.folder / "env").write_text("".join(lines))


def store_variables(url: str) -> dict[str, str]:
    """Return the environment of a process that uses an object store on loopback by obstore, boto3 or GDAL."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "segpipe-loopback",  # of a store that only this machine reaches
        "AWS_SECRET_ACCESS_KEY": "segpipe-loopback-secret",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        # GDAL's own names for the same:
        "AWS_S3_ENDPOINT": url.removeprefix("http://"),
        "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE",
    }


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return what `Services` wrote into a folder, where services were started there and not stopped."""
    path = folder / "services.json"
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    record["parts"] = [Part(**part) for part in record["parts"]]
    return dict(record)


def end_parts(folder: Path, parts: Any, cluster: Path | str | None) -> list[str]:
    """End parts, those that started last first: a worker says goodbye to a server that is still there.

    Returns:
        Names of those that had to be killed.
    """
    killed: list[str] = []
    for beginnings in (("worker-", "dask-worker-"), ("dask-scheduler", "prefect", "store"), ("postgres",)):
        killed += stop([part for part in parts if part.name.startswith(beginnings)])
    if cluster is not None:
        shutil.rmtree(cluster, ignore_errors=True)
    for name in ("services.json", "env"):
        (folder / name).unlink(missing_ok=True)
    return killed


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


__all__ = ["BUCKETS", "PARTS", "Part", "ServiceError", "Services", "end_parts", "read_record"]
