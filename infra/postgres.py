"""A PostgreSQL cluster to throw away: made, started on a loopback port, removed."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from infra.processes import Part, ServiceError, as_user, start

DATABASE = "prefect"
ACCOUNT = "prefect"
DEBIAN_USER = "postgres"
"""Made by Debian's package: PostgreSQL does not run as root."""

DEBIAN_FOLDER = Path("/usr/lib/postgresql")


def programs() -> Path:
    """The folder with `initdb` and `postgres`: of the PATH, or Debian's newest.

    Raises:
        ServiceError: there is none.
    """
    found = shutil.which("initdb")
    if found and (Path(found).resolve().parent / "postgres").exists():
        return Path(found).resolve().parent
    versions = [path.parent for path in DEBIAN_FOLDER.glob("*/bin/postgres")]
    if not versions:
        raise ServiceError(
            "postgres: no `initdb` on the PATH nor in /usr/lib/postgresql; install the Debian package "
            "`postgresql`, or use --database sqlite"
        )
    return max(versions, key=lambda path: [int(n) for n in re.findall(r"\d+", path.parent.name)])


def make_cluster(folder: Path) -> Path:
    """Make an empty cluster that trusts everyone on this machine.

    Args:
        folder: where it goes when an ordinary user makes it. Root's goes to the folder for
            temporary files, as PostgreSQL's own user has to reach it.

    Returns:
        The cluster's folder; data and socket are in it.

    Raises:
        ServiceError: PostgreSQL, or a user to run it as, is missing.
    """
    user = _user()
    if user is None:
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="segpipe-postgres-"))
        shutil.chown(folder, user, pwd.getpwnam(user).pw_gid)
    command = [
        str(programs() / "initdb"), "--pgdata", str(folder / "data"), "--username", ACCOUNT,
        "--auth", "trust", "--encoding", "UTF8", "--locale", "C", "--no-sync",
    ]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True, cwd=folder, **as_user(user))
    if made.returncode:
        raise ServiceError(f"postgres: initdb failed: {made.stderr.strip().splitlines()[-1:]}")
    return folder


def start_cluster(folder: Path, port: int, environment: Mapping[str, str], log: Path) -> Part:
    """Start the server of a cluster. Nothing is flushed to the disk: it is to be thrown away."""
    sockets = folder if len(str(folder)) < 80 else Path(tempfile.gettempdir())  # a socket's path: at most 107
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": port,
        "unix_socket_directories": sockets,
        "fsync": "off",
        "synchronous_commit": "off",
        "full_page_writes": "off",
        "max_connections": 200,
    }
    command = [str(programs() / "postgres"), "-D", str(folder / "data")]
    for key, value in settings.items():
        command += ["-c", f"{key}={value}"]
    url = database_url(port)
    return start("postgres", command, environment, log, address=url, user=_user(), cwd=str(folder))


def is_ready(port: int) -> bool:
    """Whether the server takes connections; makes the database when it does so first."""
    if _psql(port, "postgres", "select 1").returncode:
        return False
    made = _psql(port, "postgres", f"create database {DATABASE}")
    if made.returncode and "already exists" not in made.stderr:
        raise ServiceError(f"postgres: the database `{DATABASE}` cannot be made: {made.stderr.strip()}")
    return True


def query(port: int, statement: str) -> str:
    """The answer of one statement on Prefect's database, by `psql`: rows as lines, columns by ``|``.

    Raises:
        ServiceError: the statement failed.
    """
    answer = _psql(port, DATABASE, statement)
    if answer.returncode:
        raise ServiceError(f"postgres: {statement}: {answer.stderr.strip()}")
    return answer.stdout.strip()


def database_url(port: int) -> str:
    """What Prefect's setting PREFECT_SERVER_DATABASE_CONNECTION_URL takes."""
    return f"postgresql+asyncpg://{ACCOUNT}@127.0.0.1:{port}/{DATABASE}"


def _psql(port: int, database: str, statement: str) -> subprocess.CompletedProcess[str]:
    command = [
        str(programs() / "psql"), "--host", "127.0.0.1", "--port", str(port), "--username", ACCOUNT,
        "--dbname", database, "--no-password", "--no-psqlrc", "--tuples-only", "--no-align",
        "--command", statement,
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def _user() -> str | None:
    """Whom the programs run as: who calls, but for root."""
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam(DEBIAN_USER).pw_name
    except KeyError:
        raise ServiceError(
            f"postgres: does not run as root, and there is no user `{DEBIAN_USER}` to run it as; install the "
            "Debian package `postgresql`, or start the services as an ordinary user"
        ) from None
