"""All targets, and the inputs that are in the repository."""

from __future__ import annotations

from pathlib import Path

from tools.fuzz import records, requests, scenes
from tools.fuzz.target import Target

TESTS = Path(__file__).parents[2] / "tests/fuzz"
SEEDS = TESTS / "seeds"
"""A folder of inputs for each target, made by `tools.fuzz.seeds`."""
FOUND = TESTS / "found"
"""Inputs that were findings once, by target."""

TARGETS: dict[str, Target] = {t.name: t for t in (*scenes.TARGETS, *requests.TARGETS, *records.TARGETS)}


def inputs_of(name: str) -> list[Path]:
    """Seeds and former findings of a target."""
    return [path for folder in (SEEDS, FOUND) for path in sorted((folder / name).glob("*"))]
