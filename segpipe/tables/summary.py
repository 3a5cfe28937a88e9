"""The summary: means and pooled numbers of a run, with intervals and with what they leave out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from segpipe.errors import RequestError
from segpipe.metrics.bootstrap import RESAMPLES, Intervals, mean_intervals, pooled_intervals
from segpipe.metrics.overlap import ClassCounts, class_counts, grouped_mean, is_compared, mean
from segpipe.metrics.tally import Tally
from segpipe.regions.base import SCENE
from segpipe.tables.frames import FAILED, NOT_REQUESTED_STATE, ClassLike, Piece, frame
from segpipe.tables.summary_rows import REGIONS, Line, Scope, merged, summary_lines

MIN_REFERENCE = 1000
"""Elements of the reference from which a class counts in the summary's mean without rare ones."""
_COUNTED = ("n_defined", "n_missed", "n_hallucinated", "n_undefined", "n_failed")
_COLUMNS = {
    **dict.fromkeys(("metric", "class", "over", "region"), "str"),
    **dict.fromkeys(("value", "low", "high"), "float64"),
    "interval": "str",
    **dict.fromkeys(_COUNTED, "Int64"),
}


def summary_table(
    metrics: pd.DataFrame,
    classes: Sequence[ClassLike],
    min_reference: int = MIN_REFERENCE,
    *,
    groups: Mapping[str, str] | None = None,
    grouped_by: str = "groups",
    blocks: Sequence[Tally] = (),
) -> pd.DataFrame:
    """The means of a metric table, with what they average and what they could not.

    Columns: ``metric``; ``class``, empty for numbers over classes; ``over``, what is averaged, from
    the inside out, or summed (pooled); ``region``, ``scene`` (whole scenes) or ``regions`` (every
    region of every scene counts the same); ``value``; ``low`` and ``high``, its 95 % percentile
    bootstrap interval, and ``interval``, how many of what were resampled for it, or why there is
    none; and of the cells (scene × region × class; scene × region for numbers over all values) that
    entered: ``n_defined``, ``n_missed`` and ``n_hallucinated`` (among the defined, at 0),
    ``n_undefined`` (absent in both, or nothing to compare: left out of the mean); ``n_failed``,
    scenes that failed (left out too). Empty when no scene was compared with a reference.

    Args:
        metrics: the metric table.
        classes: of the model.
        min_reference: elements of the reference from which a class is not rare.
        groups: scene to what it belongs to (a patient): these are resampled instead of scenes.
        grouped_by: what the groups are, in the plural.
        blocks: of a single scene, the tallies of spatial blocks that add up to it, in a fixed order:
            these are resampled for the numbers of the whole scene.

    Raises:
        RequestError: a scene has no group.
        ValueError: blocks are given for other than one scene, or do not add up to it.
    """
    asked = metrics[metrics["state"] != NOT_REQUESTED_STATE]
    failed = int(asked.loc[asked["state"] == FAILED, "scene"].nunique())
    kept = asked[asked["state"] != FAILED]
    if not len(kept) and not failed:
        return frame([], _COLUMNS)
    whole = kept["region"] == SCENE
    scopes = [Scope.of(kept[whole], SCENE)]
    if not whole.all():
        scopes.append(Scope.of(kept[~whole], REGIONS))
    pieces = []
    for scope in scopes:
        if blocks and scope.region == SCENE:
            clusters = _Clusters.of_blocks(scope, blocks)
        else:
            clusters = _Clusters.of_scenes(scope, groups, grouped_by)
        lines = list(summary_lines(scope.region, classes, min_reference))
        pieces.append(_piece(scope, lines, clusters, failed))
    return frame(pieces, _COLUMNS)


def _piece(scope: Scope, lines: Sequence[Line], clusters: _Clusters, failed: int) -> Piece:
    """The lines as rows."""
    by_scene = np.full((len(scope.scenes), len(lines)), np.nan)
    values = []
    for i, line in enumerate(lines):
        numbers = line.numbers(scope.pooled if line.pooled else scope.cells)
        if not line.pooled:
            by_scene[:, i] = numbers = grouped_mean(numbers, scope.scene, len(scope.scenes))
        values.append(mean(numbers.tolist()))
    found, said = clusters.intervals(scope, lines, by_scene)
    cases = [line.cases(scope) for line in lines]
    columns = {
        **{name: [getattr(line, name) for line in lines] for name in ("metric", "over")},
        "class": [line.name for line in lines],
        "interval": said,
        **{
            f"n_{name}": [getattr(case, name) for case in cases]
            for name in ("defined", "missed", "hallucinated", "undefined")
        },
    }
    arrays = {name: np.array(column, dtype=object) for name, column in columns.items()}
    floats = {"value": np.array(values), "low": found.low, "high": found.high}
    return Piece(len(lines), {**arrays, **floats, "region": scope.region, "n_failed": failed})


