"""A PostgreSQL cluster to throw away: made, started on a loopback port, removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tests.services.processes import Part, ServiceError, start

USER = "postgres" if os.geteuid() == 0 else None
"""PostgreSQL does not run as root; Debian's package makes this user."""


def program(name: str) -> str:
    """Return the path of a program of PostgreSQL: Debian's newest, or one on the PATH.

    Raises:
        ServiceError: there is none.
    """
    versions = Path("/usr/lib/postgresql").glob(f"*/bin/{name}")
    found = max(versions, key=lambda path: float(path.parts[4]), default=None) or shutil.which(name)
    if found is None:
        raise ServiceError(
            f"postgres: found no `{name}`; install the Debian package `postgresql`, or use --database sqlite"
        )
    return str(found)


def make_cluster() -> Path:
    """Make an empty cluster that trusts everyone on this machine, in a folder that its user can reach.

    Raises:
        ServiceError: PostgreSQL is missing, or refuses.
    """
    initdb = program("initdb")
    folder = Path(tempfile.mkdtemp(prefix="segpipe-postgres-"))
    if USER:
        shutil.chown(folder, USER, USER)
    options = ["--username", "prefect", "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync"]
    command = [initdb, "--pgdata", str(folder / "data"), *options]
    made = subprocess.run(command, capture_output=True, text=True, cwd=folder, user=USER, group=USER)
    if made.returncode:
        raise ServiceError(f"postgres: initdb failed: {made.stderr.strip().splitlines()[-1:]}")
    return folder


def start_cluster(folder: Path, port: int, environment: Mapping[str, str], log: Path) -> Part:
    """Start the server of a cluster. Nothing is flushed to the disk: it is to be thrown away."""
    command = [program("postgres"), "-D", str(folder / "data"), "-k", str(folder), "-h", "127.0.0.1"]
    command += [
        "-p",
        str(port),
        "-F",
        "-N",
        "200",
        "-c",
        "synchronous_commit=off",
        "-c",
        "full_page_writes=off",
    ]
    return start("postgres", command, environment, log, address=database_url(port), user=USER)


def is_ready(port: int) -> bool:
    """Whether the server takes connections."""
    command = [program("pg_isready"), "--host", "127.0.0.1", "--port", str(port)]
    return subprocess.run(command, capture_output=True).returncode == 0


def database_url(port: int) -> str:
    """What Prefect's setting PREFECT_SERVER_DATABASE_CONNECTION_URL takes."""
    return f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
