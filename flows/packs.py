"""Many small scenes: several to a task run, so that the server is told of minutes, not of milliseconds.

The policy: a run of at most `UNPACKED` scenes has task runs for each. Of more scenes, small ones are done
in packs that take about `compute.batch_minutes`; large ones (`segpipe_tasks.scenes.LARGE`) have batches of
blocks of that length. So there are about three task runs at most for each such batch of work, however many
scenes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from prefect.exceptions import Pause
from prefect.futures import PrefectFuture

from segpipe.errors import StoppedError
from segpipe.lake.ledger import Receipts
from segpipe.sources import SceneRef
from segpipe.tables.record import SceneRecord
from segpipe_flows.dispatch import Dispatch, ahead
from segpipe_tasks.scenes import do_scenes

UNPACKED = 32
"""Scenes of a run up to which each has task runs of its own."""
FIRST = 4
"""Scenes of a pack before any has been timed."""
GROWTH = 4
"""A pack is at most so many times larger than the largest that was timed."""
MOST = 256
"""Scenes of one pack."""


@dataclass(frozen=True)
class _Pack:
    refs: list[SceneRef]
    future: PrefectFuture[Any]


class Packs:
    """Works through scenes, packing small ones."""

    def __init__(
        self, dispatch: Dispatch, receipts: Callable[[Sequence[SceneRef]], Receipts] | None = None
    ) -> None:
        self.dispatch = dispatch
        self.receipts = receipts
        """Of a scan's scenes, written as they are done."""
        self._seconds = 0.0
        """Of the scenes timed."""
        self._scenes = 0
        self._largest = 0
        """Pack that was timed."""

    def scenes(self, refs: Iterable[SceneRef]) -> Iterator[SceneRecord]:
        """Work through scenes; what became of each. Large ones come after the small ones of their pack.

        Raises:
            StoppedError: the flow run was cancelled.
        """
        rest = iter(refs)
        first = list(islice(rest, UNPACKED + 1))
        refs = chain(first, rest)
        job = self.dispatch.job
        if len(first) <= UNPACKED or job.prompts.asked:
            yield from self.dispatch.scenes(refs)
            return
        packs = (self._submit(pack) for pack in self._packs(refs))
        for pack in ahead(packs, job.compute.workers):
            yield from self._records(pack)

    def _packs(self, refs: Iterator[SceneRef]) -> Iterator[list[SceneRef]]:
        while pack := list(islice(refs, self._size())):
            yield pack

    def _size(self) -> int:
        """Scenes of the next pack, so that it takes as long as a batch."""
        if not self._scenes:
            return FIRST
        wanted = int(60 * self.dispatch.job.compute.batch_minutes * self._scenes / max(self._seconds, 1e-6))
        return max(1, min(wanted, GROWTH * self._largest, MOST))

    def _submit(self, refs: list[SceneRef]) -> _Pack:
        dispatch = self.dispatch
        parameters = {"resolved": dispatch.resolved, "refs": refs, "run": dispatch.run}
        parameters |= {"stop": dispatch.stop, "receipts": self.receipts(refs) if self.receipts else None}
        parameters |= {"first": refs[0].name, "more": len(refs) - 1}
        dispatch.take_place()
        future = dispatch.submit_batch(do_scenes, parameters)
        begun = time.monotonic()

        def ended(future: PrefectFuture[Any]) -> None:
            try:
                future.wait()  # it has ended: this only takes its state
                if future.state.is_completed():
                    self._seconds += time.monotonic() - begun
                    self._scenes += len(refs)
                    self._largest = max(self._largest, len(refs))
            except Pause:  # the flow run was suspended
                pass
            finally:
                dispatch.places.release()

        future.add_done_callback(ended)
        return _Pack(refs, future)

    def _records(self, pack: _Pack) -> Iterator[SceneRecord]:
        """A pack's records; what it left, or where it broke has no receipt, is done scene by scene."""
        self.dispatch.watch.wait(pack.future)
        if pack.future.state.is_cancelled():
            raise StoppedError(pack.future.state.message or "stopped")
        done: list[SceneRecord | None] = [None] * len(pack.refs)
        if pack.future.state.is_completed():
            done = pack.future.result()
        elif self.receipts:
            receipts = self.receipts(pack.refs)
            done = [receipts.of(ref.name) for ref in pack.refs]
        yield from (record for record in done if record is not None)
        left = [ref for ref, record in zip(pack.refs, done, strict=True) if record is None]
        yield from self.dispatch.scenes(left)
