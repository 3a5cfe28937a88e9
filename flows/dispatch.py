"""A request's scenes through a task runner: planned ahead, predicted side by side, finished behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from threading import BoundedSemaphore, Event
from typing import Any, TypeVar

from prefect import get_run_logger
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner

from flows.watch import Watch
from segpipe.config import Runner
from segpipe.deliver import failed_record
from segpipe.labelled import MeasurableScene
from segpipe.lattice import Index
from segpipe.report.record import SceneRecord
from segpipe.request import Request
from segpipe.run import Run
from segpipe.scene import Scene, pending_blocks
from segpipe.settings import Settings
from segpipe.sources import SceneRef
from segpipe.steps import batches_of
from tasks.scenes import finish_scene, plan_scene, predict_batch_retried
from tasks.told import NOT_READY, OUT_OF_MEMORY

T = TypeVar("T")
PLANNED_AHEAD = 2
"""Scenes whose plan is begun before the one in turn."""


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Hand on items ``count`` behind, so that what the newer ones have started runs meanwhile.

    At most ``count`` + 1 items are held: nothing is begun for a thousand scenes at once.
    """
    held: deque[T] = deque()
    for item in items:
        held.append(item)
        if len(held) > count:
            yield held.popleft()
    yield from held


@dataclass(frozen=True)
class _Started:
    """A scene on its way."""

    ref: SceneRef
    settings: Settings
    futures: tuple[PrefectFuture[Any], ...]
    """Its tasks; the last one's result is the scene's next form."""


class Dispatch:
    """Sends the tasks of a run's scenes to the workers, a bounded number of batches in flight."""

    def __init__(self, request: Request, run: Run, stop: str, runner: TaskRunner[Any], watch: Watch) -> None:
        self.request = request
        self.run = run
        self.stop = stop
        """Name under which the workers are asked to stop."""
        self.runner = runner
        self.watch = watch
        compute = request.job.compute
        self.predict_batch = predict_batch_retried(compute.retries)
        # a cluster keeps one batch waiting for each worker, so that none idles between two
        self.places = BoundedSemaphore(compute.workers * (2 if compute.runner is Runner.dask else 1))

    def scenes(self) -> list[SceneRecord]:
        """Work through the scenes; what became of each, in the order given.

        Raises:
            StoppedError: the flow run was cancelled.
        """
        plans = (self._plan(ref, self.request.settings) for ref in self.request.scenes)
        started = (self._predict(plan) for plan in ahead(plans, PLANNED_AHEAD))
        return [self._record(scene) for scene in ahead(started, self.request.job.compute.workers)]

    def _plan(self, ref: SceneRef, settings: Settings) -> _Started:
        parameters = {"job": self.request.job, "ref": ref, "settings": settings}
        return _Started(ref, settings, (self.runner.submit(plan_scene, parameters),))

    def _predict(self, planned: _Started) -> _Started:
        """Send a planned scene's batches as places come free, and behind them what finishes it."""
        (plan,) = planned.futures
        self.watch.wait(plan)
        if not plan.state.is_completed():
            return planned
        scene: MeasurableScene = plan.result()
        futures: list[PrefectFuture[Any]] = []
        reused = 0
        if isinstance(scene, Scene):
            todo = pending_blocks(scene)
            reused = scene.plan.blocks.count - len(todo)
            self.watch.begin(scene, reused)
            compute = self.request.job.compute
            futures = self._batches(scene, batches_of(scene, todo, compute.batch_minutes, compute.workers))
        parameters = {"scene": scene, "run": self.run, "predicted": futures, "reused": reused}
        finished = self.runner.submit(finish_scene, {**parameters, "stop": self.stop})
        return replace(planned, futures=(*futures, finished))

    def _batches(self, scene: Scene, batches: list[list[Index]]) -> list[PrefectFuture[Any]]:
        futures: list[PrefectFuture[Any]] = []
        failed = Event()

        def ended(future: PrefectFuture[Any]) -> None:
            future.wait()  # it has ended: this only takes its state
            if not future.state.is_completed():
                failed.set()
            self.places.release()

        for number, blocks in enumerate(batches, start=1):
            self.watch.until(lambda seconds: self.places.acquire(timeout=seconds))
            if failed.is_set():
                self.places.release()
                break  # one block short, a scene has no answer: spare the rest
            part = f"{number} of {len(batches)}"
            parameters = {"scene": scene, "blocks": blocks, "part": part, "stop": self.stop}
            futures.append(self.runner.submit(self.predict_batch, parameters))
            futures[-1].add_done_callback(ended)
        return futures

    def _record(self, started: _Started) -> SceneRecord:
        """What became of a scene; one that did not fit the device begins again in smaller batches."""
        ref, batch = started.ref, started.settings.batch
        for future in started.futures:
            self.watch.wait(future)
        bad = [f.state for f in started.futures if not f.state.is_completed() and f.state.name != NOT_READY]
        if batch > 1 and any(state.name == OUT_OF_MEMORY for state in bad):
            get_run_logger().warning("%s: out of memory, again with batches of %d", ref.name, batch // 2)
            return self._record(self._predict(self._plan(ref, replace(started.settings, batch=batch // 2))))
        record: SceneRecord = (
            failed_record(ref, bad[0].message or "failed") if bad else started.futures[-1].result()
        )
        self.watch.end(record)
        return record
