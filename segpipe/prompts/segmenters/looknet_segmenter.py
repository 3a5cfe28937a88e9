"""A LookNet as a segmenter: an embedding is the window and its map, and three looks are three candidates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from segpipe.config.card import Card, card_error
from segpipe.models.construct import construct, known, only_arguments
from segpipe.models.network import fill, forward_pass
from segpipe.models.weights import load_state, resolve_weights
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt, check_prompts
from segpipe.prompts.segmenters.looknet import COARSEST, STRIDE, LookNet
from segpipe.prompts.segmenters.rois import CERTAIN, LOOKS, Asked, drawn, laid, looks_at, resampled
from segpipe.prompts.segmenters.torch_base import TorchSegmenter, check_channels, square_window, wrong_window

ARGUMENTS = ("in_channels", "width", "context")
OUTSIDE = -10.0
"""Logits beyond a look."""


@dataclass(frozen=True)
class LookCard:
    """What a card says of its LookNet."""

    edge: int
    """Elements of its square window along an axis."""
    network: LookNet
    """With random weights."""


def read_card(card: Card) -> LookCard:
    """The network of a card, without its weights.

    Raises:
        RequestError: names the field, what was found and what would be valid.
    """
    known(card, {LookNet.__name__: LookNet})
    if card.output.kind != "prompted":
        raise card_error(card, "output.kind", f"found {card.output.kind}; valid for prompts: prompted")
    only_arguments(card, ARGUMENTS)
    edge = square_window(card)
    if edge is None or edge % COARSEST:
        raise wrong_window(card, 256, f"valid: a square whose edge is a multiple of {COARSEST}, e.g.")
    network = construct(card, LookNet, dict(card.arguments))
    assert isinstance(network, LookNet)
    check_channels(card, network.in_channels, "the network has in_channels")
    return LookCard(edge, network)


def embedding_shapes(card: LookCard) -> dict[str, tuple[int, int, int]]:
    """Name and shape (c, y, x) of each array of an embedding."""
    edge, network = card.edge, card.network
    coarse = edge // STRIDE
    return {"window": (network.in_channels, edge, edge), "context": (network.context, coarse, coarse)}


class LookSegmenter(TorchSegmenter):
    """A `Segmenter` that is a LookNet."""

    def __init__(self, card: Card, device: torch.device, threads: int, precision: str, batch: int) -> None:
        """As `load_segmenter`."""
        read = read_card(card)
        fill(card, read.network, load_state(resolve_weights(card)))
        network, edge = read.network.eval().requires_grad_(False), read.edge
        shapes = embedding_shapes(read)
        super().__init__(
            network, card, read.network.in_channels, edge, edge, shapes, device, threads, precision, batch
        )

    def _encoded(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
        return batch, self._network.encode(batch)

    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = True
    ) -> Candidates:
        """As `Segmenter.decode`. One mask: the look's that is told to be best."""
        check_prompts(prompts, self.window, self.mask_shape)
        window, context = self._tensors_of(embedding)
        logits = np.empty((len(prompts), LOOKS if multimask else 1, *self.window), np.float32)
        iou = np.empty(logits.shape[:2], np.float32)
        with forward_pass(self.device, "fp32", self._threads):
            for start in range(0, len(prompts), self._batch):
                some = list(prompts[start : start + self._batch])
                # Short batches repeat their last prompt: a batch's shape is part of its bits.
                masks, told = self._answer(window, context, some + some[-1:] * (self._batch - len(some)))
                if not multimask:
                    best = told.argmax(1, keepdim=True)
                    told, masks = told.gather(1, best), torch.take_along_dim(masks, best[..., None, None], 1)
                stop = start + len(some)
                logits[start:stop] = masks[: len(some)].cpu().numpy()
                iou[start:stop] = told[: len(some)].cpu().numpy()
        return Candidates(logits, iou, logits)

    def _answer(
        self, window: torch.Tensor, context: torch.Tensor, prompts: Sequence[Prompt]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, LOOKS, y, x) and predicted IoU (n, LOOKS).

        What a given mask has between the cells of a look, which of a large object are many elements wide, is
        added to the answer: a net of roads stays a net.
        """
        asked = self._asked(prompts)
        given = [p.mask if p.mask is not None else np.zeros(self.window, np.float32) for p in prompts]
        masks = torch.from_numpy(np.stack(given))[:, None].to(self.device).clamp(-CERTAIN, CERTAIN)
        numbers, none = torch.arange(len(prompts)).to(self.device), torch.zeros(len(prompts)).to(self.device)
        logits, told = [], []
        for look in range(LOOKS):
            edges = looks_at(asked, torch.full_like(numbers, look))
            coarse = resampled(masks, numbers, edges)[:, 0]
            found, iou = self._network.decode(window, context, none, edges, drawn(asked, edges, coarse))
            seen = laid(coarse, edges, self.window, torch.nan)
            between = torch.nan_to_num(masks[:, 0] - seen)
            logits.append(laid(found, edges, self.window, OUTSIDE) + between)
            told.append(iou)
        return torch.stack(logits, 1), torch.stack(told, 1)

    def _asked(self, prompts: Sequence[Prompt]) -> Asked:
        """Prompts as tensors; those without a box and a point of the object get the box of their mask."""
        most = max(1, *(len(p.points_xy) for p in prompts))
        boxes = np.full((len(prompts), 4), np.nan, np.float32)
        points = np.zeros((len(prompts), most, 2), np.float32)
        labels = np.full((len(prompts), most), -1, np.int64)
        for i, prompt in enumerate(prompts):
            count = len(prompt.points_xy)
            points[i, :count], labels[i, :count] = prompt.points_xy, prompt.labels
            if prompt.box_xyxy is not None:
                boxes[i] = prompt.box_xyxy
            elif not (prompt.labels == 1).any():
                boxes[i] = self._extent(prompt.mask)
        return Asked(*(torch.from_numpy(a).to(self.device) for a in (boxes, points, labels)))

    def _extent(self, mask: np.ndarray | None) -> np.ndarray:
        """Box of a given mask; the window's where nothing is in it."""
        inside = np.zeros(self.window, bool) if mask is None else mask > 0
        if not inside.any():
            return np.array([0, 0, self.window[1] - 1, self.window[0] - 1], np.float32)
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
