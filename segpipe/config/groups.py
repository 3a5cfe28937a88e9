"""Which scenes belong together (a patient, a site): a bootstrap resamples these, not their scenes."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from segpipe.errors import RequestError

FIELD = "measure.groups"


def load_groups(path: str, scenes: Iterable[str]) -> dict[str, str]:
    """Scene to group, of a CSV with the columns scene and group.

    Raises:
        RequestError: the file cannot be read, lacks a column, or a scene of the run is not in it or twice.
    """
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RequestError(f"{FIELD}: {path} cannot be read: {error}") from error
    columns = list(rows[0]) if rows else []
    if not {"scene", "group"} <= set(columns):
        raise RequestError(f"{FIELD}: {path} has the columns {columns}; valid: scene,group and a row a scene")
    found: dict[str, str] = {}
    for row in rows:
        if found.setdefault(row["scene"], row["group"]) != row["group"]:
            raise RequestError(f"{FIELD}: {path} has {row['scene']!r} in two groups; valid: one")
    missing = [scene for scene in scenes if not found.get(scene)]
    if missing:
        raise RequestError(f"{FIELD}: {path} has no group for {missing[0]!r}; every scene needs one")
    return {scene: found[scene] for scene in scenes}
