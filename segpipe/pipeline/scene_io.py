"""Where a scene's blocks come from and go to: source, ingest and prediction, with their receipts."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from segpipe.config.job import Identity
from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry
from segpipe.sources import Source, open_source
from segpipe.sources.base import Pixels, Scaling
from segpipe.sources.identity import identified
from segpipe.store.stage import Stage
from segpipe.tiling.windows import Blocks, Index, block_id

_log = logging.getLogger(__name__)
WORKER = socket.gethostname()
"""Of this process, in receipts, with its number."""

if TYPE_CHECKING:
    from segpipe.inference.block_result import BlockResult


@dataclass(frozen=True, kw_only=True)
class ScenePixels:
    """The pixels of a scene: its source as it was when it was planned, and the channels that are read."""

    uri: str
    names: tuple[str, ...]
    """Given to the bands of the source, in file order; empty: the file's own."""
    geometry: Geometry
    dtype: str
    """Of the stored pixels."""
    channels: tuple[int, ...]
    """The channels of the source that are read, in this order."""
    bands: tuple[str, ...]
    """Names of those channels; empty where the file has none."""
    scaling: tuple[Scaling, ...]
    """One per channel."""
    identity: dict[str, Any]
    """A JSON object that changes when the source does."""
    how: Identity = Identity.sampled
    """What `identity` is made of."""

    @classmethod
    def of(
        cls,
        source: Source,
        names: Sequence[str] = (),
        channels: Sequence[int] | None = None,
        bands: Sequence[str] | None = None,
        how: Identity = Identity.sampled,
    ) -> ScenePixels:
        """The pixels of an open source.

        Args:
            source: open.
            names: given to its bands.
            channels: that are read; None: all.
            bands: names of those; None: the source's.
            how: what its identity is made of.
        """
        read = tuple(range(source.count) if channels is None else channels)
        return cls(
            uri=source.uri,
            names=tuple(names),
            geometry=source.geometry,
            dtype=str(source.dtype),
            channels=read,
            bands=tuple(source.bands if bands is None else bands),
            scaling=tuple(source.scaling[c] for c in read),
            identity=identified(source.identity, how),
            how=how,
        )

    def open(self) -> Source:
        """Open the source again.

        Raises:
            SceneError: the file changed meanwhile: its pixels would go under the old one's key.
        """
        source = open_source(self.uri, band_names=self.names)
        if identified(source.identity, self.how) != self.identity:
            source.close()
            raise SceneError(f"{self.uri}: changed since it was planned; run the job again")
        return source


