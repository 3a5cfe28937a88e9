"""Augmentation of values: noise, blur, brightness, contrast, resolution, gamma. Nothing moves."""

from __future__ import annotations

from math import log

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch.nn.functional import interpolate

from segpipe.config.recipe import Augmentation


def change_values(image: torch.Tensor, spec: Augmentation, rng: np.random.Generator) -> torch.Tensor:
    """Change the values of an image (c, *space), in the order of nnU-Net (Isensee et al. 2021)."""
    bands = 1 if spec.bands_alike else image.shape[0]
    per_band = (bands,) + (1,) * (image.ndim - 1)

    def draw(limits: list[float]) -> torch.Tensor:
        return torch.from_numpy(rng.uniform(limits[0], limits[1], per_band).astype(np.float32))

    def draw_one(limits: list[float]) -> float:
        return rng.uniform(limits[0], limits[1])

    if rng.random() < spec.noise:
        image = add_noise(image, draw_one(spec.noise_range), rng)
    if rng.random() < spec.blur:
        image = blur(image, draw_one(spec.blur_range))
    if rng.random() < spec.brightness:
        image = image + draw(spec.brightness_range)
    if rng.random() < spec.contrast:
        image = gain(image, draw(spec.contrast_range))
    if rng.random() < spec.low_resolution:
        image = lower_resolution(image, draw_one(spec.low_resolution_range))
    if rng.random() < spec.gamma:
        image = power(image, draw([log(limit) for limit in spec.gamma_range]).exp())
    return image


def add_noise(image: torch.Tensor, deviation: float, rng: np.random.Generator) -> torch.Tensor:
    """Add independent Gaussian noise of this standard deviation."""
    noise = torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype=np.float32))
    return torch.add(image, noise, alpha=deviation)


def blur(image: torch.Tensor, deviation: float) -> torch.Tensor:
    """Gaussian blur of each band; the deviation is in elements, the border is repeated."""
    space = tuple(range(1, image.ndim))
    smooth = gaussian_filter(image.numpy(), deviation, axes=space, mode="nearest", truncate=3.0)
    return torch.from_numpy(smooth)


def gain(image: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the distance from each band's mean; the factor is (c or 1, 1, …)."""
    mean = image.mean(dim=tuple(range(1, image.ndim)), keepdim=True)
    return torch.lerp(mean, image, factor)


def lower_resolution(image: torch.Tensor, share: float) -> torch.Tensor:
    """Average down to a share of the elements along each axis, then interpolate linearly back up."""
    shape = list(image.shape[1:])
    fewer = [max(1, round(size * share)) for size in shape]
    small = interpolate(image[None], size=fewer, mode="area")
    return interpolate(small, size=shape, mode="bilinear" if len(shape) == 2 else "trilinear")[0]


def power(image: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Raise to a power between each band's least and largest value, which stay; exponent (c or 1, 1, …)."""
    space = tuple(range(1, image.ndim))
    low, high = image.amin(dim=space, keepdim=True), image.amax(dim=space, keepdim=True)
    width = high - low
    share = (image - low) / torch.where(width > 0, width, 1.0)  # a band of one value stays as it is
    return share.pow(exponent) * width + low
