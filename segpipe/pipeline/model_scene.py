"""From a scene that was found to one that is ready: opened, checked against the card, planned, keyed.

A `Scene` is a small value that travels to workers; pixels never do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from segpipe import ENGINE_VERSION
from segpipe.config.card import Card, Class, Interpolation
from segpipe.config.job import Job, StoreMode, parse_memory
from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.grid_map import GridMap
from segpipe.inference.settings import Settings, resolve_settings
from segpipe.pipeline.plan_scene import (
    device_parts,
    doubts,
    labels_stage,
    model_parts,
    plan_scene,
    predict_key,
    scene_grid,
)
from segpipe.pipeline.scene import PredictedScene, SceneAccount, check_others, hardest, open_scene
from segpipe.pipeline.scene_io import SceneBlocks, ScenePixels, ingest_all
from segpipe.sources.base import SceneRef, match_bands
from segpipe.store.arrays import ArraySpec
from segpipe.store.stage import Stage, stage_key
from segpipe.tiling.plan import Plan, check_memory
from segpipe.tiling.windows import BLOCK_EDGE, Blocks, Index, block_id


@dataclass(frozen=True, kw_only=True)
class Scene(PredictedScene):
    """A scene ready for a model; its channels are the model's.

    Its stage `labels` is the clean-up's or the merged objects', or the prediction's.
    """

    plan: Plan
    ingest: Stage
    predict: Stage

    @property
    def classes(self) -> tuple[Class, ...]:
        return tuple(self.card.classes)

    @property
    def nodata(self) -> int:
        return self.card.nodata

    @property
    def objects_stage(self) -> Stage | None:
        return self.labels if self.card.output.kind != "semantic" else None

    @property
    def uncertainty(self) -> tuple[str, ...]:
        return doubts(self.job)

    def open_uncertainty(self) -> Callable[[Box], np.ndarray] | None:
        """A reader of the map in the store."""
        if not self.uncertainty:
            return None
        return lambda box: self.predict.read("uncertainty", (slice(None), *box.slices))

    def open_image(self) -> SceneBlocks:
        """The ingest where that is there, else the source."""
        return self.open_blocks()

    def open_blocks(
        self, attempt: int = 1, progress: Callable[[int], None] = lambda blocks: None
    ) -> SceneBlocks:
        """A reader of the scene's pixels and the writer of its ingest and predict stages.

        Args:
            attempt: recorded in the receipts.
            progress: told the number of blocks finished, after each.
        """
        ingest = None if self.direct else self.ingest
        return SceneBlocks(self.pixels, ingest, self.predict, attempt, progress)

    def account(self) -> SceneAccount:
        """Keys of ingest and predict, the plan, and how the scene was resampled."""
        notes: tuple[str, ...] = ()
        if self.card.input.image_resampling is Interpolation.nearest and not self.plan.grid.identity:
            notes = ("resampled by nearest neighbour, as the card's own pipeline does",)
        keys = {"ingest": self.ingest.key, "predict": self.predict.key}
        return SceneAccount(keys=keys, plan=self.plan.summary(), notes=notes)

    @property
    def stages(self) -> tuple[Stage, ...]:
        return self.ingest, self.predict, self.labels

    def attempts(self) -> int:
        """How often the hardest block was tried."""
        return hardest(self.predict)

    @property
    def direct(self) -> bool:
        """Whether the source is read in place, without ingest."""
        return self.job.tiling.store is StoreMode.direct


def prepare_scene(job: Job, card: Card, ref: SceneRef, settings: Settings) -> Scene:
    """Open, check, plan and key a scene; make its stages.

    A card that needs the scene's statistics or a region of interest makes this a first streaming
    pass over the scene: it is ingested here, and the findings are recorded.

    Raises:
        SceneError: the scene does not suit the card, or cannot be read.
        RequestError: the plan cannot be met (memory, window, halo).
    """
    with open_scene(job, ref) as source:
        pixels = ScenePixels.of(source, job.bands, *match_bands(card, source), job.identity)
        notes, cache = source.notes, source.cache_bytes
    parts = {"source": pixels.identity, "channels": pixels.channels, "engine": ENGINE_VERSION}
    ingest = Stage(job.outputs.dir, stage_key("ingest", parts))
    direct = job.tiling.store is StoreMode.direct
    with SceneBlocks(pixels, None if direct else ingest) as first:
        grid, statistics = _first_pass(job, card, settings, first, ingest)
    plan = plan_scene(job, card, settings, _own_grid(card, grid), np.dtype(pixels.dtype), cache)
    predict = Stage(job.outputs.dir, predict_key(job, card, settings, ingest.key, plan.lattice))
    return Scene(
        ref=ref,
        job=job,
        pixels=pixels,
        notes=notes,
        card=card,
        settings=settings,
        statistics=statistics,
        labels=labels_stage(job, card, predict),
        plan=plan,
        ingest=ingest,
        predict=predict,
    )


def create_stages(scene: Scene) -> Scene:
    """Make the arrays of predict and, where blocks are still to compute, of ingest.

    Returns:
        The scene with the blocks of the stages as they are, where an earlier run made them.
    """
    card, job = scene.card, scene.job
    info = {"scene": scene.ref.name, "identity": scene.pixels.identity}
    blocks = scene.predict.create(scene.geometry, scene.plan.blocks, label_arrays(card, job), info)
    scene = replace(scene, plan=replace(scene.plan, blocks=blocks))
    if damaged := scene.predict.scrub():
        note = f"{len(damaged)} blocks were damaged in the store and computed again: {', '.join(damaged[:5])}"
        scene = replace(scene, notes=(*scene.notes, note))
    if scene.direct or not pending_blocks(scene):
        return scene
    arrays = image_arrays(scene.pixels)
    in_force = scene.ingest.create(scene.geometry, blocks, arrays, info)
    check_memory(scene.plan, parse_memory(job.tiling.memory))
    if in_force != blocks:
        # made by another plan: its shards cannot be written block by block of this one
        with scene.open_blocks() as store:
            ingest_all(store, scene.ingest)
    return scene


def check_blocks(scene: Scene) -> None:
    """A receipt names a block of the stage as it was made: refuse another layout under the same names.

    Raises:
        SceneError: another run dropped the predictions, and maybe made them again with other blocks.
    """
    if scene.predict.generation.blocks != scene.plan.blocks:
        raise SceneError(
            f"the stored stage {scene.predict.key} was dropped by another run and made again with other "
            "blocks; run the job again"
        )


def pending_blocks(scene: Scene) -> list[Index]:
    """Blocks without a prediction, in the plan's order.

    Raises:
        SceneError: as `check_blocks`.
    """
    check_blocks(scene)
    if not (wanted := _wanted(scene.job)):
        done = scene.predict.done()
    else:
        receipts = scene.predict.receipts()
        done = {name for name, r in receipts.items() if all(r.get(w) for w in wanted)}
    return [i for i in scene.plan.blocks.indices() if block_id(i) not in done]


def is_predicted(scene: Scene, index: Index) -> bool:
    """Whether a block has its receipt now: one or two small reads, whatever the number of blocks."""
    receipt = scene.predict.receipt(block_id(index))
    return receipt is not None and all(receipt.get(w) for w in _wanted(scene.job))


def _wanted(job: Job) -> list[str]:
    """What a receipt must say of a block beside its labels."""
    return [name for name in ("scores", "uncertainty") if getattr(job.outputs, name)]


def dry_plan(job: Job, card: Card, ref: SceneRef, settings: Settings) -> Plan:
    """The plan of a scene without touching the store; regions and reference are checked against it.

    A card with a region of interest is planned over the whole scene: the region is not known yet.

    Raises:
        SceneError, RequestError: as `prepare_scene` and `segpipe.pipeline.measure.check_measure`.
    """
    with open_scene(job, ref) as source:
        match_bands(card, source)
        grid = _own_grid(card, scene_grid(card, source.geometry, None))
        plan = plan_scene(job, card, settings, grid, source.dtype, source.cache_bytes)
        check_others(job, ref, source.geometry)
    return plan


def _own_grid(card: Card, grid: GridMap) -> GridMap:
    """The same grid, on which the card's model can be run.

    Raises:
        SceneError: it would find objects on another one than the scene's.
    """
    if card.output.kind != "semantic" and not grid.identity:
        raise SceneError(
            f"the card {card.name!r} finds objects on the scene's own grid; this scene would have to be "
            "resampled or turned for it: leave out its input.spacing and orientation, or resample the scene"
        )
    return grid


def image_arrays(pixels: ScenePixels) -> list[ArraySpec]:
    """Arrays of the ingest stage."""
    return [
        ArraySpec("image", pixels.dtype, 0, channels=len(pixels.channels)),
        ArraySpec("valid", "bool", False),
    ]


def label_arrays(card: Card, job: Job) -> list[ArraySpec]:
    """Arrays of the predict stage."""
    arrays = [ArraySpec("labels", card.label_dtype, card.nodata, labels=True)]
    if card.output.kind != "semantic":
        arrays.append(ArraySpec("objects", "uint32", 0, labels=True))
    if job.outputs.scores:
        arrays.append(ArraySpec("scores", "float32", 0.0, channels=len(card.classes)))
    if job.outputs.uncertainty:
        arrays.append(ArraySpec("uncertainty", "uint16", 0, channels=len(doubts(job))))
    return arrays


def _first_pass(
    job: Job, card: Card, settings: Settings, store: SceneBlocks, ingest: Stage
) -> tuple[GridMap, tuple[tuple[tuple[float, float], ...], ...]]:
    """The model grid and the scene's statistics; streams the scene only where the card needs it."""
    from segpipe.inference.normalise import Statistics, needs_statistics, scene_statistics
    from segpipe.inference.roi import find_crop

    geometry, scaling = store.pixels.geometry, store.pixels.scaling
    whole = needs_statistics(card)
    if not whole and card.roi is None:
        return scene_grid(card, geometry, None), ()
    parts = {"ingest": ingest.key, **model_parts(card), **device_parts(settings)}
    record = Stage(job.outputs.dir, stage_key("look", parts))
    known = record.read_json("look.json")
    if known is None:
        if store.ingest_stage is not None:
            edge = BLOCK_EDGE[geometry.ndim]
            shape = tuple(min(edge, n) for n in geometry.shape)
            blocks = Blocks(geometry.shape, shape, (0,) * geometry.ndim)
            ingest.create(geometry, blocks, image_arrays(store.pixels), {"scene": store.pixels.uri})
            ingest_all(store, ingest)
        statistics = scene_statistics(card, geometry, scaling, store)
        crop = find_crop(card, settings, geometry, scaling, store) if card.roi else None
        known = {
            "statistics": statistics.to_json(),
            "crop": [list(crop.start), list(crop.stop)] if crop else None,
        }
        record.write_json("look.json", known)
    box = Box(tuple(known["crop"][0]), tuple(known["crop"][1])) if known["crop"] else None
    return scene_grid(card, geometry, box), Statistics.from_json(known["statistics"]).pairs


def check_worker(scene: Scene) -> None:
    """Refuse to compute where the bits would differ from those that were planned.

    Raises:
        SceneError: this process has other weights, another device or version.
    """
    here = resolve_settings(scene.job.compute, scene.card)
    mine = replace(scene.settings, device_class=here.device_class)
    planned = scene.predict.key
    if predict_key(scene.job, scene.card, mine, scene.ingest.key, scene.plan.lattice) != planned:
        raise SceneError(
            f"this worker would compute other bits than were planned on {scene.settings.device_class} "
            "(weights, device or version of segpipe differ here); make the workers alike and run again"
        )
