"""Answers become the objects of a scene: merged, painted on the native grid, measured, listed."""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd

from segpipe.config.job import parse_memory, parse_size
from segpipe.geometry.box import Box
from segpipe.metrics.tally import SizeScale
from segpipe.objects.table import FACTS, TABLE, ObjectTable, add_sizes
from segpipe.pipeline.progress import Done
from segpipe.prompts.collect_prompts import phrase_row
from segpipe.prompts.grounding.label_masks import name_masks
from segpipe.prompts.masks.automatic import merge_masks
from segpipe.prompts.masks.embedding_cache import prune
from segpipe.prompts.masks.mask_table import CANDIDATES, Answered, answered_grid, together
from segpipe.prompts.masks.merge_masks import Found, Joined, Source, join_found
from segpipe.prompts.masks.rasterise import Masks, Painted, paint_scene
from segpipe.prompts.phrase_classes import UNNAMED, value_of
from segpipe.prompts.prompt_scene import ACCOUNT, PromptScene
from segpipe.prompts.prompt_set import Asked
from segpipe.prompts.segment_windows import all_answers, automatic_of, grid_masks
from segpipe.prompts.volumes.segment_volume import VOLUME
from segpipe.sources.base import LabelReader
from segpipe.store.stage import ArraySpec
from segpipe.tiling.blocks import BLOCK_EDGE, Blocks


@dataclass(frozen=True, eq=False)
class _Objects:
    """All objects that were answered, asked for and of a grid, in one numbering."""

    asked: Asked
    answers: Answered
    values: np.ndarray
    """(n,) class value."""
    source: np.ndarray
    """(n,) `Source`."""
    score: np.ndarray
    """(n,) the grounder's."""

    def found(self, scene: PromptScene) -> Found:
        """As merging takes them."""
        unnamed = np.array([c.name == UNNAMED for c in scene.classes])[self.values]
        phrase, answers = np.where(unnamed, -1, self.values), self.answers
        return Found(answers.number, phrase, self.source, self.score, answers.iou, answers.patches)

    @property
    def sure(self) -> np.ndarray:
        """(n,) the grounder's score, where there is one, times the predicted IoU; 0…1."""
        iou = np.clip(self.answers.iou, 0, 1)  # a network may predict more
        return np.asarray(np.where(np.isnan(self.score), 1.0, self.score) * iou)


def find_prompted(scene: PromptScene) -> Done:
    """Merge, paint, number and list the objects of a scene whose windows are all answered.

    Raises:
        SceneError: windows have no answer.
    """
    begun = time.perf_counter()
    if scene.labels.exists and "whole" in scene.labels.done():
        return Done(0, 1, time.perf_counter() - begun, {})
    scene.answers.compact()
    scene.embeddings.stage.compact()
    objects, lines = _objects(scene)
    joined = join_found(objects.found(scene), scene.geometry.shape, scene.options.same)
    kept = joined.kept
    blocks = _blocks(scene)
    masks = Masks(scene.geometry.shape, tuple(objects.answers.patches[i] for i in kept.tolist()))
    with scene.open_image() as store:

        @lru_cache(maxsize=1)
        def valid(box: Box, /) -> np.ndarray:
            return store.read(box).valid

        painted = paint_scene(
            (blocks.box(i) for i in blocks.indices()), masks, objects.values[kept], objects.sure[kept],
            minimum=scene.job.measure.smallest, valid=valid,
        )  # fmt: skip
        _write(scene, blocks, painted, valid)
    facts = _facts(scene, objects, joined, painted)
    buffer = io.BytesIO()
    facts.to_parquet(buffer)
    scene.labels.write_part(FACTS, buffer.getvalue())
    scene.labels.write_json(ACCOUNT, _account(scene, objects, joined, painted, lines))
    scene.labels.commit("whole", {"objects": len(painted.objects)})
    scene.embeddings.touch()
    prune(scene.job.outputs.dir, scene.embeddings.stage.key, parse_memory(scene.options.cache))
    return Done(1, 0, time.perf_counter() - begun, {})


def _blocks(scene: PromptScene) -> Blocks:
    """The units of writing: the job's, or of the usual size. No id depends on them."""
    shape, ndim = scene.geometry.shape, scene.geometry.ndim
    wanted = scene.job.tiling.block
    sizes = (BLOCK_EDGE[ndim],) * ndim if wanted == "auto" else parse_size(wanted, ndim, "tiling.block")
    return Blocks(shape, tuple(min(a, n) for a, n in zip(sizes, shape, strict=True)), (0,) * ndim)


def _objects(scene: PromptScene) -> tuple[_Objects, list[str]]:
    """Asked and answered, and what became of a grid's points in words."""
    asked = scene.asked
    if scene.planes.axis is None:
        answers = all_answers(scene)
    else:
        answers = Answered.load(scene.answers.read_part(VOLUME))
    values = [value_of(phrase, scene.classes) for phrase in asked.prompts.phrases]
    source, score, lines = asked.kind, asked.score, []
    parts = grid_masks(scene)
    if parts:
        masks, tally = merge_masks(parts, automatic_of(scene))
        lines = [f"grid: {line}" for line in tally.lines()]
        first = len(asked) + 1
        answers = together([answers, answered_grid(masks, first)])
        named = [UNNAMED] * len(masks)
        sure = np.full(len(masks), np.nan)
        if scene.labeller is not None:
            found, sure, accounts = name_masks(scene.labeller, masks.patches)
            named = [name or UNNAMED for name in found]
            asked = replace(asked, phrases=(*asked.phrases, *(phrase_row(a) for a in accounts)))
        values += [value_of(name, scene.classes) for name in named]
        source = np.concatenate((source, np.full(len(masks), int(Source.AUTOMATIC))))
        score = np.concatenate((score, np.where([name == UNNAMED for name in named], np.nan, sure)))
    return _Objects(asked, answers, np.array(values, np.int64), source, score), lines


