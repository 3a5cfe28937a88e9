"""The plan of a scene under a job and a card, and the keys of its stages: what can change their bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from segpipe import ENGINE_VERSION
from segpipe.config.card import Card, read_card
from segpipe.config.job import TTA, Blend, Job, parse_memory, parse_size
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry
from segpipe.geometry.grid_map import GridMap, model_grid
from segpipe.inference.object_merger import stuff_values
from segpipe.inference.settings import Settings
from segpipe.metrics.tally import CHANNELS
from segpipe.models.weights import weights_fingerprint
from segpipe.store.stage import Stage, stage_key
from segpipe.tiling.plan import Plan, Workload, make_plan
from segpipe.tiling.windows import Lattice, make_lattice


def scene_grid(card: Card, geometry: Geometry, crop: Box | None) -> GridMap:
    """The card's grid over a scene, or over its region of interest."""
    return model_grid(
        geometry,
        orientation=card.input.orientation,
        spacing=card.input.spacing,
        shape=card.window.shape,
        crop=crop,
    )


def scene_lattice(job: Job, card: Card, grid: GridMap) -> Lattice:
    """Windows by the job where it says so, else by the card."""
    ndim = len(grid.axes)
    stride = card.window.stride
    wanted = job.tiling.window
    if wanted == "whole" or (wanted == "auto" and card.window.size == "whole"):
        window: Sequence[int] = [-(-n // stride) * stride for n in grid.shape]
        return make_lattice(grid.shape, window, [0] * ndim, stride)
    if wanted == "auto":
        assert card.window.size != "whole"
        window = _per_axis(card.window.size, ndim)
    else:
        window = parse_size(wanted, ndim, "tiling.window")
    if job.tiling.halo != "auto":
        halo: Sequence[int] = parse_size(job.tiling.halo, ndim, "tiling.halo")
    elif card.halo is not None:
        halo = card.halo
    else:
        from segpipe.inference.receptive_field.reach import card_reach  # it loads torch

        halo = card_reach(card, window, job.outputs.dir).halo
    return make_lattice(grid.shape, window, halo, stride, card.window.fixed)


def _per_axis(sizes: Sequence[int], ndim: int) -> list[int]:
    return list(sizes) * ndim if len(sizes) == 1 else list(sizes)


def plan_scene(
    job: Job, card: Card, settings: Settings, grid: GridMap, dtype: np.dtype[Any], source_cache: int
) -> Plan:
    """The plan of a scene under a job; see `segpipe.tiling.plan`."""
    ndim = len(grid.axes)
    load = Workload(
        image_channels=card.channels,
        image_itemsize=dtype.itemsize,
        source_cache=source_cache,
        channels=card.channels,
        classes=len(card.classes),
        label_itemsize=np.dtype(card.label_dtype).itemsize,
        batch=settings.batch,
        keep_scores=job.outputs.scores,
        uncertainty=len(doubts(job)),
        activation_bytes=card.window.forward_bytes,
        cleanup=any(card.cleanup.model_dump().values()),
    )
    block = None
    if job.tiling.block != "auto":
        block = parse_size(job.tiling.block, ndim, "tiling.block")
    return make_plan(
        grid,
        scene_lattice(job, card, grid),
        load,
        blend=job.tiling.blend.value,
        block=block,
        memory=parse_memory(job.tiling.memory),
        passes_per_window=2 ** len(card.mirror) if settings.tta else 1,
    )


def doubts(job: Job) -> tuple[str, ...]:
    """Channels of the uncertainty map; none where it is not wanted."""
    if not job.outputs.uncertainty:
        return ()
    several_answers = job.compute.tta is not TTA.none or job.tiling.blend is not Blend.trim
    return CHANNELS if several_answers else CHANNELS[:-1]


def labels_stage(job: Job, card: Card, predict: Stage) -> Stage:
    """Where the finished label map is: a stage of its own where the card cleans up or finds objects."""
    if card.output.kind != "semantic":
        parts = {"of": predict.key, "smallest": job.measure.smallest, "stuff": stuff_values(card)}
        return Stage(predict.out, stage_key("objects", parts))
    cleanup = card.cleanup.model_dump()
    if not any(cleanup.values()):
        return predict
    return Stage(predict.out, stage_key("clean", {"of": predict.key, **cleanup}))


def model_parts(card: Card) -> dict[str, Any]:
    """What identifies a model in keys: its card's numbers and its weights, the first model's too."""
    parts = {"card": card.prediction_fingerprint(), "weights": weights_fingerprint(card)}
    if card.roi is not None:
        first = read_card(str(card.folder / card.roi.card))
        parts["roi_card"] = first.prediction_fingerprint()
        parts["roi_weights"] = weights_fingerprint(first)
    return parts


def device_parts(settings: Settings) -> dict[str, Any]:
    """What the device contributes to the bits."""
    return {
        "precision": settings.precision,
        "device_class": settings.device_class,
        "engine": ENGINE_VERSION,
        **({"compile": True} if settings.compile else {}),
    }


def predict_key(job: Job, card: Card, settings: Settings, ingest_key: str, lattice: Lattice) -> str:
    """Key of everything that can change a label. Block size, runner, memory and outputs are not in it."""
    parts = {
        "ingest": ingest_key,
        **model_parts(card),
        **device_parts(settings),
        "windows": [[a.window, a.padded, list(a.origins[:2]), list(a.cuts[:2])] for a in lattice.axes],
        "blend": job.tiling.blend.value,
        "tta": settings.tta,
        "batch": settings.batch,
    }
    return stage_key("predict", parts)
