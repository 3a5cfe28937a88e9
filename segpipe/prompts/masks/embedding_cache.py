"""Keep the embeddings of a scene in its store: encoded once, read as often as wanted.

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
from functools import cached_property
from typing import Any

import numpy as np
import obstore
import zarr

from segpipe.errors import SceneError
from segpipe.prompts.masks.read_planes import Planes
from segpipe.prompts.segmenters.base import Embedding
from segpipe.store.location import join, open_store
from segpipe.store.stage import IMAGE_CODEC, STORE_FOLDER, Stage
from segpipe.tiling.pyramid import Pyramid, Window
from segpipe.tiling.windows import Blocks

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

    @cached_property
    def _arrays(self) -> dict[tuple[int, str], zarr.Array[Any]]:
        """Handles by level and name: opened once, since opening costs as much as reading."""
        return {
            (level, name): self.stage.array(f"level{level}/{name}")
            for level in range(self.pyramid.levels)
            for name in self._maps
        }

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def _position(self, window: Window, index: int) -> tuple[int, ...]:
        return window.index if self.planes.axis is None else (index, *window.index)

    def read(self, window: Window, index: int = 0) -> tuple[Embedding, np.ndarray]:
        """The embedding of a window that has its receipt, and which of its elements have data, (y, x) bool.

        Raises:
            SceneError: another run dropped the stage.
        """
        position = self._position(window, index)
        try:
            arrays = {n: np.asarray(self._arrays[window.level, n][position]) for n in self._maps}
        except (KeyError, ValueError, OSError):  # arrays that vanish while they are opened
            self.stage.check()
            raise
        self.stage.check()
        return Embedding({n: arrays[n] for n in self.shapes}), arrays[VALID][0]

    def write(self, window: Window, index: int, embedding: Embedding, valid: np.ndarray) -> None:
        """Keep the embedding, halved, of a window; its receipt comes last."""
        try:
            for name, values in {**embedding.arrays, VALID: valid[None]}.items():
                self._arrays[window.level, name][self._position(window, index)] = values
            self.stage.commit(window_id(window, index), {"bytes": self.window_bytes})
        except (KeyError, ValueError, OSError):
            self.stage.check()
            raise

    def touch(self) -> None:
        """Note that the embeddings were of use now, and what they take."""
        taken = len(self.stage.done()) * self.window_bytes
        self.stage.write_json(USED, {"used": time.time(), "bytes": taken})


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
