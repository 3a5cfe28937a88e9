"""Processes on networks of their own, the store in a bucket: a lost worker costs its blocks only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import obstore
import pytest
import rasterio
import yaml
from distributed import Client
from obstore.store import S3Store

from segpipe_flows.server import free_port, local_server
from tests.flows.conftest import JobMaker, wait_until
from tests.flows.nets import DaskCluster, Net, dask_cluster, networks, object_store, started

pytestmark = pytest.mark.slow

WORK = 300
"""Slowness of the model: a block takes about half a second."""
SCENES = 4
BLOCKS = SCENES * 16
WORKERS = 3
LATE = 1.0
"""Seconds from a receipt's time to where every process finds it, on a busy machine."""
ENDS_WITHIN = 900.0
WAIT = 400.0
"""Seconds until the test gives up, not what is aimed at: a quiet machine takes 15."""


@dataclass
class World:
    """What one run after another works with."""

    net: Net
    cluster: DaskCluster
    environment: dict[str, str]
    store: S3Store


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Prefect server and a bucket on this network, a scheduler and three workers on others."""
    folder = tmp_path_factory.mktemp("scale")
    with (
        pytest.MonkeyPatch.context() as patch,
        networks(1 + WORKERS) as net,
        object_store(net.host, "runs", folder / "moto.log") as keys,
    ):
        patch.setenv("PREFECT_HOME", str(folder / "prefect"))
        patch.setenv("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        with local_server(net.host, free_port()) as api:
            environment = {**os.environ, **keys, "PREFECT_API_URL": api, "OMP_NUM_THREADS": "1"}
            with dask_cluster(net, WORKERS, environment, folder) as cluster:
                print(f"scheduler {cluster.address}, networks: {net.spaces or 'loopback'}")
                store = S3Store(
                    "runs",
                    endpoint=keys["AWS_ENDPOINT_URL"],
                    access_key_id="test",
                    secret_access_key="test",
                    region="us-east-1",
                    client_options={"allow_http": True},
                )
                yield World(net, cluster, environment, store)


def in_bucket(path: Path, out: str, compute: dict[str, Any]) -> Path:
    """The same job with its store and results in the bucket."""
    job = yaml.safe_load(path.read_text())
    job["outputs"]["dir"] = f"s3://runs/{out}"
    job["compute"] |= compute
    path.write_text(yaml.safe_dump(job))
    return path


@contextmanager
def segpipe_run(world: World, job: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`segpipe run` as a process."""
    command = [sys.executable, "-m", "segpipe.cli", "run", str(job)]
    with started(command, world.environment, log) as process:
        yield process


def to_the_end(world: World, job: Path, log: Path) -> None:
    """Run a job; all its scenes are done."""
    with segpipe_run(world, job, log) as process:
        assert process.wait(ENDS_WITHIN) == 0, log.read_text()


def answer(store: S3Store, out: str) -> dict[str, bytes]:
    """Label maps and tables of the one run below a prefix, as they lie in the bucket."""
    found: dict[str, bytes] = {}
    for name in names(store, out):
        data = (
            bytes(obstore.get(store, name).bytes()) if name.endswith(("labels.tif", "regions.csv")) else b""
        )
        if name.endswith("labels.tif"):
            with rasterio.MemoryFile(data) as file, file.open() as dataset:
                found[Path(name).parent.name] = dataset.read().tobytes()
        elif name.endswith("regions.csv"):
            found["regions"] = data
    assert len(found) == SCENES + 1
    return found


def names(store: S3Store, prefix: str) -> list[str]:
    return sorted(meta["path"] for chunk in obstore.list(store, prefix) for meta in chunk)


def receipts(store: S3Store, out: str) -> dict[str, dict[str, Any]]:
    """Receipts of predicted blocks, loose and compacted, by stage and block."""
    found: dict[str, dict[str, Any]] = {}
    # compacted ones first: a loose one beside them was written later
    paths = [n for n in names(store, f"{out}/.store") if "/predict-" in n and "/receipts-" in n]
    for path in sorted(paths, key=lambda path: path.count("/"), reverse=False):
        stage = path.split("/")[2]
        try:
            data = json.loads(bytes(obstore.get(store, path).bytes()).splitlines()[0])
        except FileNotFoundError:  # compacted meanwhile
            continue
        if path.split("/")[-2].startswith("receipts-"):
            found[f"{stage}/{Path(path).stem}"] = data
        else:
            found |= {f"{stage}/{name}": receipt for name, receipt in data.items()}
    return found


