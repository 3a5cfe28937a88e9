"""Everything a deployment of segpipe talks to, as processes on loopback of this machine."""

from __future__ import annotations

import base64
import json
import os
import shlex
import shutil
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from flows.server import answers, free_port, start_server
from infra import postgres
from infra.processes import Part, ServiceError, kill, last_lines, part_of, start, stop, wait_until

HOST = "127.0.0.1"
PARTS = ("prefect", "store", "dask", "worker")
DATABASES = ("sqlite", "postgres")
BUCKETS = ("lake", "runs")
POOLS = {"cpu": None, "gpu": 1}
"""Work pools and how many flow runs each takes at once; there is one GPU."""

STARTUP_SECONDS = 300.0
"""On a busy machine; a Prefect server takes 5 to 10 s on a quiet one."""

REGION = "us-east-1"
ACCESS_KEY = "segpipe-loopback"
SECRET_KEY = "segpipe-loopback-secret"
"""Of a store that only this machine reaches and that checks nobody."""


class Services:
    """Services in a folder, for the length of a block: ``with Services(folder) as s: s.environment``.

    Args:
        folder: for logs, Prefect's home, and the database.
        database: ``sqlite`` or ``postgres``.
        parts: which of `PARTS`; ``worker`` needs ``prefect``.
        dask_workers: processes of one thread each.
        pools: names of work pools; each has a worker of its own.
        settings: environment over that of this process, for every service, such as
            PREFECT_SERVER_API_AUTH_STRING.
        dask_resources: for each Dask worker, such as ``GPU=1``.
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
        dask_resources: str = "",
    ) -> None:
        self.folder = Path(folder).absolute()
        self.parts: dict[str, Part] = {}
        self._database = _one_of("database", database, DATABASES)
        self._wanted = [_one_of("only", part, PARTS) for part in parts]
        if "worker" in self._wanted and "prefect" not in self._wanted:
            raise ServiceError("only: worker without prefect; a worker asks a Prefect server for work")
        self._n_dask = dask_workers
        self._pools = list(pools)
        self._settings = dict(settings or {})
        self._resources = dask_resources
        self._ports = {name: free_port() for name in ("prefect", "store", "dask", "postgres")}
        self._cluster: Path | None = None

    # Where they are.

    @property
    def api(self) -> str:
        """PREFECT_API_URL."""
        return f"http://{HOST}:{self._ports['prefect']}/api"

    @property
    def ui(self) -> str:
        """The Prefect server's pages."""
        return f"http://{HOST}:{self._ports['prefect']}"

    @property
    def store_url(self) -> str:
        """AWS_ENDPOINT_URL of the object store."""
        return f"http://{HOST}:{self._ports['store']}"

    @property
    def dask(self) -> str:
        """Address of the Dask scheduler."""
        return f"tcp://{HOST}:{self._ports['dask']}"

    @property
    def database_url(self) -> str:
        """What the Prefect server keeps its history in."""
        if self._database == "postgres":
            return postgres.database_url(self._ports["postgres"])
        return f"sqlite+aiosqlite:///{self.folder / 'prefect' / 'prefect.db'}"

    @property
    def home(self) -> Path:
        """PREFECT_HOME."""
        return self.folder / "prefect"

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables with which a process uses these services."""
        found = {
            "PREFECT_HOME": str(self.home),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_LOGGING_COLORS": "false",
        }
        if "prefect" in self._wanted:
            found["PREFECT_API_URL"] = self.api
        if "store" in self._wanted:
            found |= store_variables(self.store_url)
        if "dask" in self._wanted:
            found["SEGPIPE_DASK_ADDRESS"] = self.dask
        return found | self._settings

    @property
    def environment(self) -> dict[str, str]:
        """All of the environment of such a process."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "AWS_"))}
        return {**inherited, **self.variables}

    def query(self, statement: str) -> str:
        """The answer of an SQL statement on the Prefect server's PostgreSQL database, by `psql`."""
        return postgres.query(self._ports["postgres"], statement)

    # Their life.

    def __enter__(self) -> Services:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start all that is wanted, and wait until each answers.

        Raises:
            ServiceError: one does not start; what had started is ended.
        """
        self.home.mkdir(parents=True, exist_ok=True)
        (self.folder / "logs").mkdir(exist_ok=True)
        try:
            if "prefect" in self._wanted and self._database == "postgres":
                self._cluster = postgres.make_cluster(self.folder / "postgres")
                self._launch("postgres")
                self._wait("postgres")
            for name in self._names():
                if not name.startswith("worker-") and name != "postgres":
                    self._launch(name)
            for name in list(self.parts):
                self._wait(name)
            if "store" in self._wanted:
                make_buckets(self.store_url, BUCKETS)
            if "worker" in self._wanted:
                self._make_pools()
                for pool in self._pools:
                    self._launch(f"worker-{pool}")
                for pool in self._pools:
                    self._wait(f"worker-{pool}")
        except BaseException:  # Ctrl-C too: nothing is left behind
            self.stop()
            raise

    def stop(self) -> list[str]:
        """End all; returns the names of those that had to be killed."""
        killed = end_parts(list(self.parts.values()), self._cluster)
        self.parts = {}
        self._cluster = None
        (self.folder / "services.json").unlink(missing_ok=True)
        (self.folder / "env").unlink(missing_ok=True)
        return killed

    def kill(self, name: str) -> None:
        """End parts at once, as a machine does that loses power, and what they started with them.

        Args:
            name: a part (``dask-worker-1``), or the beginning of several (``worker``).
        """
        for part in self._named(name):
            kill(part)

    def restart(self, name: str) -> None:
        """End parts where they still run, and start them again at the same addresses.

        The object store keeps its objects in memory: it comes back empty.
        """
        found = self._named(name)
        stop(found)
        for part in found:
            self._launch(part.name)
        for part in found:
            self._wait(part.name)
            if part.name == "store":
                make_buckets(self.store_url, BUCKETS)

    def _named(self, name: str) -> list[Part]:
        found = [part for key, part in self.parts.items() if key == name or key.startswith(f"{name}-")]
        if not found:
            raise ServiceError(f"{name}: no such part; there are {', '.join(self.parts)}")
        return found

    def _names(self) -> list[str]:
        """The processes wanted, in the order of their start."""
        found: list[str] = []
        if "prefect" in self._wanted:
            found += ["postgres"] * (self._database == "postgres") + ["prefect"]
        if "store" in self._wanted:
            found += ["store"]
        if "dask" in self._wanted:
            found += ["dask-scheduler", *(f"dask-worker-{n}" for n in range(self._n_dask))]
        if "worker" in self._wanted:
            found += [f"worker-{pool}" for pool in self._pools]
        return found

    def _launch(self, name: str) -> None:
        log = self.folder / "logs" / f"{name}.log"
        if name == "prefect":
            own = self.variables | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database_url}
            server = start_server(HOST, self._ports["prefect"], environment=own, log=log)
            self.parts[name] = part_of(name, server, log, self.api)
        elif name == "postgres":
            assert self._cluster is not None
            self.parts[name] = postgres.start_cluster(
                self._cluster, self._ports["postgres"], self.environment, log
            )
        else:
            command, address = self._command(name)
            self.parts[name] = start(name, command, self.environment, log, address=address)
        self._write()  # after each: `stop` finds what a start left behind that was killed

    def _command(self, name: str) -> tuple[list[str], str]:
        """What starts a part, and where it will be reached."""
        python = [sys.executable, "-m"]
        if name == "store":
            return [*python, "moto.server", "-H", HOST, "-p", str(self._ports["store"])], self.store_url
        if name == "dask-scheduler":
            port = str(self._ports["dask"])
            return [*python, "dask", "scheduler", "--host", HOST, "--port", port, "--no-dashboard"], self.dask
        if name.startswith("dask-worker-"):
            # No nanny: a worker that is killed stays away. No memory limit: it would pause, not fail.
            options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
            options += ["--name", name, "--local-directory", str(self.folder / "dask")]
            options += ["--resources", self._resources] if self._resources else []
            return [*python, "dask", "worker", self.dask, *options], ""
        pool = name.removeprefix("worker-")
        return [
            *python,
            "prefect",
            "worker",
            "start",
            "--pool",
            pool,
            "--type",
            "process",
            "--name",
            name,
        ], ""

    def _wait(self, name: str) -> None:
        part = self.parts[name]
        ready = {
            "postgres": lambda: postgres.is_ready(self._ports["postgres"]),
            "prefect": lambda: answers(self.api),
            "store": lambda: _status(f"{self.store_url}/moto-api/") == 200,
            "dask-scheduler": lambda: _listens(self._ports["dask"]),
        }
        said = "Registered to:" if name.startswith("dask") else "started!"
        wait_until(part, ready.get(name, lambda: said in part.output()), STARTUP_SECONDS)

    def _make_pools(self) -> None:
        """Make the work pools; a worker of each gives it its settings when it starts."""
        for pool in self._pools:
            body = {"name": pool, "type": "process", "concurrency_limit": POOLS.get(pool)}
            status = _status(f"{self.api}/work_pools/", body, self._settings.get("PREFECT_API_AUTH_STRING"))
            if status not in (201, 409):  # 409: it is there, from an earlier start in this folder
                log = last_lines(Path(self.parts["prefect"].log))
                raise ServiceError(f"worker: the work pool {pool} cannot be made: HTTP {status}{log}")

    def _write(self) -> None:
        """Write what a later command, or a shell, needs to find the services."""
        record = {
            "parts": [asdict(part) for part in self.parts.values()],
            "ports": self._ports,
            "database": self.database_url,
            "cluster": str(self._cluster) if self._cluster else None,
            "environment": self.variables,
        }
        (self.folder / "services.json").write_text(json.dumps(record, indent=2) + "\n")
        lines = [f"export {key}={shlex.quote(value)}" for key, value in self.variables.items()]
        (self.folder / "env").write_text("\n".join(lines) + "\n")


def store_variables(url: str) -> dict[str, str]:
    """The environment of a process that uses an object store on loopback, by obstore, boto3 or GDAL."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
        "AWS_EC2_METADATA_DISABLED": "true",
        # GDAL's own names for the same:
        "AWS_S3_ENDPOINT": url.removeprefix("http://"),
        "AWS_HTTPS": "NO",
        "AWS_VIRTUAL_HOSTING": "FALSE",
    }


