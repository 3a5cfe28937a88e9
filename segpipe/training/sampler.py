"""Windows to learn from: some around an element of each class in turn, others anywhere.

Every draw is made of (seed, number of the window) alone, so that a run that goes on after a stop sees
the windows that it would have seen, and so do several processes that share the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from segpipe.config.card import Card
from segpipe.config.job import parse_memory, parse_size
from segpipe.config.losses import IGNORE, LossName
from segpipe.config.recipe import Recipe
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.models.base import Truth
from segpipe.training.augmentation import augment
from segpipe.training.losses import border_weights
from segpipe.training.scenes import TrainScene
from segpipe.training.split import Fold

Target = torch.Tensor | Truth
"""Channels (…), or the objects of a window."""
Batch = tuple[torch.Tensor, torch.Tensor | list[Truth], torch.Tensor | None]
"""Images (n, c, …), targets (n, …) or n windows' objects, and weights of elements where a loss wants them."""

TRIES = 20
"""Windows drawn until one has something to learn from; the last is taken as it is."""


def window_shape(recipe: Recipe) -> tuple[int, ...]:
    """Elements of a window in training.

    Raises:
        RequestError: neither recipe nor card says, or it is no multiple of the network's stride.
    """
    card = recipe.card
    if recipe.windows.size != "auto":
        shape = parse_size(recipe.windows.size, card.ndim, "windows.size")
    elif card.window_shape is None:
        raise RequestError(
            "windows.size: the card takes whole scenes, so `auto` does not say what is seen in training: "
            "give a size, e.g. 48x64x48"
        )
    else:
        shape = card.window_shape
    stride = card.window.stride
    if any(n % stride for n in shape):
        raise RequestError(
            f"windows.size: found {'x'.join(map(str, shape))}; valid: multiples of {stride}, the total stride"
        )
    return shape


