"""What the flow does while it waits: tell the progress, and see whether it was cancelled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Event
from typing import Any
from uuid import UUID

from prefect import get_client, get_run_logger
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.futures import PrefectFuture

from segpipe.errors import StoppedError
from segpipe.report.record import SceneRecord
from segpipe.store import Stage

LOOK_SECONDS = 5.0
"""Between two looks at receipts and at the flow run's state."""
LOG_SECONDS = 30.0
"""Between two lines of progress in the log."""
NAMED = 3
"""Scenes in progress that are named beside the bar."""


@dataclass(frozen=True)
class _Open:
    """A scene in progress."""

    stage: Stage
    total: int
    before: int
    """Receipts of the stage that are not of these."""
    what: str


class Watch:
    """A run's progress, counted in receipts: they are the truth wherever the workers are.

    One progress artifact for the flow run; every scene has the same share of it.
    """

    def __init__(self, run_id: UUID, scenes: int) -> None:
        self._run_id = run_id
        self._total = scenes
        self._done = 0
        self._open: dict[str, _Open] = {}
        self._looked = self._logged = time.monotonic()
        artifact = create_progress_artifact(0.0, description=f"0 of {scenes} scenes done")
        assert isinstance(artifact, UUID)  # a coroutine only in async flows
        self._artifact = artifact

    def until(self, ready: Callable[[float], bool]) -> None:
        """Wait until ``ready(seconds)``, which itself waits that long at most, says yes.

        Raises:
            StoppedError: the flow run was cancelled meanwhile.
        """
        while not ready(LOOK_SECONDS):
            self._look()
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._look()

    def wait(self, future: PrefectFuture[Any]) -> None:
        """Wait for a task run to end, well or badly; its state is known afterwards."""
        ended = Event()
        future.add_done_callback(lambda _: ended.set())
        self.until(ended.wait)
        future.wait()

    def begin(self, name: str, stage: Stage, total: int, todo: int, what: str = "blocks") -> None:
        """A scene's blocks or windows are on their way; each leaves a receipt in the stage."""
        before = len(stage.done()) - (total - todo)
        self._open[name] = _Open(stage, total, before, what)
        get_run_logger().info("%s: %d of %d %s to compute", name, todo, total, what)

    def end(self, record: SceneRecord) -> None:
        """A scene is done, or has failed."""
        self._open.pop(record.name, None)
        self._done += 1
        level = "info" if record.state == "done" else "error"
        what = "done" if record.state == "done" else f"failed: {record.error}"
        getattr(get_run_logger(), level)("%s (%d of %d): %s", record.name, self._done, self._total, what)
        self._tell([])

    def _look(self) -> None:
        self._looked = time.monotonic()
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(self._run_id).state
        if state is not None and state.is_cancelling():
            raise StoppedError("the flow run was cancelled")
        counts = [(name, len(o.stage.done()) - o.before, o) for name, o in self._open.items()]
        self._tell(counts)
        if time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            for name, done, o in counts:
                get_run_logger().info("%s: %d of %d %s", name, done, o.total, o.what)

    def _tell(self, counts: list[tuple[str, int, _Open]]) -> None:
        progress = 100 * (self._done + sum(done / o.total for _, done, o in counts)) / self._total
        told = [f"scene {name}: {done} of {o.total} {o.what}" for name, done, o in counts[:NAMED]]
        told.append(f"{self._done} of {self._total} scenes done")
        update_progress_artifact(self._artifact, progress=progress, description="; ".join(told))
