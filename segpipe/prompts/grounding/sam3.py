"""Find phrases by SAM 3 (Carion et al., 2025), from folders of save_pretrained.

It was trained on photographs: where pixels are ten metres, or slices of a body, it knows no concept. The
network and the scaling of images are the transformers library's; nothing in a folder is executed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from segpipe.errors import RequestError
from segpipe.prompts.grounding.base import Detections, Grounding, PhraseAccount
from segpipe.prompts.grounding.processors import (
    check_length,
    image_tensor,
    load_network,
    load_processor,
    read_kind,
)

KINDS = ("sam3", "sam3_video")
"""`model_type` of folders that it is read from; the published one is the video model's, which holds it."""

WORDS = 32
"""Word pieces of a phrase: the library's processor fills up to as many."""

SATURATED = 1e-6
"""Probabilities are kept this far from 0 and 1, so that their logits are finite."""

AT_ONCE = 16
"""Masks that are enlarged to the window together."""


def load_concepts(folder: Path, device: torch.device, threshold: float = 0.3) -> Sam3:
    """The SAM 3 in a folder.

    Args:
        folder: as save_pretrained of the network, alone or in the video model, and of its processor
            writes it.
        device: where it runs.
        threshold: least score, 0…1; the library's own is 0.3.

    Raises:
        RequestError: the folder is none of SAM 3, or damaged.
    """
    kind, data = read_kind(folder, KINDS)
    if kind == "sam3_video":
        data = data.get("detector_config") or {}
        if not isinstance(data, dict) or data.get("model_type", "sam3") != "sam3":
            raise RequestError(f"{folder / 'config.json'}: detector_config: valid: that of a sam3")
    network = load_network(folder, "Sam3Model", data).to(device)
    processor = load_processor(folder, "Sam3Processor", "Sam3ImageProcessor", "CLIPTokenizer")
    size, edge = processor.image_processor.size, network.config.vision_config.image_size
    if (size.height, size.width) != (edge, edge):
        raise RequestError(
            f"{folder}: found a processor for {size.height} × {size.width}; valid for its network: {edge} × "
            f"{edge}"
        )
    return Sam3(network, processor, threshold)


class Sam3:
    """SAM 3 on single images. The image is encoded once for all phrases; each is decoded by itself."""

    def __init__(self, network: Any, processor: Any, threshold: float) -> None:
        """``threshold``: least score of an object."""
        self.network, self.processor, self.threshold = network, processor, threshold

    def ground(self, window: np.ndarray, phrases: Sequence[str]) -> Grounding:
        """Boxes over the threshold, the network's own, which may reach beyond the window, and points inside.

        A score is the candidate's probability times that of the phrase being in the image at all. Masks'
        probabilities are enlarged bilinearly (half-pixel centres), as the library's processor does; the point
        is where the mask is surest. An account's `small` counts the candidates of a sufficient score without
        an element that is more likely object than not.

        Args:
            window: (3, y, x) float, 0…1; the processor resizes it to the network's square.
            phrases: in words.

        Raises:
            RequestError: a phrase has more word pieces than the network takes, or the window another shape.
        """
        image = image_tensor(window)
        limit = min(WORDS, self.network.config.text_config.max_position_embeddings)
        check_length(self.processor, phrases, limit)
        device, scale = self.network.device, torch.tensor([*window.shape[1:]] * 2)
        detections, accounts = [], []
        with torch.inference_mode():
            pixels = self.processor(images=[image], do_rescale=False, return_tensors="pt").pixel_values
            vision = self.network.get_vision_features(pixel_values=pixels.to(device))
            for i, phrase in enumerate(phrases):
                words = self.processor(text=[phrase], return_tensors="pt").to(device)
                output = self.network(vision_embeds=vision, **words)
                score = (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0]
                over = score > self.threshold
                masks = enlarged(output.pred_masks[0, over], window.shape[1:])
                there = np.asarray((masks > 0).any(axis=(1, 2)))
                corners = output.pred_boxes[0, over].cpu()[:, [1, 0, 3, 2]] * scale - 0.5
                detections.append(_detections(corners, score[over].cpu(), masks, there, i, phrase))
                small, below = int((~there).sum()), int((~over).sum())
                account = PhraseAccount(
                    phrase=phrase, found=int(there.sum()), below=below, best=float(score.max()), small=small
                )
                accounts.append(account)
        return Grounding(Detections.join(detections, 2), tuple(accounts))


def enlarged(masks: torch.Tensor, shape: tuple[int, ...]) -> np.ndarray:
    """Logits (n, y, x) float16 of masks of the network's own size; float16 keeps every sign."""
    parts = [np.zeros((0, *shape), np.float16)]
    for few in masks.sigmoid().split(AT_ONCE):
        if len(few):
            large = functional.interpolate(few[None], size=shape, mode="bilinear", align_corners=False)[0]
            parts.append(large.logit(eps=SATURATED).half().cpu().numpy())
    return np.concatenate(parts)


def _detections(
    corners: torch.Tensor, score: torch.Tensor, masks: np.ndarray, there: np.ndarray, phrase: int, label: str
) -> Detections:
    """Those of one phrase.

    Args:
        corners: (n, 4) smallest positions, then largest.
        score: (n,).
        masks: (n, y, x) logits.
        there: (n,) bool: which are kept.
    """
    edges = corners.numpy().astype(np.float64)[there]
    surest = masks[there].reshape(len(edges), math.prod(masks.shape[1:])).argmax(axis=1)
    points = np.stack(np.unravel_index(surest, masks.shape[1:]), axis=-1).astype(np.float64)
    return Detections(
        start=edges[:, :2], stop=edges[:, 2:], point=points, phrase=np.full(len(edges), phrase, np.int64),
        score=score.numpy().astype(np.float64)[there], label=(label,) * len(edges),
    )  # fmt: skip
