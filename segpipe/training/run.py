"""A recipe carried out: scenes prepared, each fold trained, a card written for what came out."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from segpipe import __version__
from segpipe.config.builtin import find_card
from segpipe.config.card import Card, load_card
from segpipe.config.recipe import KeptWeights, Recipe, SplitBy
from segpipe.errors import RequestError
from segpipe.inference.settings import resolve_device
from segpipe.sources import discover
from segpipe.sources.base import SceneRef
from segpipe.sources.labels import find_reference
from segpipe.store.location import write_atomic
from segpipe.tables.table_files import csv_bytes
from segpipe.training.distributed import World, join_world
from segpipe.training.loop import MetricsRow, Training
from segpipe.training.losses import build_loss
from segpipe.training.network import TrainNetwork, begin_with, precision_here
from segpipe.training.page import samples, training_page
from segpipe.training.sampler import window_shape
from segpipe.training.scenes import TrainScene, prepare
from segpipe.training.split import Fold
from segpipe.training.validation import Trial


@dataclass(frozen=True)
class Told:
    """What a caller hears of: scenes that are ready, and rows of a fold's history."""

    scenes: Callable[[int, int], None]
    """How many are ready, of how many."""
    moment: Callable[[str, MetricsRow], None]
    """Of which fold, and where it is."""


SILENT = Told(lambda ready, total: None, lambda fold, moment: None)
"""Tells nobody."""


@dataclass(frozen=True)
class Result:
    """What a recipe left."""

    folder: Path
    card: Path | None
    """None: stopped before the end."""
    scores: str


def check_recipe(recipe: Recipe) -> list[SceneRef]:
    """Find the scenes, and refuse before any work what can be known to be wrong.

    Raises:
        RequestError: naming the field, what was found and what would be valid.
    """
    from segpipe.models.trainable import objective, untrained

    card = recipe.card
    window_shape(recipe)
    if card.roi is not None:
        raise RequestError("card.roi: leave it out; networks are trained on whole scenes")
    network = untrained(card)
    objective(card)
    if recipe.start and not find_card(recipe.start).is_file():
        raise RequestError(f"start: {recipe.start} does not exist; give a model card")
    if recipe.start:
        begin_with(network, card.channels, recipe.start)
    build_loss(recipe.loss, len(card.classes))
    if max(recipe.augment.flip_axes, default=0) >= card.ndim:
        raise RequestError(
            f"augment.flip_axes: found {recipe.augment.flip_axes}; valid: 0 to {card.ndim - 1}"
        )
    if recipe.split.by is SplitBy.scene and recipe.split.buffer:
        raise RequestError("split.buffer: is for `by: block`; scenes have no neighbours")
    precision_here(recipe.compute.precision, torch.device(resolve_device(recipe.compute.device, card)))
    refs = discover(recipe.data.scenes)
    find_reference(recipe.data.reference, refs[0].name)
    return refs


def train(recipe: Recipe, told: Told, should_stop: Callable[[], bool] = lambda: False) -> Result:
    """Train every chosen fold; go on where an earlier call of the same recipe stopped.

    Raises:
        RequestError, SceneError: as `check_recipe` and `prepare`.
    """
    refs = check_recipe(recipe)
    device = resolve_device(recipe.compute.device, recipe.card)
    cores = torch.get_num_threads() if recipe.compute.threads == "auto" else int(recipe.compute.threads)
    folder = Path(recipe.out) / recipe.name / mark(recipe)
    folder.mkdir(parents=True, exist_ok=True)
    with join_world(device) as (world, device):
        torch.set_num_threads(cores)
        if not world.first:
            world.wait()  # the first process writes the scenes, the others find them
        scenes = prepare(recipe, refs, lambda ready: told.scenes(ready, len(refs)))
        if world.first:
            world.wait()
        shapes = {scene.name: scene.shape for scene in scenes}
        cards, texts = [], []
        for apart in recipe.split.chosen:
            fold = Fold.of(recipe.split, shapes, apart)
            name = "all" if apart is None else f"fold-{apart}"
            done = _one(recipe, scenes, fold, folder / name, device, world, told, should_stop)
            if done is None:
                return Result(folder, None, "stopped: the same command goes on from the checkpoint")
            cards.append(folder / name / "card.yaml")
            texts.append(done)
    if len(cards) == 1:
        return Result(folder, cards[0], texts[0])
    if recipe.card.output.kind != "semantic":
        texts.append("Objects of several networks are not averaged: each fold has a card of its own.")
        return Result(folder, cards[0], "\n".join(texts))
    return Result(folder, _ensemble(recipe, folder, cards), "\n".join(texts))


