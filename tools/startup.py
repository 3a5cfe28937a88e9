"""Measure how long segpipe takes to start and how many modules it loads, as a Markdown table.

    python -m tools.startup [--repeats 3]

Run it in a repository with the demo's data (`make demo-data`). The library is that of PYTHONPATH, else this
repository's; jobs and data are those beside it. Seconds are the least of the repeats; processor time
includes that of child processes, such as the run's own server.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.inputs import environment, library

JOB = "configs/jobs/landcover.yaml"
COUNT = "import atexit, sys; atexit.register(lambda: print(len(sys.modules), file=open(sys.argv[-1], 'w')))\n"
"""What comes first in each process; the last argument is the file of the number of modules."""
CLI = "import runpy; arguments = sys.argv; sys.argv = sys.argv[:-1]\n" + (
    "try: runpy.run_module('segpipe.cli', run_name='__main__', alter_sys=True)\n"
    "finally: sys.argv = arguments\n"
)


@dataclass(frozen=True)
class Start:
    """One way to start segpipe."""

    name: str
    code: str
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What one start took."""

    wall: float
    processor: float
    modules: int


def starts(root: Path, out: Path) -> list[Start]:
    """Return the ways to start that a library has, whose results go into a folder."""
    to_out = ("--set", f"outputs.dir={out}")
    local = Start("`segpipe run --local` (land cover, fresh)", CLI, ("run", JOB, "--local", *to_out))
    return [
        Start("`import segpipe`", "import segpipe"),
        Start("`segpipe --help`", CLI, ("--help",)),
        Start("`segpipe plan` (land cover)", CLI, ("plan", JOB, *to_out)),
        Start("`segpipe run` (land cover, fresh)", CLI, ("run", JOB, *to_out)),
        *([local] if (root / "segpipe/runs/local.py").exists() else []),
    ]


def measure(start: Start, root: Path, folder: Path) -> Cost:
    """Start once in a process of its own, without results of an earlier start.

    Raises:
        RuntimeError: it ends with another exit code than 0.
    """
    shutil.rmtree(folder / "runs", ignore_errors=True)
    count = folder / "modules"
    log = folder / "log"
    command = [sys.executable, "-c", COUNT + start.code, *start.arguments, str(count)]
    begun = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=root, env=environment(PREFECT_HOME=str(folder / "prefect")), stdout=output, stderr=output,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begun
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{start.name}: exit code {process.returncode}\n{log.read_text()}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, int(count.read_text()))


def table(rows: Sequence[tuple[str, Sequence[Cost]]]) -> str:
    """Return the Markdown table of several starts with their repeats."""
    lines = ["| start | wall, s | processor, s | modules |", "|---|---|---|---|"]
    for name, costs in rows:
        wall, processor = min(c.wall for c in costs), min(c.processor for c in costs)
        lines.append(f"| {name} | {wall:.2f} | {processor:.2f} | {max(c.modules for c in costs):,} |")
    return "\n".join(lines)


def main() -> None:
    """Measure every start and print the table."""
    parser = argparse.ArgumentParser(description="Measure how long segpipe takes to start.")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    root = library()
    print(f"segpipe: {root / 'segpipe'}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="segpipe-startup-") as name:
        folder = Path(name)
        rows = [
            (start.name, [measure(start, root, folder) for _ in range(arguments.repeats)])
            for start in starts(root, folder / "runs")
        ]
    print(table(rows))


if __name__ == "__main__":
    main()
