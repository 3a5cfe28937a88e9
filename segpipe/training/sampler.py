"""Windows to learn from: some around an element of each class in turn, others anywhere.

Every draw is made of (seed, number of the window) alone, so that a run that goes on after a stop sees
the windows that it would have seen, and so do several processes that share the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from segpipe.boxes import Box
from segpipe.config import parse_memory, parse_size
from segpipe.errors import RequestError
from segpipe.training.augment import augment
from segpipe.training.border import border_weights
from segpipe.training.losses import IGNORE, LossName
from segpipe.training.recipe import Recipe
from segpipe.training.scenes import TrainScene
from segpipe.training.split import Fold

Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Images (n, c, …), targets (n, …), and weights of the elements where a loss wants them."""

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
        self._held: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._border = any(term.name is LossName.border for term in recipe.loss)

    def batches(self, first: int, last: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches number ``first`` to ``last`` − 1, each its own part of those of all processes."""
        torch.set_num_threads(1)  # this thread's own: the network has the cores
        size = self.recipe.optimise.batch
        for number in range(first, last):
            start = (number * world + rank) * size
            yield _collate([self.window(start + i) for i in range(size)])

    def window(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The window of this number: augmented image (c, …), target (…), weights (…)."""
        rng = np.random.default_rng((self.recipe.optimise.seed, number))
        image, target, scene = self._drawn(rng)
        pixels, labels = augment(
            torch.from_numpy(image),
            torch.from_numpy(target.astype(np.int64)),
            self.recipe.augment,
            rng,
            spacing=scene.spacing,
            outside=IGNORE,
        )
        weights = None
        if self._border:
            weights = torch.from_numpy(border_weights(np.maximum(labels.numpy(), 0)))
        if self.recipe.data.objects:
            labels = labels.clamp(max=1)
        return pixels, labels, weights

    def _drawn(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, TrainScene]:
        for _ in range(TRIES):
            scene, box = self._place(rng)
            image, target = self._cut(scene, box)
            if (target != IGNORE).any():
                break
        return image, target, scene

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

    def _cut(self, scene: TrainScene, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Image and target of a window, 0 and `IGNORE` beyond the scene."""
        inner = box.intersect(Box.whole(scene.shape))
        image, target = self._read(scene, inner)
        target = np.where(self.fold.is_learned(scene.name, inner), target, IGNORE)
        if inner == box:
            return image, target
        pads = [
            (a - b, d - c) for a, b, c, d in zip(inner.start, box.start, inner.stop, box.stop, strict=True)
        ]
        return np.pad(image, [(0, 0), *pads]), np.pad(target, pads, constant_values=IGNORE)

    def _read(self, scene: TrainScene, box: Box) -> tuple[np.ndarray, np.ndarray]:
        if not self._in_memory:
            return scene.read(box)
        if scene.name not in self._held:
            self._held[scene.name] = scene.read(Box.whole(scene.shape))
        image, target = self._held[scene.name]
        return np.ascontiguousarray(image[(slice(None), *box.slices)]), target[box.slices]


def _collate(windows: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]) -> Batch:
    images, targets, weights = zip(*windows, strict=True)
    stacked = None if weights[0] is None else torch.stack([w for w in weights if w is not None])
    return torch.stack(images), torch.stack(targets), stacked
