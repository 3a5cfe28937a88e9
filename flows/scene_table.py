"""The scenes of a run as a short Markdown table: what fails is told first, then what is in progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from segpipe.report.markdown import plain_text
from segpipe.tables.record import SceneRecord
from segpipe.tables.units import duration

FAILED = 20
OPEN = 10
FINISHED = 20
"""Rows of each kind."""


class SceneTableArtifact:
    """What became of scenes, in bounded memory: all are counted, some are listed."""

    def __init__(self) -> None:
        self._failed: list[SceneRecord] = []
        self._done: deque[SceneRecord] = deque(maxlen=FINISHED)
        self._counts = {"failed": 0, "done": 0}

    def add(self, record: SceneRecord) -> None:
        """A scene that has ended."""
        self._counts[record.state] += 1
        if record.state == "done":
            self._done.append(record)
        elif len(self._failed) < FAILED:
            self._failed.append(record)

    def markdown(self, opened: Mapping[str, str], scenes: int | None) -> str:
        """The table now.

        Args:
            opened: scenes in progress, with what is done of each.
            scenes: of the run; None: not known yet.
        """
        rows = [[plain_text(r.name), "**failed**", plain_text(r.error)] for r in self._failed]
        rows += [
            [plain_text(name), "in progress", plain_text(told)] for name, told in [*opened.items()][:OPEN]
        ]
        rows += [[plain_text(r.name), "done", _took(r)] for r in reversed(self._done)]
        failed, done = self._counts["failed"], self._counts["done"]
        of = "" if scenes is None else f" of {scenes}"
        head = f"{done + failed}{of} scenes done, {failed} of them failed; {len(opened)} in progress"
        more = failed + done + len(opened) - len(rows)
        lines = [head, "", "| Scene | State | |", "| --- | --- | --- |"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        if more > 0:
            lines += ["", f"and {more} more"]
        return "\n".join(lines)


def _took(record: SceneRecord) -> str:
    """``12.3 s``, and what was there before."""
    told = duration(sum(record.timings.values()))
    return f"{told}, {' and '.join(record.reused)} reused" if record.reused else told
