"""Read → normalise → forward → stitch → write, overlapped, for some blocks of one scene.

A thread reads and prepares batches ahead, the caller's thread runs the network and stitches, another
thread writes. Batches run on across blocks, so only the last of a call is padded. All queues are
bounded; an error anywhere ends the call with its cause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch

from segpipe.config.card import Card, Interpolation
from segpipe.errors import DeviceMemoryError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.grid_map import onto_model
from segpipe.inference.block_result import (
    BlockResult,
    BlockStore,
    ForwardResult,
    Stopwatch,
    Timings,
    entropy,
    flip_views,
    to_host,
)
from segpipe.inference.dense_crf import dense_crf
from segpipe.inference.merge import GaussianScores, Merger, NativeAnswer, Trim, native_answer
from segpipe.inference.normalise import Normaliser, padded
from segpipe.inference.object_merger import ObjectMerger, masked
from segpipe.inference.queues import Prefetch, Writer
from segpipe.models.base import ObjectModel, SegmentationModel
from segpipe.models.network import activate, all_finite, best_class
from segpipe.process.allocator import release
from segpipe.sources.base import Pixels
from segpipe.tiling.plan import Plan
from segpipe.tiling.windows import Index, block_id

READ_AHEAD = 2
"""Batches prepared ahead of the network."""
WRITE_BEHIND = 2
"""Writes that may wait."""


@dataclass
class _Block:
    """A block between its first read and its last write."""

    index: Index
    box: Box
    valid: np.ndarray
    begun: float
    merger: Merger | ObjectMerger | None = None
    windows: int = 0
    skipped: int = 0
    seconds: float = 0.0


@dataclass
class _Item:
    block: _Block
    window: Index | None
    last: bool
    valid: np.ndarray | None = None
    """Over the window, for object models: what is not valid is no object's."""


@dataclass
class _Batch:
    tensor: torch.Tensor
    items: list[_Item] = field(default_factory=list)
    used: int = 0
    watch: Stopwatch | None = None
    """Of its forward pass."""