def mark(recipe: Recipe) -> str:
    """Fingerprint of what the weights depend on: names the folder, so that a changed recipe has its own.

    What has its default is left out, so that a new field with a default changes no fingerprint.
    """
    asked = {"start", "data", "split", "windows", "augment", "loss", "optimise", "judge"}
    parts = recipe.model_dump(mode="json", exclude_defaults=True, include=asked)
    parts.get("split", {}).pop("fold", None)
    parts.get("data", {}).pop("description", None)
    card = {"provider", "architecture", "arguments", "input", "output"}
    parts["card"] = recipe.card.model_dump(mode="json", exclude_defaults=True, include=card)
    parts["card"]["input"].pop("modality", None)
    parts["classes"], parts["window"] = recipe.card.values, window_shape(recipe)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _one(
    recipe: Recipe,
    scenes: Sequence[TrainScene],
    fold: Fold,
    folder: Path,
    device: str,
    world: World,
    told: Told,
    should_stop: Callable[[], bool],
) -> str | None:
    """Train one fold and write its card; the scores in words, or None where it was stopped."""
    known = _finished(recipe, folder)
    if known is not None:
        return known
    folder.mkdir(parents=True, exist_ok=True)
    where = torch.device(device)
    network = TrainNetwork(recipe, where, precision_here(recipe.compute.precision, where))
    training = Training(recipe, scenes, fold, network, folder, world)

    def tell(moment: MetricsRow) -> None:
        if world.first:
            _show(training, "training", "")
            told.moment(folder.name, moment)

    if not training.run(tell, should_stop):
        return None
    if not world.first:
        return ""
    training.take_best()
    with torch.no_grad():
        network.save(folder / "weights.safetensors")
    trial = training.trial()  # with the weights as they were stored
    text = scores_text(recipe, fold, trial)
    if trial is not None:
        write_atomic(folder / "scores.csv", csv_bytes(trial.table))
    write_card(recipe.card, folder / "card.yaml", "weights.safetensors", recipe, text)
    _show(training, "finished", text)
    record = _record(training)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")  # last: it says "finished"
    return text


def _finished(recipe: Recipe, folder: Path) -> str | None:
    """The scores of a fold that an earlier call finished for this recipe; None: something is left to do."""
    record, card = folder / "training.json", folder / "card.yaml"
    if not (record.is_file() and card.is_file() and (folder / "weights.safetensors").is_file()):
        return None
    before, now = json.loads(record.read_text())["recipe"], _plain(recipe)
    if any(before.get(k) != now.get(k) for k in {*before, *now} - {"out", "compute", "split"}):
        return None  # of another title, or stored otherwise: the same weights, another card
    return load_card(card).scores


def _show(training: Training, state: str, scores: str) -> None:
    """The fold's history as a table, and its page."""
    folder = training.folder
    pd.DataFrame([asdict(m) for m in training.progress.history]).to_csv(folder / "history.csv", index=False)
    shown = samples(training)
    (folder / "samples").mkdir(exist_ok=True)
    for number, sample in enumerate(shown):
        for caption, picture in sample.pictures:
            (folder / "samples" / f"{number}-{caption}.jpg").write_bytes(picture)
    page = training_page(training, state, scores, shown)
    (folder / "training.html").write_text(page, encoding="utf-8")


def scores_text(recipe: Recipe, fold: Fold, trial: Trial | None) -> str:
    """What a card says of how good the model is, and how that was found."""
    if trial is None:
        return "Not judged: the model has learned from all the data."
    measure = trial.measure
    units = "scenes" if recipe.split.by is SplitBy.scene else f"blocks of {recipe.split.block} elements"
    how = f"Part {fold.apart} of {recipe.split.folds} parts of {units}, never learned from"
    if recipe.judge.keep is KeptWeights.best:
        how += ", but the best of several trials on it was kept, so this flatters"
    count = trial.table["scene"].nunique()
    if recipe.split.by is SplitBy.block and measure == "dice":
        ious = trial.table.groupby("class")[["tp", "fp", "fn"]].sum()
        iou = ious["tp"] / ious.sum(axis=1)
        lines = [f"{c.name} {iou[c.name]:.3f}" for c in recipe.card.classes if not c.background]
        return f"{how}: mIoU {trial.miou:.3f}; IoU {', '.join(lines)}."
    name = {"dice": "Dice", "pq": "panoptic quality"}[measure]
    return (
        f"{how} ({count} scenes): {name} {', '.join(trial.lines(recipe.card))} (95 % intervals over scenes)."
    )


def write_card(card: Card, path: Path, weights: str, recipe: Recipe, scores: str) -> None:
    """The trained model's card, beside its weights."""
    fields = card.model_dump(mode="json", exclude_defaults=True)
    fields["weights"] = weights
    fields["scores"] = scores
    fields["data"] = fields.get("data") or recipe.data.description
    fields["source"] = (
        fields.get("source") or f"trained by `segpipe train`, version {__version__}; see training.json"
    )
    path.write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100))


def _record(training: Training) -> dict[str, Any]:
    """Everything that is needed to do it again."""
    fold, network = training.fold, training.network
    return {
        "recipe": _plain(training.recipe),
        "apart": fold.apart,
        "learned_from": [name for name in fold.names if fold.learns(name)],
        "judged_by": [name for name in fold.names if fold.judged(name)],
        "parameters": network.parameters,
        "precision": network.precision,
        "device": str(network.device),
        "notes": network.notes,
        "steps": training.progress.step,
        "seconds": round(training.progress.seconds, 1),
        "segpipe": __version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _plain(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says, as JSON has it, without what is left at its default."""
    return recipe.model_dump(mode="json", exclude_defaults=True)


def _ensemble(recipe: Recipe, folder: Path, cards: Sequence[Path]) -> Path:
    """A card that averages the folds' models."""
    fields = recipe.card.model_dump(mode="json", exclude_defaults=True)
    fields.pop("architecture", None)
    fields["provider"] = "ensemble"
    fields["arguments"] = {"cards": [str(card.relative_to(folder)) for card in cards]}
    fields["output"] = {"activation": "none"}
    fields["scores"] = "Each member is scored on its own fold; see their cards."
    path = folder / "card.yaml"
    path.write_text(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100))
    return path
