"""The intensity table: what the image holds under each class, as a data frame."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from segpipe.metrics.intensity import PERCENTILES, Channel, Intensity, statistics
from segpipe.tables.frames import FAILED, MEASURED, NO_DATA, ClassLike

NUMBERS = ("n", "mean", "sd", "min", "max", *(f"p{p:02d}" for p in PERCENTILES), "bin")
ABSENT = "no valid pixel of the class in the region"


@dataclass(frozen=True)
class SceneIntensity:
    """What measuring left of one scene."""

    scene: str
    regions: tuple[str, ...] = ()
    """Names, by index."""
    channels: tuple[Channel, ...] = ()
    intensity: Intensity | None = None
    """None: the scene failed."""
    reason: str = ""
    """Why it failed, in one line."""


def intensity_table(results: Iterable[SceneIntensity], classes: Sequence[ClassLike]) -> pd.DataFrame:
    """Intensities by scene, region, class and channel, in the order given.

    Columns: ``n``, elements with a valid pixel, by cover; ``mean``, ``sd`` (divided by n), ``min``,
    ``max`` and percentiles ``p05``, ``p50``, ``p95`` in ``unit``; ``bin``, the width of the histogram's
    bins, which the percentiles are right within; ``state`` and ``reason``. A class that is not in a
    region has n 0 and no other number. A failed scene has one row a class.
    """
    known = {c.value: c.name for c in classes}
    rows = [row for result in results for row in _rows(result, known)]
    texts = ("scene", "region", "class", "channel", "unit", "state", "reason")
    order = ("scene", "region", "class", "value", "channel", *NUMBERS, "unit", "state", "reason")
    types = {name: "str" if name in texts else "Int64" if name == "value" else "float64" for name in order}
    return pd.DataFrame(rows, columns=list(order)).astype(types)


def _rows(result: SceneIntensity, known: dict[int, str]) -> Iterator[dict[str, Any]]:
    empty: dict[str, Any] = {"region": "", "channel": "", "unit": "", "reason": "", "scene": result.scene}
    if result.intensity is None:
        for value, name in known.items():
            yield {**empty, "class": name, "value": value, "state": FAILED, "reason": result.reason}
        return
    cells = result.intensity.cells
    found: dict[int, set[int]] = {}
    for place, value, _ in cells:
        found.setdefault(place, set()).add(value)
    for index, region in enumerate(result.regions):
        here = found.get(index, set())
        for value in (*known, *sorted(here - known.keys())):
            for number, channel in enumerate(result.channels):
                row = {**empty, "region": region, "value": value}
                row |= {"class": known.get(value, str(value)), "channel": channel.name, "unit": channel.unit}
                cell = cells.get((index, value, number))
                if cell is None:
                    state = MEASURED if here else NO_DATA
                    yield {**row, "n": 0.0 if here else None, "state": state, "reason": ABSENT}
                    continue
                s = statistics(cell, result.intensity.point, channel.scaling)
                numbers = (s.n, s.mean, s.sd, s.min, s.max, *s.percentiles, s.bin)
                yield {**row, **dict(zip(NUMBERS, numbers, strict=True)), "state": MEASURED}
