"""Segment a volume slice by slice, every slice's embedding kept like any other; one task for a volume.

A model with a memory of frames follows an object by it; for others the mask on one slice is the prompt on the
next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from segpipe.config.prompts import Volume
from segpipe.models.registry import device_of
from segpipe.models.weights import weights_fingerprint
from segpipe.pipeline.progress import Done
from segpipe.prompts.masks.decode import ObjectMask
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.masks.window_masks import CANDIDATES, WindowMasks
from segpipe.prompts.prompt_scene import PromptScene
from segpipe.prompts.segment_windows import embedded, segmenter_of
from segpipe.prompts.segmenters.base import Embedding
from segpipe.prompts.volumes.propagate import Rules, SliceMask, Stop
from segpipe.prompts.volumes.propagate_memory import VideoNetwork, has_memory, track
from segpipe.prompts.volumes.propagate_prompts import LinkOptions, link
from segpipe.store.stage import StopToken
from segpipe.tiling.pyramid import Window

VOLUME = "volume"
"""Name of the part that holds a volume's masks."""

_networks: dict[tuple[str, str, str, int], VideoNetwork] = {}


def segment_volume(scene: PromptScene, stop: StopToken | None = None) -> Done:
    """Segment the prompted slices of a volume, follow every object both ways, and commit the masks.

    Raises:
        StoppedError: a stop was requested; the embeddings made so far stay.
    """
    begun = time.perf_counter()
    if VOLUME in scene.masks.done():
        return Done(0, 1, time.perf_counter() - begun, {"encoder passes": 0.0})
    assert scene.planes.axis is not None
    segmenter, prompts = segmenter_of(scene), scene.prompt_set
    passes = 0

    def embed(index: int, window: Window) -> Embedding:
        nonlocal passes
        [(_, embedding, _, new)] = embedded(scene, segmenter, [(window, index)], stop)
        passes += new
        return embedding

    inputs = (prompts, scene.planes.axis, scene.geometry.shape, scene.pyramid)
    rules = rules_of(scene.options.volume)
    if has_memory(scene.card):
        found = track(*inputs, _network(scene), embed, rules)
    else:
        found = link(*inputs, segmenter, embed, rules, LinkOptions(choice=scene.options.choice))
    masks = _gathered(found, prompts.objects.tolist())
    scene.masks.write_part(VOLUME, masks.dump())
    scene.masks.commit(VOLUME, {"objects": len(masks), "encoded": passes})
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


def _gathered(found: Iterator[SliceMask | Stop], objects: list[int]) -> WindowMasks:
    """Return the masks of each object on all slices, and why its chains ended."""
    sections: dict[int, list[tuple[ObjectMask, Patch]]] = {number: [] for number in objects}
    ends: dict[int, list[str]] = {number: [] for number in objects}
    for item in found:
        if isinstance(item, Stop):
            end = f"{item.how.value} from slice {item.origin} to {item.last}: {item.why.value}"
            ends[item.object].append(end)
        elif item.mask.patch is not None:
            sections[item.mask.object].append((item.mask, item.mask.patch))
    every, n = list(sections.values()), len(objects)
    scales = [max((patch.scale for _, patch in one), default=1) for one in every]
    return WindowMasks(
        number=np.array(objects, np.int64),
        candidate=np.array([one[-1][0].candidate if one else 0 for one in every], np.int64),
        iou=np.array([np.mean([m.iou for m, _ in one]) if one else np.nan for one in every], np.float64),
        stability=np.full(n, np.nan), all_iou=np.full((n, CANDIDATES), np.nan),
        all_stability=np.full((n, CANDIDATES), np.nan), point=np.full((n, 2), np.nan),
        level=np.array([scale.bit_length() - 1 for scale in scales], np.int64),
        cut=np.array([any(m.cut for m, _ in one) for one in every], bool),
        reason=tuple("; ".join(ends[number]) for number in objects),
        patches=tuple(tuple(sorted((p for _, p in one), key=lambda p: p.plane or (0, 0))) for one in every),
    )  # fmt: skip
