"""Scans, questions and cancels at random for 45 minutes: memory stays flat, and nothing is lost.

    python -m benchmarks.soak [--minutes 45] [--seed 0] [--database sqlite]

A Prefect server, an object store and a worker are started; pieces of the Landsat scene of `make demo-data`
keep arriving in the store, some of them damaged. Scans, scans beside scans, and questions to a promptable
model are started as deployments, and some are cancelled. In the end every piece must be done exactly
once, every damaged one be in quarantine, and nobody hold a lease.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median
from typing import Any
from uuid import UUID

import obstore
import psutil
import rasterio
from obstore.store import from_url
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from segpipe.config.scan import Scan
from segpipe.lake.selection import check_scan
from segpipe.tables.record import load_record
from tests.services.loopback import Services

ROOT = Path(__file__).parents[1]
SCENE = ROOT / ".demo/landsat/landsat7_2000.tif"
BANDS = ["blue", "green", "red", "nir", "swir16"]
EDGE = 96
MIB = 1 << 20
DAMAGED = 0.05
"""Share of the pieces."""
MOST_AT_ONCE = 3
"""Flow runs that are not over."""
LAST_SECONDS = 1800
"""For what has piled up, once nobody cancels any more."""


class Soak:
    """What happened so far."""

    def __init__(self, services: Services, client: SyncPrefectClient, seed: int) -> None:
        self.services = services
        self.client = client
        self.dice = random.Random(seed)
        self.lake = from_url("s3://lake")
        self.good: set[str] = set()
        self.bad: set[str] = set()
        self.runs: dict[UUID, str] = {}
        """Flow runs that were started, and of which deployment."""
        self.over: Counter[str] = Counter()
        self.memory: dict[str, list[tuple[float, float]]] = defaultdict(list)
        self.peaks: dict[int, tuple[float, float]] = {}
        """Of processes of flow runs: when first seen, and the most memory seen."""
        self.begun = time.monotonic()

    def drop_in(self, count: int) -> None:
        """Some more pieces arrive."""
        with rasterio.open(SCENE, driver="GTiff") as scene:
            for _ in range(count):
                name = f"piece_{len(self.good) + len(self.bad):05}"
                row, column = self.dice.randrange(347), self.dice.randrange(393)
                window = rasterio.windows.Window(column, row, EDGE, EDGE)
                profile = {"driver": "GTiff", "width": EDGE, "height": EDGE, "count": scene.count}
                profile |= {"dtype": scene.dtypes[0], "crs": scene.crs, "nodata": scene.nodata}
                with rasterio.MemoryFile() as memory:
                    with memory.open(**profile, transform=scene.window_transform(window)) as piece:
                        piece.write(scene.read(window=window))
                    data = memory.read()
                damaged = self.dice.random() < DAMAGED
                (self.bad if damaged else self.good).add(name)
                obstore.put(self.lake, f"arrivals/{name}.tif", data[: len(data) // 3] if damaged else data)

    def scan(self) -> None:
        """A scan by its deployment."""
        self._start("scan/scan", {"scan": scan_request()})

    def ask(self) -> None:
        """A question to the promptable model, over a piece."""
        if not self.good:
            return
        name = self.dice.choice(sorted(self.good))
        words = self.dice.choice(["lake", "forest", "town . lake", "bare soil"])
        question = {
            "name": "asked", "scenes": [f"s3://lake/arrivals/{name}.tif"], "bands": BANDS,
            "model": str(ROOT / "configs/models/starter-sam.yaml"),
            "prompts": {
                "text": [words], "grounder": str(ROOT / "configs/models/landcover-unet.yaml"),
                "bands": ["nir", "green", "red"],
            },
            "outputs": {"dir": "s3://runs"}, "compute": {"device": "cpu", "threads": "1"},
        }  # fmt: skip
        self._start("prompt/prompt", {"question": question})

    def _start(self, name: str, parameters: dict[str, Any]) -> None:
        deployment = self.client.read_deployment_by_name(name)
        run = self.client.create_flow_run_from_deployment(deployment.id, parameters=parameters)
        self.runs[run.id] = name

    def cancel(self) -> None:
        """Somebody presses Cancel."""
        running = [run for run in self._open() if run.state is not None and run.state.is_running()]
        if running:
            self.client.set_flow_run_state(self.dice.choice(running).id, Cancelling())
            self.over["asked to cancel"] += 1

    def _open(self) -> list[Any]:
        """Flow runs that are not over; those that are, are counted."""
        found = []
        for run_id, name in list(self.runs.items()):
            run = self.client.read_flow_run(run_id)
            if run.state is None or not run.state.is_final():
                found.append(run)
                continue
            del self.runs[run_id]
            # the deployment of scans has a limit of one: what is due beside it is cancelled by the server
            beside = "concurrency limit" in str(run.state.message)
            self.over[f"{name.split('/')[0]} {'beside another' if beside else run.state.name}"] += 1
            if run.state.is_crashed() or (
                run.state.is_failed() and "in quarantine" not in str(run.state.message)
            ):
                print(f"  {name}: {run.state.name}: {str(run.state.message)[:300]}", flush=True)
        return found

    def step(self) -> None:
        """One random thing."""
        dice = self.dice.random()
        if dice < 0.35:
            self.drop_in(self.dice.randint(1, 5))
        elif dice < 0.45:
            self.cancel()
        elif len(self._open()) < MOST_AT_ONCE:
            (self.scan if dice < 0.8 else self.ask)()

    def look(self) -> None:
        """Memory of everything, now."""
        now = (time.monotonic() - self.begun) / 60
        for name in ("prefect", "worker-cpu", "worker-gpu"):
            part = self.services.parts.get(name)
            if part is None or not psutil.pid_exists(part.pid):
                continue
            process = psutil.Process(part.pid)
            self.memory[name].append((now, process.memory_info().rss / MIB))
            if name != "prefect":
                for child in process.children(recursive=True):
                    self._look_at(child, now)

    def _look_at(self, process: psutil.Process, now: float) -> None:
        try:
            used = process.memory_info().rss / MIB
        except psutil.NoSuchProcess:
            return
        first, most = self.peaks.get(process.pid, (now, 0.0))
        self.peaks[process.pid] = (first, max(most, used))

    def finish(self) -> None:
        """Let everything end, and scan until nothing is new."""
        end = time.monotonic() + LAST_SECONDS
        while self._open() and time.monotonic() < end:
            time.sleep(2)
        while time.monotonic() < end:
            self._start("scan/scan", {"scan": scan_request()})
            (run_id,) = self.runs
            while self._open() and time.monotonic() < end:
                time.sleep(1)
            message = str(self.client.read_flow_run(run_id).state.message)
            print(f"  last scan: {message}", flush=True)
            if message.startswith("nothing to do") and "another scan" not in message:
                return

    def lost(self) -> list[str]:
        """What is not as it must be."""
        wrong, done, store = [], Counter[str](), from_url("s3://runs")
        for page in obstore.list(store, "soak"):
            for meta in page:
                if meta["path"].endswith("/run.json"):
                    record = load_record(bytes(obstore.get(store, meta["path"]).bytes()))
                    done.update(scene.name for scene in record.done)
        wrong += [f"{name} was never done" for name in sorted(self.good - set(done))]
        wrong += [f"{name} was done {n} times" for name, n in sorted(done.items()) if n > 1]
        ledger = check_scan(Scan.model_validate(scan_request())).ledger
        held = {scene.name for scene in ledger.quarantined()}
        if held != self.bad:
            wrong.append(f"in quarantine {sorted(held ^ self.bad)} more or fewer than damaged")
        wrong += [f"run {name} has no report" for name in ledger.open_runs()]
        left = [
            m["path"]
            for prefix in ("leases", "holders")
            for page in obstore.list(ledger.objects, prefix)
            for m in page
        ]
        return wrong + [f"{path} was left behind" for path in left]

    def growth(self) -> None:
        """Print memory of each third of the time."""
        print("memory, MiB (median of each third of the time)")
        for name, samples in self.memory.items():
            print(f"  {name:<12} {thirds(samples)}")
        flows = sorted(peak for peak in self.peaks.values() if peak[1] > 400)
        if flows:
            print(f"  flow runs    {thirds(flows)}   (peaks of {len(flows)})")


def thirds(samples: list[tuple[float, float]]) -> str:
    """Medians of each third of samples in time, the middle one of what is between."""
    size = max(1, len(samples) // 3)
    parts = samples[:size], samples[size:-size] or samples, samples[-size:]
    return " ".join(f"{median(used for _, used in part):7.0f}" for part in parts)


def scan_request() -> dict[str, Any]:
    """What each scan is asked."""
    return {
        "name": "soak",
        "lake": {"location": "s3://lake/arrivals", "settle_seconds": 1},
        "model": str(ROOT / "configs/models/landcover-unet.yaml"),
        "bands": BANDS,
        "outputs": {"dir": "s3://runs"},
        "compute": {"device": "cpu", "threads": "1"},
        "lease_seconds": 60,
    }


def deploy(services: Services) -> None:
    """Every deployment of infra/prefect.yaml."""
    folder = Path(sys.executable).parent
    environment = {**services.environment, "PATH": f"{folder}:{os.environ['PATH']}"}
    for command in (
        ["infra/pools.sh"],
        ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "infra/prefect.yaml"],
    ):
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    """Soak, and exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--database", default="sqlite", choices=["sqlite", "postgres"])
    arguments = parser.parse_args()
    if not SCENE.exists():
        raise SystemExit(f"{SCENE} is not there: run `make demo-data` first")
    with (
        tempfile.TemporaryDirectory(prefix="segpipe-soak-") as name,
        Services(Path(name), database=arguments.database, parts=("prefect", "store", "worker")) as services,
    ):
        os.environ.update(services.variables)
        deploy(services)
        with temporary_settings({PREFECT_API_URL: services.api}), get_client(sync_client=True) as client:
            soak = Soak(services, client, arguments.seed)
            end, told = time.monotonic() + 60 * arguments.minutes, 0.0
            while time.monotonic() < end:
                soak.step()
                for _ in range(soak.dice.randint(1, 8)):
                    soak.look()
                    time.sleep(1)
                if time.monotonic() - told > 300:
                    told = time.monotonic()
                    minutes = (told - soak.begun) / 60
                    print(f"{minutes:5.1f} min: {len(soak.good)} pieces, {json.dumps(soak.over)}", flush=True)
            soak.finish()
            print(f"{len(soak.good)} pieces, {len(soak.bad)} damaged; flow runs: {json.dumps(soak.over)}")
            soak.growth()
            wrong = soak.lost()
    print(
        "\n".join(wrong)
        or "nothing lost: every piece done once, every damaged one in quarantine, no lease left"
    )
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
