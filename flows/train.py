"""The training flow: a recipe carried out, with its progress and pictures in the UI."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import State, flow, get_client, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.states import Cancelled, Completed

from segpipe.config.recipe import Recipe, load_recipe
from segpipe.errors import RequestError, StoppedError
from segpipe.training.loop import MetricsRow
from segpipe.training.run import Told, mark, train
from segpipe_flows.watch import LOOK_SECONDS
from segpipe_tasks.told import EXPECTED, refused
from segpipe_tasks.training import training_markdown

STATES_OF_A_STOP = ("CANCELLING", "CANCELLED")


def run_name() -> str:
    """The model's name; the file's, where the recipe is wrong, which the run then says."""
    given = runtime.flow_run.parameters
    try:
        return load_recipe(given["recipe"], given["changes"]).name
    except RequestError:
        return Path(given["recipe"]).stem or "train"


@flow(name="train", flow_run_name=run_name)
def train_model(recipe: str, changes: Sequence[str] = ()) -> State[Any]:
    """Train a model from labelled scenes and write its card.

    Prepares the scenes once, trains each chosen fold, tries it on what is kept apart, and leaves card,
    weights, scores and a page. The same recipe goes on where it stopped.

    Args:
        recipe: Path of a recipe, a YAML file such as configs/train/hippocampus.yaml. This and the paths in
            it are found from the folder in which the worker (or `segpipe serve`) was started.
        changes: Keys of the recipe to set for this run, each as a.b=value, e.g. optimise.steps=500.
    """
    try:
        wanted = load_recipe(recipe, changes)
    except RequestError as error:
        return refused(error)
    watch = TrainWatch(UUID(runtime.flow_run.get_id()), wanted)
    try:
        with on_signals(watch.stop):
            result = train(wanted, Told(watch.scenes, watch.moment), watch.should_stop)
    except StoppedError as error:
        return Cancelled(message=str(error))
    except EXPECTED as error:
        return refused(error)
    if result.card is None:
        return Cancelled(message=result.scores)
    watch.finished()
    return Completed(message=f"{result.scores} Card: {result.card}")


class TrainWatch:
    """What the UI and the log hear, and whether the run was cancelled there."""

    def __init__(self, run_id: UUID, recipe: Recipe) -> None:
        self._run_id = run_id
        self._recipe = recipe
        self._looked = time.monotonic()
        self._stop = False
        artifact = create_progress_artifact(0.0, description="preparing scenes")
        assert isinstance(artifact, UUID)  # a coroutine only in async flows
        self._artifact = artifact

    def scenes(self, ready: int, total: int) -> None:
        """Some scenes are ready.

        Raises:
            StoppedError: the run was cancelled meanwhile.
        """
        if self.should_stop():
            raise StoppedError(f"stopped: {ready} of {total} scenes are ready, the same command goes on")
        if ready == total or time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            get_run_logger().info("%d of %d scenes ready", ready, total)
            update_progress_artifact(self._artifact, 0.0, description=f"{ready} of {total} scenes ready")

    def moment(self, fold: str, moment: MetricsRow) -> None:
        """A row of the history, with a trial where something is kept apart."""
        measure = self._recipe.measure[:1].lower() + self._recipe.measure[1:]
        judged = "" if math.isnan(moment.score) else f", {measure} {moment.score:.4f}"
        left = moment.seconds / moment.step * (moment.steps - moment.step) / 60
        get_run_logger().info(
            "%s: step %d of %d, loss %.4f%s, about %.0f min left",
            fold, moment.step, moment.steps, moment.loss, judged, left,
        )  # fmt: skip
        share = 100 * moment.step / moment.steps
        told = f"{fold}: step {moment.step:,} of {moment.steps:,}{judged}"
        update_progress_artifact(self._artifact, share, description=told)
        key = self._recipe.name.lower().replace("_", "-").replace(".", "-")
        create_markdown_artifact(
            training_markdown(self._recipe, fold, moment, self.folder(fold)),
            key=f"{key}-training",
            description=f"Training of {self._recipe.name}, {fold}",
        )

    def folder(self, fold: str) -> Path:
        """Of a fold's results."""
        return Path(self._recipe.out) / self._recipe.name / mark(self._recipe) / fold

    def finished(self) -> None:
        """Every fold has its card."""
        update_progress_artifact(self._artifact, 100.0)

    def stop(self) -> None:
        """Ask for a stop from here."""
        self._stop = True

    def should_stop(self) -> bool:
        """Whether somebody cancelled the run; asked after every step, looked up every few seconds."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._looked = time.monotonic()
            with get_client(sync_client=True) as client:
                state = client.read_flow_run(self._run_id).state
            self._stop |= state is not None and state.type.value in STATES_OF_A_STOP
        return self._stop


@contextmanager
def on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM (of whoever cancels a served run) asks for a stop; the next is as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {n: handler for n, handler in handlers.items() if handler not in (None, signal.SIG_IGN)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(*_: object) -> None:
        restore()
        stop()

    for number in before:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
