"""CLIP (Radford et al., ICML 2021) as a zero-shot labeller of masks: which of some phrases each one shows.

A mask is shown to CLIP as a square crop around its box. The probabilities are a softmax over all phrases
given, with the checkpoint's own scale: they say which phrase is the likeliest *of these*, never that it is
right. Phrases for what is none of them (`others`) make it a choice. CLIP was trained on photographs from the
web: of pixels of ten metres or of slices of a body it knows little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segpipe.errors import RequestError
from segpipe.prompts.grounding.base import PhraseAccount
from segpipe.prompts.grounding.processors import (
    check_length,
    image_tensor,
    load_network,
    load_processor,
    read_kind,
)

PHOTO = ("a photo of a {}.",)
"""What CLIP's authors put around a name."""

FROM_ABOVE = ("a satellite photo of {}.", "an aerial photo of {}.")

GREY = 0.5
"""What is put in place of what is not shown."""


@dataclass(frozen=True, eq=False)
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


def mask_crop(image: np.ndarray, mask: np.ndarray, margin: float = 0.25, grey: bool = False) -> np.ndarray:
    """A mask's square crop, (3, s, s) float32: CLIP's processor would cut the ends off a longer one.

    What lies beyond the image is grey.

    Args:
        image: (3, y, x), 0…1.
        mask: (y, x) bool, at least one element.
        margin: shown on every side, as a share of the longest edge of the mask's box.
        grey: what is not of the mask is grey, too; else it is left as it is.
    """
    if not mask.any():
        raise ValueError("mask: found no element")
    if not 0 <= margin < math.inf:
        raise RequestError(f"margin: found {margin}; valid: a share of an object's size, 0 or more")
    sides = [np.flatnonzero(mask.any(axis=axis))[[0, -1]] for axis in (1, 0)]
    longest = max(int(last - first) + 1 for first, last in sides)
    edge = longest + 2 * math.ceil(margin * longest)
    crop = np.full((3, edge, edge), GREY, np.float32)
    start = [(int(first + last) + 1 - edge) // 2 for first, last in sides]
    here = tuple(slice(max(0, a), min(a + edge, n)) for a, n in zip(start, mask.shape, strict=True))
    there = tuple(slice(s.start - a, s.stop - a) for s, a in zip(here, start, strict=True))
    shown = mask[here] if grey else np.ones_like(mask[here], bool)
    crop[(slice(None), *there)] = np.where(shown, image[(slice(None), *here)], GREY)
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
        RequestError: the folder is none of CLIP, or damaged; or a template has no place for a phrase.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise RequestError(f"template {template!r}: valid: a sentence with {{}} once, for the phrase")
    if not templates:
        raise RequestError(f"templates: found none; valid: at least one, e.g. {PHOTO[0]!r}")
    _, data = read_kind(folder, ("clip",))
    network = load_network(folder, "CLIPModel", data).to(device)
    processor = load_processor(folder, "CLIPProcessor", "CLIPImageProcessor", "CLIPTokenizer")
    return ClipLabeller(network, processor, threshold, templates, batch)


class ClipLabeller:
    """CLIP, asked which phrase a crop shows."""

    def __init__(
        self, network: Any, processor: Any, threshold: float, templates: Sequence[str], batch: int
    ) -> None:
        """As `load_labeller`."""
        self.network, self.processor, self.threshold = network, processor, threshold
        self.templates, self.batch = tuple(templates), batch

    def label(
        self, crops: Sequence[np.ndarray], phrases: Sequence[str], others: Sequence[str] = ()
    ) -> MaskLabels:
        """The likeliest phrase of each crop.

        Args:
            crops: (3, y, x) float, 0…1, each of any size (`mask_crop`).
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
            highest = float(probability[:, i].max()) if len(crops) else math.nan
            found, below = int((phrase == i).sum()), int(((best == i) & ~sure).sum())
            accounts.append(PhraseAccount(name, found, below, highest))
        names = tuple(phrases[i] if i >= 0 else "" for i in phrase.tolist())
        return MaskLabels(phrase, best, probability, names, tuple(accounts))

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

    def _logits(self, crops: Sequence[np.ndarray], words: torch.Tensor) -> torch.Tensor:
        """(n, k): cosines with the k vectors of words, times the checkpoint's scale."""
        found = [torch.zeros((0, len(words)), device=self.network.device)]
        for begin in range(0, len(crops), self.batch):
            few = [image_tensor(crop) for crop in crops[begin : begin + self.batch]]
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
