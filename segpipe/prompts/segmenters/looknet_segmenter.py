"""Use a LookNet as a segmenter: an embedding is the window and its map, three looks are three candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from segpipe.config.card import Card, card_error
from segpipe.models.card_checks import construct, known, only_arguments
from segpipe.models.network import fill, forward_pass
from segpipe.models.weights import load_state, resolve_weights
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt, check_prompts
from segpipe.prompts.segmenters.looknet import (
    CERTAIN,
    COARSEST,
    LOOKS,
    STRIDE,
    LookNet,
    PromptTensors,
    drawn,
    laid,
    looks_at,
    resampled,
)
from segpipe.prompts.segmenters.torch_base import TorchSegmenter, check_channels, square_window, wrong_window

ARGUMENTS = ("in_channels", "width", "context")
OUTSIDE = -10.0
"""Logits beyond a look."""


def read_network(card: Card) -> tuple[int, LookNet]:
    """Return the edge of a card's square window, and its network without weights.

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
    return edge, network


def embedding_shapes(edge: int, network: LookNet) -> dict[str, tuple[int, int, int]]:
    """Return name and shape (c, y, x) of each array of an embedding of a window."""
    coarse = edge // STRIDE
    return {"window": (network.in_channels, edge, edge), "context": (network.context, coarse, coarse)}


class LookSegmenter(TorchSegmenter):
    """A `Segmenter` that is a LookNet."""

    def __init__(self, card: Card, device: torch.device, threads: int, precision: str, batch: int) -> None:
        """As `load_segmenter`."""
        edge, network = read_network(card)
        fill(card, network, load_state(resolve_weights(card)))
        channels, shapes = network.in_channels, embedding_shapes(edge, network)
        network.eval().requires_grad_(False)
        super().__init__(network, card, channels, edge, edge, shapes, device, threads, precision, batch)

    def _encoded(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
        return batch, self._network.encode(batch)

    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = True
    ) -> Candidates:
        """As `Segmenter.decode`. One mask: the look's of highest predicted IoU."""
        check_prompts(prompts, self.window, self.mask_shape)
        window, context = self._tensors_of(embedding)
        logits = np.empty((len(prompts), LOOKS if multimask else 1, *self.window), np.float32)
        iou = np.empty(logits.shape[:2], np.float32)
        with forward_pass(self.device, "fp32", self._threads):
            for start in range(0, len(prompts), self._batch):
                some = list(prompts[start : start + self._batch])
                # Short batches repeat their last prompt: a batch's shape is part of its bits.
                full = some + some[-1:] * (self._batch - len(some))
                masks, predicted = self._decoded(window, context, full)
                if not multimask:
                    best = predicted.argmax(1, keepdim=True)
                    predicted = predicted.gather(1, best)
                    masks = torch.take_along_dim(masks, best[..., None, None], 1)
                stop = start + len(some)
                logits[start:stop] = masks[: len(some)].cpu().numpy()
                iou[start:stop] = predicted[: len(some)].cpu().numpy()
        return Candidates(logits, iou, logits)

    def _decoded(
        self, window: torch.Tensor, context: torch.Tensor, prompts: Sequence[Prompt]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (n, LOOKS, y, x) and predicted IoU (n, LOOKS).

        What a given mask has between the cells of a look, which of a large object are many elements wide, is
        added to the result: a net of roads stays a net.
        """
        tensors = self._as_tensors(prompts)
        given = [p.mask if p.mask is not None else np.zeros(self.window, np.float32) for p in prompts]
        masks = torch.from_numpy(np.stack(given))[:, None].to(self.device).clamp(-CERTAIN, CERTAIN)
        numbers, none = torch.arange(len(prompts)).to(self.device), torch.zeros(len(prompts)).to(self.device)
        logits, scores = [], []
        for look in range(LOOKS):
            edges = looks_at(tensors, torch.full_like(numbers, look))
            coarse = resampled(masks, numbers, edges)[:, 0]
            found, iou = self._network.decode(window, context, none, edges, drawn(tensors, edges, coarse))
            seen = laid(coarse, edges, self.window, torch.nan)
            between = torch.nan_to_num(masks[:, 0] - seen)
            logits.append(laid(found, edges, self.window, OUTSIDE) + between)
            scores.append(iou)
        return torch.stack(logits, 1), torch.stack(scores, 1)

    def _as_tensors(self, prompts: Sequence[Prompt]) -> PromptTensors:
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
        arrays = {"boxes": boxes, "points": points, "labels": labels}
        return PromptTensors(**{name: torch.from_numpy(a).to(self.device) for name, a in arrays.items()})

    def _extent(self, mask: np.ndarray | None) -> np.ndarray:
        """Box of a given mask; the window's where nothing is in it."""
        inside = np.zeros(self.window, bool) if mask is None else mask > 0
        if not inside.any():
            return np.array([0, 0, self.window[1] - 1, self.window[0] - 1], np.float32)
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)
