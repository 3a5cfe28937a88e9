"""A job in this process, without Prefect: progress on the terminal, or as lines of a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from segpipe.cli.output import echo
from segpipe.errors import StoppedError
from segpipe.redact import clean

if TYPE_CHECKING:
    from segpipe.export.run_folder import RunFolder
    from segpipe.runs.check import ResolvedJob
    from segpipe.runs.local import Progress
    from segpipe.tables.record import RunRecord

LINE_SECONDS = 10.0
"""Between two lines about one scene where no terminal shows a bar."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def run_in_process(resolved: ResolvedJob) -> tuple[RunFolder, RunRecord]:
    """Run a job and show how far it is.

    Raises:
        Exit: by Ctrl-C or a request to stop, with code 130; what is committed stays.
    """
    from segpipe.runs.local import run_local

    try:
        with _bars() if Console(stderr=True).is_terminal else _lines() as show:
            return run_local(resolved, show)
    except (KeyboardInterrupt, StoppedError):
        told = "stopped; what is done stays, run the same job again to go on from there"
        echo(told, file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    """A bar of the scene at work, above it a line for each scene that has ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task("", total=None)

        def show(step: Progress) -> None:
            if step.record is not None:
                bars.console.print(_ended(step), markup=False, highlight=False)
            else:
                bars.update(bar, description=_name(step), completed=step.done, total=step.total)

        yield show


@contextmanager
def _lines() -> Iterator[Callable[[Progress], None]]:
    """A line for each scene that has ended, and meanwhile one at times."""
    last = time.monotonic()

    def show(step: Progress) -> None:
        nonlocal last
        if step.record is not None:
            echo(_ended(step), file=sys.stderr)
        elif time.monotonic() - last >= LINE_SECONDS:
            echo(f"{_name(step)}: {step.done} of {step.total}", file=sys.stderr)
        else:
            return
        last = time.monotonic()

    yield show


def _name(step: Progress) -> str:
    return clean(f"{step.number}/{step.scenes} {step.scene}")


def _ended(step: Progress) -> str:
    failed = step.record is not None and step.record.error
    return f"{_name(step)}: {'failed' if failed else 'done'}"
