"""The compare flow: what changed from one run to another."""

from __future__ import annotations

from typing import Any

from prefect import State, flow, get_run_logger, runtime
from prefect.states import Completed, Failed

from segpipe.report.comparison import Comparison, headline
from segpipe_tasks.compare import compare_two


def run_name() -> str:
    """The names of the two runs."""
    given = runtime.flow_run.parameters
    names = [str(given.get(side, "")).rstrip("/").rsplit("/", 1)[-1] or "?" for side in ("before", "after")]
    return f"{names[0]} → {names[1]}"


@flow(name="compare", flow_run_name=run_name)
def compare(before: str, after: str, out: str = "") -> State[Any]:
    """Tell what changed from one run to another, per scene, region and class.

    Rows are matched by the names of scene, region and class; the page also says what was set otherwise and
    why the two may not be like with like.

    Args:
        before: Folder or URL of the first run: <out>/<job>/<run>. A folder is found from the one in which
            the worker (or `segpipe serve`) was started.
        after: Folder or URL of the run to hold against it; changes are after − before.
        out: Folder or URL of compare.html, .csv and .parquet. Empty: compare-<first run> in the second run's
            folder.
    """
    ended = compare_two(before, after, out, return_state=True)
    if not ended.is_completed():
        return Failed(message=ended.message)
    found = ended.result()
    assert isinstance(found, Comparison)  # a completed task returns what it found
    for warning in found.warnings:
        get_run_logger().warning(warning)
    first, *_ = headline(found)
    return Completed(message=f"{first}; page: {found.page}")
