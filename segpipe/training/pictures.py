"""What a model in training says of what is kept apart, as pictures beside the truth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from segpipe.config.card import Card
from segpipe.config.losses import IGNORE
from segpipe.geometry.box import Box
from segpipe.pictures.drawing import jpeg, layers, limits, resize, stretch
from segpipe.training.scenes import TrainScene
from segpipe.training.split import Fold

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


Answer = Callable[[torch.Tensor], tuple[np.ndarray, np.ndarray | None]]
"""Image (1, c, …) to class values (…) and, of networks that find objects, their ids (…)."""


def samples(
    answer: Answer,
    card: Card,
    scenes: Sequence[TrainScene],
    fold: Fold,
    window: Sequence[int],
    device: torch.device,
) -> list[Sample]:
    """A few places that are kept apart, the same at every call.

    Args:
        answer: of the network to a window.
        card: of the model.
        scenes: of which those with judged elements are shown.
        fold: says which those are.
        window: elements of a picture along each axis, as in training.
        device: of the network.
    """
    places = [(s, box) for s in scenes for box in fold.judged(s.name)]
    chosen = [places[i] for i in np.linspace(0, len(places) - 1, min(SAMPLES, len(places))).astype(int)]
    return [_sample(answer, card, scene, box, window, device) for scene, box in chosen]


@torch.inference_mode()
def _sample(
    answer: Answer,
    card: Card,
    scene: TrainScene,
    judged: Box,
    window: Sequence[int],
    device: torch.device,
) -> Sample:
    middle = [(a + b) // 2 for a, b in zip(judged.start, judged.stop, strict=True)]
    start = [max(0, min(m - w // 2, n - w)) for m, w, n in zip(middle, window, scene.shape, strict=True)]
    box = Box.at(start, window)
    seen = box.intersect(Box.whole(scene.shape))
    image, target = scene.read(seen)
    padded = np.pad(image, [(0, 0), *((0, w - n) for w, n in zip(window, seen.shape, strict=True))])
    inside = tuple(slice(0, n) for n in seen.shape)
    labels, ids = answer(torch.from_numpy(padded)[None].to(device))
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
