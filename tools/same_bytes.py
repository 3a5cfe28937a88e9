"""Run six small jobs by the command line and print a SHA-256 of every label map and table.

    python -m tools.same_bytes FOLDER [--against LISTING]

Each line is ``job file sha``. A map's hash is of its pixels, a table's of its text: what names the run or
the time is left out, so that two trees that compute the same print the same. The library is that of
PYTHONPATH, else this repository's.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import rasterio

from tools.inputs import Command, environment, library, make_commands

LIMIT = 600
"""Seconds for one job."""
VOLATILE = {"run", "started", "finished", "time", "seconds"}
"""Columns of tables that differ from run to run."""


def run_command(command: Command, folder: Path) -> None:
    """Run one command line in a process of its own.

    Raises:
        RuntimeError: it ends with another exit code than 0.
    """
    done = subprocess.run(
        [sys.executable, "-m", "segpipe.cli", *command.arguments],
        cwd=folder, env=environment(PREFECT_HOME=str(folder / "prefect")),
        capture_output=True, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{command.name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def listing(command: Command) -> Iterator[str]:
    """Yield ``job file sha`` for every map and table of a command's only run."""
    [record] = command.out.glob("*/*/run.json")
    for path in sorted(record.parent.rglob("*")):
        digest = hash_of(path)
        if digest is not None:
            yield f"{command.name} {path.relative_to(record.parent).as_posix()} {digest}"


def hash_of(path: Path) -> str | None:
    """Return the hash of what a file says, or None where it is neither a map nor a table."""
    if path.suffix == ".tif":
        with rasterio.open(path) as file:
            return _hash_array(file.read())
    if path.name.endswith((".nii", ".nii.gz")):
        image: Any = nib.load(path)
        return _hash_array(np.asarray(image.dataobj))
    if path.suffix == ".csv":
        return _hash_table(path)
    return None


def _hash_array(array: np.ndarray) -> str:
    head = f"{array.dtype.str} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def _hash_table(path: Path) -> str:
    with path.open(newline="") as file:
        rows = [
            {key: value for key, value in row.items() if key not in VOLATILE} for row in csv.DictReader(file)
        ]
    return hashlib.sha256(repr([list(row.items()) for row in rows]).encode()).hexdigest()


def differences(before: Sequence[str], now: Sequence[str]) -> list[str]:
    """Return a line for every file that only one listing has or whose hash differs.

    Args:
        before: lines ``job file sha``.
        now: the same.
    """
    old, new = (dict(line.rsplit(" ", 1) for line in lines) for lines in (before, now))
    said = dict.fromkeys(new.keys() - old.keys(), "is new")
    said |= dict.fromkeys(old.keys() - new.keys(), "is missing")
    said |= {name: "differs" for name in old.keys() & new.keys() if old[name] != new[name]}
    return [f"{name} {what}" for name, what in sorted(said.items())]


def main() -> int:
    """Run the jobs, print the listing, and compare it where asked; return the exit code."""
    parser = argparse.ArgumentParser(description="Hash the maps and tables of six small jobs.")
    parser.add_argument("folder", type=Path, help="where inputs and results go: new or empty")
    parser.add_argument("--against", type=Path, help="an earlier listing: exit code 1 where they differ")
    arguments = parser.parse_args()
    root = library()
    print(f"segpipe: {root / 'segpipe'}", file=sys.stderr)
    lines: list[str] = []
    for command in make_commands(arguments.folder.resolve(), root):
        run_command(command, arguments.folder.resolve())
        found = [*listing(command)]
        print("\n".join(found), flush=True)
        lines += found
    if arguments.against is None:
        return 0
    wrong = differences(arguments.against.read_text().splitlines(), lines)
    print("\n".join(wrong) or f"all {len(lines)} are the same", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
