"""Networks trained to find objects, and what becomes of objects on the borders of blocks.

``python -m benchmarks.objects [--out FOLDER] [NAME …]`` draws scenes of discs over noise, trains each network
on them (`configs/train/discs-*.yaml`; finished ones are found), runs it over a scene it has never seen, in
blocks of 64 pixels, and prints how many true discs come out once, in parts, or not at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio

from segpipe.config.card import load_card, read_card
from segpipe.config.job import Job
from segpipe.config.recipe import load_recipe
from segpipe.inference.settings import resolve_settings
from segpipe.pipeline.join_objects import join_objects
from segpipe.pipeline.model_scene import create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import predict_blocks
from segpipe.sources import discover
from segpipe.training.loop import MetricsRow
from segpipe.training.run import Told, train

NETWORKS = ("discs-maskrcnn", "discs-mask2former")
SCENES, EDGE, DISCS = 6, 192, 25
"""Scenes to learn from, their edge in pixels, and discs on each."""
LARGE, MANY = 320, 75
"""Edge of the scene that is judged, and its discs."""
BLOCK = 64
PART = 0.1
"""Share of a true disc from which a found object is a part of it."""


def main() -> None:
    """A row per network."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", default=NETWORKS, help="only these (default: all)")
    parser.add_argument("--out", default="runs/objects", help="folder of scenes and trained models")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    write_scenes(out)
    print("network             discs  on borders   once  in parts  missed  false   those on borders")
    for name in arguments.names:
        card = trained(name, out)
        truth, found = run(card, out)
        every, border = count(truth, found), count(truth, found, on_border(truth))
        print(
            f"{name:<18} {every.discs:>6} {border.discs:>11} {every.once:>6} {every.parts:>9} "
            f"{every.missed:>7} {every.false:>6}   once {border.once}, in parts {border.parts}, "
            f"missed {border.missed}",
            flush=True,
        )


def draw_discs(shape: tuple[int, int], number: int, seed: int) -> np.ndarray:
    """Ids (y, x) of discs of 7 to 13 pixels' radius that leave at least a pixel between them."""
    rng = np.random.default_rng(seed)
    ids = np.zeros(shape, np.int32)
    y, x = np.mgrid[: shape[0], : shape[1]]
    placed = np.zeros((0, 3))
    for _ in range(number * 50):
        radius = rng.uniform(7, 13)
        centre = rng.uniform(radius, np.array(shape) - radius)
        apart = np.hypot(*(placed[:, :2] - centre).T) - placed[:, 2] - radius
        if len(placed) < number and (apart > 2).all():
            placed = np.concatenate([placed, [[*centre, radius]]])
            ids[np.hypot(y - centre[0], x - centre[1]) <= radius] = len(placed)
    return ids


def write_scenes(folder: Path) -> None:
    """Scenes and references to learn from, and a larger scene that is kept apart."""
    for number in range(SCENES):
        ids = draw_discs((EDGE, EDGE), DISCS, number)
        _write(folder / "images" / f"scene{number}.tif", _image(ids, number))
        _write(folder / "labels" / f"scene{number}.tif", ids[None])
    ids = draw_discs((LARGE, LARGE), MANY, SCENES)
    _write(folder / "judged.tif", _image(ids, SCENES))
    _write(folder / "judged_truth.tif", ids[None])


def _image(ids: np.ndarray, seed: int) -> np.ndarray:
    """Bands red and nir (c, y, x): noise, on which discs are brighter in one and darker in the other."""
    noise = np.random.default_rng(1000 + seed).normal(100, 8, (2, *ids.shape))
    return (noise + np.array([60, -30])[:, None, None] * (ids > 0)).clip(0, 255).astype(np.uint8)


def _write(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = {"count": len(values), "height": values.shape[1], "width": values.shape[2]}
    place = rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000)
    with rasterio.open(
        path, "w", driver="GTiff", dtype=values.dtype.name, crs="EPSG:32633", transform=place, **size
    ) as target:
        target.write(values)
        if len(values) == 2:
            target.descriptions = ("red", "nir")


def trained(name: str, folder: Path, changes: Sequence[str] = ()) -> Path:
    """Card of the network that a recipe trains on a folder's scenes."""
    where = [f"data.scenes=[{folder / 'images'}]", f"data.reference.path={folder / 'labels'}"]
    recipe = load_recipe(f"configs/train/{name}.yaml", [*where, f"out={folder / 'models'}", *changes])
    result = train(recipe, Told(lambda ready, total: None, _tell))
    print(f"  {result.scores}", flush=True)
    assert result.card is not None
    return result.card


def _tell(fold: str, moment: MetricsRow) -> None:
    score = f"panoptic quality {moment.score:.3f}"
    print(f"  {fold}: step {moment.step} of {moment.steps}, loss {moment.loss:.3f}, {score}", flush=True)


def run(card: Path, folder: Path, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """True and found ids (y, x) of the scene that was kept apart, by the engine in blocks."""
    fields = {
        "scenes": [str(folder / "judged.tif")],
        "model": str(card),
        "outputs": {"dir": str(folder / "runs")},
        "tiling": {"block": str(block)},
    }
    job = Job.model_validate(fields)
    settings = resolve_settings(job.compute, load_card(card))
    scene = create_stages(prepare_scene(job, read_card(job.model), discover(job.scenes)[0], settings))
    predict_blocks(scene, pending_blocks(scene))
    join_objects(scene)
    with rasterio.open(folder / "judged_truth.tif", driver="GTiff") as truth:
        return truth.read(1), np.asarray(scene.labels.array("instances")[...])


@dataclass(frozen=True)
class Count:
    """What became of true discs."""

    discs: int
    once: int
    """One object covers most of it, and no other a part."""
    parts: int
    """Several objects have a part of it."""
    missed: int
    """No object covers half of it."""
    false: int
    """Found objects that lie mostly on no disc."""


def on_border(truth: np.ndarray, block: int = BLOCK) -> np.ndarray:
    """Ids of discs that lie in several blocks."""
    y, x = np.mgrid[: truth.shape[0], : truth.shape[1]] // block
    number = y * truth.shape[1] + x
    return np.array([i for i in np.unique(truth[truth > 0]) if len(np.unique(number[truth == i])) > 1])


def count(truth: np.ndarray, found: np.ndarray, ids: np.ndarray | None = None) -> Count:
    """What became of the discs of these ids (all, if not given)."""
    chosen = np.unique(truth[truth > 0]) if ids is None else ids
    once = parts = missed = 0
    for i in chosen.tolist():
        disc = truth == i
        shares = np.bincount(found[disc].astype(np.int64))[1:] / disc.sum()
        if (shares > PART).sum() > 1:
            parts += 1
        elif shares.max(initial=0) > 0.5:
            once += 1
        else:
            missed += 1
    objects = [i for i in np.unique(found[found > 0]) if (truth[found == i] > 0).mean() < 0.5]
    return Count(len(chosen), once, parts, missed, len(objects))


if __name__ == "__main__":
    main()