class Engine:
    """One scene's engine: plan, card, normaliser, network and store, bound together."""

    def __init__(
        self,
        plan: Plan,
        card: Card,
        normaliser: Normaliser,
        model: SegmentationModel | ObjectModel,
        store: BlockStore,
        tta: bool = False,
    ) -> None:
        self.plan = plan
        self.card = card
        self.normaliser = normaliser
        self.model = model
        self.store = store
        self.views = flip_views(card.mirror) if tta else [()]
        self.values = np.array(card.values, dtype=card.label_dtype)
        self.labels_only = plan.labels_only
        self.finds_objects = card.output.kind != "semantic"
        self.several = plan.workload.uncertainty > 0 and (tta or plan.blend != "trim")
        """Whether an element has several answers, whose disagreement is wanted."""
        self.timings = Timings()

    def run(
        self,
        blocks: Sequence[Index],
        check_stop: Callable[[], None] = lambda: None,
        is_done: Callable[[Index], bool] = lambda index: False,
    ) -> Timings:
        """Compute blocks and hand each to the store.

        Args:
            blocks: in the plan's order, for reads that follow one another.
            check_stop: called before every block; raises StoppedError where the run is to stop.
            is_done: asked just before a block is read: whether somebody else computed it meanwhile.

        Raises:
            StoppedError: as `check_stop`; the blocks finished so far are committed.
            DeviceMemoryError: the accelerator is too small for the batch.
        """
        began = time.perf_counter()
        with Writer(WRITE_BEHIND) as writer:
            source = self._batches(blocks, writer, check_stop, is_done)
            with Prefetch(source, READ_AHEAD) as batches:
                self._consume(iter(batches), writer)
        self.timings.wall = time.perf_counter() - began
        return self.timings

    def _consume(self, batches: Iterator[_Batch], writer: Writer) -> None:
        """Keep one batch computing on the device while the one before is stitched."""
        pending: tuple[_Batch, ForwardResult] | None = None
        try:
            for batch in batches:
                begun = time.perf_counter()
                answer = self._forward(batch) if batch.used else None
                self.timings.forward += time.perf_counter() - begun
                if pending is not None:
                    self._stitch(*pending, writer)
                    pending = None
                if answer is None:
                    self._stitch(batch, ForwardResult(None, None, None), writer)
                else:
                    pending = (batch, answer)
            if pending is not None:
                self._stitch(*pending, writer)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(self.plan.workload.batch) from error

    # -- read ---------------------------------------------------------------------------------

    def _batches(
        self,
        blocks: Sequence[Index],
        writer: Writer,
        check_stop: Callable[[], None],
        is_done: Callable[[Index], bool],
    ) -> Iterator[_Batch]:
        torch.set_num_threads(1)  # this thread's own: its sums must not depend on the machine
        batch = self._empty()
        for index in blocks:
            check_stop()
            if is_done(index):
                continue
            for item, window in self._open(index, writer):
                if window is None:  # a block without a valid element has nothing to wait for
                    yield _Batch(torch.empty(0), [item])
                    continue
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
        begun, now = time.perf_counter(), time.time()
        plan = self.plan
        box, read_box = plan.blocks.box(index), plan.read_box(index)
        try:
            pixels = self.store.read(read_box)
        except SceneError as error:
            raise SceneError(f"block {block_id(index)}: {error}") from error
        inner = box.within(read_box)
        own = Pixels(pixels.values[(slice(None), *inner)], pixels.valid[inner])
        writer.submit(lambda: self.store.ingest(index, box, own))
        normal = self.normaliser.elementwise(pixels)
        block = _Block(index, box, own.valid.copy(), now)  # a view would keep the whole read alive
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
            valid = None
            if self.finds_objects:  # what is padded is not valid
                valid = padded(pixels.valid[real.within(read_box)], plan.lattice.window_shape)
            self.timings.read += time.perf_counter() - begun
            yield _Item(block, window, last=n == len(wanted), valid=valid), values

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
            values = padded(values, shape, self.card.window.padding)
        return np.ascontiguousarray(values)

    # -- forward ------------------------------------------------------------------------------

    @torch.inference_mode()
    def _forward(self, batch: _Batch) -> ForwardResult:
        batch.watch = Stopwatch(self.model.device)
        try:
            return self._answer(batch)
        finally:
            batch.watch.stop()

    def _answer(self, batch: _Batch) -> ForwardResult:
        on_cpu = self.model.device.type == "cpu"  # there a batch is computed one by one
        x = batch.tensor[: batch.used] if on_cpu else batch.tensor.to(self.model.device, non_blocking=True)
        if self.finds_objects:
            self.timings.passes += batch.used
            found = cast(ObjectModel, self.model).objects(x[: batch.used])
            return ForwardResult(None, None, None, found)
        scores = self._probabilities(x)
        labels = best_class(scores) if self.labels_only else None
        self.timings.passes += batch.used
        finite = to_host(all_finite(scores[: batch.used]))
        return ForwardResult(to_host(labels), None if self.labels_only else to_host(scores), finite)

    def _probabilities(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over the test-time views of what the network says, as probabilities (n, k, …).

        One channel more where several answers are compared: the mean of their entropies.
        """
        total: torch.Tensor | None = None
        for view in self.views:
            p = activate(self._scores(x.flip(view) if view else x), self.card.output.activation)
            p = p.flip(view) if view else p
            if self.card.output.crf is not None:
                crf = self.card.output.crf.model_dump()
                p = torch.stack([dense_crf(q, image, **crf) for q, image in zip(p, x, strict=True)])
            if self.several:
                p = torch.cat([p, entropy(p)], 1)
            total = p if total is None else total + p
        assert total is not None
        return total / len(self.views) if len(self.views) > 1 else total

    def _scores(self, x: torch.Tensor) -> torch.Tensor:
        """The network's output; on a CPU window by window, where a batch saves nothing.

        A window's place in a batch changes the last bits of some matrix products there.
        """
        model = cast(SegmentationModel, self.model)
        if x.device.type == "cpu" and len(x) > 1:
            return torch.cat([model(window) for window in x.split(1)])
        return model(x)

    # -- stitch and write ---------------------------------------------------------------------

    def _stitch(self, batch: _Batch, answer: ForwardResult, writer: Writer) -> None:
        begun = time.perf_counter()
        labels, scores, finite = answer.wait()
        if not finite:
            raise SceneError(
                f"block {block_id(batch.items[0].block.index)}: the model {self.card.name!r} gave scores "
                "that are no numbers (NaN or infinite): a scene of one value, a precision that overflows, or "
                "broken weights"
            )
        self.timings.forward += time.perf_counter() - begun
        begun = time.perf_counter()
        each = batch.watch.seconds / batch.used if batch.watch else 0.0
        position = 0
        for item in batch.items:
            block = item.block
            if item.window is not None:
                merger = self._merger(block)
                if isinstance(merger, ObjectMerger):
                    assert answer.objects is not None and item.valid is not None
                    merger.aggregate(item.window, masked(answer.objects[position], item.valid))
                else:
                    values = labels if self.labels_only else scores
                    assert values is not None
                    merger.aggregate(item.window, values[position])
                block.seconds += each
                position += 1
            if item.last:
                self._finish(block, writer)
        self.timings.stitch += time.perf_counter() - begun

    def _merger(self, block: _Block) -> Merger | ObjectMerger:
        """A block's merger, made when its first window is stitched."""
        if block.merger is None:
            plan, classes = self.plan, len(self.card.classes)
            region = plan.grid.model_box(block.box)
            if self.finds_objects:
                block.merger = ObjectMerger(block.box, plan.lattice, self.card)
            elif self.labels_only:
                block.merger = Trim(region, plan.lattice, "uint8" if classes <= 256 else "int32")
            else:
                channels = classes + self.several
                if plan.blend == "gaussian":
                    block.merger = GaussianScores(region, plan.lattice, channels)
                else:
                    block.merger = Trim(region, plan.lattice, "float32", channels)
        return block.merger

    def _finish(self, block: _Block, writer: Writer) -> None:
        """Onto the native grid, to class values, to the writer."""
        merger = self._merger(block)
        answer, objects = NativeAnswer(np.zeros(0), None, None), None
        if isinstance(merger, ObjectMerger):
            labels, objects = merger.finalize()
        else:
            merged = merger.finalize()
            answer = NativeAnswer(merged, None, None)
            if not self.labels_only:
                nearest = self.card.input.score_resampling is Interpolation.nearest
                answer = native_answer(merged, len(self.card.classes), self.plan, block.box, nearest)
            labels = self.values[answer.channel]
        labels[~block.valid] = self.card.nodata
        block.merger = None
        result = BlockResult(
            block.index,
            block.box,
            labels,
            answer.scores,
            answer.uncertainty,
            objects,
            int(block.valid.sum()),
            block.windows,
            block.skipped,
            block.seconds,
            block.begun,
        )

        def write() -> None:
            begun = time.perf_counter()
            self.store.finish(result)
            release()
            self.timings.write += time.perf_counter() - begun

        writer.submit(write)
