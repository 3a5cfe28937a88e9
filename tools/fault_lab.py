"""A folder, a server and a library under test, for `tools.faults`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml

LIMIT = 150.0
"""Seconds after which a command counts as hanging."""
EDGE = 64
SHARE = 30
"""Per cent of the label map that are class 1: 30 x 64 x 64 / 100 pixels of 100 m², 12.29 ha."""


@dataclass(frozen=True)
class Ended:
    """A command that ended, or was ended."""

    code: int
    """-1: it hung."""
    out: str
    err: str
    seconds: float

    @property
    def what(self) -> str:
        """In some words."""
        if self.code == -1:
            return f"hangs (> {LIMIT:g} s)"
        if self.code < -1:
            return f"dies of {signal.Signals(-self.code).name}"
        if "Traceback" in self.err:
            return f"traceback: {self.err.strip().splitlines()[-1][:60]}"
        return f"exit {self.code} after {self.seconds:.0f} s" if self.seconds > 30 else f"exit {self.code}"

    def names(self, word: str) -> bool:
        """Whether it was refused by one line that has a word in it."""
        said = [line for line in (self.out + self.err).splitlines() if word in line]
        return self.code in (1, 2) and "Traceback" not in self.err and bool(said)


@dataclass
class Lab:
    """A folder with a scene of 64 x 64 pixels and its labels, and the library under test."""

    tree: Path
    folder: Path
    asked: list[str] = field(default_factory=list)
    """Paths that somebody asked the server for."""
    address: str = ""

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.raster("scene.tif", np.random.default_rng(1).integers(1, 255, (EDGE, EDGE)).astype(np.uint8))
        self.raster("labels.tif", self.share(SHARE))

    def share(self, percent: int) -> np.ndarray:
        """Labels of which so many are class 1."""
        labels = np.zeros(EDGE * EDGE, np.uint8)
        labels[: EDGE * EDGE * percent // 100] = 1
        return labels.reshape(EDGE, EDGE)

    def raster(self, name: str, values: np.ndarray, **profile: Any) -> Path:
        """A GeoTIFF of 10 m pixels in UTM."""
        bands = values if values.ndim == 3 else values[None]
        place = rasterio.Affine(10, 0, 5e5, 0, -10, 4e6)
        shape = {"count": bands.shape[0], "height": bands.shape[1], "width": bands.shape[2]}
        data = {"driver": "GTiff", "dtype": bands.dtype, "crs": "EPSG:32616", "transform": place, **shape}
        with rasterio.open(self.folder / name, "w", **data | profile) as file:
            file.write(bands)
        return self.folder / name

    def write(self, name: str, text: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    def job(self, **fields: Any) -> Path:
        """A job that measures the labels as they are given."""
        data = {
            "name": "fault", "scenes": ["scene.tif"], "labels": "labels.tif", "outputs": {"dir": "out"},
        } | fields  # fmt: skip
        return self.write("job.yaml", yaml.safe_dump(data))

    def segpipe(self, *arguments: str, **environment: str) -> Ended:
        """Run the command line of the library under test."""
        path = os.pathsep.join([str(self.tree), str(self.tree / ".typing")])
        home = {"PREFECT_HOME": str(self.folder / ".prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "segpipe.cli", *arguments],
            cwd=self.folder, env={**os.environ, **home, "PYTHONPATH": path, **environment},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, err = process.communicate()
            return Ended(-1, out, err, LIMIT)
        return Ended(process.returncode, out, err, time.monotonic() - begun)

    def run(self, **fields: Any) -> Ended:
        return self.segpipe("run", str(self.job(**fields)))

    def plan(self, **fields: Any) -> Ended:
        return self.segpipe("plan", str(self.job(**fields)))

    def hectares(self) -> str:
        """Of class 1 in the latest run."""
        for run in sorted((self.folder / "out" / "fault").glob("*/regions.csv"), reverse=True):
            header, *rows = [line.split(",") for line in run.read_text().splitlines()]
            found = [dict(zip(header, row, strict=False)) for row in rows]
            return ", ".join(f"{float(r['area_m2']) / 1e4:.2f} ha" for r in found if r.get("class") == "1")
        return "no table"


@contextmanager
def server(asked: list[str]) -> Iterator[str]:
    """A server on loopback that has nothing and writes down what it is asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815  (its name)

        def log_message(self, *_: object) -> None:
            return

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
