"""How fast a run gets on: elements a second, time left, share of time in which devices compute."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from segpipe.tables.units import duration

SPAN_SECONDS = 60.0
"""Over which rates are taken."""


@dataclass(frozen=True)
class RateSample:
    """What this attempt of the run had done at a time."""

    at: float
    """Seconds of a monotonic clock."""
    pieces: int
    """Blocks or windows."""
    elements: float
    forward: float
    """Seconds in forward passes, of all workers together."""


class Rates:
    """Rates over the last minute; a pause is no part of them."""

    def __init__(self) -> None:
        self._moments: deque[RateSample] = deque()

    def add(self, moment: RateSample) -> None:
        """Note where the run is; moments come in order of time."""
        self._moments.append(moment)
        while len(self._moments) > 2 and self._moments[1].at <= moment.at - SPAN_SECONDS:
            self._moments.popleft()

    @property
    def known(self) -> bool:
        """Whether any moment is noted."""
        return bool(self._moments)

    def restart(self) -> None:
        """Forget what was: the run stood still."""
        self._moments.clear()

    @property
    def elements(self) -> float:
        """Elements a second; 0 where nothing is known yet."""
        return self._per_second("elements")

    @property
    def pieces(self) -> float:
        """Blocks or windows a second."""
        return self._per_second("pieces")

    def busy(self, workers: int) -> float | None:
        """Share of the wall time in which these workers' devices computed; None: not known."""
        found = self._per_second("forward")
        return min(1.0, found / workers) if found and workers else None

    def _per_second(self, what: str) -> float:
        if len(self._moments) < 2:
            return 0.0
        first, last = self._moments[0], self._moments[-1]
        past: float = getattr(last, what) - getattr(first, what)
        return past / (last.at - first.at) if last.at > first.at else 0.0


def rate_told(per_second: float, unit: str) -> str:
    """``2.1 Mpx/s``; ``unit``: px or voxel. Small rates get the digits that they need."""
    millions = per_second / 1e6
    digits = 1 if millions >= 1 else 3 if millions >= 0.001 else 6
    return f"{millions:.{digits}f} {'Mvox' if unit == 'voxel' else 'Mpx'}/s"


def left_told(seconds: float) -> str:
    """``3 min 20 s left``."""
    return f"{duration(seconds)} left"
