"""What a flow run is called in the UI: the job, its scenes, and the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect import runtime
from pydantic import BaseModel

from segpipe.config.card import read_card
from segpipe.errors import SegpipeError
from segpipe.redact import public_uri
from segpipe.sources import discover

LONGEST = 120
"""Characters of a run's name."""


def run_name() -> str:
    """``landcover: landsat7_2000 by landcover-unet``: for ``flow_run_name`` of a flow with one request.

    Never fails: what is wrong with a request is said by the run, which needs a name to say it.
    """
    return name_of(*runtime.flow_run.parameters.values())


def name_of(asked: object) -> str:
    """The name of a run of a request, as a model (`Job`, `PromptJob`, `Scan`) or as the form's plain values.

    Args:
        asked: with ``name``, ``scenes`` or ``lake``, and ``model`` or ``labels``.
    """
    given: dict[str, Any] = {}
    if isinstance(asked, BaseModel):
        given = {field: getattr(asked, field) for field in type(asked).model_fields}
    elif isinstance(asked, dict):
        given = asked
    name = str(given.get("name") or "run")
    try:
        text = f"{name}: {_scenes(given)}{_model(given)}"
    except (SegpipeError, OSError, KeyError, TypeError, ValueError):  # a form's values, not yet checked
        return name
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _scenes(given: dict[str, Any]) -> str:
    """The one scene's name, or how many; a lake's location."""
    lake = given.get("lake")
    if lake is not None:
        location = lake["location"] if isinstance(lake, dict) else lake.location
        return public_uri(str(location))
    return scenes_told([scene.name for scene in discover(given["scenes"])])


def scenes_told(names: Sequence[str]) -> str:
    """``landsat7_2000`` for one, ``12 scenes`` for several."""
    return names[0] if len(names) == 1 else f"{len(names)} scenes"


def _model(given: dict[str, Any]) -> str:
    model = given.get("model")
    if not model:
        return ", labels as given" if given.get("labels") else ""
    try:
        return f" by {read_card(str(model)).name}"
    except (SegpipeError, OSError):
        return f" by {Path(str(model)).stem}"
