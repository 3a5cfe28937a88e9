"""Where a scene's blocks come from and go to: source, ingest and prediction, with their receipts."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from segpipe.boxes import Box
from segpipe.errors import SceneError
from segpipe.geometry import Geometry
from segpipe.lattice import Index
from segpipe.plan import Blocks, block_id
from segpipe.sources import Source, open_source
from segpipe.sources.base import Pixels
from segpipe.store import Stage

WORKER = socket.gethostname()
"""Of this process, in receipts, with its number."""

if TYPE_CHECKING:
    from segpipe.inference.results import BlockResult
    from segpipe.scene import Scene


class SceneBlocks:
    """Reads a scene from its ingest where that is there, else from the source; writes both stages.

    Thread-safe as the engine uses it: one thread reads, one writes.
    """

    def __init__(
        self,
        uri: str,
        band_names: Sequence[str],
        channels: tuple[int, ...],
        dtype: str,
        geometry: Geometry,
        ingest: Stage | None,
        identity: dict[str, Any] | None = None,
        predict: Stage | None = None,
        attempt: int = 1,
    ) -> None:
        self.uri = uri
        self.band_names = tuple(band_names)
        self.channels = channels
        self.dtype = dtype
        self.geometry = geometry
        self.ingest_stage = ingest
        self.identity = identity
        self.predict_stage = predict
        self.attempt = attempt
        self._source: Source | None = None
        self._blocks: Blocks | None = None
        self._ingested: set[str] = set()
        self._lock = threading.Lock()
        if ingest is not None and ingest.exists:
            self.refresh()

    @classmethod
    def of(cls, scene: Scene, attempt: int = 1) -> SceneBlocks:
        """The blocks of a prepared scene."""
        return cls(
            scene.ref.uri,
            scene.job.bands,
            scene.channels,
            scene.dtype,
            scene.geometry,
            None if scene.direct else scene.ingest,
            scene.identity,
            scene.predict,
            attempt,
        )

    def refresh(self) -> None:
        """Read again which blocks are ingested."""
        stage = self.ingest_stage
        if stage is None:
            return
        blocks, done = stage.generation.blocks, stage.done()
        with self._lock:
            self._blocks, self._ingested = blocks, done

    def _open(self) -> Source:
        """The source, held against what was planned.

        Raises:
            SceneError: the file changed meanwhile: its pixels would go under the old one's key.
        """
        if self._source is None:
            source = open_source(self.uri, band_names=self.band_names)
            if self.identity is not None and source.identity != self.identity:
                source.close()
                raise SceneError(f"{self.uri}: changed since it was planned; run the job again")
            self._source = source
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
                values = np.asarray(stage.array("image")[(slice(None), *box.slices)])
                pixels = Pixels(values, np.asarray(stage.array("valid")[box.slices]))
            except (KeyError, ValueError, OSError):  # arrays that vanish while they are opened
                if stage.current:
                    raise
            else:
                if stage.current:
                    return pixels
            self._forget_ingest()
        return self._open().read(box, self.channels)

    def ingest(self, index: Index, box: Box, pixels: Pixels) -> None:
        """Write a block through to the ingest, unless it is there or the source is read in place."""
        stage, blocks = self.ingest_stage, self._blocks
        if stage is None or blocks is None or block_id(index) in self._ingested:
            return
        if blocks.box(index) != box:
            return  # made by another plan, and complete before this one began
        try:
            stage.write("image", box.slices, pixels.values)
            stage.write("valid", box.slices, pixels.valid)
            stage.commit(block_id(index), {"valid": int(pixels.valid.sum()), "elements": box.size})
        except (KeyError, ValueError, OSError):
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
            stage.write("labels", result.box.slices, result.labels)
            if result.scores is not None:
                stage.write("scores", result.box.slices, result.scores)
            if result.uncertainty is not None:
                stage.write("uncertainty", result.box.slices, result.uncertainty)
            if result.objects is not None:
                stage.write("objects", result.box.slices, result.objects.raw)
                stage.write_part(block_id(result.index), result.objects.dump())
            stage.commit(block_id(result.index), receipt)
        except (KeyError, ValueError, OSError):  # arrays that vanished
            stage.check()
            raise

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
