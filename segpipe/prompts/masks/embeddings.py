"""Read the windows of a scene's planes as a segmenter takes them, and keep their embeddings in the store.

A stage ``embed-<key>`` holds, for each level of the pyramid and each map of the encoder, one float16 array
(slice,) row, column, channel, y, x, and beside them which elements of a window have data. A window's map is
one shard, so that windows are added as prompts need them, by whoever comes first, and nothing is written
twice. The receipt of a window is its commit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import obstore
import zarr

from segpipe.config.prompts import PlaneOf
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry, VolumeGeometry
from segpipe.inference.normalise import Normaliser
from segpipe.pipeline.scene_io import SceneBlocks
from segpipe.prompts.masks.patches import slice_box
from segpipe.prompts.segmenters.base import Embedding
from segpipe.store.arrays import IMAGE_CODEC
from segpipe.store.location import STORE_FOLDER, join, open_store
from segpipe.store.receipts import Marks
from segpipe.store.stage import Stage
from segpipe.tiling.pyramid import Pyramid, Window
from segpipe.tiling.windows import Blocks

STRIP = 1 << 22
"""Elements of the scene that are read at once for a coarse window."""

ACROSS = {PlaneOf.axial: "SI", PlaneOf.coronal: "AP", PlaneOf.sagittal: "LR"}
"""Directions that each kind of slice lies across."""


@dataclass(frozen=True)
class Planes:
    """The planes of a scene: one of a raster, as many of a volume as it has slices along an axis."""

    shape: tuple[int, ...]
    """Of the scene."""
    axis: int | None
    """Which axis slices are across; None: a raster."""

    @classmethod
    def of(cls, geometry: Geometry, plane: PlaneOf) -> Planes:
        """Of a scene.

        Raises:
            RequestError: a kind of slice is asked of a raster.
        """
        if isinstance(geometry, RasterGeometry):
            if plane is not PlaneOf.auto:
                raise RequestError(f"prompts.volume.plane: found {plane.value}; a raster has no slices")
            return cls(geometry.shape, None)
        assert isinstance(geometry, VolumeGeometry)
        # codes are of (i, j, k), the array's axes are (k, j, i)
        codes = geometry.orientation[::-1]
        if plane is PlaneOf.auto:
            farthest = max(geometry.spacing)
            thick = [a for a, s in enumerate(geometry.spacing) if s > 1.01 * min(geometry.spacing)]
            axial = next(a for a, code in enumerate(codes) if code in ACROSS[PlaneOf.axial])
            return cls(geometry.shape, geometry.spacing.index(farthest) if thick else axial)
        return cls(geometry.shape, next(a for a, code in enumerate(codes) if code in ACROSS[plane]))

    @property
    def plane_shape(self) -> tuple[int, int]:
        """(y, x) of one plane."""
        y, x = (n for a, n in enumerate(self.shape) if a != self.axis)
        return y, x

    @property
    def count(self) -> int:
        """How many there are."""
        return 1 if self.axis is None else self.shape[self.axis]

    def box(self, plane: Box, index: int) -> Box:
        """A box of one plane as a box of the scene."""
        return plane if self.axis is None else slice_box(plane, self.axis, index)


def read_box(
    store: SceneBlocks, normaliser: Normaliser, planes: Planes, whole: Box, step: int, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a box of a plane, (c, y, x) float32, normalised, and whether its elements have data, (y, x).

    Of ``step`` × ``step`` elements each is the mean of the valid ones, and has data if there is any. What is
    beyond the plane or has no data is 0. Rows are read in strips, so that memory follows the result and not
    what it covers.

    Args:
        whole: (y, x) elements of the plane, multiples of ``step`` long; may reach beyond it.
        index: of the slice.
    """
    box = whole.intersect(Box.whole(planes.plane_shape))
    # squares begin where the box does, also before the plane
    lead = [(a - b) % step for a, b in zip(box.start, whole.start, strict=True)]
    shape = tuple(n // step for n in whole.shape)
    out = np.zeros((len(store.pixels.channels), *shape), np.float32)
    known = np.zeros(shape, bool)
    left = (box.start[1] - whole.start[1]) // step
    rows = max(1, STRIP // max(1, box.shape[1] * step)) * step
    for start in range(box.start[0] - lead[0], box.stop[0], rows):
        strip = Box((max(start, box.start[0]), box.start[1]), (min(start + rows, box.stop[0]), box.stop[1]))
        pixels = store.read(planes.box(strip, index))
        before = ((strip.start[0] - start), lead[1])
        values = np.pad(
            normaliser.elementwise(pixels).reshape(len(out), *strip.shape),
            ((0, 0), (before[0], 0), (before[1], 0)),
        )
        valid = np.pad(pixels.valid.reshape(strip.shape), ((before[0], 0), (before[1], 0)))
        small, any_of = (values, valid) if step == 1 else _means(values, valid, step)
        top = (start - whole.start[0]) // step
        out[:, top : top + small.shape[1], left : left + small.shape[2]] = small
        known[top : top + small.shape[1], left : left + small.shape[2]] = any_of
    return out, known


def _means(values: np.ndarray, valid: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of the valid elements of each ``step`` × ``step``, 0 where there is none; where there is any.

    Args:
        values: (c, y, x), 0 where not valid; a last short square is a square too.
    """
    edges = [np.arange(0, n, step) for n in valid.shape]
    sums = np.add.reduceat(np.add.reduceat(values.astype(np.float64), edges[0], 1), edges[1], 2)
    counts = np.add.reduceat(np.add.reduceat(valid.astype(np.int64), edges[0], 0), edges[1], 1)
    return np.asarray(sums / np.maximum(counts, 1), np.float32), np.asarray(counts > 0)


PREFIX = "embed"
USED = "used.json"
VALID = "valid"
"""Name of the array that says which elements of a window have data."""


def window_id(window: Window, index: int = 0) -> str:
    """Name of a window's receipt: level, lattice position, slice."""
    return ".".join(f"{n:05d}" for n in (window.level, *window.index, index))


@dataclass(frozen=True)
class Embeddings:
    """A scene's embeddings under one encoder."""

    stage: Stage
    pyramid: Pyramid
    planes: Planes
    shapes: Mapping[str, tuple[int, int, int]]
    """Name and (c, y, x) of each map of a window."""

    @property
    def window_bytes(self) -> int:
        """Of one window, before compression."""
        return sum(2 * math.prod(shape) for shape in self.shapes.values())

    def create(self, attributes: Mapping[str, Any]) -> None:
        """Make the stage and its arrays where they are absent; two processes may do so at once."""
        self.stage.create(None, Blocks((1,), (1,), (0,)), [], attributes)
        for level in range(self.pyramid.levels):
            for name, shape in self._maps.items():
                with suppress(zarr.errors.ContainsArrayError):
                    self._create_array(level, name, shape)

    @property
    def _maps(self) -> dict[str, tuple[int, int, int]]:
        """All arrays of a window: the encoder's, and what has data."""
        return {**self.shapes, VALID: (1, self.pyramid.window, self.pyramid.window)}

    def _create_array(self, level: int, name: str, shape: Sequence[int]) -> None:
        lead = (() if self.planes.axis is None else (self.planes.count,)) + self.pyramid.counts(level)
        one = (1,) * len(lead)
        channels = math.ceil(shape[0] / 4)
        self.stage.group.create_array(
            f"level{level}/{name}", shape=(*lead, *shape), shards=(*one, 4 * channels, *shape[1:]),
            chunks=(*one, channels, *shape[1:]), dtype="bool" if name == VALID else "float16",
            fill_value=0, compressors=IMAGE_CODEC,
            dimension_names=("slice",) * (len(lead) - 2) + ("row", "column", "channel", "y", "x"),
        )  # fmt: skip

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def _position(self, window: Window, index: int) -> tuple[int | slice, ...]:
        """Where a window lies in the arrays of its level."""
        maps = (slice(None),) * 3
        return (*window.index, *maps) if self.planes.axis is None else (index, *window.index, *maps)

    def read(self, window: Window, index: int = 0) -> tuple[Embedding, np.ndarray]:
        """The embedding of a window that has its receipt, and which of its elements have data, (y, x) bool.

        Raises:
            SceneError: another run dropped the stage.
        """
        where, commits = self._position(window, index), [window_id(window, index)]
        try:
            arrays = {n: self.stage.read(f"level{window.level}/{n}", where, commits) for n in self._maps}
        except (KeyError, ValueError, OSError):  # arrays that vanish while they are opened
            self.stage.check()
            raise
        return Embedding({n: arrays[n] for n in self.shapes}), arrays[VALID][0]

    def write(self, window: Window, index: int, embedding: Embedding, valid: np.ndarray) -> None:
        """Keep the embedding, halved, of a window; its receipt comes last."""
        try:
            files: Marks = {}
            for name, values in {**embedding.arrays, VALID: valid[None]}.items():
                where = self._position(window, index)
                files |= self.stage.write_shards(f"level{window.level}/{name}", where, values)
            self.stage.commit(window_id(window, index), {"bytes": self.window_bytes}, files)
        except (KeyError, ValueError, OSError):
            self.stage.check()
            raise

    def touch(self) -> None:
        """Note that the embeddings were of use now, and what they take."""
        used = {"used": time.time(), "bytes": len(self.stage.done()) * self.window_bytes}
        self.stage.write_json(USED, used)


def check_budget(windows: int, each: int, budget: int) -> None:
    """Reject prompts whose embeddings would not fit.

    Raises:
        SceneError: says what it would take.
    """
    if windows * each > budget:
        raise SceneError(
            f"prompts.cache: {windows:,} windows take {windows * each / 2**30:.1f} GiB of embeddings, the "
            f"budget is {budget / 2**30:.1f} GiB; raise it, or ask for less at once"
        )


def prune(out: str, keep: str, budget: int) -> list[str]:
    """Drop the embeddings that were not used for longest until all fit; those of ``keep`` stay.

    Returns:
        Keys of the stages that were dropped.
    """
    found = obstore.list_with_delimiter(open_store(join(out, STORE_FOLDER)))["common_prefixes"]
    stages = [Stage(out, name.rstrip("/")) for name in found if name.startswith(f"{PREFIX}-")]
    used = {s.key: s.read_json(USED) or {"used": 0.0, "bytes": 0} for s in stages if s.exists}
    total = sum(entry["bytes"] for entry in used.values())
    dropped = []
    for stage in sorted((s for s in stages if s.key in used), key=lambda s: used[s.key]["used"]):
        if total <= budget:
            break
        if stage.key != keep and used[stage.key]["bytes"]:
            stage.drop()
            total -= used[stage.key]["bytes"]
            dropped.append(stage.key)
    return dropped
