"""What the flow does while it waits: tell the progress, and see whether it was paused or cancelled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from threading import Event
from typing import Any
from uuid import UUID

from prefect import get_client, get_run_logger
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import Pause
from prefect.futures import PrefectFuture
from prefect.states import Paused

from segpipe.errors import StoppedError
from segpipe.store.stage import Stage
from segpipe.tables.record import SceneRecord
from segpipe_flows.rates import Rates, RateSample, left_told, rate_told
from segpipe_flows.scene_table import SceneTableArtifact

LOOK_SECONDS = 5.0
"""Between two looks at receipts and at the flow run's state, and two updates of the progress."""
LOG_SECONDS = 30.0
"""Between two lines of progress in the log."""
TABLE_SECONDS = 15.0
"""Between two updates of the table of scenes."""
NAMED = 3
"""Scenes in progress that are named beside the bar."""
SAMPLE = 16
"""Receipts read at a look, of those that came since the last: they say how busy the devices are."""


@dataclass
class _Open:
    """A scene in progress."""

    stage: Stage
    total: int
    todo: int
    what: str
    size: float
    """Elements of the scene in one piece; 0 where pieces overlap (windows)."""
    unit: str
    """px or voxel."""
    known: set[str]
    """Receipts seen, those of other work in the stage too."""
    before: int
    """Receipts of the stage that are not of these pieces."""
    begun: float = field(default_factory=time.monotonic)

    @property
    def done(self) -> int:
        """Pieces with a receipt."""
        return min(self.total, max(0, len(self.known) - self.before))

    @property
    def computed(self) -> int:
        """Of those, the ones of this attempt."""
        return max(0, self.done - (self.total - self.todo))


