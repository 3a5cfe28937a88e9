"""Build the objects of a scene from its masks: merge, rasterise on the native grid, measure and list them."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from dataclasses import fields, replace
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
from segpipe.prompts.masks.automatic import merge_grid_masks
from segpipe.prompts.masks.embeddings import prune
from segpipe.prompts.masks.scene_masks import (
    MaskMerge,
    PatchIndex,
    RasterisedMasks,
    SceneMasks,
    merge_masks,
    rasterise_scene,
)
from segpipe.prompts.masks.window_masks import CANDIDATES, WindowMasks
from segpipe.prompts.phrases import UNNAMED, value_of
from segpipe.prompts.prompt_scene import ACCOUNT, PromptScene
from segpipe.prompts.prompt_set import PromptSet, PromptSource
from segpipe.prompts.segment_scene import VOLUME, load_window_masks, read_grid_masks
from segpipe.sources.base import LabelReader
from segpipe.store.arrays import ArraySpec
from segpipe.store.receipts import Marks
from segpipe.store.stage import WHOLE
from segpipe.tiling.windows import BLOCK_EDGE, Blocks


def build_objects(scene: PromptScene) -> Done:
    """Merge, rasterise, number and list the objects of a scene whose windows all have their masks.

    Raises:
        SceneError: windows have no masks.
    """
    begun = time.perf_counter()
    scene.labels.scrub()
    if scene.labels.exists and WHOLE in scene.labels.done():
        return Done(0, 1, time.perf_counter() - begun, {})
    scene.masks.compact()
    scene.embeddings.stage.compact()
    prompts, masks = _scene_masks(scene)
    unnamed = next((c.value for c in scene.classes if c.name == UNNAMED), -1)
    merge = merge_masks(masks, scene.geometry.shape, scene.options.same, unnamed)
    kept = masks.take(merge.kept)
    blocks = _blocks(scene)
    with scene.open_image() as store:

        @lru_cache(maxsize=1)
        def valid(box: Box, /) -> np.ndarray:
            return store.read(box).valid

        objects = rasterise_scene(
            (blocks.box(i) for i in blocks.indices()), PatchIndex(scene.geometry.shape, kept.patches),
            kept.value, kept.confidence, minimum=scene.job.measure.smallest, valid=valid,
        )  # fmt: skip
        files = _write(scene, blocks, objects, valid)
    buffer = io.BytesIO()
    _facts(scene, prompts, kept, merge, objects).to_parquet(buffer)
    files |= scene.labels.write_part(FACTS, buffer.getvalue())
    account = _account(scene, prompts, masks, merge, objects)
    scene.labels.commit(WHOLE, {"objects": len(objects.objects), ACCOUNT: account}, files)
    scene.embeddings.touch()
    prune(scene.job.outputs.dir, scene.embeddings.stage.key, parse_memory(scene.options.cache))
    return Done(1, 0, time.perf_counter() - begun, {})


def _blocks(scene: PromptScene) -> Blocks:
    """The units of writing: the job's, or of the usual size. No id depends on them."""
    shape, ndim = scene.geometry.shape, scene.geometry.ndim
    wanted = scene.job.tiling.block
    sizes = (BLOCK_EDGE[ndim],) * ndim if wanted == "auto" else parse_size(wanted, ndim, "tiling.block")
    return Blocks(shape, tuple(min(a, n) for a, n in zip(sizes, shape, strict=True)), (0,) * ndim)


def _scene_masks(scene: PromptScene) -> tuple[PromptSet, SceneMasks]:
    """Return the prompts, with the account of a grid and of its names, and the masks of both."""
    prompts = scene.prompt_set
    if scene.planes.axis is None:
        masks = load_window_masks(scene)
    else:
        masks = WindowMasks.load(scene.masks.read_part(VOLUME))
    names, source, score = [*prompts.phrases], prompts.source, prompts.score
    parts = read_grid_masks(scene)
    if parts:
        of_grid, tally = merge_grid_masks(parts, scene.options.grid.overlap)
        prompts = replace(prompts, notes=(*prompts.notes, *(f"grid: {line}" for line in tally.lines())))
        masks = WindowMasks.merge([masks, WindowMasks.of_grid(of_grid, len(prompts) + 1)])
        labels, confidence = [""] * len(of_grid), np.full(len(of_grid), np.nan)
        if scene.labeller is not None:
            from segpipe.prompts.grounding.clip import label_masks

            labels, confidence, accounts = label_masks(scene.labeller, of_grid.patches)
            prompts = replace(prompts, accounts=(*prompts.accounts, *(phrase_row(a) for a in accounts)))
        names += labels
        source = np.concatenate((source, np.full(len(of_grid), int(PromptSource.AUTOMATIC))))
        score = np.concatenate((score, np.where([name == "" for name in labels], np.nan, confidence)))
    columns = {f.name: getattr(masks, f.name) for f in fields(masks)}
    value = np.array([value_of(name, scene.classes) for name in names], np.int64)
    return prompts, SceneMasks(**columns, value=value, source=source, score=score)


