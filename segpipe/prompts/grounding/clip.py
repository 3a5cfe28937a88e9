"""Label masks by CLIP (Radford et al., ICML 2021), zero-shot: which of some phrases each one shows.

A mask is shown to CLIP as a square crop around its box. The probabilities are a softmax over all phrases
given, with the checkpoint's own scale: they say which phrase is the likeliest *of these*, never that it is
right. Phrases for what is none of them (`others`) make it a choice. CLIP was trained on photographs from the
web: of pixels of ten metres or of slices of a body it knows little.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.models.weights import resolve_weights, weights_fingerprint
from segpipe.pipeline.scene_io import SceneBlocks
from segpipe.prompts.grounding.base import PhraseAccount
from segpipe.prompts.grounding.detect_scene import DetectorScene
from segpipe.prompts.grounding.processors import (
    check_length,
    image_tensor,
    load_network,
    load_processor,
    read_kind,
)
from segpipe.prompts.masks.embeddings import Planes, read_box
from segpipe.prompts.masks.patches import Patch

PHOTO = ("a photo of a {}.",)
"""What CLIP's authors put around a name."""

FROM_ABOVE = ("a satellite photo of {}.", "an aerial photo of {}.")

GREY = 0.5
"""What is put in place of what is not shown."""
MARGIN = 0.25
"""Shown on every side of a mask, as a share of the longest edge of its box."""
OTHER = "something else"
"""What a mask may be beside the phrases: else the likeliest of them would be all that there is."""


@dataclass(frozen=True, eq=False, kw_only=True)
class MaskLabels:
    """What each of n masks shows, of k phrases and then the others."""

    phrase: np.ndarray
    """(n,) int64: which phrase; −1: none, for its best is below the threshold or one of the others."""
    best: np.ndarray
    """(n,) int64: the likeliest of all, whatever its probability."""
    probability: np.ndarray
    """(n, k + others) float64; a row's sum is 1."""
    names: tuple[str, ...]
    """Of each mask: its phrase, or an empty string."""
    accounts: tuple[PhraseAccount, ...]
    """Of each phrase; `below`: masks of which it is the likeliest, but not enough."""


