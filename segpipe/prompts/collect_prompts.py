"""What is asked of a scene is settled here: files read, phrases grounded, all numbered, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from segpipe.geometry.box import Box
from segpipe.pipeline.given_scene import find_labels
from segpipe.pipeline.model_scene import Scene
from segpipe.prompts.grounding.base import Detections, Grounding, PhraseAccount, VocabularyGrounder
from segpipe.prompts.grounding.detect_scene import Detecting, detected
from segpipe.prompts.grounding.vocabulary import Vocabulary, concepts
from segpipe.prompts.inputs.files import read_prompts
from segpipe.prompts.inputs.label_prompts import read_labels
from segpipe.prompts.inputs.prompts import make_boxes, make_outlines, make_points, make_prompts, parse_phrases
from segpipe.prompts.masks.merge_masks import Source
from segpipe.prompts.prompt_scene import ASKED, PromptScene
from segpipe.prompts.prompt_set import Asked, asked_by, together


def settle(scene: PromptScene) -> Asked:
    """Everything that is asked of a scene; read from the store where it is settled already.

    Call it when the grounder's windows are done.

    Raises:
        RequestError, SceneError: a file of prompts cannot be read, or suits no such scene.
    """
    stage = scene.ask
    if scene.settled:
        return Asked.load(stage.read_part(ASKED))
    parts = [*_of_files(scene), *_of_text(scene)]
    nothing, _ = make_prompts(
        make_points([], scene.geometry.ndim), make_boxes([], scene.geometry.ndim), make_outlines([]), {}
    )
    asked = together([asked_by(nothing, Source.DRAWN), *parts])
    create_ask(scene)
    stage.write_part(ASKED, asked.dump())
    stage.commit(ASKED, {"objects": len(asked)})
    return asked


def create_ask(scene: PromptScene) -> None:
    """Make the stage where it is absent; it holds no arrays."""
    from segpipe.tiling.blocks import Blocks

    scene.ask.create(None, Blocks((1,), (1,), (0,)), [], {"scene": scene.ref.name})


def _of_files(scene: PromptScene) -> list[Asked]:
    """What people drew, and what an earlier run found."""
    options, parts = scene.options, []
    if options.path:
        prompts, account = read_prompts(
            options.path, scene.geometry, crs=options.crs, layer=options.layer,
            polygons=options.polygons,
        )  # fmt: skip
        parts.append(asked_by(prompts, Source.DRAWN, account.lines()))
    if options.earlier:
        path = find_labels(options.earlier, scene.ref.name)
        prompts, account = read_labels(
            path, scene.geometry, ids=options.earlier_ids, names=options.names,
            smallest=scene.job.measure.smallest,
        )  # fmt: skip
        parts.append(asked_by(prompts, Source.EARLIER, account.lines()))
    return parts


def _of_text(scene: PromptScene) -> list[Asked]:
    """What phrases find, by a vocabulary or a detector."""
    if scene.grounder is None:
        return []
    found = parse_phrases(scene.options.text)
    if isinstance(scene.grounder, Detecting):
        grounding, also, merged = detected(scene.grounder, scene.planes, found.phrases)
    else:
        grounding = _ground(scene, scene.grounder, found.phrases)
        grounding, also, merged = _one_each(grounding)
    rows = tuple(phrase_row(a, m) for a, m in zip(grounding.accounts, merged, strict=True))
    notes = tuple(f"text: {note}" for note in found.notes)
    return [_as_prompts(scene, grounding.detections, also, found.phrases, rows, notes)]


def _ground(scene: PromptScene, model: Scene, phrases: Sequence[str]) -> Grounding:
    """Components of the model's probabilities."""
    scores, labels = model.predict.array("scores"), model.predict.array("labels")

    def read(box: Box) -> np.ndarray:
        known = np.asarray(labels[box.slices]) != model.nodata
        return np.where(known, np.asarray(scores[(slice(None), *box.slices)]), np.float32(np.nan))

    grounder = VocabularyGrounder(
        Vocabulary(concepts(model.card.classes)),
        scene.options.threshold,
        scene.job.measure.smallest,
        scene.geometry.spacing,
    )
    grounding = grounder.ground_scene(read, scene.geometry.shape, phrases)
    model.predict.check()
    return grounding


def _one_each(grounding: Grounding) -> tuple[Grounding, list[tuple[str, ...]], list[int]]:
    """Phrases that mean one class find the same components: each becomes one object, of the first phrase.

    Returns:
        The grounding without what was found twice, the further phrases of each object, and for each phrase
        how many of its objects became another phrase's.
    """
    d = grounding.detections
    phrases = [a.phrase for a in grounding.accounts]
    keys = np.column_stack((d.start, d.stop))
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    which = which.reshape(-1)
    kept = np.sort(first)
    also: dict[int, list[str]] = {int(i): [] for i in kept}
    merged = [0] * len(phrases)
    for place in range(len(d)):
        winner = int(first[which[place]])
        if winner != place:
            also[winner].append(phrases[d.phrase[place]])
            merged[d.phrase[place]] += 1
    labels = tuple(d.label[i] for i in kept.tolist())
    outlines = tuple(d.outline[i] for i in kept.tolist()) if d.outline else ()
    alone = Detections(
        d.start[kept], d.stop[kept], d.point[kept], d.phrase[kept], d.score[kept], labels, outlines
    )
    return Grounding(alone, grounding.accounts), [tuple(also[i]) for i in kept.tolist()], merged


def _as_prompts(
    scene: PromptScene,
    d: Detections,
    also: Sequence[tuple[str, ...]],
    phrases: Sequence[str],
    rows: tuple[dict[str, Any], ...],
    notes: tuple[str, ...],
) -> Asked:
    """Boxes, with a point inside and an outline where the grounder knows them; of a volume on one slice.

    It is that of the point. An outline tells a winding river from all that lies in its box.
    """
    axis, axes = scene.planes.axis, scene.geometry.ndim
    start, stop = d.start.copy(), d.stop.copy()
    if axis is not None:
        start[:, axis] = stop[:, axis] = d.point[:, axis]
    numbers = range(1, len(d) + 1)
    known = [(n, p, True) for n, p in zip(numbers, d.point.tolist(), strict=True) if not math.isnan(p[0])]
    prompts, _ = make_prompts(
        make_points(known, axes),
        make_boxes(zip(numbers, start.tolist(), stop.tolist(), strict=True), axes),
        make_outlines(zip(numbers, d.outline, strict=False)),
        {n: phrases[k] for n, k in zip(numbers, d.phrase.tolist(), strict=True)},
    )
    return Asked(prompts, np.full(len(d), int(Source.TEXT)), d.score, tuple(also), rows, notes)


def phrase_row(account: PhraseAccount, merged: int = 0) -> dict[str, Any]:
    """What became of a phrase, for the record."""
    match = account.match
    return {
        "phrase": account.phrase,
        "outcome": account.outcome.value,
        "found": account.found,
        "below": account.below,
        "small": account.small,
        "merged": merged,
        "best": None if math.isnan(account.best) else account.best,
        "means": "" if match is None else match.name,
        "similarity": None if match is None else match.similarity,
        "note": str(account),
    }
