"""Networks that answer with queries, a mask each and of what, and their own losses.

Cheng et al., MaskFormer, NeurIPS 2021. OneFormer is told its task in words, as numbers (Jain et al., CVPR
2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, masks_to_boxes

from segpipe.config.card import Card
from segpipe.models.base import MaskCandidates, Truth
from segpipe.models.network import enlarged
from segpipe.models.providers.transformers.configs import ARCHITECTURES, TransformersFamily
from segpipe.models.weights import resolve_weights
from segpipe.objects.window import mask_quality

TASK_ARGUMENTS = ("task", "task_tokens")
TASKS = ("semantic", "instance", "panoptic")


def task_tokens(card: Card, config: Any) -> list[int]:
    """Numbers of "the task is …", padded with 0 to the network's length, as `OneFormerProcessor` gives them.

    The task is `arguments.task`, or else the card's kind of output. Its numbers are `arguments.task_tokens`,
    or those that config.json has under `task_tokens`, by task, or what the folder's CLIP tokenizer makes.

    Raises:
        RequestError: there are none, they are too many, or the task is unknown.
    """
    task = card.arguments.get("task", card.output.kind)
    if task not in TASKS:
        raise card.error("arguments.task", f"found {task!r}; valid: {', '.join(TASKS)}")
    tokens = card.arguments.get("task_tokens")
    if tokens is None:
        tokens = (getattr(config, "task_tokens", None) or {}).get(task)
    if tokens is None:
        tokens = _tokenised(card, f"the task is {task}")
    length = int(config.task_seq_len)
    plain = isinstance(tokens, list) and all(type(t) is int and t >= 0 for t in tokens)
    if not plain or not 0 < len(tokens) <= length:
        raise card.error(
            "arguments.task_tokens", f"found {tokens!r}; valid: 1 to {length} whole numbers from 0 on"
        )
    return [*tokens, *[0] * (length - len(tokens))]


def _tokenised(card: Card, text: str) -> list[int]:
    from transformers import CLIPTokenizer

    folder = resolve_weights(card) if card.weights else Path()
    there = (folder / "tokenizer.json").is_file() or (
        (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    )
    if not card.weights or not there:
        raise card.error(
            "arguments.task_tokens",
            f"none given, and {folder} holds no tokenizer (tokenizer.json, or vocab.json with merges.txt); "
            f"valid: the numbers of {text!r} under the CLIP tokenizer",
        )
    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise card.error("weights", f"{folder}: its tokenizer cannot be read: {error}") from error
    return [int(t) for t in tokenizer(text)["input_ids"]]


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
        self.parameters = sum(p.numel() for p in queries.parameters())

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


class QueryLoss:
    """The network's own loss: queries matched with masks, then of classes and masks.

    Cheng et al., MaskFormer, NeurIPS 2021, section 3.3, and Mask2Former, CVPR 2022; Carion et al., DETR,
    ECCV 2020.
    """

    def __init__(self, card: Card, values: tuple[int, ...]) -> None:
        """``values``: class value of each of the network's labels.

        Raises:
            RequestError: OneFormer with a loss of texts, which needs texts for every image.
        """
        self._card = card
        self._values = torch.tensor(values)
        self._task = ARCHITECTURES[str(card.architecture)].task
        if self._task and card.arguments.get("contrastive_temperature") is not None:
            raise card.error(
                "arguments.contrastive_temperature",
                "OneFormer is trained here without its loss of texts: valid: left out",
            )

    def __call__(
        self, network: torch.nn.Module, images: torch.Tensor, truths: Sequence[Truth]
    ) -> torch.Tensor:
        """Loss of a batch, as `Objective` says."""
        labels = [(t.classes[:, None] == self._values.to(images.device)).int().argmax(1) for t in truths]
        if self._card.architecture == "DetrForSegmentation":
            loss = network(pixel_values=images, labels=[*map(_boxed, truths, labels)]).loss
        else:
            more: dict[str, Any] = {}
            if self._task:
                config = getattr(network, "module", network).config
                more["task_inputs"] = torch.tensor([task_tokens(self._card, config)] * len(images))
                more["task_inputs"] = more["task_inputs"].to(images.device)
            masks = [t.masks.to(torch.float32) for t in truths]
            loss = network(pixel_values=images, mask_labels=masks, class_labels=labels, **more).loss
        assert isinstance(loss, torch.Tensor)
        return loss.squeeze()


def _boxed(truth: Truth, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """DETR's targets: boxes as centre and size, as shares of the window."""
    rows, columns = truth.masks.shape[1:]
    boxes = masks_to_boxes(truth.masks).to(torch.float32)
    boxes[:, 2:] += 1
    size = torch.tensor([columns, rows, columns, rows], device=boxes.device)
    return {
        "class_labels": labels,
        "boxes": box_convert(boxes, "xyxy", "cxcywh") / size,
        "masks": truth.masks.to(torch.float32),
    }
