"""Masks of everything get names: a CLIP says which of the phrases each one shows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from segpipe.geometry.box import Box
from segpipe.inference.normalise import Normaliser, Statistics
from segpipe.models.weights import resolve_weights, weights_fingerprint
from segpipe.pipeline.scene_io import SceneBlocks
from segpipe.prompts.grounding.base import PhraseAccount
from segpipe.prompts.grounding.clip import FROM_ABOVE, GREY, ClipLabeller, load_labeller, mask_crop
from segpipe.prompts.grounding.detect_scene import Detecting
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.masks.read_planes import Planes, read_box

MARGIN = 0.25
"""Shown on every side of a mask, as a share of the longest edge of its box."""
TOGETHER = 64
"""Masks whose pictures are held at once."""
OTHER = "something else"
"""What a mask may be beside the phrases: else the likeliest of them would be all that there is."""


def name_masks(
    looking: Detecting, patches: Sequence[Patch]
) -> tuple[list[str], np.ndarray, tuple[PhraseAccount, ...]]:
    """The phrase that each mask shows, empty where none does; its probability; an account of every phrase.

    Args:
        looking: the scene as the CLIP sees it.
        patches: of the masks, on a raster.
    """
    card, settings = looking.card, looking.settings
    labeller = _labeller(
        str(resolve_weights(card)), weights_fingerprint(card), settings.device, looking.job.prompts.threshold
    )
    names: list[str] = []
    scores = [np.zeros(0)]
    accounts = tuple(PhraseAccount(phrase, 0, 0, math.nan) for phrase in looking.phrases)
    with SceneBlocks(looking.pixels) as store:
        for first in range(0, len(patches), TOGETHER):
            crops = [*_crops(looking, store, patches[first : first + TOGETHER])]
            found = labeller.label(crops, looking.phrases, (OTHER,))
            names += found.names
            scores.append(found.probability.max(axis=1))
            accounts = tuple(_sum(a, b) for a, b in zip(accounts, found.accounts, strict=True))
    return names, np.concatenate(scores), accounts


@lru_cache(maxsize=1)
def _labeller(folder: str, mark: str, device: str, threshold: float) -> ClipLabeller:
    """One a process; ``mark`` tells that its folder changed."""
    return load_labeller(Path(folder), torch.device(device), threshold, FROM_ABOVE)


def _crops(looking: Detecting, store: SceneBlocks, patches: Sequence[Patch]) -> Iterator[np.ndarray]:
    """Each mask and what is around it, as large as its own window showed it."""
    normaliser = Normaliser(looking.card, looking.pixels.scaling, Statistics(looking.statistics))
    planes = Planes(looking.pixels.geometry.shape, None)
    for patch in patches:
        height, width = patch.logits.shape
        around = math.ceil(MARGIN * max(height, width)) + 1
        start = [o - around * patch.scale for o in patch.origin]
        box = Box.at(start, [(n + 2 * around) * patch.scale for n in (height, width)])
        image, known = read_box(store, normaliser, planes, box, patch.scale, 0)
        mask = np.pad(patch.logits > 0, around)
        yield mask_crop(np.where(known, image, np.float32(GREY)), mask, MARGIN)


def _sum(a: PhraseAccount, b: PhraseAccount) -> PhraseAccount:
    best = np.fmax(a.best, b.best)
    return replace(a, found=a.found + b.found, below=a.below + b.below, best=float(best))
