"""Processes that outlive the command which started them, and are ended by their process ids."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]

TERM_SECONDS = 15.0
"""After SIGTERM: a Prefect server closes its database, a worker tells the server that it goes."""

LEFT_SECONDS = 2.0
KILL_SECONDS = 5.0

SAME_SECONDS = 1.0
"""Two readings of when a process began differ by the clock's corrections."""


class ServiceError(Exception):
    """A service that did not start, or cannot: one line, and what to do."""


@dataclass(frozen=True)
class Part:
    """One process that was started, enough to find it again from another process."""

    name: str
    pid: int
    """Also the id of its process group: each is started with a session of its own."""

    created: float
    """Seconds since 1970 when the process began: a process id may belong to another one later."""

    log: str
    """File with what it prints."""

    address: str = ""
    """Where it is reached: a URL, or empty."""

    skip: int = 0
    """Bytes of the log that an earlier process wrote."""

    def output(self) -> str:
        """What the process printed."""
        return Path(self.log).read_bytes()[self.skip :].decode(errors="replace")

    def process(self) -> psutil.Process | None:
        """The process, where it still runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < SAME_SECONDS
        except psutil.NoSuchProcess:
            return None
        return process if same and _lives(process) else None

    def owns_group(self) -> bool:
        """Whether the process group with this id is this part's.

        No new process is given the id of a group that has members, so it is another's only
        where the id is that of another process.
        """
        try:
            return bool(abs(psutil.Process(self.pid).create_time() - self.created) < SAME_SECONDS)
        except psutil.NoSuchProcess:
            return True


def start(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    address: str = "",
    user: str | None = None,
    cwd: str | None = None,
) -> Part:
    """Start a process in a session of its own; what it prints goes to the end of ``log``.

    Args:
        name: of the part.
        command: program and arguments.
        environment: all of it.
        log: file for both of its outputs.
        address: where it will be reached.
        user: whom it runs as, when started by root; left out: who starts it.
        cwd: its working directory.
    """
    skip = log_size(log)
    with log.open("ab") as output:
        popen = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=cwd,
            **as_user(user),
        )
    return part_of(name, popen, log, address, skip)


def log_size(log: Path) -> int:
    """Bytes of a log so far."""
    return log.stat().st_size if log.exists() else 0


def part_of(name: str, popen: subprocess.Popen[bytes], log: Path, address: str = "", skip: int = 0) -> Part:
    """The part that a process is which leads a session of its own."""
    try:
        created = psutil.Process(popen.pid).create_time()
    except psutil.NoSuchProcess:
        raise ServiceError(f"{name}: ended at once{last_lines(log)}") from None
    popen.returncode = 0  # ours to end by its id: no warning that it still runs
    return Part(name, popen.pid, created, str(log), address, skip)


def as_user(user: str | None) -> dict[str, Any]:
    """What `subprocess` takes to run a program as somebody else."""
    return {} if user is None else {"user": user, "group": user, "extra_groups": []}


def wait_until(part: Part, ready: Callable[[], bool], seconds: float) -> None:
    """Wait until a part that was started is ready.

    Raises:
        ServiceError: it ended, or was not ready in time; with the last lines it printed.
    """
    end = time.monotonic() + seconds
    while not ready():
        if part.process() is None:
            raise ServiceError(f"{part.name}: ended while starting{last_lines(Path(part.log))}")
        if time.monotonic() > end:
            raise ServiceError(f"{part.name}: not ready after {seconds:g} s{last_lines(Path(part.log))}")
        time.sleep(0.1)


def last_lines(log: Path, count: int = 5) -> str:
    """The end of a log, to be put behind a message."""
    lines = log.read_text(errors="replace").splitlines()[-count:] if log.exists() else []
    return f" ({log}: {' | '.join(lines)})" if lines else f" ({log} is empty)"


def stop(parts: Sequence[Part]) -> list[str]:
    """End parts and everything they started: SIGTERM, and SIGKILL for what is left.

    Returns:
        Names of the parts that had to be killed, or left something behind that had to be.
    """
    families = {part.name: family(part) for part in parts}
    leaders = [part.process() for part in parts]
    _signal([process for process in leaders if process is not None], signal.SIGTERM, TERM_SECONDS)
    # What a leader left behind, such as flow runs of a worker.
    everyone = [process for members in families.values() for process in members]
    left = _signal(everyone, signal.SIGTERM, LEFT_SECONDS)
    _signal(left, signal.SIGKILL, KILL_SECONDS)
    return [name for name, members in families.items() if any(process in left for process in members)]


def kill(part: Part) -> None:
    """End a part and everything it started at once, as a machine does that loses power."""
    _signal(family(part), signal.SIGKILL, KILL_SECONDS)


def family(part: Part) -> list[psutil.Process]:
    """A part's process and all that descend from it or belong to its process group, and still run."""
    leader = part.process()
    found: dict[int, psutil.Process] = {}
    if leader is not None:
        found = {process.pid: process for process in [leader, *leader.children(recursive=True)]}
    if part.owns_group():
        for process in psutil.process_iter():
            try:
                if os.getpgid(process.pid) == part.pid:
                    found.setdefault(process.pid, process)
            except (ProcessLookupError, PermissionError):
                continue
    return [process for process in found.values() if _lives(process)]


def _lives(process: psutil.Process) -> bool:
    """Whether it runs; a child of ours that ended is taken note of, and is gone."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            with suppress(ChildProcessError):  # another process's child: its parent's to take note of
                os.waitpid(process.pid, os.WNOHANG)
            return False
        return bool(process.is_running())
    except psutil.NoSuchProcess:
        return False


def _signal(
    processes: Sequence[psutil.Process], number: signal.Signals, seconds: float
) -> list[psutil.Process]:
    """Send a signal and wait for the end; the processes that still run after that time."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # psutil also refuses where the id is another process's by now
            process.send_signal(number)
    end = time.monotonic() + seconds
    while (left := [process for process in processes if _lives(process)]) and time.monotonic() < end:
        time.sleep(0.05)
    return left
