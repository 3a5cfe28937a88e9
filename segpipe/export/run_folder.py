"""The folder of a run: where it lies, and how files get into it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import obstore

from segpipe.export.manifest import MANIFEST
from segpipe.store.location import is_url, join, open_store


@dataclass(frozen=True)
class RunFolder:
    """One application of a job to scenes. Small and picklable."""

    out: str
    job: str
    name: str
    started: str

    @property
    def location(self) -> str:
        """Folder or URL of the run."""
        return join(self.out, self.job, self.name)

    @property
    def report(self) -> str:
        """Where the page is."""
        return join(self.location, "report.html")


@contextmanager
def local_folder(run: RunFolder) -> Iterator[Path]:
    """The run's folder to write files into; for a URL a temporary one that is uploaded at the end."""
    if not is_url(run.location):
        folder = Path(run.location)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="segpipe-") as name:
        yield Path(name)
        store = open_store(run.location)
        last = [Path(name) / MANIFEST, Path(name) / "run.json"]  # who sees the record finds the rest
        for path in [p for p in sorted(Path(name).rglob("*")) if p not in last] + last:
            if path.is_file():
                obstore.put(store, path.relative_to(name).as_posix(), path)


def now() -> str:
    """Local time, ISO 8601 with its offset."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
