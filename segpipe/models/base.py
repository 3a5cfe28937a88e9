"""What every provider's adapter gives the engine."""

from __future__ import annotations

from typing import Protocol

import torch


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
        ...
