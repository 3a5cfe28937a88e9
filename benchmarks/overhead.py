"""What a block costs beside its forward pass: 500 blocks of a model that does almost nothing, by threads.

Run: python -m benchmarks.overhead [FOLDER_OR_URL]
"""

from __future__ import annotations

import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
import torch
import yaml

from segpipe.config.card import read_card
from segpipe.config.job import Job
from segpipe.pipeline.model_scene import Scene, create_stages, is_predicted, prepare_scene
from segpipe.pipeline.predict import predict_blocks
from segpipe.runs.check import check_request
from segpipe.store.location import join
from segpipe.store.stop import StopToken

EDGE = 64
ROWS, COLUMNS = 20, 25
BANDS = ("near", "far")


def make_world(folder: Path) -> dict[str, object]:
    """A scene of 500 blocks, one window each, and a network of one 1×1 convolution; the job for both."""
    torch.manual_seed(1)
    network = torch.jit.script(torch.nn.Conv2d(2, 2, 1))
    network.save(str(folder / "one.pt"))
    card = {
        "name": "one",
        "kind": "raster",
        "provider": "torchscript",
        "allow_torchscript": True,
        "weights": "one.pt",
        "input": {"bands": list(BANDS)},
        "window": {"size": [EDGE], "halo": [0], "stride": 8},
        "classes": [
            {"value": 0, "name": "no", "color": "#000000"},
            {"value": 1, "name": "yes", "color": "#ff0000"},
        ],
    }
    (folder / "one.yaml").write_text(yaml.safe_dump(card))
    with rasterio.open(
        folder / "scene.tif", "w", driver="GTiff", width=COLUMNS * EDGE, height=ROWS * EDGE, count=2,
        dtype="float32", crs="EPSG:32616", tiled=True, blockxsize=EDGE, blockysize=EDGE,
        transform=rasterio.Affine(10, 0, 5e5, 0, -10, 4e6),
    ) as dataset:  # fmt: skip
        dataset.write(np.random.default_rng(7).normal(size=(2, ROWS * EDGE, COLUMNS * EDGE)).astype("f4"))
    return {
        "name": "overhead",
        "scenes": [str(folder / "scene.tif")],
        "model": str(folder / "one.yaml"),
        "bands": list(BANDS),
        "tiling": {"block": EDGE},
        "compute": {"device": "cpu", "threads": 1},
        "outputs": {"dir": str(folder / "runs"), "formats": []},
    }


def prepared(job: Job) -> Scene:
    """The one scene of a job, its stages made."""
    request = check_request(job)
    return create_stages(prepare_scene(job, read_card(job.model), request.scenes[0], request.settings))


def stage_alone(asked: dict[str, object], out: str) -> None:
    """The predict stage in this thread, without Prefect; then what one look at the store costs."""
    scene = prepared(Job.model_validate({**asked, "outputs": {"dir": out, "formats": []}}))
    first, *blocks = scene.plan.blocks.indices()
    predict_blocks(scene, [first])  # loads the model
    begun, busy = time.perf_counter(), time.process_time()
    done = predict_blocks(scene, blocks)
    busy = 1000 * (time.process_time() - busy) / len(blocks)
    each = 1000 * (time.perf_counter() - begun) / len(blocks)
    shares = ", ".join(f"{k} {1000 * v / len(blocks):.1f}" for k, v in done.timings.items() if k != "passes")
    print(f"predict stage alone: {each:.1f} ms a block, {busy:.1f} of processors ({shares})")
    StopToken(out, "another").request()
    missing = tuple(n + 1000 for n in first)
    looks: tuple[tuple[str, Callable[[], bool]], ...] = (
        ("is_predicted, not there", lambda: is_predicted(scene, missing)),  # two reads
        ("is_predicted, there", lambda: is_predicted(scene, first)),
        ("stop_requested", lambda: StopToken(out, "run").requested),
    )
    for name, look in looks:
        begun = time.perf_counter()
        for _ in range(200):
            look()
        print(f"{name}: {5 * (time.perf_counter() - begun):.3f} ms")


def profile(asked: dict[str, object], out: str) -> None:
    """Where the writer's and the reader's time goes, one after the other in one thread."""
    from segpipe.inference.block_result import BlockResult

    scene = prepared(Job.model_validate({**asked, "outputs": {"dir": out, "formats": []}}))
    watch = cProfile.Profile()
    with scene.open_blocks() as store:
        watch.enable()
        for index in list(scene.plan.blocks.indices())[:200]:
            box = scene.plan.blocks.box(index)
            pixels = store.read(box)
            store.ingest(index, box, pixels)
            labels = np.ones(box.shape, np.uint8)
            store.finish(BlockResult(index, box, labels, None, None, None, box.size, 1, 0, 0.0, 0.0))
        watch.disable()
    pstats.Stats(watch).sort_stats("cumtime").print_stats("segpipe|zarr|obstore", 25)


def by_flow(asked: dict[str, object], out: str) -> None:
    """The whole job by the flow on threads, its server and report included."""
    from segpipe_flows.here import run_here
    from segpipe_flows.segment import segment

    job = Job.model_validate({**asked, "outputs": {"dir": out, "formats": []}})
    begun = time.perf_counter()
    state = run_here(segment, job)
    seconds = time.perf_counter() - begun
    scene = prepared(job)
    times = list(scene.predict.receipts().values())
    predict = max(r["time"] for r in times) - min(r["begun"] for r in times)
    print(
        f"flow: {state.name} in {seconds:.1f} s; from the first block's read to the last receipt "
        f"{1000 * predict / len(times):.1f} ms a block"
    )


def main() -> None:
    """All of it, in a temporary folder; results go to an argument's location, where one is given."""
    with tempfile.TemporaryDirectory() as name:
        asked = make_world(Path(name))
        out = sys.argv[1] if len(sys.argv) > 1 else join(name, "runs")
        stage_alone(asked, join(out, "alone"))
        profile(asked, join(out, "profile"))
        by_flow(asked, join(out, "flow"))


if __name__ == "__main__":
    main()