def mask_crop(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A mask's square crop, (3, s, s) float32: CLIP's processor would cut the ends off a longer one.

    It shows `MARGIN` around the mask's box. What lies beyond the image is grey.

    Args:
        image: (3, y, x), 0…1.
        mask: (y, x) bool, at least one element.
    """
    if not mask.any():
        raise ValueError("mask: found no element")
    sides = [np.flatnonzero(mask.any(axis=axis))[[0, -1]] for axis in (1, 0)]
    longest = max(int(last - first) + 1 for first, last in sides)
    edge = longest + 2 * math.ceil(MARGIN * longest)
    crop = np.full((3, edge, edge), GREY, np.float32)
    start = [(int(first + last) + 1 - edge) // 2 for first, last in sides]
    here = tuple(slice(max(0, a), min(a + edge, n)) for a, n in zip(start, mask.shape, strict=True))
    there = tuple(slice(s.start - a, s.stop - a) for s, a in zip(here, start, strict=True))
    crop[(slice(None), *there)] = image[(slice(None), *here)]
    return crop


def load_labeller(
    folder: Path,
    device: torch.device,
    threshold: float = 0.5,
    templates: Sequence[str] = PHOTO,
    batch: int = 16,
) -> ClipLabeller:
    """The CLIP in a folder.

    Args:
        folder: as save_pretrained of the network and of its processor writes it.
        device: where it runs.
        threshold: least probability of a label, 0…1.
        templates: sentences around a phrase, with {} in its place; `PHOTO` or `FROM_ABOVE`.
        batch: crops in one pass; fewer are padded. On a CPU a crop's place in it may change the last bits.

    Raises:
        RequestError: the folder is none of CLIP, or damaged.
    """
    _, data = read_kind(folder, ("clip",))
    network = load_network(folder, "CLIPModel", data).to(device)
    processor = load_processor(folder, "CLIPProcessor", "CLIPImageProcessor", "CLIPTokenizer")
    return ClipLabeller(network, processor, threshold, templates, batch)


class ClipLabeller:
    """CLIP, which tells the phrase that a crop shows."""

    def __init__(
        self, network: Any, processor: Any, threshold: float, templates: Sequence[str], batch: int
    ) -> None:
        """As `load_labeller`."""
        self.network, self.processor, self.threshold = network, processor, threshold
        self.templates, self.batch = tuple(templates), batch

    def label(
        self, crops: Iterable[np.ndarray], phrases: Sequence[str], others: Sequence[str] = ()
    ) -> MaskLabels:
        """The likeliest phrase of each crop.

        Args:
            crops: (3, y, x) float, 0…1, each of any size (`mask_crop`); a batch of them is held at once.
            phrases: in words.
            others: what else there may be, e.g. background: where it is the likeliest, no phrase is meant.

        Raises:
            RequestError: there is nothing to choose from, or a phrase is longer than the network takes.
        """
        texts = [*phrases, *others]
        if not phrases or len(texts) < 2:
            raise RequestError(
                f"phrases: found {len(phrases)} and {len(others)} others; valid: two or more together, for "
                "each is told from the rest"
            )
        with torch.inference_mode():
            words = torch.stack([self._text(text) for text in texts])
            probability = self._logits(crops, words).double().softmax(dim=1).cpu().numpy()
        best = probability.argmax(axis=1)
        sure = probability.max(axis=1) >= self.threshold
        phrase = np.where(sure & (best < len(phrases)), best, -1).astype(np.int64)
        accounts = []
        for i, name in enumerate(phrases):
            highest = float(probability[:, i].max()) if len(probability) else math.nan
            found, below = int((phrase == i).sum()), int(((best == i) & ~sure).sum())
            accounts.append(PhraseAccount(phrase=name, found=found, below=below, best=highest))
        names = tuple(phrases[i] if i >= 0 else "" for i in phrase.tolist())
        return MaskLabels(
            phrase=phrase, best=best, probability=probability, names=names, accounts=tuple(accounts)
        )

    def _text(self, phrase: str) -> torch.Tensor:
        """(c,) of length 1: the mean of the phrase's vectors in all templates, each of length 1 before."""
        sentences = [template.replace("{}", phrase) for template in self.templates]
        check_length(self.processor, sentences, self.network.config.text_config.max_position_embeddings)
        vectors = []
        for sentence in sentences:
            words = self.processor(text=[sentence], return_tensors="pt").to(self.network.device)
            found = self.network.get_text_features(**words).pooler_output[0]
            vectors.append(found / found.norm())
        mean = torch.stack(vectors).mean(dim=0)
        unit: torch.Tensor = mean / mean.norm()
        return unit

    def _logits(self, crops: Iterable[np.ndarray], words: torch.Tensor) -> torch.Tensor:
        """(n, k): cosines with the k vectors of words, times the checkpoint's scale."""
        found = [torch.zeros((0, len(words)), device=self.network.device)]
        images = map(image_tensor, crops)
        while few := [*islice(images, self.batch)]:
            # Short batches repeat their last crop: other crops then change no answer beyond rounding, for a
            # batch's shape, and on a CPU a crop's place in it, are part of its bits.
            full = few + few[-1:] * (self.batch - len(few))
            batch = self.processor(images=full, do_rescale=False, return_tensors="pt")
            vectors = self.network.get_image_features(
                pixel_values=batch["pixel_values"].to(self.network.device)
            ).pooler_output
            cosines = vectors / vectors.norm(dim=1, keepdim=True) @ words.T
            found.append((cosines * self.network.logit_scale.exp())[: len(few)])
        logits: torch.Tensor = torch.cat(found)
        return logits


def label_masks(
    scene: DetectorScene, patches: Sequence[Patch]
) -> tuple[list[str], np.ndarray, tuple[PhraseAccount, ...]]:
    """Return the phrase that each mask shows or "", its probability, and an account of every phrase.

    Args:
        scene: as the CLIP sees it.
        patches: of the masks, on a raster.
    """
    card, device = scene.card, scene.settings.device
    labeller = _labeller(
        str(resolve_weights(card)), weights_fingerprint(card), device, scene.job.prompts.threshold
    )
    with scene.open_image() as store:
        found = labeller.label(_crops(scene, store, patches), scene.phrases, (OTHER,))
    return [*found.names], found.probability.max(axis=1), found.accounts


@lru_cache(maxsize=1)
def _labeller(folder: str, fingerprint: str, device: str, threshold: float) -> ClipLabeller:
    """One a process; ``fingerprint`` tells that its folder changed."""
    return load_labeller(Path(folder), torch.device(device), threshold, FROM_ABOVE)


def _crops(scene: DetectorScene, store: SceneBlocks, patches: Sequence[Patch]) -> Iterator[np.ndarray]:
    """Each mask and what is around it, as large as its own window showed it."""
    planes = Planes(scene.pixels.geometry.shape, None)
    for patch in patches:
        height, width = patch.logits.shape
        around = math.ceil(MARGIN * max(height, width)) + 1
        start = [o - around * patch.scale for o in patch.origin]
        box = Box.at(start, [(n + 2 * around) * patch.scale for n in (height, width)])
        image, known = read_box(store, scene.normaliser, planes, box, patch.scale, 0)
        mask = np.pad(patch.logits > 0, around)
        yield mask_crop(np.where(known, image, np.float32(GREY)), mask)
