"""What every provider's adapter gives the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from segpipe.objects.window import WindowObjects


class SegmentationModel(Protocol):
    """A network ready on its device, in evaluation mode."""

    device: torch.device

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Scores of a batch of windows.

        Args:
            batch: normalised windows, float32, (n, c, y, x) or (n, c, a, b, d) with the spatial
                axes in the card's order, on `device`.

        Returns:
            float32 (n, k, …) with the input's spatial shape: what `card.output.activation` says.
            A network that answers at a lower resolution is upsampled (bilinear, half-pixel) here.
        """


@dataclass(frozen=True, eq=False)
class MaskCandidates:
    """What an instance or panoptic network proposes for one window, before masks compete."""

    masks: np.ndarray
    """(m, …) float32 probabilities at the window's size."""
    classes: np.ndarray
    """(m,) class values of the card, int64."""
    scores: np.ndarray
    """(m,) float32 in [0, 1]."""


class ObjectNetwork(Protocol):
    """What an adapter builds for a card whose output is `instance` or `panoptic`."""

    device: torch.device
    rule: Literal["transformers", "paper"]
    """How masks of panoptic cards compete: see `segpipe.objects.window.resolve_masks`."""

    @property
    def parameters(self) -> int | None:
        """Numbers learned in training; None where the file does not tell."""

    def candidates(self, batch: torch.Tensor) -> Sequence[MaskCandidates]:
        """Masks proposed for each window of a batch (n, c, …), normalised, on `device`."""


@dataclass(frozen=True, eq=False)
class Truth:
    """What an instance or panoptic network should find in one window."""

    masks: torch.Tensor
    """(m, y, x) bool; no element is in two."""
    classes: torch.Tensor
    """(m,) class values of the card, int64."""


class Objective(Protocol):
    """A library's own loss of its network."""

    def __call__(
        self, network: torch.nn.Module, images: torch.Tensor, truths: Sequence[Truth]
    ) -> torch.Tensor:
        """A scalar to minimise.

        Args:
            network: in training mode, maybe wrapped for several processes.
            images: (n, c, y, x), on the network's device as the truths are.
            truths: of each image.
        """


class ObjectModel(Protocol):
    """A network whose answer is objects, ready on its device."""

    device: torch.device

    def objects(self, batch: torch.Tensor) -> Sequence[WindowObjects]:
        """The objects of each window of a batch."""


class Network(SegmentationModel, Protocol):
    """What an adapter builds; `ReadyModel` makes it keep the promises of `SegmentationModel`."""

    @property
    def parameters(self) -> int | None:
        """Numbers learned in training; None where the file does not tell."""