class SceneBlocks:
    """Reads a scene from its ingest where that is there, else from the source; writes both stages.

    Thread-safe as the engine uses it: one thread reads, one writes.
    """

    def __init__(
        self,
        pixels: ScenePixels,
        ingest: Stage | None = None,
        predict: Stage | None = None,
        attempt: int = 1,
        progress: Callable[[int], None] = lambda blocks: None,
    ) -> None:
        """Open nothing yet.

        Args:
            pixels: of the scene.
            ingest: stage that keeps them; None: the source is read in place.
            predict: stage of the labels; None: nothing is predicted.
            attempt: recorded in the receipts.
            progress: told the number of blocks finished, after each.
        """
        self.pixels = pixels
        self.ingest_stage = ingest
        self.predict_stage = predict
        self.attempt = attempt
        self.progress = progress
        self._finished = 0
        self._source: Source | None = None
        self._blocks: Blocks | None = None
        self._ingested: set[str] = set()
        self._lock = threading.Lock()
        if ingest is not None and ingest.exists:
            self.refresh()

    def refresh(self) -> None:
        """Read again which blocks are ingested."""
        stage = self.ingest_stage
        if stage is None:
            return
        blocks, done = stage.generation.blocks, stage.done()
        with self._lock:
            self._blocks, self._ingested = blocks, done

    def _open(self) -> Source:
        if self._source is None:
            self._source = self.pixels.open()
        return self._source

    def _is_ingested(self, box: Box) -> bool:
        """Whether every block that a box meets has its receipt."""
        with self._lock:
            if self._blocks is None:
                return False
            return all(block_id(i) in self._ingested for i in self._blocks.meeting(box))

    def _forget_ingest(self) -> None:
        """Another run dropped the ingest: from now on the source is read, and nothing kept."""
        with self._lock:
            self._ingested.clear()
            self._blocks = self.ingest_stage = None

    def read(self, box: Box) -> Pixels:
        """Pixels of a native box: the model's channels in the card's order, as stored."""
        stage = self.ingest_stage  # one look: the writer's thread may forget it meanwhile
        if stage is not None and self._is_ingested(box):
            try:
                values = stage.read("image", (slice(None), *box.slices))
                return Pixels(values, stage.read("valid", box.slices))
            except SceneError as error:  # dropped by another run, or damaged
                _log.warning("%s; the source is read instead", error)
            except (KeyError, ValueError, OSError):  # arrays that vanish while they are opened
                if stage.current:
                    raise
            self._forget_ingest()
        return self._open().read(box, self.pixels.channels)

    def ingest(self, index: Index, box: Box, pixels: Pixels) -> None:
        """Write a block through to the ingest, unless it is there or the source is read in place."""
        stage, blocks = self.ingest_stage, self._blocks
        if stage is None or blocks is None or block_id(index) in self._ingested:
            return
        if blocks.box(index) != box:
            return  # made by another plan, and complete before this one began
        try:
            files = stage.write("image", box.slices, pixels.values)
            files |= stage.write("valid", box.slices, pixels.valid)
            receipt = {"valid": int(pixels.valid.sum()), "elements": box.size}
            stage.commit(block_id(index), receipt, files)
        except (SceneError, KeyError, ValueError, OSError):
            if stage.current:
                raise
            self._forget_ingest()
            return
        with self._lock:
            self._ingested.add(block_id(index))

    def finish(self, result: BlockResult) -> None:
        """Write a block's labels (and scores), then its receipt.

        The receipt says, beside counts, for how many seconds the device was busy with the block, which
        process (``host:pid``) computed it, and when it was read and done (``begun``, ``time``: since 1970).

        Raises:
            SceneError: another run dropped the predictions meanwhile.
        """
        stage = self.predict_stage
        assert stage is not None
        receipt = {
            "valid": result.valid,
            "windows": result.windows,
            "skipped": result.skipped,
            "attempts": self.attempt,
            "scores": result.scores is not None,
            "uncertainty": result.uncertainty is not None,
            "seconds": round(result.seconds, 6),
            "worker": f"{WORKER}:{os.getpid()}",
            "begun": round(result.begun, 3),
            "time": round(time.time(), 3),
        }
        try:
            files = stage.write("labels", result.box.slices, result.labels)
            if result.scores is not None:
                files |= stage.write("scores", result.box.slices, result.scores)
            if result.uncertainty is not None:
                files |= stage.write("uncertainty", result.box.slices, result.uncertainty)
            if result.objects is not None:
                files |= stage.write("objects", result.box.slices, result.objects.raw)
                files |= stage.write_part(block_id(result.index), result.objects.dump())
            stage.commit(block_id(result.index), receipt, files)
        except (KeyError, ValueError, OSError):  # arrays that vanished
            stage.check()
            raise
        self._finished += 1
        self.progress(self._finished)

    def close(self) -> None:
        """Close the source."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def __enter__(self) -> SceneBlocks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def ingest_all(store: SceneBlocks, stage: Stage) -> None:
    """Stream a whole scene into its ingest: the first pass of cards that must see it as a whole."""
    store.refresh()
    layout = stage.generation.blocks
    done = stage.done()
    for index in layout.indices():
        if block_id(index) not in done:
            box = layout.box(index)
            store.ingest(index, box, store.read(box))
    store.refresh()
