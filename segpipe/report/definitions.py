"""The formulas behind the numbers of the report, from the data dictionary of the tables."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache

from segpipe.tables.frames import dictionary


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One number, explained."""

    id: str
    """Anchor on the page: ``def-<id>``."""
    name: str
    formula: str = ""
    """In plain text; empty where there is none."""
    meaning: str
    undefined: str = ""
    """When it is not defined, and what is shown then."""
    metrics: str = ""
    """Pattern of the summary's ``metric`` that it explains, matched at any place."""

    @property
    def text(self) -> str:
        """All of it in one line."""
        return " ".join(filter(None, (f"{self.formula}.", self.meaning, self.undefined)))


@cache
def definitions() -> dict[str, Definition]:
    """Return all definitions by id, in the order of the page."""
    return {id: Definition(id=id, **entry) for id, entry in dictionary()["definitions"].items()}


def of_metric(name: str) -> Definition | None:
    """Return what explains a metric of the summary."""
    return next((d for d in definitions().values() if d.metrics and re.search(d.metrics, name)), None)


def needed(ids: Collection[str], metrics: Collection[str]) -> list[Definition]:
    """Return the definitions with these ids or of these metrics of the summary, in their order."""
    return [
        item
        for item in definitions().values()
        if item.id in ids or (item.metrics and any(re.search(item.metrics, m) for m in metrics))
    ]
