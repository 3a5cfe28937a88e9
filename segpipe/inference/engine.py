"""Read → normalise → forward → stitch → write, overlapped, for some blocks of one scene.

A thread reads and prepares batches ahead, the caller's thread runs the network and stitches, another
thread writes. Batches run on across blocks, so only the last of a call is padded. All queues are
bounded; an error anywhere ends the call with its cause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Protocol

import numpy as np
import torch

from segpipe.boxes import Box
from segpipe.errors import StoppedError
from segpipe.grid import onto_model, onto_native
from segpipe.inference.labels import label_dtype
from segpipe.inference.merge import GaussianScores, Merger, TrimLabels, TrimScores
from segpipe.inference.normalise import Normaliser
from segpipe.inference.overlap import Prefetch, Writer
from segpipe.models.base import SegmentationModel
from segpipe.models.card import Card, Interpolation
from segpipe.plan import Index, Plan
from segpipe.sources.base import Pixels

READ_AHEAD = 2
"""Batches prepared ahead of the network."""
WRITE_BEHIND = 2
"""Writes that may wait."""


class DeviceMemoryError(Exception):
    """The device ran out of memory at this batch size; the scene restarts under half of it."""

    def __init__(self, batch: int) -> None:
        super().__init__(f"out of device memory with {batch} windows in a batch")
        self.batch = batch


@dataclass
class BlockResult:
    """What the engine hands to the sink for one block."""

    index: Index
    box: Box
    labels: np.ndarray
    """Class values over the box, native grid; the plan's nodata where the scene is not valid."""
    scores: np.ndarray | None
    """(k, …) float32 probabilities, where they were asked for."""
    valid: int
    """Number of valid elements."""
    windows: int
    """Windows computed for this block."""
    skipped: int
    """Windows without a valid element, not computed."""


class BlockStore(Protocol):
    """Where blocks come from and go to."""

    def read(self, box: Box) -> Pixels:
        """Pixels of a native box, the model's channels in the card's order."""
        ...

    def ingest(self, index: Index, box: Box, pixels: Pixels) -> None:
        """Keep a block as read (write-through); called in the writer's thread."""
        ...

    def finish(self, result: BlockResult) -> None:
        """Keep a block's result and commit it; called in the writer's thread."""
        ...


@dataclass
class Timings:
    """Seconds, by thread: they overlap, so they do not add up to the wall time."""

    wall: float = 0.0
    read: float = 0.0
    forward: float = 0.0
    stitch: float = 0.0
    write: float = 0.0
    passes: int = 0
    """Windows forwarded, without padding and test-time views."""


@dataclass
class _Block:
    """A block between its first read and its last write."""

    index: Index
    box: Box
    valid: np.ndarray
    merger: Merger | None = None
    score_merger: TrimScores | None = None
    windows: int = 0
    skipped: int = 0


@dataclass
class _Item:
    block: _Block
    window: Index | None
    last: bool


@dataclass
class _Batch:
    tensor: torch.Tensor
    items: list[_Item] = field(default_factory=list)
    used: int = 0


