"""What many scenes, and scenes of many blocks, cost beside the model: a scan with a model that costs nothing.

    python -m benchmarks.lakes [--small 2000] [--large 20] [--blocks 500]

Each case is a scan in a fresh process, by threads, against a real Prefect server with SQLite: seconds, peak
and growth of the flow process's memory, requests to the server, task runs, size of the database; and for
the large scenes the time of the batches per block, nearly all of which is overhead.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import rasterio
import torch
import yaml

from tests.services.loopback import Services

EDGE = 64
"""Of a block, in pixels: one window."""
MIB = 1 << 20


def card(folder: Path) -> Path:
    """A network of one multiplication."""
    network = torch.nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        network.weight.copy_(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1))
        network.bias = None
    torch.jit.script(network).save(str(folder / "free.pt"))
    colors = ("#000000", "#ff0000")
    data = {
        "name": "free", "kind": "raster", "provider": "torchscript", "allow_torchscript": True,
        "weights": "free.pt", "input": {"bands": ["b1"]},
        "window": {"size": [EDGE], "halo": [0], "stride": 1},
        "classes": [{"value": v, "name": f"c{v}", "color": c} for v, c in enumerate(colors)],
    }  # fmt: skip
    (folder / "free.yaml").write_text(yaml.safe_dump(data))
    return folder / "free.yaml"


def lake(folder: Path, scenes: int, blocks: int) -> Path:
    """Scenes of so many blocks each, no two alike."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = next(n for n in range(int(blocks**0.5), 0, -1) if blocks % n == 0)
    shape = (rows * EDGE, blocks // rows * EDGE)
    profile = {"driver": "GTiff", "width": shape[1], "height": shape[0], "count": 1, "dtype": "int16"}
    profile |= {"tiled": True, "blockxsize": EDGE, "blockysize": EDGE, "crs": "EPSG:32633"}
    for n in range(scenes):
        transform = rasterio.Affine(10, 0, 500_000 + n, 0, -10, 5_200_000)
        with rasterio.open(folder / f"scene_{n:05}.tif", "w", **profile, transform=transform) as target:
            target.write(rng.integers(-9, 9, shape).astype(np.int16), 1)
            target.set_band_description(1, "b1")
    return folder


def scan_once(file: str) -> None:
    """The flow process: a scan, and what it cost; prints a line of numbers."""
    import httpx

    from segpipe.config.scan import load_scan
    from segpipe_flows.scan import scan

    sent = 0

    def counted(send):  # type: ignore[no-untyped-def]
        def wrapper(*arguments, **options):  # type: ignore[no-untyped-def]
            nonlocal sent
            sent += 1
            return send(*arguments, **options)

        return wrapper

    httpx.Client.send = counted(httpx.Client.send)  # type: ignore[method-assign]
    httpx.AsyncClient.send = counted(httpx.AsyncClient.send)  # type: ignore[method-assign]
    me, samples, ended = psutil.Process(), [], threading.Event()

    def sample() -> None:
        while not ended.wait(0.5):
            samples.append(me.memory_info().rss)

    threading.Thread(target=sample, daemon=True).start()
    begun = time.perf_counter()
    state = scan(load_scan(file), return_state=True)
    seconds = time.perf_counter() - begun
    ended.set()
    print(state.message, file=sys.stderr)
    third = len(samples) // 3
    growth = np.median(samples[-max(third // 2, 1) :]) - np.median(samples[third : 2 * third] or samples)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(int(state.is_completed()), f"{seconds:.1f}", peak // MIB, round(growth / MIB), sent)


def overhead(out: Path) -> float:
    """Milliseconds of a scan's batches per block."""
    import json

    run = json.loads(next(out.glob("*/*/run.json")).read_text())
    seconds = sum(scene["timings"]["predict"] for scene in run["scenes"])
    blocks = sum(scene["plan"]["blocks"] for scene in run["scenes"])
    return 1000 * seconds / blocks


def case(folder: Path, scenes: int, blocks: int) -> None:
    """Print a row."""
    name = f"{scenes}x{blocks}"
    data = {
        "name": name,
        "lake": {"location": str(lake(folder / f"lake-{name}", scenes, blocks)), "settle_seconds": 0},
        "model": str(card(folder)),
        "tiling": {"block": EDGE},
        "compute": {"device": "cpu", "threads": 1, "batch": 4},
        "outputs": {"dir": str(folder / f"out-{name}"), "formats": ["cog"]},
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(data))
    with Services(folder / f"services-{name}", parts=("prefect",)) as services:
        command = [sys.executable, "-m", "benchmarks.lakes", "--one", str(file)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **services.environment}
        )
        time.sleep(10)  # the server's recorder is behind
        ok, seconds, peak, growth, sent = done.stdout.split()[-5:]
        database = sum(p.stat().st_size for p in services.home.glob("prefect.db*")) / MIB
        runs = task_runs(services.home / "prefect.db")
    beside = f"{overhead(folder / f'out-{name}'):8.1f}" if blocks > 1 else f"{'':8}"
    print(
        f"{name:>9}  {'done' if ok == '1' else 'FAILED'}  {seconds:>7} s  {peak:>5} MiB  {growth:>5} MiB  "
        f"{sent:>8}  {runs:>9}  {database:7.1f} MiB  {beside}",
        flush=True,
    )


def task_runs(database: Path) -> int:
    """Recorded by the server."""
    import sqlite3

    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return int(connection.execute("SELECT count(*) FROM task_run").fetchone()[0])


def main() -> None:
    """Both cases."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--small", type=int, default=2000, help="scenes of one block")
    parser.add_argument("--large", type=int, default=20, help="scenes of many blocks")
    parser.add_argument("--blocks", type=int, default=500, help="blocks of each of these")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        scan_once(arguments.one)
        return
    print("   scenes                        memory:          requests  task runs      database  ms of the")
    print(" x blocks             time     peak     growth  to server   recorded              batches/block")
    with tempfile.TemporaryDirectory(prefix="segpipe-lakes-") as name:
        if arguments.small:
            case(Path(name), arguments.small, 1)
        if arguments.large:
            case(Path(name), arguments.large, arguments.blocks)


if __name__ == "__main__":
    main()
