"""Land cover of one Landsat scene: three networks and a random forest on the same spatial folds.

``python -m benchmarks.landcover [--out FOLDER]`` trains each network on each fold (`configs/train/
landcover-*.yaml`; finished ones are found), fits the forest on the same elements, predicts every quarter
of the scene through the engine with the model that never saw it, and prints mean IoU with intervals
from resampling blocks of 64 pixels.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from segpipe.config.card import Card, load_card, read_card
from segpipe.config.job import Job
from segpipe.config.losses import IGNORE
from segpipe.config.recipe import Recipe, load_recipe
from segpipe.geometry.box import Box, grid_boxes
from segpipe.inference.settings import resolve_settings
from segpipe.metrics.tally import SizeScale, Tally, add, measure_tile
from segpipe.models.providers.classical.forest import fit_forest, save_forest
from segpipe.pipeline.model_scene import create_stages, pending_blocks, prepare_scene
from segpipe.pipeline.predict import finish_labels, predict_blocks
from segpipe.regions.base import WholeScene
from segpipe.sources import discover, open_source
from segpipe.sources.labels import IGNORED
from segpipe.tables.overlap_tables import SceneTallies, metric_table
from segpipe.tables.summary import MIN_REFERENCE, summary_table
from segpipe.training.loop import MetricsRow
from segpipe.training.run import Told, check_recipe, mark, train
from segpipe.training.scenes import TrainScene, prepare
from segpipe.training.split import Fold

NETWORKS = ("unet", "deeplabv3plus", "segformer")
EDGE = 64
"""Pixels of a block that is resampled as one."""
SHOWN = {
    "mIoU": "mIoU, all classes",
    f"mIoU of classes with reference ≥ {MIN_REFERENCE}": f"mIoU, at least {MIN_REFERENCE} px",
    "pixel accuracy": "pixel accuracy",
}
"""Rows of the summary, and their heads here."""


def main() -> None:
    """Train what is not trained, predict, compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/landcover", help="folder of trained models and predictions")
    out: str = parser.parse_args().out
    tallies: dict[str, list[Tally]] = {}
    for name in NETWORKS:
        recipe = load_recipe(f"configs/train/landcover-{name}.yaml", [f"out={out}"])
        train(recipe, Told(lambda ready, total: None, _tell))
        cards = [
            Path(out) / recipe.name / mark(recipe) / f"fold-{k}" / "card.yaml"
            for k in range(recipe.split.folds)
        ]
        tallies[recipe.card.architecture or name] = out_of_fold(recipe, cards)
    tallies["random forest"] = out_of_fold(recipe, list(forests(recipe, Path(out) / "forest")))
    print(table(tallies, recipe.card).to_string(index=False))


def _tell(fold: str, moment: MetricsRow) -> None:
    print(
        f"  {fold}: step {moment.step} of {moment.steps}, loss {moment.loss:.3f}, mIoU {moment.miou:.3f}",
        flush=True,
    )


def _folds(recipe: Recipe) -> tuple[TrainScene, list[Fold]]:
    (scene,) = prepare(recipe, check_recipe(recipe), lambda ready: None)
    shapes = {scene.name: scene.shape}
    return scene, [Fold.of(recipe.split, shapes, k) for k in range(recipe.split.folds)]


def forests(recipe: Recipe, folder: Path) -> Iterator[Path]:
    """A forest for each fold, fitted to every element that a network may learn from; their cards."""
    scene, folds = _folds(recipe)
    box = Box.whole(scene.shape)
    image, target = scene.read(box)
    for fold in folds:
        place = folder / f"fold-{fold.apart}"
        place.mkdir(parents=True, exist_ok=True)
        learned = np.where(fold.is_learned(scene.name, box), target, IGNORE)
        save_forest(fit_forest(image, learned, trees=100, seed=0), place / "weights.safetensors")
        fields = recipe.card.model_dump(mode="json", exclude_defaults=True)
        fields |= {
            "name": "landcover-forest",
            "provider": "classical",
            "architecture": "random-forest",
            "arguments": {},
            "weights": "weights.safetensors",
            "window": {"size": [256], "halo": [0]},
            "output": {"activation": "none"},
        }
        (place / "card.yaml").write_text(yaml.safe_dump(fields))
        yield place / "card.yaml"


def out_of_fold(recipe: Recipe, cards: list[Path]) -> list[Tally]:
    """Tallies of blocks of the scene, each quarter predicted by the model that did not see it."""
    scene, folds = _folds(recipe)
    box = Box.whole(scene.shape)
    labels = np.zeros(scene.shape, np.int64)
    for fold, card in zip(folds, cards, strict=True):
        here = fold.is_judged(scene.name, box)
        labels[here] = predicted(recipe, card)[here]
    _, target = scene.read(box)
    values = np.array([*recipe.card.values, IGNORED])
    truth = values[np.where(target == IGNORE, len(recipe.card.values), target)]
    with open_source(discover(recipe.data.scenes)[0].uri) as source:
        geometry = source.geometry
    scale, regions = SizeScale.of(geometry), WholeScene(geometry)
    return [
        measure_tile(labels[part.slices], None, truth[part.slices], regions, part, box, scale)
        for part in grid_boxes(scene.shape, (EDGE, EDGE))
    ]


def predicted(recipe: Recipe, card: Path) -> np.ndarray:
    """The scene's label map by a card, through the engine."""
    outputs = {"dir": str(Path(recipe.out)), "keep": ["labels"]}
    job = Job.model_validate(
        {"scenes": recipe.data.scenes, "bands": recipe.data.bands, "model": str(card), "outputs": outputs}
    )
    settings = resolve_settings(job.compute, load_card(card))
    scene = create_stages(prepare_scene(job, read_card(job.model), discover(job.scenes)[0], settings))
    predict_blocks(scene, pending_blocks(scene))
    finish_labels(scene)
    return np.asarray(scene.labels.array("labels")[...])


def table(tallies: dict[str, list[Tally]], card: Card) -> pd.DataFrame:
    """A row a model: pooled numbers with 95 % block-bootstrap intervals."""
    rows = []
    for name, blocks in tallies.items():
        scale = SizeScale("px", 1.0, 0, np.zeros(0, np.int64))  # sizes are not shown
        result = SceneTallies("scene", regions=("scene",), tally=add(blocks), scale=scale, outside=(0,))
        metrics = metric_table([result], card.classes)
        summary = summary_table(metrics, card.classes, blocks=blocks)
        row = {"model": name}
        for metric, title in SHOWN.items():
            line = summary[(summary["metric"] == metric) & (summary["class"] == "")].iloc[0]
            row[title] = f"{line['value']:.3f} ({line['low']:.3f} to {line['high']:.3f})"
        rows.append(row)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main()
