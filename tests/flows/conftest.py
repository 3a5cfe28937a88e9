"""A real Prefect server, and jobs small enough to run many times on it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from segpipe.config.job import Job, load_job
from segpipe.tables.record import RunRecord, load_record
from segpipe_flows.server import free_port, local_server

EDGE = 256
"""Of a test scene, in pixels: 16 blocks of 64."""


class Small(torch.nn.Module):
    """Two bands to three classes by what surrounds a pixel; ``work`` slows it down by real arithmetic."""

    def __init__(self, work: int) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(2, 3, 5, padding=2)
        self.work = work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        square = torch.eye(256)
        for _ in range(self.work):
            square = torch.mm(square, torch.eye(256))
        return self.conv(x) * square[0, 0]


@pytest.fixture(scope="session")
def flow_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """``flow_models(work)``: the card of a small model of that slowness."""
    folder = tmp_path_factory.mktemp("models")

    def make(work: int) -> Path:
        path = folder / f"small-{work}.yaml"
        if not path.exists():
            torch.manual_seed(20240607)
            torch.jit.script(Small(work)).save(str(folder / f"small-{work}.pt"))
            colors = {"ground": "#000000", "house": "#ff0000", "water": "#0000ff"}
            card = {
                "name": f"small-{work}",
                "kind": "raster",
                "provider": "torchscript",
                "allow_torchscript": True,
                "weights": f"small-{work}.pt",
                "input": {"bands": ["near", "far"]},
                "window": {"size": [64], "halo": [8], "stride": 8},
                "classes": [{"value": v, "name": n, "color": c} for v, (n, c) in enumerate(colors.items())],
            }
            path.write_text(yaml.safe_dump(card))
        return path

    return make


@pytest.fixture(scope="session")
def flow_scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four scenes of noise, smooth enough for the model to see shapes."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(7)
    for number in range(4):
        coarse = rng.normal(size=(2, EDGE // 8, EDGE // 8))
        pixels = np.kron(coarse, np.ones((1, 8, 8))).astype(np.float32)
        with rasterio.open(
            folder / f"scene_{number}.tif",
            "w",
            driver="GTiff",
            width=EDGE,
            height=EDGE,
            count=2,
            dtype="float32",
            crs="EPSG:32616",
            transform=rasterio.Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 4_000_000.0 + number * 10_000),
        ) as dataset:
            dataset.write(pixels)
    return folder


JobMaker = Callable[..., Path]


@pytest.fixture
def flow_job(tmp_path: Path, flow_models: Callable[[int], Path], flow_scenes: Path) -> JobMaker:
    """``flow_job(out, scenes=…, work=0, tiling={…}, compute={…})``: the path of a job's YAML."""

    def make(
        out: str = "runs",
        *,
        scenes: Sequence[str | Path] | None = None,
        work: int = 0,
        compute: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Path:
        job = {
            "name": out,
            "scenes": [str(s) for s in scenes or [flow_scenes / "scene_0.tif", flow_scenes / "scene_1.tif"]],
            "model": str(flow_models(work)),
            "bands": ["near", "far"],
            "tiling": {"block": 64},
            "compute": {"device": "cpu", "threads": 1, "batch": 2, "batch_minutes": 0.04, **(compute or {})},
            "outputs": {"dir": str(tmp_path / out), "formats": ["cog"]},
            **fields,
        }
        path = tmp_path / f"{out}.yaml"
        path.write_text(yaml.safe_dump(job))
        return path

    return make


def load(path: Path) -> Job:
    """The job of a file."""
    return load_job(path)


def run_folder(job: Job) -> Path:
    """The one run of a job."""
    (folder,) = Path(job.outputs.dir, job.name).iterdir()
    return folder


def record_of(job: Job) -> RunRecord:
    """What ``run.json`` says of the one run of a job."""
    return load_record((run_folder(job) / "run.json").read_bytes())


def results_of(job: Job) -> dict[str, bytes]:
    """Everything a run answers, as bytes: label maps as stored, and tables."""
    folder = run_folder(job)
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob("scenes/*/labels.tif")):
        with rasterio.open(path) as dataset:
            found[path.parent.name] = dataset.read().tobytes()
    found["regions"] = (folder / "regions.csv").read_bytes()
    return found


def wait_until(ready: Callable[[], Any], seconds: float, what: str) -> Any:
    """The first true answer of ``ready``, asked several times a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = ready()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds:g} s: {what}")


@pytest.fixture(scope="session")
def flow_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PREFECT_HOME of all that runs here."""
    return tmp_path_factory.mktemp("prefect")


@pytest.fixture(scope="session")
def flow_server(flow_home: Path) -> Iterator[str]:
    """The API's URL of a real server of our own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(flow_home))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        with local_server("127.0.0.1", free_port()) as api:
            yield api
            for worker in (APILogWorker, EventsWorker):  # else they look for the server for a minute at exit
                worker.drain_all(timeout=10)


@pytest.fixture
def on_server(flow_server: str, flow_home: Path) -> Iterator[SyncPrefectClient]:
    """Flows called in this test run on the server; a client of it."""
    with (
        temporary_settings({PREFECT_API_URL: flow_server, PREFECT_HOME: flow_home}),
        get_client(sync_client=True) as client,
    ):
        yield client


@pytest.fixture
def server_environment(flow_server: str, flow_home: Path) -> dict[str, str]:
    """The environment of a process that uses the server."""
    return {**os.environ, "PREFECT_API_URL": flow_server, "PREFECT_HOME": str(flow_home)}
