"""Which blocks a scene is written in, which windows they need, and what that costs: pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.geometry.grid_map import GridMap
from segpipe.tiling.windows import BLOCK_EDGE, Blocks, Index, Lattice

REDUNDANCY_AIM = 1.15
"""`block: auto` grows blocks until forward passes over lattice windows is at most this."""


@dataclass(frozen=True)
class Plan:
    """The deterministic list of a scene's blocks and windows, and what they cost."""

    grid: GridMap
    lattice: Lattice
    blocks: Blocks
    blend: str
    workload: Workload
    passes_per_window: int = 1
    """Forward passes of test-time augmentation: 1, 4 (2D flips) or 8 (3D flips)."""

    def windows(self, index: Index) -> list[Index]:
        """Windows a block needs, in C order."""
        return list(self.lattice.windows(self.grid.model_box(self.blocks.box(index)), self.blend))

    def read_box(self, index: Index) -> Box:
        """Native elements that a block's windows are made from, and the block itself."""
        return self._read_of(self.blocks.box(index))

    def _read_of(self, block: Box) -> Box:
        model = self.grid.model_box(block)
        if model.size == 0:
            return block
        ranges = self.lattice.needed(model, self.blend)
        seen = Box(
            tuple(a.origins[r[0]] for a, r in zip(self.lattice.axes, ranges, strict=True)),
            tuple(
                min(a.origins[r[-1]] + a.window, a.size)
                for a, r in zip(self.lattice.axes, ranges, strict=True)
            ),
        )
        return block.hull(self.grid.native_box(seen))

    @cached_property
    def window_passes(self) -> int:
        """Windows computed over all blocks; each axis separately, for the grid is a product."""
        total = 1
        for axis, native in enumerate(self.grid.axes):
            rows = map(self.grid.model_box, self._rows(native))
            total *= sum(len(self.lattice.needed(row, self.blend)[axis]) for row in rows)
        return total

    def _rows(self, native: int) -> Iterator[Box]:
        """The blocks along one native axis, each as wide as the crop on the others."""
        index = [0] * len(self.grid.axes)
        for position in range(self.blocks.counts[native]):
            index[native] = position
            block = self.blocks.box(tuple(index))
            yield self.grid.crop.narrowed(native, block.start[native], block.stop[native])

    def _largest(self) -> tuple[int, int, int]:
        """Elements of the largest read, model region and block: axis by axis, the grid is a product."""
        read = model = block = 1
        for native in range(len(self.grid.axes)):
            axis = self.grid.axes.index(native)
            rows = list(self._rows(native))
            read *= max(self._read_of(row).shape[native] for row in rows)
            model *= max(self.grid.model_box(row).shape[axis] for row in rows)
            block *= max(row.shape[native] for row in rows)
        return read, model, block

    @property
    def redundancy(self) -> float:
        """Forward passes over lattice windows; 1 when no window is computed twice."""
        return self.window_passes / self.lattice.count

    @property
    def forward_passes(self) -> int:
        """Upper bound: windows without a valid element are skipped when read."""
        return self.window_passes * self.passes_per_window

    @property
    def labels_only(self) -> bool:
        """Whether only class numbers leave the device: no scores are blended, resampled or kept."""
        load = self.workload
        return self.grid.identity and self.blend == "trim" and not (load.keep_scores or load.uncertainty)

    @cached_property
    def memory(self) -> Memory:
        """Predicted peak of one worker: from the largest block, not from the scene."""
        read, model, block = self._largest()
        return predict_memory(
            self.workload,
            read=read,
            model=model,
            block=block,
            window=math.prod(self.lattice.window_shape),
            scene=math.prod(self.blocks.shape),
            labels_only=self.labels_only,
        )

    @property
    def disk(self) -> int:
        """Upper bound of the working store in bytes, before compression."""
        load = self.workload
        per_element = load.image_channels * load.image_itemsize + 1 + load.label_itemsize * (1 + load.cleanup)
        per_element += 4 * load.classes if load.keep_scores else 0
        per_element += 2 * load.uncertainty
        return math.prod(self.blocks.shape) * per_element

    def summary(self) -> dict[str, Any]:
        """What `segpipe plan` and the report show."""
        return {
            "blocks": self.blocks.count,
            "block": "x".join(map(str, self.blocks.block)),
            "windows": self.lattice.count,
            "window": "x".join(map(str, self.lattice.window_shape)),
            "forward_passes": self.forward_passes,
            "redundancy": round(self.redundancy, 4),
            "batch": self.workload.batch,
            "blend": self.blend,
            "memory_bytes": self.memory.total,
            "disk_bytes": self.disk,
        }


def make_plan(
    grid: GridMap,
    lattice: Lattice,
    workload: Workload,
    *,
    blend: str = "trim",
    block: Sequence[int] | None = None,
    memory: int = 4 * 1024**3,
    passes_per_window: int = 1,
) -> Plan:
    """The plan of a scene.

    Args:
        block: native elements, or None: chosen so that memory fits and no work is done twice.
        memory: upper bound of `Memory.total`.

    Raises:
        RequestError: the bound cannot be met; says what the smallest plan takes and why.
    """

    shared = grid.identity and blend == "trim"
    absorb = _absorbed(lattice) if shared else (0,) * len(grid.axes)

    def plan(shape: Sequence[int]) -> Plan:
        edges = [max(1, min(b, n)) for b, n in zip(shape, grid.native_shape, strict=True)]
        for axis, a in enumerate(lattice.axes):
            if shared and len(a.origins) == 1:
                edges[axis] = a.size  # one window answers for all: two blocks would compute it twice
        blocks = Blocks(grid.native_shape, tuple(edges), absorb)
        return Plan(grid, lattice, blocks, blend, workload, passes_per_window)

    if block is not None:
        chosen = plan(block)
        check_memory(chosen, memory)
        return chosen
    candidates = [plan(shape) for shape in _block_sizes(grid, lattice)]
    fitting = [p for p in candidates if p.memory.total <= memory]
    if not fitting:
        check_memory(candidates[0], memory)
    aim = BLOCK_EDGE[len(grid.native_shape)]
    for p in fitting:
        covered = zip(p.blocks.block, grid.native_shape, strict=True)
        large = all(b >= min(aim, n) for b, n in covered)
        if large and p.redundancy <= REDUNDANCY_AIM:
            return p
    return min(
        fitting,
        key=lambda p: (p.redundancy > REDUNDANCY_AIM, p.redundancy, -math.prod(p.blocks.block)),
    )