class Sampler:
    """Draws windows of the scenes of a fold."""

    def __init__(self, recipe: Recipe, scenes: Sequence[TrainScene], fold: Fold) -> None:
        """Find where windows may lie.

        Raises:
            RequestError: there is nothing to learn from.
        """
        self.recipe = recipe
        self.fold = fold
        self.shape = window_shape(recipe)
        self.scenes = [s for s in scenes if fold.learns(s.name)]
        self.at = [[fold.learned_at(s.name, p) for p in s.positions] for s in self.scenes]
        classes = range(len(recipe.card.classes))
        self.having = [[i for i, found in enumerate(self.at) if len(found[c])] for c in classes]
        if not any(self.having):
            raise RequestError("data: no element to learn from: the labels are empty, or all kept apart")
        self.share = np.array([float(np.prod(s.shape)) for s in self.scenes])
        self.share /= self.share.sum()
        self._in_memory = sum(s.bytes for s in self.scenes) <= parse_memory(recipe.compute.memory)
        self._held: dict[str, tuple[np.ndarray, ...]] = {}
        self._border = any(term.name is LossName.border for term in recipe.loss)

    def batches(self, first: int, last: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches number ``first`` to ``last`` − 1, each its own part of those of all processes."""
        torch.set_num_threads(1)  # this thread's own: the network has the cores
        size = self.recipe.optimise.batch
        for number in range(first, last):
            start = (number * world + rank) * size
            yield _collate([self.window(start + i) for i in range(size)])

    def window(self, number: int) -> tuple[torch.Tensor, Target, torch.Tensor | None]:
        """The window of this number: augmented image (c, …), its target, weights (…)."""
        rng = np.random.default_rng((self.recipe.optimise.seed, number))
        image, target, ids, scene = self._drawn(rng)
        table = np.zeros((0, 2), np.int64)
        if ids is not None:
            target, table = number_pairs(target, ids)
        pixels, labels = augment(
            torch.from_numpy(image),
            torch.from_numpy(target.astype(np.int64)),
            self.recipe.augment,
            rng,
            spacing=scene.spacing,
            outside=IGNORE,
        )
        if ids is None:
            return pixels, labels, None
        target, ids = pairs_of(labels.numpy(), table)
        if self.recipe.card.output.kind != "semantic":
            # These networks cannot be told to look away: what nothing is said of is not there to be seen.
            return pixels * (labels != IGNORE), window_truth(target, ids, self.recipe.card), None
        weights = torch.from_numpy(border_weights(ids)) if self._border else None
        return pixels, torch.from_numpy(target), weights

    def _drawn(
        self, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, TrainScene]:
        for _ in range(TRIES):
            scene, box = self._place(rng)
            image, target, *ids = self._cut(scene, box)
            if (target != IGNORE).any():
                break
        return image, target, ids[0] if ids else None, scene

    def _place(self, rng: np.random.Generator) -> tuple[TrainScene, Box]:
        """A scene and a window on it, which may reach beyond where the scene is smaller."""
        if rng.random() < self.recipe.windows.balance:
            channel = int(rng.choice([c for c, having in enumerate(self.having) if having]))
            number = int(rng.choice(self.having[channel]))
            scene, at = self.scenes[number], self.at[number][channel]
            centre = at[rng.integers(len(at))]
            # Anywhere in the window's inner half, so that the network cannot know the class by the place.
            wanted = [
                int(c) - int(rng.integers(n // 4, n - n // 4))
                for c, n in zip(centre, self.shape, strict=True)
            ]
        else:
            scene = self.scenes[int(rng.choice(len(self.scenes), p=self.share))]
            wanted = [
                int(rng.integers(min(0, n - w), max(0, n - w) + 1))
                for n, w in zip(scene.shape, self.shape, strict=True)
            ]
        start = [
            min(max(at, min(0, n - w)), max(0, n - w))
            for at, n, w in zip(wanted, scene.shape, self.shape, strict=True)
        ]
        return scene, Box.at(start, self.shape)

    def _cut(self, scene: TrainScene, box: Box) -> tuple[np.ndarray, ...]:
        """Image, target and, where the scene has them, ids of a window; beyond the scene 0 and `IGNORE`."""
        inner = box.intersect(Box.whole(scene.shape))
        image, *said = self._read(scene, inner)
        learned = self.fold.is_learned(scene.name, inner)
        said = [np.where(learned, part, IGNORE) for part in said]
        if inner == box:
            return image, *said
        pads = [
            (a - b, d - c) for a, b, c, d in zip(inner.start, box.start, inner.stop, box.stop, strict=True)
        ]
        return np.pad(image, [(0, 0), *pads]), *(np.pad(p, pads, constant_values=IGNORE) for p in said)

    def _read(self, scene: TrainScene, box: Box) -> tuple[np.ndarray, ...]:
        if not self._in_memory:
            return _everything(scene, box)
        if scene.name not in self._held:
            self._held[scene.name] = _everything(scene, Box.whole(scene.shape))
        image, *said = self._held[scene.name]
        return np.ascontiguousarray(image[(slice(None), *box.slices)]), *(p[box.slices] for p in said)


def _everything(scene: TrainScene, box: Box) -> tuple[np.ndarray, ...]:
    return *scene.read(box), *([scene.read_ids(box)] if scene.objects else [])


def _collate(windows: Sequence[tuple[torch.Tensor, Target, torch.Tensor | None]]) -> Batch:
    images, targets, weights = zip(*windows, strict=True)
    stacked = None if weights[0] is None else torch.stack([w for w in weights if w is not None])
    objects = [t for t in targets if isinstance(t, Truth)]
    return torch.stack(images), objects or torch.stack(targets), stacked


def number_pairs(target: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes and ids as one small number an element, which augmentation can move about.

    Args:
        target: channels (…); `IGNORE` where nothing is said.
        ids: like target, 0 no object; ids of a file may be too large for float32, which numbers are not.

    Returns:
        Numbers 0…n − 1 like target, int64, `IGNORE` where the target is; and a table (n, 2), int64: the
        channel and the id of each number.
    """
    said = target != IGNORE
    pairs = np.stack([target[said].astype(np.int64), ids[said]], -1)
    table, number = np.unique(pairs, axis=0, return_inverse=True)
    numbers = np.full(target.shape, IGNORE, np.int64)
    numbers[said] = number.ravel()
    return numbers, table


def pairs_of(numbers: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The inverse of `number_pairs`; ids are 0 where nothing is said."""
    rows = np.concatenate([table, [[IGNORE, 0]]])[np.where(numbers == IGNORE, len(table), numbers)]
    return rows[..., 0], rows[..., 1]


def window_truth(target: np.ndarray, ids: np.ndarray, card: Card) -> Truth:
    """The masks that an instance or panoptic network should find in a window.

    Each id of a class of things is an object; for panoptic cards each class of stuff is one. An id under two
    classes is two objects. Background is none.

    Args:
        target: channels (…), `IGNORE` where nothing is said.
        ids: like target; 0: no object.
        card: says which classes are what.
    """
    masks, classes = [], []
    for channel, c in enumerate(card.classes):
        here = target == channel
        if c.background or not here.any():
            continue
        if c.thing:
            parts = [here & (ids == i) for i in np.unique(ids[here]).tolist() if i > 0]
        else:
            parts = [here] if card.output.kind == "panoptic" else []
        masks += parts
        classes += [c.value] * len(parts)
    stacked = np.stack(masks) if masks else np.zeros((0, *target.shape), bool)
    return Truth(torch.from_numpy(stacked), torch.tensor(classes, dtype=torch.int64))
