"""What a check found: one line, and what to do about it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, ParamSpec

P = ParamSpec("P")


class State(str, Enum):
    """How bad it is."""

    ok = "ok"
    warn = "warn"
    """Runs, but slower or with less than there could be."""
    fail = "fail"
    """Some job will not run."""


class Finding(NamedTuple):
    """One line of the doctor's."""

    name: str
    state: State
    found: str
    advice: str = ""
    """What to do; never empty where `state` is not ok."""


def check(name: str) -> Callable[[Callable[P, Finding]], Callable[P, Finding]]:
    """A check that never raises: a broken library must not hide what the other checks find."""

    def wrap(function: Callable[P, Finding]) -> Callable[P, Finding]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> Finding:
            try:
                return function(*args, **kwargs)
            except ImportError as error:
                advice = "install segpipe anew: `pip install --force-reinstall segpipe`"
                return Finding(name, State.fail, f"cannot be loaded: {error}", advice)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what was found
                found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                return Finding(name, State.fail, found, "unexpected: report it with this line")

        return run

    return wrap
