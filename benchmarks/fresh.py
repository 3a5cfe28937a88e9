"""A measurement in a process of its own: peak memory and the first touch of libraries are its alone."""

from __future__ import annotations

import os
import subprocess
import sys


def run_fresh(module: str, *arguments: str, **environment: str) -> list[str]:
    """What ``python -m MODULE --one ARGUMENTS`` prints, by words."""
    command = [sys.executable, "-m", module, "--one", *arguments]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done.stdout.split()