def make_buckets(url: str, names: Iterable[str]) -> None:
    """Make buckets in a store that checks nobody.

    Raises:
        ServiceError: one cannot be made.
    """
    for name in names:
        status = _status(f"{url}/{name}", method="PUT")
        if status != 200:
            raise ServiceError(f"store: the bucket {name} cannot be made: HTTP {status}")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `start` wrote into a folder, where services were started there and not stopped."""
    path = folder / "services.json"
    return json.loads(path.read_text()) if path.exists() else None


def end_parts(parts: Sequence[Part], cluster: Path | None) -> list[str]:
    """End parts, those that started last first: a worker says goodbye to a server that is still there.

    Returns:
        Names of those that had to be killed.
    """
    killed: list[str] = []
    for beginnings in (("worker-", "dask-worker-"), ("dask-scheduler", "prefect", "store"), ("postgres",)):
        killed += stop([part for part in parts if part.name.startswith(beginnings)])
    if cluster is not None:
        shutil.rmtree(cluster, ignore_errors=True)
    return killed


def _status(
    url: str, body: Mapping[str, Any] | None = None, auth: str | None = None, *, method: str | None = None
) -> int:
    """The HTTP status of a request; 0 where nobody answers."""
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if auth:
        headers["Authorization"] = f"Basic {base64.b64encode(auth.encode()).decode()}"
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _one_of(what: str, value: str, valid: Sequence[str]) -> str:
    if value not in valid:
        raise ServiceError(f"{what}: {value!r} is none of {', '.join(valid)}")
    return value
