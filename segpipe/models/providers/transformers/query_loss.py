"""The losses that the library's own networks make of masks and their classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torchvision.ops import box_convert, masks_to_boxes

from segpipe.config.card import Card, card_error
from segpipe.models.base import Truth
from segpipe.models.providers.transformers.families import ARCHITECTURES
from segpipe.models.providers.transformers.task import task_tokens


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
            raise card_error(
                card,
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
