"""Five hundred objects over a scene of 8192², many on borders of windows and blocks: each found once?

    python -m benchmarks.prompted [--card configs/models/starter-sam.yaml] [--edge 8192] [--objects 500]

Bright objects with soft texture over a dark textured ground, from 8 pixels to three windows in length. They
are asked for by boxes (a CSV in the scene's CRS), and by words: a threshold is the semantic model whose class
"lake" the vocabulary grounder matches with "lakes". An object is found once if exactly one object of the
result has an IoU above 0.5 with it. Everything is asked under three block shapes; the ids must be the same.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import rasterio
import yaml
from rasterio.transform import from_origin
from rasterio.windows import Window
from scipy.ndimage import find_objects, zoom

from segpipe.config.job import Job
from segpipe.geometry.box import Box
from segpipe.pipeline.model_scene import Scene, create_stages, pending_blocks
from segpipe.pipeline.predict import predict_blocks
from segpipe.prompts.build_objects import build_objects
from segpipe.prompts.collect_prompts import collect_prompts
from segpipe.prompts.prompt_scene import PromptScene, prepare_prompts
from segpipe.prompts.segment_scene import create_mask_stages, next_round, segment_windows
from segpipe.runs.check import check_request

BLOCKS = ("auto", "1024", "777x1500")
BORDER = 128
"""Windows of the finest level begin at its multiples, blocks at some of them."""
LARGE = 12
"""Objects longer than a window of 256."""


def draw(edge: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids (y, x) of ellipses that do not touch, most of them over a border; and which are over one, by id."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((edge, edge), np.uint16)
    over: list[bool] = [False]
    while len(over) <= count:
        number = len(over)
        size = rng.uniform(300, 760, 2) if number <= LARGE else np.exp(rng.uniform(np.log(8), np.log(160), 2))
        centre = rng.uniform(size, edge - size)
        if rng.random() < 0.6:  # onto a border of windows
            axis = rng.integers(2)
            centre[axis] = round(centre[axis] / BORDER) * BORDER
        low = np.maximum(np.floor(centre - size / 2 - 8), 0).astype(int)
        high = np.minimum(np.ceil(centre + size / 2 + 8), edge).astype(int)
        part = ids[low[0] : high[0], low[1] : high[1]]
        if part.any():
            continue
        y, x = np.ogrid[low[0] : high[0], low[1] : high[1]]
        inside = ((y - centre[0]) / (size[0] / 2)) ** 2 + ((x - centre[1]) / (size[1] / 2)) ** 2 < 1
        part[inside] = number
        ends = np.array([centre - size / 2, centre + size / 2]) / BORDER
        over.append(bool((np.floor(ends[0]) != np.floor(ends[1])).any()))
    return ids, np.array(over)


def paint(ids: np.ndarray, path: Path, seed: int) -> None:
    """Three bands of 8 bits, 10 m pixels, tiled."""
    rng = np.random.default_rng(seed)
    edge = len(ids)
    profile = {
        "driver": "GTiff", "height": edge, "width": edge, "count": 3, "dtype": "uint8", "tiled": True,
        "blockxsize": 512, "blockysize": 512, "compress": "deflate", "crs": "EPSG:32617",
        "transform": from_origin(400_000, 4_500_000, 10, 10),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        for top in range(0, edge, 512):
            rows = ids[top : top + 512]
            for band in (1, 2, 3):
                coarse = rng.normal(0, 14, (rows.shape[0] // 16 + 1, edge // 16 + 1))
                texture = zoom(coarse, 16, order=1)[: rows.shape[0], :edge]
                values = np.where(rows > 0, 180 - 15 * band, 60 + 10 * band) + texture
                values += rng.normal(0, 6, rows.shape)
                pixels = np.clip(values, 0, 255).astype(np.uint8)
                file.write(pixels, band, window=Window(0, top, edge, rows.shape[0]))


def boxes_csv(ids: np.ndarray, path: Path) -> None:
    """The boxes of all objects, in metres."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["x_min", "x_max", "y_min", "y_max", "phrase"])
        for y, x in find_objects(ids):
            west, east = 400_000 + 10 * x.start, 400_000 + 10 * x.stop
            rows.writerow([west, east, 4_500_000 - 10 * y.stop, 4_500_000 - 10 * y.start, "lakes"])


