"""The fingerprint of a run: a hash of everything that its results depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from segpipe import ANSWER_VERSION, ENGINE_VERSION
from segpipe.config.card import Card, read_card
from segpipe.config.job import Job
from segpipe.inference.settings import Settings
from segpipe.pipeline.keys import model_parts
from segpipe.pipeline.measure import TALLY_VERSION
from segpipe.sources.base import SceneRef
from segpipe.sources.common import matches
from segpipe.sources.mosaic import MOSAIC
from segpipe.sources.remote import is_remote, remote_identity
from segpipe.sources.stack import STACK, stack_files
from segpipe.store.location import is_url


def fingerprint(job: Job, card: Card | None, settings: Settings, scenes: Sequence[SceneRef]) -> str:
    """Hash of everything a run's results depend on: what was asked, the model, and the inputs' state.

    Runner, workers, memory and block size are left out: they change no result.
    """
    asked = job.model_dump(mode="json")
    for key in ("runner", "workers", "least", "address", "cluster", "retries", "batch_minutes"):
        asked["compute"].pop(key)
    for key in ("memory", "block", "store"):
        asked["tiling"].pop(key)
    asked["outputs"] = {k: asked["outputs"][k] for k in ("formats", "scores", "uncertainty")}
    files, prompts = [s.uri for s in scenes], job.prompts
    asked["prompts"].pop("cache")
    grounder = read_card(prompts.grounder) if prompts.grounder else None
    if job.regions is not None:
        files += [job.regions.path, *([job.regions.name] if job.regions.name else [])]
    if job.reference is not None:
        files += [job.reference.path]
    files += [path for path in (job.labels, job.classes, job.measure.groups, prompts.path) if path]
    files += [prompts.earlier] if prompts.earlier else []
    prompted = card is not None and card.answers_prompts
    parts = {
        "asked": asked,
        "model": model_parts(card) if card else None,
        "card": card.model_dump(mode="json") if card else None,
        "grounder": [grounder.model_dump(mode="json"), model_parts(grounder)] if grounder else None,
        "settings": [settings.device_class, settings.precision, settings.batch],
        "inputs": [_state(uri) for uri in files],
        "versions": [ENGINE_VERSION, TALLY_VERSION, *([ANSWER_VERSION] if prompted else [])],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]


def _state(uri: str) -> list[Any]:
    """A path with what tells that it changed: size and time of the file, or of a folder's or glob's files."""
    if uri.startswith(STACK):
        return [uri, *(_state(part) for part in stack_files(uri))]
    location = uri.removeprefix(MOSAIC).split("#")[0]
    if is_remote(location):
        return [uri, remote_identity(location)[0]]
    path = Path(location)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file())
    elif path.exists():
        files = [path]
    else:
        files = [] if is_url(location) else [p for p in matches(location) if p.is_file()]
    return [uri, *([str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in files)]
