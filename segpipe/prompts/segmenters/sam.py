"""Use SAM and its successors (SAM-HQ, MedSAM, SAM 2 and 2.1, EdgeTAM, SAM 3) as segmenters.

Kirillov et al., Segment Anything, ICCV 2023; Ke et al., SAM-HQ, NeurIPS 2023; Ma et al., MedSAM, Nature
Communications 2024; Ravi et al., SAM 2, ICLR 2025; Zhou et al., EdgeTAM, CVPR 2025; Carion et al., SAM 3,
2025. The networks are the transformers library's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from segpipe.config.card import Card
from segpipe.models.network import forward_pass
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt, check_prompts
from segpipe.prompts.segmenters.sam_folder import ENLARGE, embedding_shapes, load_network, read_folder
from segpipe.prompts.segmenters.torch_base import TorchSegmenter

SATURATED = 1e-6
"""Probabilities are kept this far from 0 and 1, so that their logits are finite."""


class SamSegmenter(TorchSegmenter):
    """A `Segmenter` of the SAM families."""

    def __init__(self, card: Card, device: torch.device, threads: int, precision: str, batch: int) -> None:
        """As `load_segmenter`."""
        folder = read_folder(card)
        network, shapes = load_network(card, folder), embedding_shapes(folder)
        super().__init__(
            network, card, folder.channels, folder.edge, 4 * folder.grid, shapes, device, threads, precision,
            batch,
        )  # fmt: skip
        self._hq, self._levels = folder.family.network == "SamHQModel", bool(folder.family.backbone)
        self._probabilities = card.arguments.get("enlarge", ENLARGE[0]) == "probabilities"

    def _encoded(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
        found = self._network.get_image_embeddings(batch)
        if self._hq:
            image, layers = found
            # The decoder looks at the first layer with global attention alone; it is (n, y, x, c).
            return [layer.permute(0, 3, 1, 2) for layer in layers[:1]] + [image]
        return found if isinstance(found, list) else [found]

    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = True
    ) -> Candidates:
        """As `Segmenter.decode`."""
        check_prompts(prompts, self.window, self.mask_shape)
        maps = self._maps(embedding)
        count = self._network.config.mask_decoder_config.num_multimask_outputs if multimask else 1
        low = np.empty((len(prompts), count, *self.mask_shape), np.float32)
        iou = np.empty((len(prompts), count), np.float32)
        logits = np.empty((len(prompts), count, *self.window), np.float32)
        with forward_pass(self.device, "fp32", self._threads):
            for numbers in alike(prompts, self._batch):
                chosen = [prompts[i] for i in numbers]
                # Short batches repeat their last prompt: a batch's shape is part of its bits.
                chosen += chosen[-1:] * (self._batch - len(chosen))
                # A coarse mask belongs to an image in the library, so each prompt with one has its own.
                images = 1 if chosen[0].mask is None else len(chosen)
                out = self._network(
                    **_repeated(maps, images), **self._tensors(chosen, images), multimask_output=multimask
                )
                masks = out.pred_masks.flatten(0, 1)[: len(numbers)].float()
                low[numbers] = masks.cpu().numpy()
                iou[numbers] = out.iou_scores.flatten(0, 1)[: len(numbers)].float().cpu().numpy()
                logits[numbers] = self._enlarged(masks).cpu().numpy()
        return Candidates(logits, iou, low)

    def _maps(self, embedding: Embedding) -> dict[str, Any]:
        """The embedding as the network's arguments."""
        tensors = self._tensors_of(embedding)
        if self._levels:
            return {"image_embeddings": tensors}
        layers = [t.permute(0, 2, 3, 1) for t in tensors[:-1]]
        return {"image_embeddings": tensors[-1], **({"intermediate_embeddings": layers} if self._hq else {})}

    def _tensors(self, prompts: Sequence[Prompt], images: int) -> dict[str, torch.Tensor]:
        """Prompts of one kind as the network's arguments: all of one image, or one an image."""
        first, arrays = prompts[0], {}
        if len(first.points_xy):
            arrays["input_points"] = np.stack([p.points_xy for p in prompts]).astype(np.float32)
            arrays["input_labels"] = np.stack([p.labels for p in prompts]).astype(np.int64)
        if first.box_xyxy is not None:
            arrays["input_boxes"] = np.stack([p.box_xyxy for p in prompts if p.box_xyxy is not None]).astype(
                np.float32
            )
        if first.mask is not None:
            arrays["input_masks"] = np.stack([p.mask for p in prompts if p.mask is not None])
        shaped = {name: a.reshape(images, -1, *a.shape[1:]) for name, a in arrays.items()}
        return {name: torch.from_numpy(a).to(self.device) for name, a in shaped.items()}

    def _enlarged(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, k, y, x) at the window's size: bilinear, half-pixel centres."""
        given = masks.sigmoid() if self._probabilities else masks
        large = functional.interpolate(given, size=self.window, mode="bilinear", align_corners=False)
        return large.logit(eps=SATURATED) if self._probabilities else large


def alike(prompts: Sequence[Prompt], batch: int) -> Iterator[list[int]]:
    """Numbers of prompts that can be decoded together, at most ``batch`` at a time.

    They have as many points and the same other parts: the library fills up missing points with tokens that
    others attend to, which would make a mask depend on its neighbours.
    """
    kinds: dict[tuple[int, bool, bool], list[int]] = {}
    for number, prompt in enumerate(prompts):
        kind = (len(prompt.points_xy), prompt.box_xyxy is not None, prompt.mask is not None)
        kinds.setdefault(kind, []).append(number)
    for numbers in kinds.values():
        for start in range(0, len(numbers), batch):
            yield numbers[start : start + batch]


def _repeated(maps: Mapping[str, Any], images: int) -> dict[str, Any]:
    """The same embedding for several images."""
    if images == 1:
        return dict(maps)

    def expand(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(images, *tensor.shape[1:])

    return {
        name: [expand(t) for t in value] if isinstance(value, list) else expand(value)
        for name, value in maps.items()
    }