def threshold_card(path: Path) -> Path:
    """A semantic model that anybody can check: bright is lake."""
    classes = [("dry ground", True), ("lake", False)]
    card = {
        "name": "bright",
        "kind": "raster",
        "provider": "classical",
        "architecture": "otsu",
        "arguments": {"thresholds": [120.0]},
        "input": {"bands": ["red"]},
        "window": {"size": [1024], "forward_bytes": 50},
        "output": {"activation": "none"},
        "classes": [
            {"value": v, "name": n, "color": "#000000", "background": b} for v, (n, b) in enumerate(classes)
        ],
    }
    path.write_text(yaml.safe_dump(card))
    return path


def ask(scene_path: Path, card: str, out: Path, block: str, prompts: dict[str, Any]) -> PromptScene:
    """One question, answered, its objects painted."""
    job = Job.model_validate(
        {
            "name": "prompted", "scenes": [str(scene_path)], "bands": ["red", "green", "blue"], "model": card,
            "prompts": prompts, "measure": {"smallest": 16}, "tiling": {"block": block},
            "compute": {"device": "cpu"}, "outputs": {"dir": str(out)},
        }
    )  # fmt: skip
    request = check_request(job)
    scene = prepare_prompts(job, request.scenes[0], request.settings)
    if isinstance(scene.grounder, Scene):
        grounder = create_stages(scene.grounder)
        predict_blocks(grounder, pending_blocks(grounder))
    collect_prompts(scene)
    create_mask_stages(scene)
    number = 0
    while (here := next_round(scene, number)) is not None:
        segment_windows(scene, number, here.windows)
        number += 1
    build_objects(scene)
    return scene


def judge(truth: np.ndarray, found: np.ndarray) -> dict[str, np.ndarray]:
    """By true id (0 is none): how many found objects match it, and their best IoU; and false objects."""
    wide = found.astype(np.int64)
    pairs, both = np.unique(truth.astype(np.int64) * (int(wide.max()) + 1) + wide, return_counts=True)
    a, b = np.divmod(pairs, int(wide.max()) + 1)
    size_a, size_b = np.bincount(truth.ravel()), np.bincount(wide.ravel())
    iou = both / (size_a[a] + size_b[b] - both)
    real = (a > 0) & (b > 0)
    times, best = np.zeros(len(size_a), int), np.zeros(len(size_a))
    np.add.at(times, a[real & (iou > 0.5)], 1)
    np.maximum.at(best, a[real], iou[real])
    matched = np.unique(b[real & (iou > 0.5)])
    return {"times": times, "best": best, "false": np.setdiff1d(np.unique(wide[wide > 0]), matched)}


def main() -> None:
    """Print, for each way of asking and each block, how many objects are found once; a mark of the ids."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--card", default="configs/models/starter-sam.yaml")
    parser.add_argument("--edge", type=int, default=8192)
    parser.add_argument("--objects", type=int, default=500)
    arguments = parser.parse_args()
    with TemporaryDirectory() as name:
        folder = Path(name)
        truth, over = draw(arguments.edge, arguments.objects, seed=1)
        scene = folder / "scene.tif"
        paint(truth, scene, seed=2)
        boxes_csv(truth, folder / "boxes.csv")
        ways = {
            "boxes": {"path": str(folder / "boxes.csv"), "crs": "scene"},
            "text": {"text": ["lakes . volcano"], "grounder": str(threshold_card(folder / "bright.yaml"))},
        }
        print(
            f"{arguments.objects} objects, {int(over.sum())} over borders of windows, {LARGE} larger than one"
        )
        print(f"{'asked by':9} {'block':9} {'once':>5} {'twice':>6} {'missed':>7} {'false':>6} "
              f"{'borders once':>13} {'large once':>11} {'mean IoU':>9} {'seconds':>8}  ids")  # fmt: skip
        for way, prompts in ways.items():
            for block in BLOCKS:
                begun = time.perf_counter()
                # stores of their own, so that nothing is taken from the run before
                done = ask(scene, arguments.card, folder / f"runs-{way}-{block}", block, prompts)
                seconds = time.perf_counter() - begun
                ids = np.asarray(done.labels.array("instances")[Box.whole(truth.shape).slices])
                result = judge(truth, ids)
                times, large = result["times"][1:], slice(0, LARGE)
                once = times == 1
                mark = hashlib.sha256(ids.tobytes()).hexdigest()[:12]
                print(
                    f"{way:9} {block:9} {once.sum():5} {(times > 1).sum():6} {(times == 0).sum():7} "
                    f"{len(result['false']):6} {once[over[1:]].sum():6} of {over.sum():3} "
                    f"{once[large].sum():5} of {LARGE} {result['best'][1:].mean():9.3f} "
                    f"{seconds:8.1f}  {mark}",
                    flush=True,
                )
            for row in done.account().asked:
                print(f"  {row['phrase']}: {row['note']}")


if __name__ == "__main__":
    main()
