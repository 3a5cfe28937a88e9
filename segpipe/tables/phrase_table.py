"""The table of the phrases of a run: what became of each in every scene."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pandas as pd

from segpipe.regions.base import SCENE
from segpipe.tables import units
from segpipe.tables.frames import FAILED, SIZE_COLUMNS, column_types, table_of_rows
from segpipe.tables.record import AskedPhrase, RunRecord, SceneRecord

SCENE_FAILED = "scene failed"
"""Outcome where the scene failed: what became of the phrase is unknown."""
GIVEN = "from prompts"
"""Outcome of classes that no text asked for: their objects come from prompts of files or from points."""
FOUND = "found"
PHRASE_COUNTS = ("found", "below", "small", "merged")


def phrase_table(
    record: RunRecord, regions: pd.DataFrame, instances: pd.DataFrame | None = None
) -> pd.DataFrame:
    """A row a scene and phrase, in the order asked; classes that only prompts of files name come last.

    Numbers of failed scenes are empty; ``mean_score`` is NaN where no object has a score.

    Args:
        record: of the run.
        regions: the region table, with ``objects``.
        instances: the table of objects; left out: ``mean_score`` is NaN.
    """
    asked = dict.fromkeys(a.phrase for scene in record.scenes for a in scene.asked)
    named = (c.name for c in record.legend if not c.background)
    phrases = list(dict.fromkeys((*asked, *named))) if record.prompted else []
    sizes = [c for c in units.SIZES if c in regions and regions[c].notna().any()]
    whole = regions[regions["region"] == SCENE]
    measured = {(r["scene"], r["class"]): r for r in whole.to_dict("records") if r["state"] != FAILED}
    scores = _mean_scores(instances)
    rows = []
    for scene in record.scenes:
        told = {a.phrase: a for a in scene.asked}
        for phrase in phrases:
            here = measured.get((scene.name, phrase), {})
            row = {"scene": scene.name, **_fate(scene, phrase, told.get(phrase))}
            row |= {c: here.get(c) for c in ("objects", *sizes)}
            rows.append(row | {"mean_score": scores.get((scene.name, phrase))})
    kept = [unit for unit, column in SIZE_COLUMNS.items() if column in sizes]
    return table_of_rows(rows, column_types("asked", kept))


def _fate(scene: SceneRecord, phrase: str, asked: AskedPhrase | None) -> dict[str, Any]:
    if asked is not None:
        return asdict(asked)
    failed = scene.state == "failed"
    return {
        "phrase": phrase, "outcome": SCENE_FAILED if failed else GIVEN,
        "means": "", "note": scene.error if failed else "",
    }  # fmt: skip


def _mean_scores(instances: pd.DataFrame | None) -> dict[tuple[str, str], float]:
    """Mean score of the objects by scene and class; without those that have none."""
    if instances is None or not {"scene", "class", "score"} <= set(instances):
        return {}
    scored = instances.dropna(subset=["score"])
    means = scored.groupby(["scene", "class"])["score"].mean().reset_index()
    rows = zip(means["scene"], means["class"], means["score"], strict=True)
    return {(str(scene), str(name)): float(mean) for scene, name, mean in rows}
