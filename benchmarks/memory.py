"""Peak memory against the size of the scene, and against what the plan predicted.

    python -m benchmarks.memory [--sizes 2048 4096 8192 16384] [--depths 64 256 1024]

Each size runs in a fresh process: a raster of one band (or a volume of 128² columns and the given
depth), a network of one convolution, from file to file. Flat is what law 3 asks for.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
from pathlib import Path

from benchmarks import scenes
from benchmarks.fresh import run_fresh
from segpipe.config.job import Job


def one(path: str, card: str, out: str) -> None:
    """Run a scene in this process; print predicted and measured peak in MiB."""
    from segpipe.config.card import read_card
    from segpipe.export.run_folder import RunFolder
    from segpipe.export.scene_files import export_scene
    from segpipe.inference.settings import resolve_settings
    from segpipe.pipeline.measure import measure_scene
    from segpipe.pipeline.model_scene import create_stages, pending_blocks, prepare_scene
    from segpipe.pipeline.predict import finish_labels, predict_blocks
    from segpipe.sources import discover

    job = Job.model_validate({"scenes": [path], "model": card, "outputs": {"dir": out}})
    ref = discover(job.scenes)[0]
    scene = create_stages(
        prepare_scene(job, read_card(job.model), ref, resolve_settings(job.compute, read_card(card)))
    )
    predict_blocks(scene, pending_blocks(scene))
    finish_labels(scene)
    measured, _ = measure_scene(scene)
    export_scene(scene, measured, RunFolder(out, "memory", "benchmark", ""))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{scene.plan.memory.total / 2**20:.0f} {peak:.0f}")


def measure(path: str, card: str) -> tuple[int, int]:
    """Predicted and measured peak of a fresh process, MiB."""
    with tempfile.TemporaryDirectory() as out:
        predicted, peak = run_fresh("benchmarks.memory", path, card, out)
    return int(predicted), int(peak)


def main() -> None:
    """Print both curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--depths", type=int, nargs="*", default=[64, 256, 1024])
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        one(*arguments.one)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        card = scenes.tiny_card(folder, 2)
        print("raster edge   predicted MiB   measured peak MiB")
        for size in arguments.sizes:
            path = scenes.raster(folder / "raster.tif", size, 1, "uint8")
            print("{:11d} {:15d} {:19d}".format(size, *measure(path, card)), flush=True)
        card = scenes.tiny_card(folder, 3)
        print("volume depth  predicted MiB   measured peak MiB")
        for depth in arguments.depths:
            path = scenes.volume(folder / "volume.nii.gz", (128, 128, depth))
            print("{:12d} {:14d} {:19d}".format(depth, *measure(path, card)), flush=True)


if __name__ == "__main__":
    main()
