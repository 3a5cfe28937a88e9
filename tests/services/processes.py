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

import psutil

TERM_SECONDS = 15.0
"""After SIGTERM: a Prefect server closes its database, a worker tells the server that it goes."""
LEFT_SECONDS = 2.0
KILL_SECONDS = 5.0


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
        found = self.leader()
        return found if found is not None and lives(found) else None

    def leader(self) -> psutil.Process | None:
        """The process, where it runs or its end has not been taken note of."""
        with suppress(psutil.NoSuchProcess):
            found = psutil.Process(self.pid)
            if abs(found.create_time() - self.created) < 1:  # the clock's corrections
                return found
        return None

    def family(self) -> list[psutil.Process]:
        """The process and all that descend from it or belong to its group, and still run."""
        leader, found = self.leader(), set[psutil.Process]()
        if leader is not None:
            with suppress(psutil.NoSuchProcess):
                found = {leader, *leader.children(recursive=True)}
        # No new process is given the id of a group that has members: without the leader, the group is ours.
        if leader is not None or not psutil.pid_exists(self.pid):
            for process in psutil.process_iter():
                with suppress(ProcessLookupError, PermissionError):
                    if os.getpgid(process.pid) == self.pid:
                        found.add(process)
        return [process for process in found if lives(process)]


def start(
    name: str,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    *,
    address: str = "",
    user: str | None = None,
) -> Part:
    """Start a process in a session of its own; what it prints goes to the end of ``log``.

    Args:
        name: Of the part.
        command: Program and arguments.
        environment: All of it.
        log: File for both of its outputs.
        address: Where it will be reached.
        user: Whom it runs as, when root starts it; None: who starts it.
    """
    skip = log.stat().st_size if log.exists() else 0
    with log.open("ab") as output:
        popen = subprocess.Popen(
            list(command),
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
    created = psutil.Process(popen.pid).create_time()  # of a zombie too: nobody has waited for it
    popen.returncode = 0  # ours to end by its id: no warning that it still runs
    return Part(name, popen.pid, created, str(log), address, skip)


def wait_until(part: Part, ready: Callable[[], bool], seconds: float) -> None:
    """Wait until a part that was started is ready.

    Raises:
        ServiceError: it ended, or was not ready in time; with the last lines it printed.
    """
    end = time.monotonic() + seconds
    while not ready():
        ended = part.process() is None
        if ended or time.monotonic() > end:
            last = " | ".join(part.output().splitlines()[-5:])
            why = "ended while starting" if ended else f"not ready after {seconds:g} s"
            raise ServiceError(f"{part.name}: {why} ({part.log}: {last})")
        time.sleep(0.1)


def stop(parts: Sequence[Part]) -> list[str]:
    """End parts and everything they started: SIGTERM, and SIGKILL for what is left.

    Returns:
        Names of the parts that had to be killed, or left something behind that had to be.
    """
    families = {part.name: part.family() for part in parts}
    end([process for part in parts if (process := part.process())], signal.SIGTERM, TERM_SECONDS)
    # What a leader left behind, such as flow runs of a worker.
    left = end([p for members in families.values() for p in members], signal.SIGTERM, LEFT_SECONDS)
    end(left, signal.SIGKILL, KILL_SECONDS)
    return [name for name, members in families.items() if any(process in left for process in members)]


def end(processes: Sequence[psutil.Process], number: signal.Signals, seconds: float) -> list[psutil.Process]:
    """Send a signal and wait for the end; return the processes that still run after that time."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # psutil also refuses where the id is another process's by now
            process.send_signal(number)
    until = time.monotonic() + seconds
    while (left := [process for process in processes if lives(process)]) and time.monotonic() < until:
        time.sleep(0.05)
    return left


def lives(process: psutil.Process) -> bool:
    """Whether it runs. `psutil.wait_procs` would wait for the zombies of parents that wait for nobody."""
    try:
        if process.status() == psutil.STATUS_ZOMBIE:
            with suppress(ChildProcessError):  # another process's child: its parent's to take note of
                os.waitpid(process.pid, os.WNOHANG)
            return False
        return bool(process.is_running())
    except psutil.NoSuchProcess:
        return False
