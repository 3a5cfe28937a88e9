"""Networks that answer with queries: a mask each, and of what (Cheng et al., MaskFormer, NeurIPS 2021)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from segpipe.config.card import Card
from segpipe.models.base import MaskCandidates
from segpipe.models.providers.transformers.families import TransformersFamily
from segpipe.objects.window import mask_quality


class Queries(torch.nn.Module):
    """The network, asked for the logits of its queries."""

    def __init__(
        self, network: torch.nn.Module, family: TransformersFamily, tokens: list[int] | None
    ) -> None:
        """``tokens``: the words that name OneFormer's task, as numbers."""
        super().__init__()
        self.network = network
        self.family = family
        self._tokens = tokens

    def forward(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Class logits (n, q, k + 1), the last for no object, and mask logits (n, q, y, x); float32."""
        more: dict[str, Any] = {}
        if self._tokens is not None:
            more["task_inputs"] = torch.tensor([self._tokens] * len(batch), device=batch.device)
        out = self.network(pixel_values=batch, **more)
        if "class_queries_logits" in out:
            return out.class_queries_logits.float(), out.masks_queries_logits.float()
        return out.logits.float(), out.pred_masks.float()  # DETR

    def masks(self, logits: torch.Tensor, size: torch.Size) -> torch.Tensor:
        """Probabilities (n, q, y, x) of masks at the window's size."""
        if self.family.enlarge == "logits":
            return enlarged(logits, size).sigmoid()
        return enlarged(logits.sigmoid(), size)


class ClassScores(torch.nn.Module):
    """Scores per class: over the queries, the sum of class probability × mask probability.

    They are at least 0 and need not sum to 1. This is `post_process_semantic_segmentation` of the library's
    image processors, before its argmax, with the window as the size of the preprocessed image.
    """

    def __init__(self, queries: Queries) -> None:
        super().__init__()
        self.queries = queries

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(n, k, y, x), at the window's size or, where the sum can be enlarged as well, at the masks'."""
        classes, masks = self.queries(batch)
        size = batch.shape[2:] if self.queries.family.enlarge == "logits" else masks.shape[2:]
        with torch.autocast(batch.device.type, enabled=False):
            probabilities = classes.softmax(-1)[..., :-1]
            return torch.einsum("bqc,bqhw->bchw", probabilities, self.queries.masks(masks, size))


class QueryObjects:
    """The network as an `ObjectNetwork`."""

    def __init__(self, card: Card, queries: Queries, values: tuple[int, ...], device: torch.device) -> None:
        """``values``: class value of each of the network's labels."""
        self.device = device
        self.rule = queries.family.rule
        self._queries = queries
        self._instances = card.output.kind == "instance"
        self._lowest = card.output.score
        self._values = np.array(values, np.int64)

    @property
    def parameters(self) -> int | None:
        """Numbers learned in training."""
        return sum(p.numel() for p in self._queries.parameters())

    def candidates(self, batch: torch.Tensor) -> list[MaskCandidates]:
        """The queries of each window that are objects with at least the card's score.

        Panoptic: a query has its likeliest class and that class's probability. Instance: as many (query,
        class) pairs as there are queries, the likeliest first (EoMT: each query with its likeliest class),
        and a pair's score is its probability × the mean of its mask where it is above one half.
        """
        classes, masks = self._queries(batch)
        probabilities = classes.softmax(-1)
        return [self._of_window(p, m, batch.shape[2:]) for p, m in zip(probabilities, masks, strict=True)]

    def _of_window(
        self, probabilities: torch.Tensor, logits: torch.Tensor, size: torch.Size
    ) -> MaskCandidates:
        """Candidates from (q, k + 1) class probabilities and (q, y, x) mask logits."""
        nothing = probabilities.shape[1] - 1
        rows = torch.arange(len(probabilities), device=probabilities.device)
        if not self._instances:
            scores, labels = probabilities.max(1)
        elif self._queries.family.pairs:
            scores, order = probabilities[:, :-1].flatten().sort(descending=True, stable=True)
            scores, order = scores[: len(rows)], order[: len(rows)]
            rows, labels = order // nothing, order % nothing
        else:
            scores, labels = probabilities[:, :-1].max(1)
        # Masks of the others would only cost memory: quality can but lower a score.
        kept = (labels != nothing) & (scores >= self._lowest)
        masks = self._queries.masks(logits[rows[kept]][None], size)[0].cpu().numpy()
        weights = scores[kept].cpu().numpy()
        if self._instances:
            weights = weights * mask_quality(masks)
        return MaskCandidates(masks, self._values[labels[kept].cpu().numpy()], weights)


def enlarged(maps: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """(n, q, y, x) at another size: bilinear, half-pixel centres."""
    if maps.shape[2:] == size or not maps.shape[1]:
        return maps.new_zeros(*maps.shape[:2], *size) if not maps.shape[1] else maps
    return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