class Engine:
    """One scene's engine: plan, card, normaliser, network and store, bound together."""

    def __init__(
        self,
        plan: Plan,
        card: Card,
        normaliser: Normaliser,
        model: SegmentationModel,
        store: BlockStore,
        nodata: int,
        tta: bool = False,
    ) -> None:
        self.plan = plan
        self.card = card
        self.normaliser = normaliser
        self.model = model
        self.store = store
        self.nodata = nodata
        self.views = flip_views(len(plan.grid.axes)) if tta else [()]
        self.values = np.array(card.values, dtype=label_dtype(card))
        self.direct = plan.grid.identity and plan.blend == "trim"
        self.timings = Timings()

    def run(self, blocks: Sequence[Index], should_stop: Callable[[], bool]) -> Timings:
        """Compute blocks and hand each to the store.

        Args:
            blocks: in the plan's order, for reads that follow one another.
            should_stop: asked before every block.

        Raises:
            StoppedError: `should_stop` said so; the blocks finished so far are committed.
            DeviceMemoryError: the accelerator is too small for the batch.
        """
        began = time.perf_counter()
        with Writer(WRITE_BEHIND) as writer:
            source = self._batches(blocks, writer, should_stop)
            with Prefetch(source, READ_AHEAD) as batches:
                self._consume(iter(batches), writer)
        self.timings.wall = time.perf_counter() - began
        return self.timings

    def _consume(self, batches: Iterator[_Batch], writer: Writer) -> None:
        """Keep one batch computing on the device while the one before is stitched."""
        pending: tuple[_Batch, _Answer] | None = None
        try:
            for batch in batches:
                begun = time.perf_counter()
                answer = self._forward(batch) if batch.used else None
                self.timings.forward += time.perf_counter() - begun
                if pending is not None:
                    self._stitch(*pending, writer)
                    pending = None
                if answer is None:
                    self._stitch(batch, _Answer(None, None), writer)
                else:
                    pending = (batch, answer)
            if pending is not None:
                self._stitch(*pending, writer)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(self.plan.workload.batch) from error

    # -- read ---------------------------------------------------------------------------------

    def _batches(
        self, blocks: Sequence[Index], writer: Writer, should_stop: Callable[[], bool]
    ) -> Iterator[_Batch]:
        batch = self._empty()
        for index in blocks:
            if should_stop():
                raise StoppedError("the run was asked to stop; run it again to resume")
            for item, window in self._open(index, writer):
                if window is not None:
                    batch.tensor[batch.used].copy_(torch.from_numpy(window))
                    batch.used += 1
                batch.items.append(item)
                if batch.used == self.plan.workload.batch:
                    yield batch
                    batch = self._empty()
        if batch.items:
            yield batch

    def _empty(self) -> _Batch:
        shape = (self.plan.workload.batch, self.card.channels, *self.plan.lattice.window_shape)
        pinned = self.model.device.type == "cuda"
        return _Batch(torch.zeros(shape, dtype=torch.float32, pin_memory=pinned))

    def _open(self, index: Index, writer: Writer) -> Iterator[tuple[_Item, np.ndarray | None]]:
        """Read a block once and cut its windows."""
        begun = time.perf_counter()
        plan = self.plan
        box, read_box = plan.blocks.box(index), plan.read_box(index)
        pixels = self.store.read(read_box)
        inner = box.within(read_box)
        own = Pixels(pixels.values[(slice(None), *inner)], pixels.valid[inner])
        writer.submit(lambda: self.store.ingest(index, box, own))
        normal = self.normaliser.elementwise(pixels)
        block = self._block(index, box, own.valid)
        wanted = []
        for window in plan.windows(index):
            real = plan.lattice.window(window).intersect(Box.whole(plan.lattice.shape))
            native = plan.grid.native_box(real) if not plan.grid.identity else real
            if pixels.valid[native.within(read_box)].any():
                wanted.append((window, real, native))
            else:
                block.skipped += 1
        block.windows = len(wanted)
        self.timings.read += time.perf_counter() - begun
        if not wanted:
            yield _Item(block, None, last=True), None
        for n, (window, real, native) in enumerate(wanted, start=1):
            begun = time.perf_counter()
            values = self._window(normal, read_box, real, native)
            self.timings.read += time.perf_counter() - begun
            yield _Item(block, window, last=n == len(wanted)), values

    def _window(self, normal: np.ndarray, read_box: Box, real: Box, native: Box) -> np.ndarray:
        """One window on the model grid, padded at the scene's trailing edge."""
        values = normal[(slice(None), *native.within(read_box))]
        if not self.plan.grid.identity:
            nearest = self.card.input.image_resampling is Interpolation.nearest
            values = onto_model(values, native, self.plan.grid, real, nearest=nearest)
        if self.normaliser.has_window_steps:
            values = self.normaliser.window(np.ascontiguousarray(values))
        shape = self.plan.lattice.window_shape
        if values.shape[1:] != shape:
            rest = [(0, n - m) for n, m in zip(shape, values.shape[1:], strict=True)]
            modes = {"zero": "constant", "edge": "edge", "symmetric": "symmetric"}
            mode: Any = modes[self.card.window.padding]
            values = np.pad(values, [(0, 0), *rest], mode=mode)
        return np.ascontiguousarray(values)

    def _block(self, index: Index, box: Box, valid: np.ndarray) -> _Block:
        plan = self.plan
        region = plan.grid.model_box(box)
        block = _Block(index, box, valid)
        classes = len(self.card.classes)
        if plan.blend == "gaussian":
            block.merger = GaussianScores(region, plan.lattice, classes)
        elif self.direct:
            block.merger = TrimLabels(region, plan.lattice, "uint8" if classes <= 256 else "int32")
            if plan.workload.keep_scores:
                block.score_merger = TrimScores(region, plan.lattice, classes)
        else:
            block.merger = TrimScores(region, plan.lattice, classes)
        return block

    # -- forward ------------------------------------------------------------------------------

    @torch.inference_mode()
    def _forward(self, batch: _Batch) -> _Answer:
        x = batch.tensor.to(self.model.device, non_blocking=True)
        scores = self._probabilities(x)
        labels = None
        if self.direct:
            labels = scores.argmax(1).to(torch.uint8 if scores.shape[1] <= 256 else torch.int32)
        keep = not self.direct or self.plan.workload.keep_scores
        self.timings.passes += batch.used
        return _Answer(_to_host(labels), _to_host(scores) if keep else None)

    def _probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over the test-time views of what the network says, as probabilities (n, k, …)."""
        total: torch.Tensor | None = None
        for view in self.views:
            out = self.model(x.flip(view) if view else x)
            p = activate(out, self.card.output.activation)
            p = p.flip(view) if view else p
            total = p if total is None else total + p
        assert total is not None
        return total / len(self.views) if len(self.views) > 1 else total

    # -- stitch and write ---------------------------------------------------------------------

    def _stitch(self, batch: _Batch, answer: _Answer, writer: Writer) -> None:
        begun = time.perf_counter()
        labels, scores = answer.wait()
        self.timings.forward += time.perf_counter() - begun
        begun = time.perf_counter()
        position = 0
        for item in batch.items:
            block = item.block
            if item.window is not None:
                assert block.merger is not None
                values = labels if self.direct else scores
                assert values is not None
                block.merger.aggregate(item.window, values[position])
                if block.score_merger is not None:
                    assert scores is not None
                    block.score_merger.aggregate(item.window, scores[position])
                position += 1
            if item.last:
                self._finish(block, writer)
        self.timings.stitch += time.perf_counter() - begun

    def _finish(self, block: _Block, writer: Writer) -> None:
        """Onto the native grid, to class values, to the writer."""
        assert block.merger is not None
        merged = block.merger.finalize()
        scores = block.score_merger.finalize() if block.score_merger else None
        if self.direct:
            channel = merged
        elif self.plan.grid.identity:
            scores, channel = merged, merged.argmax(0)
        else:
            channel, scores = self._native(merged, block)
        labels = self.values[channel]
        labels[~block.valid] = self.nodata
        block.merger = block.score_merger = None
        result = BlockResult(
            block.index,
            block.box,
            labels,
            scores if self.plan.workload.keep_scores else None,
            int(block.valid.sum()),
            block.windows,
            block.skipped,
        )

        def write() -> None:
            begun = time.perf_counter()
            self.store.finish(result)
            self.timings.write += time.perf_counter() - begun

        writer.submit(write)

    def _native(self, merged: np.ndarray, block: _Block) -> tuple[np.ndarray, np.ndarray | None]:
        """Resample scores class by class, keeping only the best: (channel numbers, scores)."""
        plan = self.plan
        inside = block.box.intersect(plan.grid.crop)
        region = plan.grid.model_box(block.box)
        channel = np.zeros(block.box.shape, np.uint8 if len(merged) <= 256 else np.int32)
        keep = np.zeros((len(merged), *block.box.shape), np.float32)[
            : len(merged) if plan.workload.keep_scores else 0
        ]
        if inside.size == 0:
            return channel, keep if len(keep) else None
        nearest = self.card.input.score_resampling is Interpolation.nearest
        here = inside.within(block.box)
        best: np.ndarray | None = None
        for k in range(len(merged)):
            plane = onto_native(merged[k : k + 1], region, plan.grid, inside, nearest=nearest)[0]
            if len(keep):
                keep[k][here] = plane
            if best is None:
                best = plane
                continue
            better = plane > best
            channel[here][better] = k
            np.copyto(best, plane, where=better)
        return channel, keep if len(keep) else None


@dataclass
class _Answer:
    """What a batch gave, on its way to the host."""

    labels: tuple[torch.Tensor, torch.cuda.Event | None] | None
    scores: tuple[torch.Tensor, torch.cuda.Event | None] | None

    def wait(self) -> tuple[np.ndarray | None, np.ndarray | None]:
        """As arrays on the host."""
        return _arrived(self.labels), _arrived(self.scores)


def _to_host(tensor: torch.Tensor | None) -> tuple[torch.Tensor, torch.cuda.Event | None] | None:
    """Start the copy to pinned memory right behind the kernels, so that it never waits for the next."""
    if tensor is None or tensor.device.type != "cuda":
        return None if tensor is None else (tensor, None)
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def _arrived(pending: tuple[torch.Tensor, torch.cuda.Event | None] | None) -> np.ndarray | None:
    if pending is None:
        return None
    tensor, event = pending
    if event is not None:
        event.synchronize()
    return tensor.numpy()


def activate(out: torch.Tensor, activation: str) -> torch.Tensor:
    """Network output (n, k, …) as float32 probabilities of each class."""
    out = out.float()
    if activation == "softmax":
        return out.softmax(1)
    if activation == "sigmoid":
        foreground = out.sigmoid()
        return torch.cat([1 - foreground, foreground], 1)
    return out


def flip_views(ndim: int) -> list[tuple[int, ...]]:
    """Every set of spatial axes of an (n, c, …) tensor, the empty one first."""
    axes = range(2, 2 + ndim)
    return [view for n in range(ndim + 1) for view in combinations(axes, n)]
