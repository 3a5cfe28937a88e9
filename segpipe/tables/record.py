"""What a run was, as data: ``run.json`` is this, and the page and the summary are drawn from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from segpipe.errors import RequestError


@dataclass(frozen=True)
class ClassInfo:
    """A class as the report shows it."""

    value: int
    name: str
    color: str
    """``#rrggbb``."""
    background: bool = False
    stuff: bool = False
    """Of a panoptic model: one segment, not counted."""


@dataclass(frozen=True)
class ModelSummary:
    """The model card's part that a reader needs."""

    name: str
    title: str = ""
    provider: str = ""
    data: str = ""
    """What it was trained on."""
    scores: str = ""
    limits: str = ""
    licence: str = ""
    source: str = ""
    weights: str = ""
    """Where the weights came from."""
    fingerprint: str = ""
    """SHA-256 of the weights."""
    classes: tuple[ClassInfo, ...] = ()


@dataclass(frozen=True)
class GeometrySummary:
    """Where a scene is, in words."""

    kind: Literal["raster", "volume"]
    shape: tuple[int, ...]
    """Array order: (y, x) or (z, y, x)."""
    crs: str | None = None
    """Name of the CRS; None for volumes and for rasters without one."""
    spacing: tuple[float, ...] | None = None
    """Array order."""
    unit: str = ""
    """Of the spacing: m, mm, degree."""
    orientation: str | None = None
    """Of a volume, e.g. RAS."""


Outcome = Literal["found", "below threshold", "not found", "not in the vocabulary", "not understood"]
"""What became of a phrase in a scene."""


@dataclass(frozen=True)
class AskedPhrase:
    """A phrase that was asked for, and what became of it in one scene."""

    phrase: str
    outcome: Outcome
    found: int = 0
    """Detections with a sufficient score and size."""
    below: int = 0
    """Candidates whose score is below the threshold."""
    small: int = 0
    """Candidates that are too small."""
    merged: int = 0
    """Detections that became part of other objects."""
    best: float | None = None
    """Highest score of a candidate, found or not; None: there is none."""
    means: str = ""
    """Class that the phrase was matched with, the nearest one if none is meant; empty: not matched."""
    similarity: float | None = None
    """Of the phrase and that class."""
    note: str = ""
    """All of it in one line of words."""


@dataclass(frozen=True)
class SceneRecord:
    """One scene of the run."""

    name: str
    uri: str
    state: Literal["done", "failed"]
    error: str = ""
    may_pass: bool = False
    """Of a scene that failed: by a fault of storage or memory, not of the scene."""
    unmeasured: dict[str, str] = field(default_factory=dict)
    """Of a scene that failed although its map is written: what could not be measured, to the reason."""
    notes: tuple[str, ...] = ()
    geometry: GeometrySummary | None = None
    """None where the scene could not be opened."""
    keys: dict[str, str] = field(default_factory=dict)
    """Stage to key: ingest, predict, measure."""
    plan: dict[str, Any] = field(default_factory=dict)
    """Windows, blocks, redundancy, memory, … as numbers and words."""
    timings: dict[str, float] = field(default_factory=dict)
    """Stage to seconds."""
    attempts: int = 1
    """How often the hardest batch was tried; 1: at once. It is in no table: those are as after no crash."""
    files: dict[str, str] = field(default_factory=dict)
    """What it is to its path relative to the run's folder."""
    reused: tuple[str, ...] = ()
    """Stages that were found finished under the same key and not computed again."""
    asked: tuple[AskedPhrase, ...] = ()
    """Of a prompted run: every phrase, in the order asked."""
    prompts: tuple[str, ...] = ()
    """Of a prompted run: what became of the rows of files of prompts, a line a fact."""

    @property
    def mapped(self) -> bool:
        """Whether its label map and its files are written."""
        return self.state == "done" or bool(self.unmeasured)


@dataclass(frozen=True)
class RunRecord:
    """A run."""

    job_name: str
    run_id: str
    started: str
    """ISO 8601 with its offset."""
    finished: str
    job: dict[str, Any] = field(default_factory=dict)
    """The job as resolved."""
    model: ModelSummary | None = None
    classes: tuple[ClassInfo, ...] = ()
    """For runs without a model; otherwise the model's."""
    versions: dict[str, str] = field(default_factory=dict)
    scenes: tuple[SceneRecord, ...] = ()
    groups: dict[str, str] = field(default_factory=dict)
    """Scene to what it belongs to, where the job says so: what intervals resample."""
    notes: tuple[str, ...] = ()

    @property
    def legend(self) -> tuple[ClassInfo, ...]:
        """The classes the run reports."""
        return self.model.classes if self.model and self.model.classes else self.classes

    @property
    def done(self) -> tuple[SceneRecord, ...]:
        return tuple(s for s in self.scenes if s.state == "done")

    @property
    def mapped(self) -> tuple[SceneRecord, ...]:
        """Those that are done, and those of which not all could be measured."""
        return tuple(s for s in self.scenes if s.mapped)

    @property
    def failed(self) -> tuple[SceneRecord, ...]:
        return tuple(s for s in self.scenes if s.state == "failed")

    @property
    def prompted(self) -> bool:
        """Whether objects were asked for, by phrases or by prompts of files."""
        return any(s.asked or s.prompts for s in self.scenes)


_ADAPTER = TypeAdapter(RunRecord)


def dump_record(record: RunRecord) -> str:
    """The text of ``run.json``."""
    return _ADAPTER.dump_json(record, indent=2).decode() + "\n"


def load_record(text: str | bytes) -> RunRecord:
    """The inverse of `dump_record`.

    Raises:
        RequestError: not a run's record.
    """
    try:
        return _ADAPTER.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "the file"
        raise RequestError(f"run.json is not a run's record: {where}: {first['msg']}") from error