def _write(scene: PromptScene, blocks: Blocks, rasterised: RasterisedMasks, valid: LabelReader) -> Marks:
    """Write classes, ids and the table of the objects, block by block."""
    arrays = [
        ArraySpec("labels", "uint16", scene.nodata, labels=True),
        ArraySpec("instances", "uint32", 0, labels=True),
    ]
    in_force = scene.labels.create(scene.geometry, blocks, arrays, {"scene": scene.ref.name}, whole=True)
    files: Marks = {}
    scale = SizeScale.of(scene.geometry)
    count, axes = len(rasterised.objects), scene.geometry.ndim
    size, sums = np.zeros(count, np.int64), np.zeros((count, axes), np.int64)
    classes = np.concatenate(([0], rasterised.objects.classes)).astype(np.uint16)
    for index in in_force.indices():
        box = in_force.box(index)
        ids = rasterised.ids(box)
        known = np.where(valid(box), classes[ids], np.uint16(scene.nodata))
        files |= scene.labels.write("labels", box.slices, known)
        files |= scene.labels.write("instances", box.slices, ids)
        add_sizes(ids, box, scale, size, sums)
    return files | scene.labels.write_part(TABLE, ObjectTable(rasterised.objects, size, sums).dump())


def _facts(
    scene: PromptScene, prompts: PromptSet, kept: SceneMasks, merge: MaskMerge, rasterised: RasterisedMasks
) -> pd.DataFrame:
    """Return a row an object, by id: where its prompt came from, all scores, which mask was taken."""
    masks = kept.take(rasterised.row)
    names = {c.value: c.name for c in scene.classes}
    also = []
    for number, row in zip(masks.number.tolist(), rasterised.row.tolist(), strict=True):
        of_prompt = prompts.also[number - 1] if number <= len(prompts) else ()
        also.append(" . ".join(dict.fromkeys((*of_prompt, *(names[v] for v in merge.also[row])))))
    sources = [PromptSource(s).name.lower() for s in masks.source.tolist()]
    frame = pd.DataFrame(
        {
            "id": rasterised.objects.ids,
            "prompt": masks.number,
            "source": pd.Series(sources, dtype="str"),
            "also": pd.Series(also, dtype="str"),
            "grounder_score": masks.score,
            "predicted_iou": masks.iou,
            "stability": masks.stability,
            "candidate": masks.candidate + 1,
            "chosen": pd.Series(list(masks.reason), dtype="str"),
            "level": masks.level,
            "cut": masks.cut,
            "mask_count": rasterised.whole.elements[rasterised.row],
            "points": pd.Series(_points(prompts, masks), dtype="str"),
        }
    )
    for k in range(CANDIDATES):
        frame[f"iou_{k + 1}"] = masks.all_iou[:, k]
        frame[f"stability_{k + 1}"] = masks.all_stability[:, k]
    return frame


def _points(prompts: PromptSet, masks: SceneMasks) -> list[str]:
    """Return the positive points of each object: JSON, a list of positions in array order."""
    points = prompts.points.take(prompts.points.positive)
    given: dict[int, list[list[float]]] = {}
    for number, position in zip(points.objects.tolist(), points.position.tolist(), strict=True):
        given.setdefault(number, []).append(position)
    return [
        json.dumps(given.get(number, []) if np.isnan(point[0]) else [point])
        for number, point in zip(masks.number.tolist(), masks.point.tolist(), strict=True)
    ]


def _account(
    scene: PromptScene, prompts: PromptSet, masks: SceneMasks, merge: MaskMerge, rasterised: RasterisedMasks
) -> dict[str, Any]:
    """Return what became of all prompts, in numbers and in words."""
    notes = [*prompts.notes]
    small = int((rasterised.whole.elements[rasterised.small] > 0).sum())
    for count, what in (
        (len(rasterised.small) - small, "prompts with an empty mask"),
        (len(merge.merged), "objects merged into another that has the same mask"),
        (len(rasterised.hidden), "objects wholly behind others, without an id"),
        (small, "objects smaller than measure.smallest"),
        (int(masks.cut.sum()), "objects that reach the border of the largest window"),
    ):
        if count > 0:
            notes.append(f"{what}: {count}")
    names = {c.value: c.name for c in scene.classes}
    merged = masks.value[np.searchsorted(masks.number, merge.merged)]
    lost = Counter(names[value] for value in merged.tolist())
    rows = [{**row, "merged": row["merged"] + lost[row["phrase"]]} for row in prompts.accounts]
    return {"asked": rows, "prompts": notes}
