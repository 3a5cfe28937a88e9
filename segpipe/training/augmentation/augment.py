"""Augmentation: what a training window may look like, and one random draw of it.

This module loads no torch until :func:`augment` is called, so that configs and forms can use
:class:`Augmentation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from segpipe.config.recipe import Augmentation
from segpipe.errors import RequestError

if TYPE_CHECKING:
    import torch


def augment(
    image: torch.Tensor,
    target: torch.Tensor,
    spec: Augmentation,
    rng: np.random.Generator,
    spacing: Sequence[float] | None = None,
    outside: int = -1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One random change of a window, the same for image and target.

    Args:
        image: float32 (c, y, x) or (c, z, y, x), normalised.
        target: int64 (y, x) or (z, y, x), class numbers below 2^24 in size.
        spec: What may happen.
        rng: The only source of randomness: the same state gives the same bits.
        spacing: Size of an element along each spatial axis, in array order and any one unit;
            None: all the same. Rotations are rotations in this space.
        outside: Target of elements that come from outside the window; their image is 0 before values
            are changed.

    Returns:
        Image and target of the same shapes. Where nothing changes, the tensors themselves.

    Raises:
        RequestError: `flip_axes` names an axis that the image lacks.
        ValueError: shapes that do not go together.
    """
    from segpipe.training.augmentation.intensity import change_values
    from segpipe.training.augmentation.spatial import change_space

    shape = tuple(target.shape)
    if len(shape) not in (2, 3) or tuple(image.shape[1:]) != shape:
        raise ValueError(
            f"image {tuple(image.shape)}, target {shape}; valid: (c, y, x), (y, x) or (c, z, y, x), (z, y, x)"
        )
    spacing = (1.0,) * len(shape) if spacing is None else tuple(spacing)
    if len(spacing) != len(shape) or min(spacing) <= 0:
        raise ValueError(f"spacing {spacing}; valid: {len(shape)} numbers above 0")
    if max(spec.flip_axes, default=0) >= len(shape):
        raise RequestError(
            f"flip_axes: found {spec.flip_axes}; the image has {len(shape)} axes: valid 0 to {len(shape) - 1}"
        )
    image, target = change_space(image, target, spec, rng, spacing, outside)
    return change_values(image, spec, rng), target
