"""What a task makes of an error: a mistake is told in one line, a passing fault is tried again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from obstore.exceptions import BaseError as StorageError
from prefect import State, Task, get_run_logger
from prefect.client.schemas.objects import TaskRun
from prefect.exceptions import FailedRun
from prefect.results import ResultRecord  # type: ignore[attr-defined]  # its home is private
from prefect.runtime import task_run
from prefect.states import Cancelled, Failed

from segpipe.errors import DeviceMemoryError, SegpipeError, StoppedError
from segpipe.redact import scrubbed
from segpipe.store.location import store_reason

PASSING = (OSError, MemoryError, StorageError)
"""Storage and memory come back, mistakes do not."""
EXPECTED = (SegpipeError, FailedRun, *PASSING)
"""What a task or flow ends with in one line; a failed task whose result is asked for raises FailedRun."""

P = ParamSpec("P")
R = TypeVar("R")

OUT_OF_MEMORY = "OutOfMemory"
"""Name of the state of a batch that did not fit the device."""
NOT_READY = "NotReady"
"""Prefect's name of the state of a task whose inputs failed: never the cause."""


def told(step: Callable[P, R]) -> Callable[P, R | State[Any]]:
    """Turn what is expected to fail into a state that says it in one line, and a stop into Cancelled."""

    @functools.wraps(step)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | State[Any]:
        try:
            with scrubbed():
                return step(*args, **kwargs)
        except StoppedError as error:
            return Cancelled(message=str(error))
        except DeviceMemoryError as error:
            return refused(error, name=OUT_OF_MEMORY)
        except EXPECTED as error:
            return refused(error)

    return wrapper


def refused(error: Exception, **fields: Any) -> State[Any]:
    """A failed state that tells an error in one line; of a fault that may pass, with the error.

    Prefect logs a state that is returned in one line, and an error that is raised with its traceback; the
    state of a flow as mere information, so that the reason is logged here.
    """
    line, passing = " ".join(str(error).split()), isinstance(error, PASSING)
    if passing:
        line = f"{type(error).__name__}: {store_reason(error)}"
    if task_run.id is None:
        get_run_logger().error(line)
    return Failed(message=line, data=error if passing else None, **fields)


def passing_fault(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again may help: see `passes`."""
    return passes(state)


def passes(state: State[Any]) -> bool:
    """Whether a task run failed by a fault that may pass."""
    data: Any = state.data
    return isinstance(data.result if isinstance(data, ResultRecord) else data, PASSING)
