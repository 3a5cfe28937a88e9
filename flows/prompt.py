"""The prompt flow: objects that are asked for in words, by points or by boxes."""

from __future__ import annotations

from typing import Any

from prefect import State, flow
from prefect.states import Failed

from segpipe.config.job import PromptJob
from segpipe.errors import RequestError
from segpipe_flows.here import request_of
from segpipe_flows.segment import OF_REQUEST, carry_out
from segpipe_tasks.told import refused


@flow(name="prompt", **OF_REQUEST)
def prompt(question: PromptJob) -> State[Any]:
    """Ask a promptable model for objects over scenes of any size, and report them by phrase and region.

    Phrases go through a grounder (a semantic model's own classes, or a detector) to boxes; boxes, points and
    earlier labels go to the model, whose encoder sees a window once: the next question reads what is kept.
    Every phrase is accounted for, also those of which nothing is found.

    Args:
        question: Which scenes, which promptable model, and under "prompts" what to ask.
    """
    try:
        question = request_of(PromptJob, question, "question")
    except RequestError as error:
        return refused(error)
    if not question.prompts.asked:
        return Failed(message="prompts: nothing is asked; valid: `text`, `path`, `earlier` or `everything`")
    return carry_out(question)
