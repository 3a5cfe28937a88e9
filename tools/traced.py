"""Run one job in this process and print, as JSON, which files of segpipe it enters and what it reads again.

    python -m tools.traced NAME FOLDER

A file counts as entered when one of its functions runs in any thread. A card counts as looked up whenever
its file's state is asked for, as parsed when YAML is parsed from its text; a source counts as opened by
each ``rasterio.open`` or ``nibabel.load`` of it. No name of segpipe's own is part of a definition.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from tools.inputs import Command, library, make_commands


class Trace:
    """What one job enters, opens and parses."""

    def __init__(self, package: Path, command: Command) -> None:
        self.package = f"{package}/"
        self.card = str(command.card)
        self.card_text = command.card.read_text() if command.card else ""
        self.scene = str(command.scene)
        self.entered: set[str] = set()
        self.counts: Counter[str] = Counter()

    def profile(self, frame: FrameType, event: str, _argument: object) -> None:
        """Note the file of a call: the function for `sys.setprofile`."""
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(self.package):
            return
        if not code.co_flags & inspect.CO_OPTIMIZED:  # the body of a module or class, not a function
            return
        self.entered.add(code.co_filename.removeprefix(self.package))
        if code.co_name == "open_raster":  # the one place where the library opens a raster
            self.counts["source_opens"] += self.scene in map(str, frame.f_locals.values())

    def count(self, module: Any, name: str, wanted: Callable[[Any], bool], key: str) -> None:
        """Count the calls of a library's function whose first argument is wanted."""
        original = getattr(module, name)

        def counted(first: Any, *rest: Any, **options: Any) -> Any:
            self.counts[key] += wanted(first)
            return original(first, *rest, **options)

        setattr(module, name, counted)

    def run(self, job: Callable[[], None]) -> None:
        """Run a job under the trace, with all threads that it starts."""
        import nibabel
        import yaml

        self.count(yaml, "load", lambda text: _text(text) == self.card_text, "card_parses")
        self.count(os, "stat", lambda path: _text(path) == self.card, "card_lookups")
        self.count(nibabel, "load", lambda path: _text(path) == self.scene, "source_opens")
        threading.setprofile(self.profile)
        sys.setprofile(self.profile)
        try:
            job()
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


def _text(given: Any) -> str:
    return given.decode() if isinstance(given, bytes) else str(given)


def entry(command: Command) -> Callable[[], None]:
    """Return the library's own way to run a job file in this process."""
    import segpipe

    def run() -> None:
        ended = segpipe.run(command.file)
        if ended.failed:
            raise RuntimeError(f"{command.name}: {ended.failed}")

    return run


def main() -> None:
    """Make the inputs, run the job of that name, and print what was traced."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    root = library()
    [command] = [c for c in make_commands(folder, root) if c.name == name]
    trace = Trace(root / "segpipe", command)
    trace.run(entry(command))
    print(json.dumps({"entered": sorted(trace.entered), "counts": trace.counts}))


if __name__ == "__main__":
    main()