class Ledger:
    """Every receipt as it was first seen, and every one that differed from that later."""

    def __init__(self, store: S3Store, out: str) -> None:
        self.store, self.out = store, out
        self.first: dict[str, dict[str, Any]] = {}
        self.again: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def look(self) -> None:
        """Compare what is there with what was there."""
        for name, receipt in receipts(self.store, self.out).items():
            known = self.first.setdefault(name, receipt)
            if receipt != known and (known, receipt) not in self.again:
                self.again.append((known, receipt))

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self.look()

    def __enter__(self) -> Ledger:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def workers(self) -> dict[str, int]:
        """Blocks by the process that computed them."""
        found: dict[str, int] = {}
        for receipt in list(self.first.values()):
            found[receipt["worker"]] = found.get(receipt["worker"], 0) + 1
        return found


def test_the_same_bytes_though_a_worker_and_the_flow_are_killed(
    world: World, flow_job: JobMaker, flow_scenes: Path, tmp_path: Path
) -> None:
    scenes = [flow_scenes / f"scene_{number}.tif" for number in range(SCENES)]
    threads = in_bucket(flow_job("job", scenes=scenes, work=WORK), "threads", {"workers": 2})
    to_the_end(world, threads, tmp_path / "threads.log")
    expected = answer(world.store, "threads")
    compute = {"runner": "dask", "address": world.cluster.address, "workers": WORKERS}
    job = in_bucket(flow_job("job", scenes=scenes, work=WORK), "cluster", compute)
    begun = time.monotonic()
    with Ledger(world.store, "cluster") as ledger:

        def reached(count: int) -> Callable[[], bool]:
            return lambda: len(ledger.first) >= count

        with segpipe_run(world, job, tmp_path / "flow.log") as flow:
            lost = wait_until(lambda: in_the_middle(world, ledger), WAIT, "a worker in the middle of a batch")
            lost.kill()
            lost.wait()
            told(begun, ledger, "a worker was killed")
            wait_until(reached(len(ledger.first) + 4), WAIT, "four blocks more")
            assert flow.poll() is None
            flow.kill()
            flow.wait()
            told(begun, ledger, "the flow was killed")
        assert len(ledger.first) < BLOCKS - 4
        to_the_end(world, job, tmp_path / "again.log")
        told(begun, ledger, "ended")
    ledger.look()
    assert answer(world.store, "cluster") == expected
    assert len(ledger.first) == BLOCKS
    assert len(ledger.workers()) >= 2
    for known, later in ledger.again:  # begun twice before either was done, or not at all
        assert later["begun"] < known["time"] + LATE
    left = [r for r in receipts(world.store, "cluster").values() if is_of(r, lost.pid)]
    assert len(left) == sum(is_of(r, lost.pid) for r in ledger.first.values()) > 0


def is_of(receipt: dict[str, Any], pid: int) -> bool:
    """Whether a process computed a block."""
    return str(receipt["worker"]).endswith(f":{pid}")


def in_the_middle(world: World, ledger: Ledger) -> subprocess.Popen[bytes] | None:
    """A worker that has computed a block of a batch and is at the next, if there is one."""
    if len(ledger.first) < 3:
        return None
    with Client(world.cluster.address, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        pids, tasks = client.run(os.getpid), client.processing()
    busy = {
        pids[at] for at, keys in tasks.items() if any("predict" in str(key) for key in keys) and at in pids
    }
    busy = {pid for pid in busy if any(is_of(receipt, pid) for receipt in list(ledger.first.values()))}
    return next((worker for worker in world.cluster.workers if worker.pid in busy), None)


def told(begun: float, ledger: Ledger, what: str) -> None:
    """A line of what happened, for whoever reads the test's output."""
    print(
        f"{time.monotonic() - begun:5.1f} s: {what}; receipts {len(ledger.first)} of {BLOCKS}, "
        f"by worker {ledger.workers()}, computed twice {len(ledger.again)}"
    )