@dataclass(frozen=True, eq=False)
class _Clusters:
    """What is resampled: scenes, groups of them, or blocks of one, in which something was compared."""

    kind: str
    """In the plural."""
    cells: ClassCounts
    """A group is a cluster."""
    of_scene: np.ndarray | None
    """Of each scene its cluster, -1 where nothing was compared; None: blocks."""

    @classmethod
    def of_scenes(cls, scope: Scope, groups: Mapping[str, str] | None, grouped_by: str) -> _Clusters:
        """Scenes, or the groups they are in."""
        lacking = [name for name in scope.scenes if groups is not None and name not in groups]
        if lacking:
            raise RequestError(f"{grouped_by}: scene {lacking[0]} is in none; every scene must be in one")
        owners = scope.scenes if groups is None else [groups[name] for name in scope.scenes]
        compared = np.zeros(len(scope.scenes), dtype=bool)
        compared[scope.scene[scope.compared]] = True
        found, index = np.unique(np.array(owners, dtype=object)[compared], return_inverse=True)
        of_scene = np.full(len(compared), -1)
        of_scene[compared] = index
        cells = merged(scope.cells, of_scene[scope.scene], len(found))
        return cls("scenes" if groups is None else grouped_by, cells, of_scene)

    @classmethod
    def of_blocks(cls, scope: Scope, blocks: Sequence[Tally]) -> _Clusters:
        """Spatial blocks of the one scene, which is the first region of their tallies."""
        if len(scope.scenes) != 1:
            raise ValueError(f"blocks are given for {len(scope.scenes)} scenes; they are of one")
        rows = [(block, np.flatnonzero(is_compared(block) & (block.region == 0))) for block in blocks]
        kept = [(block, here) for block, here in rows if len(here)]
        columns = {
            name: np.concatenate([getattr(block, name)[here] for block, here in kept] or [[]])
            for name in ("label", "reference", "cover", "size", "edge")
        }
        number = np.repeat(np.arange(len(kept)), [len(here) for _, here in kept])
        cells = class_counts(Tally.from_columns(region=number, **columns))
        if _listed(merged(cells, np.zeros(len(kept), dtype=np.int64), 1)) != _listed(scope.pooled):
            raise ValueError(f"the blocks do not add up to scene {scope.scenes[0]}")
        return cls("blocks", cells, None)

    def intervals(
        self, scope: Scope, lines: Sequence[Line], by_scene: np.ndarray
    ) -> tuple[Intervals, list[str]]:
        """The lines' intervals, and what was resampled for each.

        Args:
            scope: of the lines.
            lines: of the summary.
            by_scene: each scene's number for each line, float64, (scene, line).
        """
        blocks = self.of_scene is None
        lines = [line.of_sums(scope) for line in lines] if blocks else lines
        summed = np.array([line.pooled or blocks for line in lines])
        of_sums = [line for line, is_sum in zip(lines, summed, strict=True) if is_sum]
        have = [line.sources(self.cells) for line in of_sums]
        found = Intervals.none(len(lines))
        found[summed] = pooled_intervals(self.cells, [line.numbers for line in of_sums], have)
        if self.of_scene is not None:
            seen = self.of_scene >= 0
            values = by_scene[seen][:, ~summed]
            found[~summed] = mean_intervals(values, self.of_scene[seen], self.cells.groups)
        return found, [
            self._said(*n) for n in zip(found.clusters.tolist(), found.undefined.tolist(), strict=True)
        ]

    def _said(self, have: int, undefined: int) -> str:
        if have < 2:
            return f"none: fewer than 2 {self.kind} have it"
        lost = f", undefined in {undefined} of {RESAMPLES} resamples" if undefined else ""
        return f"{self.cells.groups} {self.kind}{lost}"


def _listed(cells: ClassCounts) -> list[tuple[int, ...]]:
    """Value, tp, fp and fn of each value that occurs."""
    counts, there = cells.counts, ~cells.counts.undefined
    columns = (cells.value, counts.tp, counts.fp, counts.fn)
    return list(zip(*(column[there].tolist() for column in columns), strict=True))
