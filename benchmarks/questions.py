"""What a second question costs: ten prompts on a scene, then ten others in the same windows, in one process.

    python -m benchmarks.questions [--card configs/models/starter-sam.yaml] [--encoder vit-b] [--threads 2]

The first card is asked as it is. ``vit-b`` is SAM's own ViT-B (Kirillov et al. 2023) with random weights: its
masks mean nothing, its time is that of the trained one. Time is of everything from opening the scene to the
answers being stored; the model is loaded before, as in a worker that has answered before.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import rasterio
import torch
import yaml
from transformers import SamConfig, SamModel

from segpipe.config.job import Job
from segpipe.prompts.collect_prompts import collect_prompts
from segpipe.prompts.prompt_scene import prepare_prompts
from segpipe.prompts.segment_scene import create_mask_stages, next_round, segment_windows, segmenter_of
from segpipe.runs.check import check_request

SCENE = Path(".demo/landsat/landsat7_2000.tif")
BANDS = ["blue", "green", "red", "nir", "swir16"]
PROMPTS = 10
EDGE = 24.0
"""Of a box, in pixels."""


def vit_b(folder: Path) -> Path:
    """A card of SAM's ViT-B, 94 million random numbers."""
    torch.manual_seed(0)
    SamModel(SamConfig()).save_pretrained(folder / "vit-b")
    card = {
        "name": "sam-vit-b-random",
        "kind": "raster",
        "provider": "transformers",
        "weights": "vit-b",
        "output": {"kind": "prompted"},
        "input": {"bands": ["red", "green", "blue"], "normalisation": [{"op": "scene_quantiles"}]},
        "window": {"size": [1024], "fixed": True},
    }
    path = folder / "vit-b.yaml"
    path.write_text(yaml.safe_dump(card))
    return path


def ask(card: Path, folder: Path, centres: np.ndarray, name: str, threads: int) -> tuple[float, int, int]:
    """Seconds, encoder passes and windows of one question."""
    with rasterio.open(SCENE, driver="GTiff") as file:
        to_world = file.transform
    table = folder / f"{name}.csv"
    with table.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["x_min", "x_max", "y_min", "y_max"])
        for y, x in centres:
            (x0, y1), (x1, y0) = (
                to_world * (x - EDGE / 2, y - EDGE / 2),
                to_world * (x + EDGE / 2, y + EDGE / 2),
            )
            rows.writerow([x0, x1, y0, y1])
    job = Job.model_validate(
        {
            "name": name,
            "scenes": [str(SCENE)],
            "bands": BANDS,
            "model": str(card),
            "prompts": {"path": str(table), "crs": "scene"},
            "compute": {"device": "cpu", "threads": threads},
            "outputs": {"dir": str(folder / "runs")},
        }
    )
    request = check_request(job)
    segmenter_of(prepare_prompts(job, request.scenes[0], request.settings))  # a worker has it already
    begun = time.perf_counter()
    scene = prepare_prompts(job, request.scenes[0], request.settings)
    collect_prompts(scene)
    create_mask_stages(scene)
    passes = windows = number = 0
    # one round: masks that reach a window's border would be asked again in other windows
    here = next_round(scene, number)
    assert here is not None
    passes += int(segment_windows(scene, number, here.windows).timings["encoder passes"])
    windows += here.total
    return time.perf_counter() - begun, passes, windows


def main() -> None:
    """Print the two questions of each card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--card", default="configs/models/starter-sam.yaml")
    parser.add_argument("--encoder", default="vit-b", choices=["vit-b", "none"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    first = rng.uniform(60, 400, (PROMPTS, 2))
    second = first + rng.uniform(-4, 4, (PROMPTS, 2))
    print(f"{'model':24} {'question':9} {'seconds':>8} {'encoder passes':>15} {'windows':>8} {'ratio':>7}")
    with TemporaryDirectory() as name:
        folder = Path(name)
        cards = [Path(arguments.card)] + ([vit_b(folder)] if arguments.encoder == "vit-b" else [])
        for card in cards:
            one, passes, windows = ask(card, folder, first, f"{card.stem}-first", arguments.threads)
            print(f"{card.stem:24} {'first':9} {one:8.3f} {passes:15} {windows:8}")
            two, passes, windows = ask(card, folder, second, f"{card.stem}-second", arguments.threads)
            print(f"{card.stem:24} {'second':9} {two:8.3f} {passes:15} {windows:8} {one / two:7.1f}")


if __name__ == "__main__":
    main()
