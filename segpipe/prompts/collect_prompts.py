"""Collect the prompts of a scene: read files, ground phrases, number all objects; or estimate their cost."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from segpipe.geometry.box import Box
from segpipe.pipeline.given_scene import find_labels
from segpipe.pipeline.model_scene import Scene
from segpipe.prompts.grounding.base import Grounding, PhraseAccount, VocabularyGrounder
from segpipe.prompts.grounding.detect_scene import DetectorScene, merge_windows
from segpipe.prompts.grounding.merge_boxes import detection_windows
from segpipe.prompts.grounding.vocabulary import Vocabulary, concepts
from segpipe.prompts.inputs.components import read_labels
from segpipe.prompts.inputs.prompt_files import read_prompts
from segpipe.prompts.masks.embeddings import window_id
from segpipe.prompts.phrases import parse_phrases
from segpipe.prompts.prompt_scene import ASKED, PromptScene
from segpipe.prompts.prompt_set import (
    PromptSet,
    PromptSource,
    make_boxes,
    make_outlines,
    make_points,
    make_prompts,
)
from segpipe.tables.units import byte_size
from segpipe.tiling.windows import Blocks


def collect_prompts(scene: PromptScene) -> PromptSet:
    """Return all prompts of a scene; they are read from the store where they were collected before.

    Call it when the grounder's windows are done.

    Raises:
        RequestError, SceneError: a file of prompts cannot be read, or suits no such scene.
    """
    if scene.collected:
        return scene.prompt_set
    ndim = scene.geometry.ndim
    nothing, _ = make_prompts(make_points([], ndim), make_boxes([], ndim), make_outlines([]), {})
    prompts = PromptSet.concatenate([nothing, *_of_files(scene), *_of_text(scene)])
    scene.prompts.create(None, Blocks((1,), (1,), (0,)), [], {"scene": scene.ref.name})
    files = scene.prompts.write_part(ASKED, prompts.dump())
    scene.prompts.commit(ASKED, {"objects": len(prompts)}, files)
    return prompts


def _of_files(scene: PromptScene) -> Iterator[PromptSet]:
    """Yield what people drew, and what the labels of a previous run hold."""
    options = scene.options
    if options.path:
        prompts, account = read_prompts(
            options.path, scene.geometry, crs=options.crs, layer=options.layer, polygons=options.polygons
        )
        yield replace(prompts, notes=account.lines())
    if options.earlier:
        prompts, account = read_labels(
            find_labels(options.earlier, scene.ref.name), scene.geometry, ids=options.earlier_ids,
            names=options.names, smallest=scene.job.measure.smallest,
        )  # fmt: skip
        source = np.full(len(prompts), int(PromptSource.EARLIER))
        yield replace(prompts, source=source, notes=account.lines())


def _of_text(scene: PromptScene) -> list[PromptSet]:
    """Return what a vocabulary or a detector finds for the phrases."""
    if scene.grounder is None:
        return []
    found = parse_phrases(scene.options.text)
    if isinstance(scene.grounder, DetectorScene):
        grounding, also, merged = merge_windows(scene.grounder, found.phrases)
    else:
        grounding = _ground(scene, scene.grounder, found.phrases)
        grounding, also, merged = _one_each(grounding)
    rows = tuple(phrase_row(a, m) for a, m in zip(grounding.accounts, merged, strict=True))
    notes = tuple(f"text: {note}" for note in found.notes)
    return [replace(_as_prompts(scene, grounding, also), accounts=rows, notes=notes)]


def _ground(scene: PromptScene, model: Scene, phrases: Sequence[str]) -> Grounding:
    """Ground phrases in a semantic model's probabilities of the scene."""

    def read(box: Box) -> np.ndarray:
        known = model.predict.read("labels", box.slices) != model.nodata
        return np.where(known, model.predict.read("scores", (slice(None), *box.slices)), np.float32(np.nan))

    grounder = VocabularyGrounder(
        Vocabulary(concepts(model.card.classes)), scene.options.threshold, scene.job.measure.smallest,
        scene.geometry.spacing,
    )  # fmt: skip
    return grounder.ground_scene(read, scene.geometry.shape, phrases)


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
    kept, winners = np.sort(first), first[which.reshape(-1)]
    also: dict[int, list[str]] = {int(i): [] for i in kept}
    merged = [0] * len(phrases)
    for row in np.flatnonzero(winners != np.arange(len(d))).tolist():
        also[int(winners[row])].append(phrases[d.phrase[row]])
        merged[d.phrase[row]] += 1
    return Grounding(d.take(kept), grounding.accounts), [tuple(also[i]) for i in kept.tolist()], merged