class Watch:
    """A run's progress, counted in receipts: they are the truth wherever the workers are.

    One progress artifact for the flow run, and a table of scenes. Where the number of scenes is known, every
    scene has the same share of the bar; else the bar is the share of what was begun.
    """

    def __init__(self, run_id: UUID, scenes: int | None) -> None:
        self._run_id = run_id
        self._scenes = scenes
        self._done = self._failed = 0
        self._open: dict[str, _Open] = {}
        self._closed = RateSample(0.0, 0, 0.0, 0.0)
        """Sum over what is no longer open."""
        self._begun = (0, 0.0)
        """Scenes begun, and the elements that they had to compute."""
        self._forward = (0, 0.0)
        """Receipts read that say for how long the device was busy, and the sum of it."""
        self._workers: set[str] = set()
        self._rates = Rates()
        self._table = SceneTableArtifact()
        self._paused = False
        self._looked = self._told = self._logged = self._tabled = time.monotonic()
        artifact = create_progress_artifact(0.0, description=self._scenes_told())
        assert isinstance(artifact, UUID)  # a coroutine only in async flows
        self._progress = artifact
        self._markdown: UUID | None = None

    # -- waiting ------------------------------------------------------------------------------

    def until(self, ready: Callable[[float], bool]) -> None:
        """Wait until ``ready(seconds)``, which itself waits that long at most, says yes.

        While the flow run is paused it does not return, so that nothing new is begun.

        Raises:
            StoppedError: the flow run was cancelled meanwhile.
            Pause: it was suspended (the UI's "Pause" of a deployment's run): its process ends here, and
                another goes on when it is resumed.
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

    # -- scenes -------------------------------------------------------------------------------

    def begin(self, name: str, stage: Stage, total: int, todo: int, what: str = "blocks") -> None:
        """A scene's blocks or windows are on their way; each leaves a receipt in the stage."""
        if name in self._open:
            self._close(name)
        known = stage.done()
        shape = stage.generation.blocks.shape
        size = math.prod(shape) / max(1, total) if what == "blocks" else 0.0
        unit = "voxel" if len(shape) == 3 else "px"
        before = len(known) - (total - todo)
        self._open[name] = _Open(stage, total, todo, what, size, unit, known, before)
        self._begun = (self._begun[0] + 1, self._begun[1] + todo * size)
        get_run_logger().info("%s: %d of %d %s to compute", name, todo, total, what)
        if not self._rates.known:
            self._note()

    def end(self, record: SceneRecord) -> None:
        """A scene is done, or has failed."""
        if record.name in self._open:
            self._close(record.name, whole=record.state == "done")
        self._done += 1
        self._failed += record.state == "failed"
        self._table.add(record)
        of = "" if self._scenes is None else f" of {self._scenes}"
        if record.state == "done":
            get_run_logger().info("%s (%d%s): done", record.name, self._done, of)
        else:
            get_run_logger().error("%s (%d%s): failed: %s", record.name, self._done, of, record.error)
        if self._done == self._scenes:
            self.close()
        elif time.monotonic() - self._told >= LOOK_SECONDS:
            self._tell()

    def close(self) -> None:
        """All scenes have ended: the last word. Needed where their number was not known before."""
        self._scenes = self._done
        self._tell()
        self._tell_table()

    def _close(self, name: str, whole: bool = True) -> None:
        """What a scene did, or a round of its windows, becomes part of the sum."""
        scene, closed = self._open.pop(name), self._closed
        pieces = scene.todo if whole else scene.computed
        self._guess(max(0, pieces - scene.computed))
        self._closed = RateSample(0.0, closed.pieces + pieces, closed.elements + pieces * scene.size, 0.0)

    # -- looking ------------------------------------------------------------------------------

    def _look(self) -> None:
        """See what was done and how the flow run stands; stay while it is paused."""
        self._count()
        while self._stands_still():
            if not self._paused:
                self._paused = True
                get_run_logger().warning("paused: what is in flight ends, nothing new is begun")
            self._tell()
            time.sleep(LOOK_SECONDS)
            self._count()
        if self._paused:
            self._paused = False
            self._rates.restart()
            get_run_logger().info("resumed")
        self._note()
        self._tell()
        now = time.monotonic()
        self._looked = now
        if now - self._tabled >= TABLE_SECONDS:
            self._tell_table()
        if now - self._logged >= LOG_SECONDS:
            self._logged = now
            get_run_logger().info("%s", self._description())

    def _stands_still(self) -> bool:
        """Whether the flow run is paused.

        Raises:
            StoppedError: it was cancelled, or ended by somebody else.
            Pause: it was suspended, and a worker will start it again.
        """
        with get_client(sync_client=True) as client:
            run = client.read_flow_run(self._run_id)
            state = run.state
            if state is None or state.is_running():
                return False
            if state.is_cancelling() or state.is_final():
                raise StoppedError("the flow run was cancelled" if state.is_cancelling() else "it was ended")
            if state.is_paused():
                self._suspended(client, run, state)
            return state.is_paused()

    def _suspended(self, client: SyncPrefectClient, run: FlowRun, state: State[Any]) -> None:
        """End the process of a suspended run: the server schedules another, if there is a deployment."""
        if not state.state_details.pause_reschedule:
            return
        if run.deployment_id is not None:
            get_run_logger().warning("suspended: what is done stays, another process goes on when resumed")
            raise Pause(state=state)
        client.set_flow_run_state(self._run_id, Paused(), force=True)  # which can be resumed

    def _count(self) -> None:
        """Read which receipts are there, and of some of the new ones how long the device was busy."""
        share = max(1, SAMPLE // max(1, len(self._open)))
        for scene in self._open.values():
            found = scene.stage.done()
            new = sorted(found - scene.known)
            scene.known = scene.known | found
            self._sample(scene.stage, new[:: max(1, len(new) // share)][:share], len(new))

    def _sample(self, stage: Stage, names: list[str], new: int) -> None:
        receipts = [r for name in names if (r := stage.receipt(name)) is not None and "seconds" in r]
        self._workers |= {str(r["worker"]) for r in receipts if "worker" in r}
        read, seconds = self._forward
        self._forward = (read + len(receipts), seconds + sum(float(r["seconds"]) for r in receipts))
        self._guess(new)

    def _guess(self, pieces: int) -> None:
        """Pieces came of which not all receipts are read: they are like those that were."""
        read, seconds = self._forward
        past = self._closed
        forward = past.forward + (pieces * seconds / read if read else 0.0)
        self._closed = RateSample(past.at, past.pieces, past.elements, forward)

    def _note(self) -> None:
        """Where the run is now, for its rates."""
        opened = self._open.values()
        self._rates.add(
            RateSample(
                time.monotonic(),
                self._closed.pieces + sum(s.computed for s in opened),
                self._closed.elements + sum(s.computed * s.size for s in opened),
                self._closed.forward,
            )
        )

    # -- telling ------------------------------------------------------------------------------

    def _tell(self) -> None:
        self._told = time.monotonic()
        update_progress_artifact(self._progress, progress=self._share(), description=self._description())

    def _share(self) -> float:
        """Per cent."""
        begun = self._done + len(self._open)
        total = begun if self._scenes is None else self._scenes
        parts = sum(scene.done / scene.total for scene in self._open.values() if scene.total)
        return min(100.0, 100 * (self._done + parts) / total) if total else 0.0

    def _description(self) -> str:
        """One line, what matters most first: a card of the UI shows its beginning."""
        told = ["paused"] if self._paused else []
        told.append(self._scenes_told())
        if not self._paused and self._done != self._scenes:
            told += self._speed()
        told += [f"{name}: {s.done} of {s.total} {s.what}" for name, s in [*self._open.items()][:NAMED]]
        if len(self._open) > NAMED:
            told.append(f"and {len(self._open) - NAMED} more scenes in progress")
        return "; ".join(told)

    def _scenes_told(self) -> str:
        of = "" if self._scenes is None else f" of {self._scenes}"
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{self._done}{of} scenes done{failed}"

    def _speed(self) -> Iterator[str]:
        """What is known of time left, rate and the devices."""
        if self._rates.elements:
            if (left := self._left()) is not None:
                yield left_told(left)
            units = {scene.unit for scene in self._open.values() if scene.size}
            yield rate_told(self._rates.elements, "voxel" if units == {"voxel"} else "px")
        elif self._rates.pieces:
            yield f"{self._rates.pieces:.2g} windows/s"
        if (busy := self._rates.busy(len(self._workers))) is not None:
            yield f"device busy {100 * busy:.0f} %"

    def _left(self) -> float | None:
        """Seconds until all known scenes are predicted: those not begun are like those that were.

        None: the number of scenes is not known, or nothing is left.
        """
        if self._scenes is None:
            return None
        left = sum((s.total - s.done) * s.size for s in self._open.values())
        scenes, elements = self._begun
        left += (self._scenes - self._done - len(self._open)) * elements / max(1, scenes)
        return left / self._rates.elements if left else None

    def _tell_table(self) -> None:
        self._tabled = time.monotonic()
        text = self._table.markdown(
            {n: f"{s.done} of {s.total} {s.what}" for n, s in self._open.items()}, self._scenes
        )
        if self._markdown is None:
            made = create_markdown_artifact(text, description="Scenes in progress, failed and done")
            assert isinstance(made, UUID)  # a coroutine only in async flows
            self._markdown = made
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self._markdown, ArtifactUpdate(data=text))
