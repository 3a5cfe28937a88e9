"""Where a scene's blocks come from and go to: source, ingest and prediction, with their receipts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from segpipe.boxes import Box
from segpipe.geometry import Geometry
from segpipe.plan import Blocks, Index, block_id
from segpipe.sources import Source, open_source
from segpipe.sources.base import Pixels
from segpipe.store import Stage

if TYPE_CHECKING:
    from segpipe.inference.engine import BlockResult
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
        predict: Stage | None = None,
        attempt: int = 1,
        progress: Callable[[int], None] = lambda blocks: None,
    ) -> None:
        self.uri = uri
        self.band_names = tuple(band_names)
        self.channels = channels
        self.dtype = dtype
        self.geometry = geometry
        self.ingest_stage = ingest
        self.predict_stage = predict
        self.attempt = attempt
        self.progress = progress
        self._finished = 0
        self._source: Source | None = None
        self._blocks: Blocks | None = None
        self._ingested: set[str] = set()
        self._token: str | None = None
        self._lock = threading.Lock()
        if ingest is not None and ingest.exists:
            self.refresh()

    @classmethod
    def of(
        cls,
        scene: Scene,
        attempt: int = 1,
        progress: Callable[[int], None] = lambda blocks: None,
    ) -> SceneBlocks:
        """The blocks of a prepared scene."""
        return cls(
            scene.ref.uri,
            scene.job.bands,
            scene.channels,
            scene.dtype,
            scene.geometry,
            None if scene.direct else scene.ingest,
            scene.predict,
            attempt,
            progress,
        )

    def refresh(self) -> None:
        """Read again which blocks are ingested."""
        assert self.ingest_stage is not None
        token, layout = self.ingest_stage.token, self.ingest_stage.layout
        done = self.ingest_stage.done()
        with self._lock:
            self._token, self._blocks, self._ingested = token, layout, done

    def _open(self) -> Source:
        if self._source is None:
            self._source = open_source(self.uri, band_names=self.band_names)
        return self._source

    def _is_ingested(self, box: Box) -> bool:
        """Whether every block that a box meets has its receipt."""
        if self._blocks is None:
            return False
        with self._lock:
            return all(block_id(i) in self._ingested for i in self._blocks.meeting(box))

    def read(self, box: Box) -> Pixels:
        """Pixels of a native box: the model's channels in the card's order, as stored."""
        if self.ingest_stage is not None and self._is_ingested(box):
            values = np.asarray(self.ingest_stage.array("image")[(slice(None), *box.slices)])
            valid = np.asarray(self.ingest_stage.array("valid")[box.slices])
            if self.ingest_stage.token == self._token:
                return Pixels(values, valid)
            with self._lock:  # another run dropped it meanwhile: what was read may be fill
                self._ingested.clear()
                self.ingest_stage = None
        return self._open().read(box, self.channels)

    def ingest(self, index: Index, box: Box, pixels: Pixels) -> None:
        """Write a block through to the ingest, unless it is there or the source is read in place."""
        if self.ingest_stage is None or block_id(index) in self._ingested:
            return
        if self._blocks is None or self._blocks.box(index) != box:
            return  # made by another plan, and complete before this one began
        self.ingest_stage.write("image", box.slices, pixels.values)
        self.ingest_stage.write("valid", box.slices, pixels.valid)
        receipt = {"valid": int(pixels.valid.sum()), "elements": box.size}
        self.ingest_stage.commit(block_id(index), receipt)
        with self._lock:
            self._ingested.add(block_id(index))

    def finish(self, result: BlockResult) -> None:
        """Write a block's labels (and scores), then its receipt."""
        assert self.predict_stage is not None
        self.predict_stage.write("labels", result.box.slices, result.labels)
        if result.scores is not None:
            self.predict_stage.write("scores", result.box.slices, result.scores)
        receipt = {
            "valid": result.valid,
            "windows": result.windows,
            "skipped": result.skipped,
            "attempts": self.attempt,
            "scores": result.scores is not None,
        }
        self.predict_stage.commit(block_id(result.index), receipt)
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
    layout = stage.layout
    done = stage.done()
    for index in layout.indices():
        if block_id(index) not in done:
            box = layout.box(index)
            store.ingest(index, box, store.read(box))
    store.refresh()
