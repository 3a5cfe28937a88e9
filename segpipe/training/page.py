"""The page of a model in training: curves, pictures beside the truth, scores, and the recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import yaml
from markupsafe import Markup

from segpipe.config.losses import IGNORE
from segpipe.geometry.box import Box
from segpipe.inference.normalise import padded
from segpipe.pictures.drawing import DIFFERENCE, jpeg, layers, limits, resize, stretch
from segpipe.report.figures import ticks
from segpipe.report.templates import data_uri, render
from segpipe.training.loop import Training
from segpipe.training.network import TrainNetwork
from segpipe.training.scenes import TrainScene

SAMPLES = 4
"""Scenes, or places of a scene, that are shown."""
SIDE = 240
"""Pixels of a picture's shorter side, at least."""
NOTHING = 65535
"""Stands for "not said" in the reference's picture: no class has it."""


@dataclass(frozen=True)
class Sample:
    """One place: the image, the labels, what the model says."""

    name: str
    pictures: tuple[tuple[str, bytes], ...]
    """Caption and JPEG."""


def samples(training: Training) -> list[Sample]:
    """A few places that are kept apart, each of a window's size, the same at every call."""
    places = [(s, box) for s in training.scenes for box in training.fold.judged(s.name)]
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, min(SAMPLES, len(places))).astype(int)]
    return [_sample(training.network, scene, box, training.sampler.shape) for scene, box in chosen]


@torch.inference_mode()
def _sample(network: TrainNetwork, scene: TrainScene, judged: Box, window: Sequence[int]) -> Sample:
    card = network.card
    middle = [(a + b) // 2 for a, b in zip(judged.start, judged.stop, strict=True)]
    start = [max(0, min(m - w // 2, n - w)) for m, w, n in zip(middle, window, scene.shape, strict=True)]
    box = Box.at(start, window)
    seen = box.intersect(Box.whole(scene.shape))
    image, target = scene.read(seen)
    inside = tuple(slice(0, n) for n in seen.shape)
    labels, ids = network.answer(torch.from_numpy(padded(image, window))[None])
    labels, ids = labels[inside], None if ids is None else ids[inside]
    values = np.array([*card.values, NOTHING])
    truth = values[np.where(target == IGNORE, len(card.values), target)]
    if len(window) == 3:
        background = [c.value for c in card.classes if c.background]
        at = int((~np.isin(truth, [*background, NOTHING])).sum((1, 2)).argmax())
        image, truth, labels = image[:, at], truth[at], labels[at]
    shown = image[[2, 1, 0]] if len(image) >= 3 else image[:1]
    valid = np.ones(labels.shape, dtype=bool)
    base = stretch(shown, valid, limits(shown, valid))
    drawn = layers(base, labels, truth, card.classes, None, ids)
    captions = {"image": "image", "reference": "reference", "labels": "predicted", "difference": "difference"}
    return Sample(scene.name, tuple((captions[k], _shown(drawn[k])) for k in captions))


def _shown(picture: np.ndarray) -> bytes:
    rows, columns = picture.shape[:2]
    factor = max(1, -(-SIDE // min(rows, columns)))
    large = resize(picture, (rows * factor, columns * factor), smooth=False)
    alpha = large[..., 3:].astype(np.float32) / 255
    flat = large[..., :3] * alpha + 255 * (1 - alpha)
    return jpeg(flat.round().astype(np.uint8), 85)


WIDE, HIGH, LEFT, RIGHT, BOTTOM = 640, 220, 56, 28, 28


def training_page(training: Training, state: str, scores: str, shown: Sequence[Sample]) -> str:
    """One self-contained page of one fold.

    Args:
        training: of the fold.
        state: in a word.
        scores: in words, once it is finished.
        shown: places that are kept apart.
    """
    recipe, progress, network = training.recipe, training.progress, training.network
    rows = progress.history
    losses, scored = [(m.step, m.loss) for m in rows], [(m.step, m.score) for m in rows]
    fold = {
        "name": training.folder.name,
        "state": state,
        "scores": scores,
        "curves": [
            ("Loss on what is learned from", curve(losses, "Loss by step")),
            (f"{recipe.measure} on what is kept apart", curve(scored, f"{recipe.measure} by step")),
        ],
        "samples": [(s.name, [(c, data_uri("jpeg", p)) for c, p in s.pictures]) for s in shown],
        "facts": {
            "Steps": f"{progress.step:,} of {recipe.optimise.steps:,}",
            "Time": f"{progress.seconds / 60:.1f} minutes on {network.device.type}, {network.precision}",
            "Network": f"{recipe.card.architecture}, {network.parameters:,} parameters",
            "Learned from": f"{len(training.sampler.scenes)} scenes",
        },
    }
    text = yaml.safe_dump(recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=100)
    legend = [(c.name, c.color) for c in recipe.card.classes if not c.background]
    kinds = list(DIFFERENCE.values())
    return render("training.html", recipe=recipe, folds=[fold], text=text, legend=legend, difference=kinds)


def curve(points: Sequence[tuple[float, float]], title: str) -> Markup:
    """A line over steps, as SVG; points without a number are left out."""
    known = [(x, y) for x, y in points if math.isfinite(y)]
    if not known:
        return Markup("")
    xs, ys = [x for x, _ in known], [y for _, y in known]
    low, high = min(ys), max(ys)
    pad = (high - low) * 0.06 or abs(high) * 0.06 or 1.0
    low, high = low - pad, high + pad
    last = max(xs)

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDE - LEFT - RIGHT) * x / last
        return across, 8 + (HIGH - BOTTOM - 8) * (high - y) / (high - low)

    parts = []
    for value, label in ticks(low, high):
        _, y = place(0, value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDE - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in ticks(0, last):
        x, _ = place(value, low)
        parts.append(f'<text x="{x:.1f}" y="{HIGH - 8}" text-anchor="middle">{label}</text>')
    line = "L".join("{:.1f} {:.1f}".format(*place(x, y)) for x, y in known)
    parts.append(f'<path class="curve" d="M{line}"/>')
    x, y = place(*known[-1])
    parts.append(
        f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{known[-1][1]:.4g}</title></circle>'
    )
    head = f'<svg class="fig" viewBox="0 0 {WIDE} {HIGH}" width="{WIDE}" height="{HIGH}" role="img"'
    return Markup(f'{head} aria-label="{title}">{"".join(parts)}</svg>')