def _as_prompts(scene: PromptScene, grounding: Grounding, also: Sequence[tuple[str, ...]]) -> PromptSet:
    """Return boxes, with a point inside and an outline where the grounder knows them.

    The box of a volume is on the slice of the point. An outline tells a winding river from all that lies in
    its box.
    """
    d, axis, axes = grounding.detections, scene.planes.axis, scene.geometry.ndim
    start, stop = d.start.copy(), d.stop.copy()
    if axis is not None:
        start[:, axis] = stop[:, axis] = d.point[:, axis]
    numbers = range(1, len(d) + 1)
    known = [(n, p, True) for n, p in zip(numbers, d.point.tolist(), strict=True) if not math.isnan(p[0])]
    prompts, _ = make_prompts(
        make_points(known, axes),
        make_boxes(zip(numbers, start.tolist(), stop.tolist(), strict=True), axes),
        make_outlines(zip(numbers, d.outline, strict=False)),
        {n: grounding.accounts[k].phrase for n, k in zip(numbers, d.phrase.tolist(), strict=True)},
        PromptSource.TEXT,
    )
    return replace(prompts, score=d.score, also=tuple(also))


def phrase_row(account: PhraseAccount, merged: int = 0) -> dict[str, Any]:
    """Return what became of a phrase, for the record."""
    match = account.match
    return {
        "phrase": account.phrase, "outcome": account.outcome.value, "found": account.found,
        "below": account.below, "small": account.small, "merged": merged,
        "best": None if math.isnan(account.best) else account.best,
        "means": "" if match is None else match.name,
        "similarity": None if match is None else match.similarity, "note": str(account),
    }  # fmt: skip


def prompt_line(scene: PromptScene) -> str:
    """Return what a scene takes, in a line: windows to encode and what is kept of them, a grounder's work.

    Of phrases and of volumes it is the most it can be: where their objects are shows when they are found.

    Raises:
        RequestError, SceneError: as `collect_prompts`.
    """
    kept = set(scene.embeddings.stage.done()) if scene.embeddings.stage.exists else set()
    windows, at_most = _windows(scene)
    new = len(windows - kept) if not at_most else max(0, len(windows) - len(kept))
    bound = "at most " if at_most else ""
    line = (
        f"{bound}{new:,} windows of {scene.pyramid.window} to encode ({len(windows & kept):,} are kept), "
        f"embeddings {bound}{byte_size(scene.embeddings.window_bytes * len(windows))}"
    )
    grounder = scene.grounder
    if isinstance(grounder, DetectorScene):
        left = len(grounder.pending()) if grounder.stage.exists else len(grounder.windows())
        return f"{line}; {left:,} windows for {grounder.card.name}"
    if grounder is not None:
        s = grounder.plan.summary()
        return f"{line}; up to {s['forward_passes']:,} passes of {grounder.card.name}"
    return line


def _windows(scene: PromptScene) -> tuple[set[str], bool]:
    """Return names of the windows, and whether they are more than will be segmented."""
    options, pyramid = scene.options, scene.pyramid
    parts = list(_of_files(scene))
    if scene.planes.axis is not None:
        return {str(i) for i in range(scene.planes.count)}, True
    if options.text:
        return {window_id(w) for w in detection_windows(pyramid, range(pyramid.levels))}, True
    extents = [part.extents() for part in parts if len(part)]
    names = {window_id(w) for e in extents for w in pyramid.needed(e.start, e.stop)[0]}
    if options.everything:
        names |= {window_id(w) for w in detection_windows(pyramid, range(options.grid.levels))}
    return names, False
