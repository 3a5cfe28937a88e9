"""Wall time of the pipeline, file to file, over the bare forward pass of each lattice window once.

    python -m benchmarks.pipeline [--size 8192] [--edge 256] [--device auto]

Both are measured in one process: half of the bare passes before the pipeline and half after it, so that
a machine that slows down slows both. The pipeline reads a GeoTIFF or NIfTI, ingests it, predicts,
measures and writes a COG or NIfTI. Aim: at most 1.15.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import scenes
from segpipe.config.card import read_card
from segpipe.config.job import Job
from segpipe.export.run_folder import RunFolder
from segpipe.export.scene_files import export_scene
from segpipe.inference.settings import resolve_settings
from segpipe.models.registry import load_model
from segpipe.pipeline.measure import measure_scene
from segpipe.pipeline.model_scene import Scene, create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.pipeline.progress import Done
from segpipe.sources import discover


def bare(scene: Scene, passes: int) -> float:
    """Seconds for this many forward passes of batches of the lattice's windows, nothing else."""
    settings, load = scene.settings, scene.plan.workload
    model = load_model(scene.card, settings.device, settings.threads, settings.precision)
    x = torch.randn(load.batch, load.channels, *scene.plan.lattice.window_shape, device=model.device)
    with torch.inference_mode():
        for _ in range(3):
            model(x)
        _wait(model.device)
        begun = time.perf_counter()
        for _ in range(-(-passes // load.batch)):
            model(x)
        _wait(model.device)
        return time.perf_counter() - begun


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(job: Job) -> None:
    """Print the ratio of one scene and where its time went."""
    assert job.model is not None
    ref = discover(job.scenes)[0]
    settings = resolve_settings(job.compute, read_card(job.model))
    preview = prepare_scene(job, read_card(job.model), ref, settings)
    count = preview.plan.lattice.count
    forward = bare(preview, count // 2)
    steps: dict[str, float] = {}

    def timed(name: str, begun: float) -> float:
        now = time.perf_counter()
        steps[name] = now - begun
        return now

    begin = mark = time.perf_counter()
    scene = create_stages(prepare_scene(job, read_card(job.model), ref, settings))
    mark = timed("plan", mark)
    done = predict_blocks(scene, pending_blocks(scene))
    finish_labels(scene)
    mark = timed("predict (read, forward, stitch, write overlapped)", mark)
    measured, _ = measure_scene(scene)
    mark = timed("measure", mark)
    export_scene(scene, measured, RunFolder(job.outputs.dir, job.name, "benchmark", ""))
    timed("export and pictures", mark)
    wall = time.perf_counter() - begin
    forward += bare(scene, count - count // 2)
    _report(job, scene, forward, wall, steps, done)


def _report(job: Job, scene: Scene, forward: float, wall: float, steps: dict[str, float], done: Done) -> None:
    settings, lattice = scene.settings, scene.plan.lattice
    elements = scene.geometry.box.size
    shape, window = ("x".join(map(str, s)) for s in (scene.geometry.shape, lattice.window_shape))
    print(f"\n{job.name} on {settings.device_class}, {settings.precision}, batch {settings.batch}")
    print(f"  {shape} elements, {lattice.count} windows of {window}, {done.timings['passes']} forwarded")
    print(f"  bare forward {forward:8.2f} s    {elements / forward / 1e6:7.2f} M elements/s")
    print(f"  pipeline     {wall:8.2f} s    {elements / wall / 1e6:7.2f} M elements/s")
    print(f"  ratio        {wall / forward:8.3f}")
    for name, seconds in steps.items():
        print(f"    {name:<52}{seconds:8.2f} s {100 * seconds / wall:5.1f} %")
    inside = {k: v for k, v in done.timings.items() if k not in ("passes", "wall")}
    print("    in predict, by thread: " + ", ".join(f"{k} {v:.2f} s" for k, v in inside.items()))
    print(f"    device busy with forward passes: {100 * done.timings['forward'] / wall:.1f} % of the wall")


def main() -> None:
    """Measure the raster and the volume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--size", type=int, default=8192, help="edge of the four-band raster; 0: none")
    parser.add_argument("--edge", type=int, default=256, help="edge of the volume; 0: none")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = {"compute": {"device": arguments.device}, "outputs": {"dir": str(folder / "out")}}
        if arguments.size:
            path = scenes.raster(folder / "raster.tif", arguments.size, 4)
            card = scenes.unet_card(folder, 4)
            measure(Job.model_validate({"name": "raster", "scenes": [path], "model": card, **common}))
        if arguments.edge:
            path = scenes.volume(folder / "volume.nii.gz", (arguments.edge,) * 3)
            card = scenes.volume_card(folder)
            measure(Job.model_validate({"name": "volume", "scenes": [path], "model": card, **common}))


if __name__ == "__main__":
    main()