def _write(scene: PromptScene, blocks: Blocks, painted: Painted, valid: LabelReader) -> None:
    """Classes, ids and the table of the objects, block by block."""
    arrays = [
        ArraySpec("labels", "uint16", scene.nodata, labels=True),
        ArraySpec("instances", "uint32", 0, labels=True),
    ]
    in_force = scene.labels.create(scene.geometry, blocks, arrays, {})
    scale = SizeScale.of(scene.geometry)
    count, axes = len(painted.objects), scene.geometry.ndim
    size, sums = np.zeros(count, np.int64), np.zeros((count, axes), np.int64)
    classes = np.concatenate(([0], painted.objects.classes)).astype(np.uint16)
    for index in in_force.indices():
        box = in_force.box(index)
        ids = painted.ids(box)
        scene.labels.write("labels", box.slices, np.where(valid(box), classes[ids], np.uint16(scene.nodata)))
        scene.labels.write("instances", box.slices, ids)
        add_sizes(ids, box, scale, size, sums)
    scene.labels.write_part(TABLE, ObjectTable(painted.objects, size, sums).dump())


def _facts(scene: PromptScene, objects: _Objects, joined: Joined, painted: Painted) -> pd.DataFrame:
    """A row an object, by id: where its prompt came from, how sure everybody is, which mask was taken."""
    place = joined.kept[painted.place]
    answers = objects.answers.take(place)
    names = {c.value: c.name for c in scene.classes}
    asked_also = [*objects.asked.also, *[()] * (len(objects.source) - len(objects.asked))]
    merged_also = [joined.also[i] for i in painted.place.tolist()]
    also = [
        dict.fromkeys((*asked_also[i], *(names[v] for v in more)))
        for i, more in zip(place.tolist(), merged_also, strict=True)
    ]
    frame = pd.DataFrame(
        {
            "id": painted.objects.ids,
            "prompt": answers.number,
            "source": pd.Series(
                [Source(s).name.lower() for s in objects.source[place].tolist()], dtype="str"
            ),
            "also": pd.Series([" . ".join(more) for more in also], dtype="str"),
            "grounder_score": objects.score[place],
            "predicted_iou": answers.iou,
            "stability": answers.stability,
            "candidate": answers.candidate + 1,
            "chosen": pd.Series(list(answers.reason), dtype="str"),
            "level": answers.level,
            "cut": answers.cut,
            "mask_count": painted.whole.elements[painted.place],
            "points": pd.Series(_points(scene, objects, place), dtype="str"),
        }
    )
    for k in range(CANDIDATES):
        frame[f"iou_{k + 1}"] = answers.all_iou[:, k]
        frame[f"stability_{k + 1}"] = answers.all_stability[:, k]
    return frame


def _points(scene: PromptScene, objects: _Objects, place: np.ndarray) -> list[str]:
    """Of each object the positive points that it was asked with: JSON, a list of positions in array order."""
    points = objects.asked.prompts.points
    asked: dict[int, list[list[float]]] = {}
    for number, position in zip(
        points.objects[points.positive].tolist(), points.position[points.positive].tolist(), strict=True
    ):
        asked.setdefault(number, []).append(position)
    grid = objects.answers.point
    return [
        json.dumps(asked.get(n, []) if np.isnan(grid[i, 0]) else [grid[i].tolist()])
        for i, n in zip(place.tolist(), objects.answers.number[place].tolist(), strict=True)
    ]


def _account(
    scene: PromptScene, objects: _Objects, joined: Joined, painted: Painted, lines: list[str]
) -> dict[str, Any]:
    """What became of everything that was asked, in numbers and in words."""
    said = [*objects.asked.lines, *lines]
    small = int((painted.whole.elements[painted.small] > 0).sum())
    empty = len(painted.small) - small
    for count, what in (
        (empty, "prompts with an empty mask"),
        (len(joined.merged), "objects merged into another that has the same mask"),
        (len(painted.hidden), "objects wholly behind others, without an id"),
        (small, "objects smaller than measure.smallest"),
        (int(objects.answers.cut.sum()), "objects that reach the border of the largest window"),
    ):
        if count > 0:
            said.append(f"{what}: {count}")
    merged = objects.values[np.searchsorted(objects.answers.number, joined.merged)]
    lost: dict[str, int] = {}
    names = {c.value: c.name for c in scene.classes}
    for value in merged.tolist():
        lost[names[value]] = lost.get(names[value], 0) + 1
    rows = [{**row, "merged": row["merged"] + lost.get(row["phrase"], 0)} for row in objects.asked.phrases]
    return {"asked": rows, "prompts": said}