def _absorbed(lattice: Lattice) -> tuple[int, ...]:
    """How long a rest at the scene's end may be to be answered by the windows before it."""
    return tuple((a.window - (a.cuts[1] - a.cuts[0])) // 2 if len(a.origins) > 1 else 0 for a in lattice.axes)


def _block_sizes(grid: GridMap, lattice: Lattice) -> Iterator[tuple[int, ...]]:
    """Growing multiples of the lattice's step, in native elements, up to the whole scene."""
    ndim = len(grid.axes)
    steps = [0] * ndim
    for axis, native in enumerate(grid.axes):
        a = lattice.axes[axis]
        step = a.cuts[1] - a.cuts[0]
        steps[native] = max(1, math.ceil(step * grid.ratio[axis]))
    k = 1
    while True:
        shape = tuple(min(s * k, n) for s, n in zip(steps, grid.native_shape, strict=True))
        yield shape
        if shape == grid.native_shape:
            return
        k += 1 if k < 16 else k // 4


def check_memory(plan: Plan, bound: int) -> None:
    """Raises RequestError where a plan needs more bytes than the bound; says for what."""
    if plan.memory.total <= bound:
        return
    parts = plan.memory
    mib = 1024**2
    reasons = ", ".join(f"{name} {getattr(parts, name) // mib} MiB" for name in vars(parts))
    raise RequestError(
        f"tiling.memory: found {bound // mib} MiB; blocks of {'x'.join(map(str, plan.blocks.block))} "
        f"need {parts.total // mib} MiB ({reasons}); give more memory, or a smaller window, block or batch"
    )


WINDOWS_ALIVE = 5
"""Batches alive at once: two queued, one being filled, one computed, one being stitched."""
IN_FLIGHT = 3
"""Blocks alive at once in the engine: one read ahead, one computed, one written."""
CLEANUP_BYTES = 20
"""Per element: two label maps, components of 32 bits, masks (measured, and rounded up)."""
LIBRARY_BYTES = 900 * 1024**2


@dataclass(frozen=True)
class Workload:
    """What the plan must know of the image and the model to count bytes."""

    image_channels: int
    """Channels stored at ingest."""
    image_itemsize: int
    channels: int
    """Channels the model sees."""
    classes: int
    label_itemsize: int
    batch: int
    keep_scores: bool
    activation_bytes: int = 400
    """Forward pass, bytes per element of a batch (the card's, or an estimate for U-Nets)."""
    uncertainty: int = 0
    """Channels of the uncertainty map; 0: none."""
    source_cache: int = 0
    """Bytes that the source's reader keeps of what it decoded."""
    cleanup: bool = False
    """Whether the card cleans up the finished label map, which is read whole for it."""


@dataclass(frozen=True)
class Memory:
    """Predicted peak of one worker in bytes, with its reasons."""

    libraries: int
    """Python, torch and their caches."""
    read: int
    """Blocks with their margins, as stored, with validity and normalised; the reader's cache."""
    windows: int
    """Batches waiting for the model."""
    forward: int
    """Activations (an estimate)."""
    scores: int
    """Merged labels or scores of the blocks in flight, and of the one being resampled."""
    cleanup: int
    """The whole label map and its components, where the card cleans up; after the forward passes."""

    @property
    def total(self) -> int:
        """The larger of predicting and cleaning up, which follow one another."""
        predicting = self.read + self.windows + self.forward + self.scores
        return self.libraries + max(predicting, self.cleanup)


def predict_memory(
    load: Workload,
    *,
    read: int,
    model: int,
    block: int,
    window: int,
    scene: int,
    labels_only: bool,
) -> Memory:
    """The peak of one worker: from its largest block, not from the scene (but for the clean-up).

    Args:
        load: what is stored and what the model sees.
        read: elements of the largest read, block and margins, native grid.
        model: elements of the largest region of the model grid that a block needs.
        block: elements of the largest block.
        window: elements of a window.
        scene: elements of the scene.
        labels_only: whether only class numbers leave the device.
    """
    per_read = load.image_channels * load.image_itemsize + 1 + 8 * load.channels
    per_model = load.label_itemsize if labels_only else 4 * (load.classes + 2)
    per_block = load.label_itemsize + (20 if load.uncertainty else 0)
    if load.keep_scores:
        per_block += 4 * load.classes
    return Memory(
        libraries=LIBRARY_BYTES,
        read=IN_FLIGHT * read * per_read + load.source_cache,
        windows=WINDOWS_ALIVE * load.batch * window * 4 * load.channels,
        forward=load.batch * window * (load.activation_bytes + 8 * load.classes),
        scores=IN_FLIGHT * (model * per_model + block * per_block) + (0 if labels_only else 16 * block),
        cleanup=CLEANUP_BYTES * scene if load.cleanup else 0,
    )
