"""The job of a question: a job's file, or a run that is asked again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from segpipe.config.job import Job
from segpipe.config.loading import apply_overrides, read_yaml, validate
from segpipe.errors import RequestError

QUESTION = ("text", "path", "layer", "crs", "earlier", "earlier_ids", "names", "everything")
"""Fields of `prompts` that say what is asked, not how."""


def asked_job(
    what: str,
    text: Sequence[str],
    grounder: str,
    path: str,
    threshold: float | None,
    overrides: Sequence[str],
) -> Job:
    """A job with its question.

    Args:
        what: a job's file, whose own question stays where none is given; or a run's folder or URL, whose
            question goes where another one is given.
        text: phrases.
        grounder: card; empty: the job's.
        path: file of points, boxes or polygons; empty: none.
        threshold: of phrases; None: the job's.
        overrides: ``a.b=value`` items, which come last.

    Raises:
        RequestError: there is neither a job nor a run, or nothing is asked.
    """
    if what.endswith((".yaml", ".yml")):
        data = read_yaml(what)
    else:
        from segpipe.runs.run import load_run

        data = load_run(what)[1].job
    asked: dict[str, Any] = dict(data.get("prompts") or {})
    if (text or path) and not what.endswith((".yaml", ".yml")):
        asked = {k: v for k, v in asked.items() if k not in QUESTION}
    asked |= {"text": list(text)} if text else {}
    asked |= {"grounder": grounder} if grounder else {}
    asked |= {"path": path} if path else {}
    asked |= {"threshold": threshold} if threshold is not None else {}
    if not asked.get("text"):
        asked.pop("grounder", None)  # kept by a run that was asked in words
    data = {**data, "prompts": asked}
    apply_overrides(data, overrides)
    job = validate(Job, data, what)
    if not job.prompts.asked:
        raise RequestError(
            f"{what}: nothing is asked: give --text, --points, --boxes, or `prompts` in the job"
        )
    return job
