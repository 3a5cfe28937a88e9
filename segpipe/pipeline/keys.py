"""Keys of the stages of a scene: everything that can change their bits."""

from __future__ import annotations

from typing import Any

from segpipe import ENGINE_VERSION
from segpipe.config.card import Card, read_card
from segpipe.config.job import Job
from segpipe.inference.object_merger import stuff_values
from segpipe.inference.settings import Settings
from segpipe.models.weights import weights_fingerprint
from segpipe.store.stage import Stage, stage_key
from segpipe.tiling.windows import Lattice


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
