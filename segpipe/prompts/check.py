"""A job with prompts held against the world before any work starts."""

from __future__ import annotations

from segpipe.config.card import Card, read_card
from segpipe.config.job import TTA, Blend, Job
from segpipe.errors import RequestError
from segpipe.models.registry import ModelDescription, check_card, describe
from segpipe.models.weights import resolve_weights
from segpipe.prompts.grounding.detectors import check_detector
from segpipe.prompts.grounding.processors import read_kind
from segpipe.prompts.inputs.prompts import parse_phrases
from segpipe.prompts.phrase_classes import file_mark, phrase_classes
from segpipe.prompts.prompt_scene import prompted_card
from segpipe.prompts.segmenters.registry import check_segmenter, load_segmenter


def check_prompts(job: Job) -> Card:
    """The promptable model's card, with the bands that the job shows it.

    Raises:
        RequestError: naming the field, what was found and what would be valid.
    """
    card, options = prompted_card(job), job.prompts
    if card.output.kind != "prompted":
        raise RequestError(
            f"model: {card.name!r} is a {card.output.kind} model, which takes no prompts: give a promptable "
            "one (output.kind: prompted), and this one as `prompts.grounder`"
        )
    check_segmenter(card)
    _check_in_vain(job)
    if options.text:
        parse_phrases(options.text)
    if options.grounder:
        grounder = read_card(options.grounder)
        if grounder.output.kind == "semantic" or grounder.output.kind == "boxes":
            check_model(grounder)
        else:
            raise RequestError(
                f"prompts.grounder: {grounder.name!r} is a {grounder.output.kind} model; valid: a semantic "
                "one, or a detector that takes text (output.kind: boxes)"
            )
    if options.labeller:
        names = read_card(options.labeller)
        if names.output.kind != "names":
            raise RequestError(
                f"prompts.labeller: {names.name!r} is a {names.output.kind} model; valid: a CLIP "
                "(output.kind: names)"
            )
        check_model(names)
    if options.path:
        file_mark(options.path)
    classes = phrase_classes(options)
    objects = [c.name for c in classes if not c.background]
    if job.measure.objects and not (job.reference and job.reference.divisor) and len(objects) > 1:
        raise RequestError(
            f"measure.objects: ids alone do not say which of {', '.join(objects)} an object is: give a "
            "reference whose values are class × divisor + number, and `reference.divisor`"
        )
    return card


def check_model(card: Card) -> None:
    """Refuse a card that could not run, whether it answers prompts or not (`check_card`).

    Raises:
        RequestError: names the card, the field, what was found and what would be valid.
    """
    if not card.answers_prompts:
        check_card(card)
    elif card.output.kind == "boxes":
        check_detector(resolve_weights(card))
    elif card.output.kind == "names":
        read_kind(resolve_weights(card), ("clip",))
    else:
        resolve_weights(card)
        check_segmenter(card)


def describe_model(card: Card) -> ModelDescription:
    """Facts of a model that are not written on its card, of those that answer prompts too.

    Raises:
        RequestError: as `segpipe.models.registry.load_model` or `load_segmenter`.
    """
    if card.output.kind != "prompted":
        return describe(card)
    import torch

    return describe(card, load_segmenter(card, torch.device("cpu")).parameters)


def _check_in_vain(job: Job) -> None:
    """What a promptable model has no use for is refused, never ignored."""
    for field, asked in {
        "tiling.window": job.tiling.window != "auto",
        "tiling.halo": job.tiling.halo != "auto",
        "tiling.blend": job.tiling.blend is not Blend.trim,
        "compute.tta": job.compute.tta is not TTA.none,
        "compute.compile": job.compute.compile,
        "outputs.scores": job.outputs.scores,
        "outputs.uncertainty": job.outputs.uncertainty,
    }.items():
        if asked:
            raise RequestError(f"{field}: a promptable model has no use for it: leave it out")
