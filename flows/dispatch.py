"""Scenes through a task runner: planned ahead, predicted side by side, finished behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from threading import BoundedSemaphore, Event
from typing import Any, TypeVar

from prefect import Task, get_run_logger
from prefect.exceptions import Pause
from prefect.futures import PrefectFuture
from prefect.task_runners import TaskRunner

from segpipe.export.run_folder import RunFolder
from segpipe.export.scene_files import failed_record
from segpipe.pipeline.model_scene import Scene, pending_blocks
from segpipe.pipeline.progress import Done, Pace, batches_of
from segpipe.pipeline.scene import MeasurableScene
from segpipe.prompts.prompt_scene import PromptScene
from segpipe.prompts.segment_scene import Round
from segpipe.runs.check import ResolvedJob
from segpipe.sources import SceneRef
from segpipe.store.stop import StopToken
from segpipe.tables.record import SceneRecord
from segpipe_flows.runners import placed
from segpipe_flows.watch import Watch
from segpipe_tasks.prompts import (
    collect_scene_prompts,
    detect_batch,
    plan_round,
    propagate_volume,
    segment_batch,
)
from segpipe_tasks.scenes import finish_scene, plan_scene, predict_batch, retried
from segpipe_tasks.told import NOT_READY, OUT_OF_MEMORY, passes

T = TypeVar("T")
MOST_WINDOWS = 64
"""Of one batch: one to five minutes of a large encoder on a GPU, more on a CPU."""
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


def split(items: Sequence[T], workers: int) -> list[list[T]]:
    """Windows in batches, at least one for each worker and none of more than `MOST_WINDOWS`."""
    size = max(1, min(MOST_WINDOWS, -(-len(items) // workers)))
    return [list(items[i : i + size]) for i in range(0, len(items), size)]


@dataclass(frozen=True)
class _Started:
    """A scene on its way."""

    ref: SceneRef
    resolved: ResolvedJob
    futures: tuple[PrefectFuture[Any], ...]
    """Its tasks; the last one's result is the scene's next form."""


class Dispatch:
    """Sends the tasks of a run's scenes to the workers, a bounded number of batches in flight."""

    def __init__(
        self,
        resolved: ResolvedJob,
        run: RunFolder,
        stop: StopToken,
        runner: TaskRunner[Any],
        watch: Watch,
        begun: Callable[[SceneRef], None] = lambda ref: None,
    ) -> None:
        self.resolved = resolved
        self.job = job = resolved.job
        self.run = run
        self.stop = stop
        """By which the workers are asked to stop."""
        self.runner = runner
        self.watch = watch
        self.begun = begun
        """Told of a scene before any work on it."""
        self.pace = Pace()
        """Seconds that blocks of this run take: batches are sized by it."""
        self.predict_batch = retried(predict_batch, job.compute.retries)
        self.segment_batch = retried(segment_batch, job.compute.retries)
        # a cluster keeps one batch waiting for each worker, so that none idles between two
        self.places = BoundedSemaphore(job.compute.workers * (2 if job.compute.clustered else 1))

    def scenes(self, refs: Iterable[SceneRef]) -> Iterator[SceneRecord]:
        """Work through scenes, each with task runs of its own; what became of each, in the order given.

        Raises:
            StoppedError: the flow run was cancelled.
        """
        plans = (self._plan(ref, self.resolved) for ref in refs)
        started = (self._predict(plan) for plan in ahead(plans, PLANNED_AHEAD))
        for scene in ahead(started, self.job.compute.workers):
            yield self._record(scene)

    def _plan(self, ref: SceneRef, resolved: ResolvedJob) -> _Started:
        self.begun(ref)
        planned = self.runner.submit(plan_scene, {"resolved": resolved, "ref": ref, "run": self.run})
        return _Started(ref, resolved, (planned,))

    def _predict(self, planned: _Started) -> _Started:
        """Send a planned scene's batches as places come free, and behind them what finishes it."""
        plan = planned.futures[0]
        self.watch.wait(plan)
        if not plan.state.is_completed():
            return planned
        scene: MeasurableScene = plan.result()
        if isinstance(scene, PromptScene):
            return replace(planned, futures=(*planned.futures, *self._ask(scene)))
        futures: list[PrefectFuture[Any]] = []
        reused = 0
        if isinstance(scene, Scene):
            futures, reused = self._blocks(scene)
        parameters = {"scene": scene, "run": self.run, "computed": futures, "reused": reused}
        finished = self.runner.submit(finish_scene, {**parameters, "stop": self.stop})
        return replace(planned, futures=(*futures, finished))

    def _blocks(self, scene: Scene) -> tuple[list[PrefectFuture[Any]], int]:
        """Send the batches of a scene's blocks; also how many blocks are there already."""
        todo, total = pending_blocks(scene), scene.plan.blocks.count
        self.watch.begin(scene.ref.name, scene.predict, total, len(todo))
        compute = self.job.compute
        batches = batches_of(scene, todo, compute.batch_minutes, compute.workers, self.pace)
        parameters = [{"scene": scene, "blocks": blocks} for blocks in batches]
        return self._batches(self.predict_batch, parameters), total - len(todo)

    def _ask(self, scene: PromptScene) -> list[PrefectFuture[Any]]:
        """Ground, then ask round by round: what does not fit its window is asked again in a larger one."""
        futures = self._ground(scene)
        parameters = {"scene": scene, "found": list(futures)}
        futures.append(self.runner.submit(collect_scene_prompts, parameters))
        answered: list[PrefectFuture[Any]] = []
        for number in count():
            self.watch.wait(futures[-1])
            if any(not f.state.is_completed() for f in futures):
                return futures
            if scene.planes.axis is not None:
                answered += self._batches(propagate_volume, [{"scene": scene}])
                break
            planned = self.runner.submit(plan_round, {"scene": scene, "number": number})
            futures.append(planned)
            self.watch.wait(planned)
            if not planned.state.is_completed():
                return futures
            here: Round | None = planned.result()
            if here is None:
                break
            self.watch.begin(scene.ref.name, scene.masks, here.total, len(here.windows), "windows")
            sent = self._batches(self.segment_batch, self._windows(scene, here))
            answered += sent
            futures += sent
            for future in sent:
                self.watch.wait(future)
        futures += [f for f in answered if f not in futures]
        parameters = {"scene": scene, "run": self.run, "computed": answered, "stop": self.stop}
        return [*futures, self.runner.submit(finish_scene, {**parameters, "reused": 0})]

    def _ground(self, scene: PromptScene) -> list[PrefectFuture[Any]]:
        """Send the batches of what finds phrases."""
        grounder = scene.grounder
        if scene.collected or grounder is None:
            return []
        if isinstance(grounder, Scene):
            return self._blocks(grounder)[0]
        todo, total = grounder.pending(), len(grounder.windows())
        self.watch.begin(scene.ref.name, grounder.stage, total, len(todo), "windows")
        parts = split(todo, self.job.compute.workers)
        return self._batches(detect_batch, [{"scene": grounder, "windows": part} for part in parts])

    def _windows(self, scene: PromptScene, here: Round) -> list[dict[str, Any]]:
        parts = split(here.windows, self.job.compute.workers)
        return [{"scene": scene, "number": here.number, "windows": part} for part in parts]

    def _batches(
        self, step: Task[..., Any], parameters: Sequence[dict[str, Any]]
    ) -> list[PrefectFuture[Any]]:
        """Send the batches of one scene as places come free."""
        futures: list[PrefectFuture[Any]] = []
        failed = Event()

        def ended(future: PrefectFuture[Any]) -> None:
            try:
                future.wait()  # it has ended: this only takes its state
                if not future.state.is_completed():
                    failed.set()
                elif isinstance(done := future.result(), Done):
                    self.pace.note(done)
            except Pause:  # the flow run was suspended
                failed.set()
            finally:
                self.places.release()

        for number, batch in enumerate(parameters, start=1):
            self.take_place()
            if failed.is_set():
                self.places.release()
                break  # one block short, a scene has no answer: spare the rest
            part = f"{number} of {len(parameters)}"
            futures.append(self.submit_batch(step, {**batch, "part": part, "stop": self.stop}))
            futures[-1].add_done_callback(ended)
        return futures

    def take_place(self) -> None:
        """Wait until a worker has room for a batch."""
        self.watch.until(lambda seconds: self.places.acquire(timeout=seconds))

    def submit_batch(self, step: Task[..., Any], parameters: dict[str, Any]) -> PrefectFuture[Any]:
        """Send a task that needs the device."""
        with placed(self.job.compute, self.resolved.settings):
            future: PrefectFuture[Any] = self.runner.submit(step, parameters)
        return future

    def _record(self, started: _Started) -> SceneRecord:
        """What became of a scene; one that did not fit the device begins again in smaller batches."""
        ref, batch = started.ref, started.resolved.settings.batch
        for future in started.futures:
            self.watch.wait(future)
        bad = [f.state for f in started.futures if not f.state.is_completed() and f.state.name != NOT_READY]
        if batch > 1 and any(state.name == OUT_OF_MEMORY for state in bad):
            get_run_logger().warning("%s: out of memory, again with batches of %d", ref.name, batch // 2)
            return self._record(self._predict(self._plan(ref, started.resolved.with_batch(batch // 2))))
        if bad:
            failed = failed_record(ref, bad[0].message or "failed")
            return replace(failed, may_pass=any(passes(state) for state in bad))
        record: SceneRecord = started.futures[-1].result()
        return record
