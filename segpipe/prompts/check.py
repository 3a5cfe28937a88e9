"""A job with prompts held against the world before any work starts."""

from __future__ import annotations

from segpipe.config import TTA, Blend, Job
from segpipe.errors import RequestError
from segpipe.models.card import Card
from segpipe.models.registry import check_card
from segpipe.prompts.phrases import file_mark, phrase_classes
from segpipe.prompts.request import parse_phrases
from segpipe.prompts.scene import prompted_card
from segpipe.prompts.segmenters import check_segmenter
from segpipe.scene import read_card


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
            check_card(grounder)
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
        check_card(names)
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
