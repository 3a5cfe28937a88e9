"""Scenes to learn from: on the model's grid, normalised, with their labels, in Zarr.

Everything that a scene needs as a whole (statistics, resampling) is done here, once; afterwards a
window is a read. Streamed block by block, so a scene may be of any size.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from segpipe.config.card import Card, Interpolation
from segpipe.config.losses import IGNORE
from segpipe.config.recipe import Data, Recipe
from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, VolumeGeometry
from segpipe.geometry.grid_map import GridMap, onto_model
from segpipe.inference.normalise import Normaliser, Statistics, needs_statistics, scene_statistics
from segpipe.pipeline.plan_scene import scene_grid
from segpipe.pipeline.scene_io import SceneBlocks, ScenePixels
from segpipe.sources import SceneRef, open_source
from segpipe.sources.base import match_bands
from segpipe.sources.labels import IGNORED, IdRule, ReferenceLabels, find_reference, open_reference
from segpipe.store.arrays import ArraySpec
from segpipe.store.receipts import Marks
from segpipe.store.stage import WHOLE, Stage, stage_key
from segpipe.tiling.windows import Blocks

EDGE = {2: 1024, 3: 128}
"""Longest edge of a block in the store, by number of axes."""
POSITIONS = 8192
"""Elements of each class remembered of a scene, drawn evenly from all: where balanced windows lie."""
VERSION = 2
"""Raised when the same scene would be stored with other bits."""


@dataclass(frozen=True)
class TrainScene:
    """A scene in the store, ready to be learned from."""

    name: str
    stage: Stage
    shape: tuple[int, ...]
    """Of the model's grid."""
    counts: tuple[int, ...]
    """Elements of each class."""
    spacing: tuple[float, ...] | None
    """Element size along the model's axes in mm; None for rasters, whose elements are taken as square."""
    objects: bool = False
    """Whether ids of objects are there."""

    @property
    def bytes(self) -> int:
        """Of its arrays in memory."""
        names = ("image", "target", "ids") if self.objects else ("image", "target")
        return sum(int(self.stage.array(name).nbytes) for name in names)

    @cached_property
    def positions(self) -> list[np.ndarray]:
        """For each class some of its elements, int32 (n, axis)."""
        data = self.stage.read_part("positions.npz")
        assert data is not None
        with np.load(io.BytesIO(data)) as found:
            return [found[str(channel)] for channel in range(len(self.counts))]

    def read(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        """Image (c, …) float32 and target (…) of a box inside the scene; `IGNORE` where nothing is said."""
        image = self.stage.read("image", (slice(None), *box.slices))
        return image, self.stage.read("target", box.slices)

    def read_ids(self, box: Box) -> np.ndarray:
        """Ids of objects of a box, int64 (…); 0: none, `IGNORE` where nothing is said."""
        return self.stage.read("ids", box.slices)


def prepare(recipe: Recipe, refs: Iterable[SceneRef], told: Callable[[int], None]) -> list[TrainScene]:
    """Every scene in the store; those of an earlier call are found there.

    Args:
        recipe: card, labels, bands.
        refs: what was discovered.
        told: called with the number of scenes that are ready.

    Raises:
        SceneError: a scene or its labels do not suit the card, or cannot be read.
    """
    scenes = []
    for number, ref in enumerate(refs, start=1):
        scenes.append(_prepare_one(recipe, ref))
        told(number)
    return scenes


def _prepare_one(recipe: Recipe, ref: SceneRef) -> TrainScene:
    card, data = recipe.card, recipe.data
    with open_source(ref.uri, band_names=data.bands) as source:
        pixels = ScenePixels.of(source, data.bands, *match_bands(card, source))
    geometry, scaling = pixels.geometry, pixels.scaling
    with _open_labels(card, data, ref, geometry) as labels:
        parts = {
            "source": pixels.identity,
            "channels": pixels.channels,
            "labels": labels.identity,
            "input": card.input.model_dump(mode="json", exclude={"modality"}),
            "values": card.values,
            "objects": data.objects and [data.reference.divisor],
            "version": VERSION,
        }
        stage = Stage(recipe.out, stage_key("learn", parts))
        stage.scrub()
        found = stage.receipts().get(WHOLE) if stage.exists else None
        grid = scene_grid(card, geometry, None)
        if found is None:
            with SceneBlocks(pixels) as reader:
                statistics = Statistics()
                if needs_statistics(card):
                    statistics = scene_statistics(card, geometry, scaling, reader)
                normaliser = Normaliser(card, scaling, statistics)
                found = _store(stage, grid, normaliser, reader, labels, data.objects)
    spacing = _spacing(geometry, grid)
    return TrainScene(ref.name, stage, grid.shape, tuple(found["counts"]), spacing, data.objects)


def _open_labels(card: Card, data: Data, ref: SceneRef, geometry: Geometry) -> ReferenceLabels:
    """The labels of a scene, or why there are none.

    Raises:
        SceneError: none fits its name, or they lie on another grid.
    """
    uri = find_reference(data.reference, ref.name)
    rule = None
    if data.objects:
        ground = next((c.value for c in card.classes if c.background), card.values[0])
        other = next(value for value in card.values if value != ground)
        rule = IdRule(data.reference.divisor, value=other, ground=ground)
    return open_reference(data.reference, uri, geometry, rule)


def _spacing(geometry: Geometry, grid: GridMap) -> tuple[float, ...] | None:
    if not isinstance(geometry, VolumeGeometry):
        return None
    native = geometry.spacing
    return tuple(native[axis] * ratio for axis, ratio in zip(grid.axes, grid.ratio, strict=True))


def _store(
    stage: Stage,
    grid: GridMap,
    normaliser: Normaliser,
    reader: SceneBlocks,
    labels: ReferenceLabels,
    objects: bool,
) -> dict[str, Any]:
    """Write image and target block by block, and what sampling needs to know of them."""
    card = normaliser.card
    block = tuple(min(EDGE[len(grid.shape)], n) for n in grid.shape)
    blocks = Blocks(grid.shape, block, (0,) * len(block))
    arrays = [
        ArraySpec("image", "float32", 0.0, channels=card.channels),
        ArraySpec("target", "int16", IGNORE, labels=True),
    ]
    if objects:
        arrays.append(ArraySpec("ids", "int64", IGNORE, labels=True))
    stage.create(None, blocks, arrays, {}, whole=True)
    files: Marks = {}
    drawn = Drawn(len(card.classes))
    for number, index in enumerate(blocks.indices()):
        box = blocks.box(index)
        image, target, ids = _block(grid, normaliser, reader, labels, box)
        files |= stage.write("image", box.slices, image)
        files |= stage.write("target", box.slices, target.astype(np.int16))
        if objects:
            files |= stage.write("ids", box.slices, ids)
        drawn.add(target, box, np.random.default_rng(number))
    buffer = io.BytesIO()
    named: dict[str, Any] = {str(c): found for c, found in enumerate(drawn.positions)}
    np.savez_compressed(buffer, **named)
    files |= stage.write_part("positions.npz", buffer.getvalue())
    receipt = {"counts": drawn.counts}
    stage.commit(WHOLE, receipt, files)
    return receipt


def _block(
    grid: GridMap, normaliser: Normaliser, reader: SceneBlocks, labels: ReferenceLabels, box: Box
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image, target and ids of a box of the model's grid; labels are taken from the nearest element."""
    card, native = normaliser.card, box if grid.identity else grid.native_box(box)
    pixels = reader.read(native)
    image = normaliser.elementwise(pixels)
    classes, ids = labels.read_both(native)
    said = np.stack([_channels(card, classes, labels.uri), ids])
    said[:, ~pixels.valid] = IGNORE
    if not grid.identity:
        nearest = card.input.image_resampling is Interpolation.nearest
        image = onto_model(image, native, grid, box, nearest=nearest)
        said = onto_model(said, native, grid, box, nearest=True)
    return image, said[0], said[1]


def _channels(card: Card, values: np.ndarray, uri: str) -> np.ndarray:
    """Class values as channels of the network's output; `IGNORE` where nothing is said."""
    known = np.array(sorted(card.values), dtype=np.int64)
    channel = np.array([card.values.index(value) for value in known.tolist()], dtype=np.int64)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    fits = known[place] == values
    strange = ~fits & (values != IGNORED)
    if strange.any():
        raise SceneError(
            f"{uri}: holds {values[strange].flat[0]}, which is no class of the card "
            f"({', '.join(map(str, card.values))}); map it in `data.reference.values` (null: ignored)"
        )
    return np.where(fits, channel[place], IGNORE)


class Drawn:
    """How many elements each class has, and an even draw of them, from any number of blocks."""

    def __init__(self, classes: int) -> None:
        self.counts = [0] * classes
        self._keys: list[np.ndarray] = [np.zeros(0) for _ in range(classes)]
        self.positions: list[np.ndarray] = []
        """int32 (n, axis) for each class."""

    def add(self, target: np.ndarray, box: Box, rng: np.random.Generator) -> None:
        """Take a block in: each element draws a number, and the smallest are kept."""
        if not self.positions:
            self.positions = [np.zeros((0, target.ndim), np.int32) for _ in self.counts]
        for channel in range(len(self.counts)):
            at = np.argwhere(target == channel)
            self.counts[channel] += len(at)
            keys = np.concatenate([self._keys[channel], rng.random(len(at))])
            found = np.concatenate([self.positions[channel], (at + box.start).astype(np.int32)])
            best = np.argsort(keys, kind="stable")[:POSITIONS]
            self._keys[channel], self.positions[channel] = keys[best], found[best]
