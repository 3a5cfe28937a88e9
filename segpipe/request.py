"""A job held against the world before any work starts: card, weights, scenes, outputs, device."""

from __future__ import annotations

from dataclasses import dataclass

from segpipe.config import Job
from segpipe.models.registry import check_card
from segpipe.run import fingerprint
from segpipe.scene import Settings, read_card, resolve_settings
from segpipe.sources import SceneRef, discover
from segpipe.store import check_writable


@dataclass(frozen=True)
class Request:
    """A job that can run."""

    job: Job
    settings: Settings
    scenes: tuple[SceneRef, ...]
    mark: str
    """Fingerprint of everything the results depend on."""


def check_request(job: Job) -> Request:
    """Find the scenes and refuse, now, whatever can be known to be wrong.

    Raises:
        RequestError: naming the field, what was found and what would be valid.
    """
    assert job.model is not None
    card = read_card(job.model)
    check_card(card)
    settings = resolve_settings(job.compute, card)
    scenes = tuple(discover(job.scenes))
    check_writable(job.outputs.dir)
    return Request(job, settings, scenes, fingerprint(job, card, settings, scenes))
