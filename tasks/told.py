"""What a task makes of an error: a mistake is told in one line, a passing fault is tried again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from obstore.exceptions import BaseError as StorageError
from prefect import State, Task
from prefect.client.schemas.objects import TaskRun
from prefect.states import Cancelled, Failed

from segpipe.errors import DeviceMemoryError, SegpipeError, StoppedError
from segpipe.redact import scrubbed

P = ParamSpec("P")
R = TypeVar("R")

OUT_OF_MEMORY = "OutOfMemory"
"""Name of the state of a batch that did not fit the device."""
NOT_READY = "NotReady"
"""Prefect's name of the state of a task whose inputs failed: never the cause."""


def told(step: Callable[P, R]) -> Callable[P, R | State[Any]]:
    """Turn the errors that a user can act on into a state that says what to do, and a stop into Cancelled."""

    @functools.wraps(step)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R | State[Any]:
        try:
            with scrubbed():
                return step(*args, **kwargs)
        except StoppedError as error:
            return Cancelled(message=str(error))
        except DeviceMemoryError as error:
            return refused(error, name=OUT_OF_MEMORY)
        except SegpipeError as error:
            return refused(error)

    return wrapper


def refused(error: Exception, **fields: Any) -> State[Any]:
    """A failed state that tells a mistake in one line."""
    return Failed(message=str(error), **fields)


def passing_fault(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether trying again may help: see `passes`."""
    return passes(state)


PASSING = (OSError, MemoryError, StorageError)
"""Storage and memory come back, mistakes do not."""


def passes(state: State[Any]) -> bool:
    """Whether a task run failed by a fault that may pass."""
    return isinstance(state.data, PASSING)
