"""A volume is asked slice by slice, every slice's embedding kept like any other; one task for a volume.

A model with a memory of frames follows an object by it; for others the mask on one slice is the prompt on the
next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from segpipe.config.prompts import Volume
from segpipe.models.registry import device_of
from segpipe.models.weights import weights_fingerprint
from segpipe.pipeline.progress import Done
from segpipe.prompts.masks.mask_table import CANDIDATES, Answered
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.prompt_scene import PromptScene
from segpipe.prompts.segment_windows import embedded, segmenter_of
from segpipe.prompts.segmenters.base import Embedding
from segpipe.prompts.volumes.propagate import Rules, SliceAnswer, Stop
from segpipe.prompts.volumes.propagate_memory import VideoNetwork, has_memory, track
from segpipe.prompts.volumes.propagate_prompts import Linking, link
from segpipe.store.stops import StopToken
from segpipe.tiling.pyramid import Window

VOLUME = "volume"
"""Name of the part that holds a volume's answers."""

_networks: dict[tuple[str, str, str, int], VideoNetwork] = {}


@dataclass(eq=False)
class _Solid:
    """One object as its slices come."""

    patches: list[Patch] = field(default_factory=list)
    iou: list[float] = field(default_factory=list)
    candidate: int = 0
    level: int = 0
    cut: bool = False
    ends: list[str] = field(default_factory=list)


def answer_volume(scene: PromptScene, stop: StopToken | None = None) -> Done:
    """Ask the prompted slices of a volume, follow every object both ways, and commit the answers.

    Raises:
        StoppedError: a stop was requested; the embeddings made so far stay.
    """
    begun = time.perf_counter()
    if VOLUME in scene.answers.done():
        return Done(0, 1, time.perf_counter() - begun, {"encoder passes": 0.0})
    assert scene.planes.axis is not None
    segmenter, asked = segmenter_of(scene), scene.asked
    passes = 0

    def embed(index: int, window: Window) -> Embedding:
        nonlocal passes
        [(_, embedding, _, new)] = embedded(scene, segmenter, [(window, index)], stop)
        passes += new
        return embedding

    question = (asked.prompts, scene.planes.axis, scene.geometry.shape, scene.pyramid)
    rules = rules_of(scene.options.volume)
    if has_memory(scene.card):
        found = track(*question, _network(scene), embed, rules)
    else:
        found = link(*question, segmenter, embed, rules, Linking(choice=scene.options.choice))
    solids = _gathered(found, asked.prompts.objects.tolist())
    scene.answers.write_part(VOLUME, _answered(solids).dump())
    scene.answers.commit(VOLUME, {"objects": len(solids), "encoded": passes})
    return Done(1, 0, time.perf_counter() - begun, {"encoder passes": float(passes)})


def _network(scene: PromptScene) -> VideoNetwork:
    """The scene's video model; the same object for the same request in one process."""
    card, settings = scene.card, scene.settings
    key = (card.prediction_fingerprint(), weights_fingerprint(card), settings.device, settings.threads)
    if key not in _networks:
        _networks.clear()  # one at a time: they are large
        _networks[key] = VideoNetwork(card, device_of(settings.device), settings.threads)
    return _networks[key]


def rules_of(options: Volume) -> Rules:
    """When a chain of slices ends."""
    return Rules(options.least_iou, options.least_overlap, options.change, options.reach)


def _gathered(found: Iterator[SliceAnswer | Stop], objects: list[int]) -> dict[int, _Solid]:
    """What comes slice by slice, by object."""
    solids = {number: _Solid() for number in objects}
    for item in found:
        if isinstance(item, Stop):
            ends = f"{item.how.value} from slice {item.origin} to {item.last}: {item.why.value}"
            solids[item.object].ends.append(ends)
            continue
        answer, patch = item.answer, item.answer.patch
        solid = solids[answer.object]
        if patch is not None:
            solid.patches.append(patch)
            solid.iou.append(answer.iou)
            solid.candidate, solid.level = answer.candidate, max(solid.level, patch.scale.bit_length() - 1)
            solid.cut |= answer.cut
    return solids


def _answered(solids: dict[int, _Solid]) -> Answered:
    n = len(solids)
    every = list(solids.values())
    unknown = np.full((n, CANDIDATES), np.nan)
    return Answered(
        np.array(list(solids), np.int64),
        np.array([s.candidate for s in every], np.int64),
        np.array([np.mean(s.iou) if s.iou else np.nan for s in every], np.float64),
        np.full(n, np.nan),
        unknown, unknown.copy(),
        np.array([s.level for s in every], np.int64),
        np.array([s.cut for s in every], bool),
        np.full((n, 2), np.nan),
        tuple("; ".join(s.ends) for s in every),
        tuple(tuple(sorted(s.patches, key=lambda p: p.plane or (0, 0))) for s in every),
    )  # fmt: skip
