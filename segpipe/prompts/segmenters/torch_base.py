"""Provide what segmenters on torch share: the network on its device, windows in, embeddings out, checks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.network import forward_pass
from segpipe.models.providers.transformers.configs import REFUSED
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt


class TorchSegmenter(ABC):
    """A `Segmenter` whose network is torch's; a family says how it encodes and decodes."""

    def __init__(
        self, network: torch.nn.Module, card: Card, channels: int, edge: int, mask_edge: int,
        shapes: Mapping[str, tuple[int, int, int]], device: torch.device, threads: int, precision: str,
        batch: int,
    ) -> None:  # fmt: skip
        """Put the network on its device.

        Args:
            network: with its weights, in evaluation mode.
            card: whose channels windows have.
            channels: of the network.
            edge: elements of its square window along an axis.
            mask_edge: elements of its masks along an axis.
            shapes: as `Segmenter.shapes`.
            device, threads, precision, batch: as `load_segmenter`.
        """
        self.device = device
        self.window, self.mask_shape = (edge, edge), (mask_edge, mask_edge)
        self.shapes = shapes
        self._network: Any = network.to(device)
        self._given, self._channels = card.channels, channels
        self._threads, self._precision, self._batch = threads, precision, batch

    @property
    def parameters(self) -> int:
        """Numbers learned in training."""
        return sum(p.numel() for p in self._network.parameters())

    def encode(self, window: np.ndarray) -> Embedding:
        """As `Segmenter.encode`."""
        return self.encode_batch(window[None])[0]

    def encode_batch(self, windows: np.ndarray) -> list[Embedding]:
        """As `Segmenter.encode_batch`. One channel is repeated where the network has several."""
        wanted = (self._given, *self.window)
        if windows.shape[1:] != wanted:
            raise RequestError(f"window: found shape {windows.shape[1:]}; valid: {wanted}")
        batch = torch.from_numpy(np.ascontiguousarray(windows, np.float32)).to(self.device)
        batch = batch.expand(-1, self._channels, -1, -1)
        with forward_pass(self.device, self._precision, self._threads):
            arrays = [m.float().cpu().numpy() for m in self._encoded(batch)]
        return [
            Embedding({name: a[i] for name, a in zip(self.shapes, arrays, strict=True)})
            for i in range(len(windows))
        ]

    @abstractmethod
    def _encoded(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
        """The maps (n, c, y, x) of windows (n, c, y, x), in the order of `shapes`; within `forward_pass`."""

    @abstractmethod
    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = True
    ) -> Candidates:
        """As `Segmenter.decode`."""


def embedding_tensors(
    embedding: Embedding, shapes: Mapping[str, tuple[int, int, int]], device: torch.device
) -> list[torch.Tensor]:
    """The maps (1, c, y, x) of an embedding, float32, in the order of a network's ``shapes``.

    Raises:
        RequestError: it is of another network.
    """
    found = {name: a.shape for name, a in embedding.arrays.items()}
    if found != dict(shapes):
        raise RequestError(f"embedding: found {found}; valid: {dict(shapes)}")
    return [
        torch.from_numpy(np.ascontiguousarray(embedding.arrays[name], np.float32))[None].to(device)
        for name in shapes
    ]


def library_config(
    cls: Any, data: dict[str, Any], what: str, refuse: Callable[[str], RequestError] = RequestError
) -> Any:
    """The configuration of the transformers library that a folder's numbers make.

    Args:
        cls: of the configuration.
        data: its fields.
        what: begins the message of data that make no sense.
        refuse: makes the error of the message.

    Raises:
        RequestError: the data make no sense.
    """
    try:
        return cls.from_dict(data)
    except REFUSED as error:
        raise refuse(f"{what}: {' '.join(str(error).split())}") from error


def square_window(card: Card) -> int | None:
    """Edge of a card's fixed square window, on volumes one slice deep; None where it has no such window."""
    edges = [n for n in card.window_shape or () if n != 1 or card.kind == "raster"]
    square = len(edges) == 2 and edges[0] == edges[1] and card.window.fixed
    return edges[0] if square else None


def wrong_window(card: Card, edge: int, rule: str) -> RequestError:
    """The mistake of a card without the window it needs: ``rule``, then a size that would do."""
    size = [edge] if card.kind == "raster" else [1, edge, edge]
    fixed = str(card.window.fixed).lower()
    return card.error(
        "window.size", f"found {card.window.size}, fixed {fixed}; {rule} {size} with fixed: true"
    )


def check_channels(card: Card, channels: int, named: str) -> None:
    """Refuse a card that shows a network another number of channels than it has, or one to be repeated.

    Args:
        card: of the network.
        channels: that the network has.
        named: who says so, and by what name: ``the network has in_channels``.

    Raises:
        RequestError: says both numbers.
    """
    if card.channels not in (1, channels):
        raise card.error(
            "input.bands",
            f"found {card.channels}; {named} {channels}: valid: as many, or one, which is repeated",
        )
