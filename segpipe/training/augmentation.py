"""Augmentation: one random change of a training window, in space and in values.

Mirror images and quarter turns are exact, everything else in space is one resampling; noise, blur,
brightness, contrast, resolution and gamma move nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import log

import numpy as np
import torch
from scipy.interpolate import BSpline
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from torch.nn.functional import affine_grid, grid_sample, interpolate

from segpipe.config.recipe import Augmentation
from segpipe.errors import RequestError


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


CELLS = 4
"""Cells of the elastic lattice along an axis."""


def change_space(
    image: torch.Tensor,
    target: torch.Tensor,
    spec: Augmentation,
    rng: np.random.Generator,
    spacing: Sequence[float],
    outside: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move image (c, *space) and target (*space) alike; arguments as in :func:`augment`."""
    image, target = _mirror(image, target, spec, rng)
    image, target = _quarter_turn(image, target, spec, rng, spacing)
    matrix, lattice = draw_matrix(spec, rng, spacing), draw_lattice(spec, rng, target.ndim)
    if matrix is None and lattice is None:
        return image, target
    grid = sampling_grid(target.shape, matrix, lattice)
    return resample(image, target, grid, outside)


def _mirror(
    image: torch.Tensor, target: torch.Tensor, spec: Augmentation, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    allowed = spec.flip_axes or range(target.ndim)
    axes = [axis for axis in sorted(set(allowed)) if rng.random() < spec.flip]
    if not axes:
        return image, target
    return image.flip([axis + 1 for axis in axes]), target.flip(axes)


def _quarter_turn(
    image: torch.Tensor,
    target: torch.Tensor,
    spec: Augmentation,
    rng: np.random.Generator,
    spacing: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    if rng.random() >= spec.rotate90:
        return image, target
    square = target.shape[-2] == target.shape[-1] and bool(np.isclose(spacing[-2], spacing[-1], rtol=1e-3))
    turns = int(rng.integers(1, 4)) if square else 2
    return image.rot90(turns, (-2, -1)), target.rot90(turns, (-2, -1))


def draw_matrix(spec: Augmentation, rng: np.random.Generator, spacing: Sequence[float]) -> np.ndarray | None:
    """Rotation and scaling as a matrix (axis, axis) of element offsets, or None.

    It maps an offset from the window's centre in the output to the one in the input that is seen there.
    """
    ndim = len(spacing)
    turned, scaled = rng.random() < spec.rotate, rng.random() < spec.scale
    if not (turned or scaled):
        return None
    physical = np.eye(ndim)
    if turned:
        # about the first axis in 2D as well: it turns the last two
        turns = 1 if ndim == 2 else 3
        angles = [*rng.uniform(-spec.degrees, spec.degrees, turns), *[0.0] * (3 - turns)]
        physical = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()[-ndim:, -ndim:]
    if scaled:
        physical = physical / np.exp(rng.uniform(*np.log(spec.scale_range)))
    sizes = np.asarray(spacing, float)
    matrix: np.ndarray = physical * sizes[None, :] / sizes[:, None]
    return matrix


def draw_lattice(spec: Augmentation, rng: np.random.Generator, ndim: int) -> np.ndarray | None:
    """Control points of an elastic deformation, (CELLS + 3 along each axis, axis), or None.

    Shifts are shares of the window, uniform within ±`elastic_size`. A cubic B-spline of them stays within the
    same bound, and folds nowhere if they are below 1 / 2.48 of a cell in 3D, 1 / 2.05 in 2D (Choi and Lee
    2000, Injectivity conditions of 2D and 3D uniform cubic B-spline functions): 0.1 of a window of 4 cells.
    """
    if rng.random() >= spec.elastic:
        return None
    return rng.uniform(-spec.elastic_size, spec.elastic_size, (CELLS + 3,) * ndim + (ndim,))


@lru_cache(maxsize=64)
def _spline_weights(size: int) -> torch.Tensor:
    """Weight of each control point at each element's centre along an axis, float32 (size, CELLS + 3)."""
    centres = (np.arange(size) + 0.5) / size * CELLS
    knots = np.arange(-3.0, CELLS + 4)
    return torch.from_numpy(BSpline.design_matrix(centres, knots, 3).toarray().astype(np.float32))


def sampling_grid(
    shape: Sequence[int], matrix: np.ndarray | None, lattice: np.ndarray | None
) -> torch.Tensor:
    """Where each output element comes from: float32 (1, *shape, axis), as `grid_sample` wants it.

    An output element p sees the input at M (p + d(p)), from the window's centre, with M the matrix and d the
    spline of the lattice. The window's extent is -1 to 1 and axes are in reverse order (align_corners=False).
    """
    ndim = len(shape)
    extent = np.asarray(shape, float)
    unit = (np.eye(ndim) if matrix is None else matrix) * extent[None, :] / extent[:, None]
    theta = np.zeros((1, ndim, ndim + 1), np.float32)
    theta[0, :, :ndim] = unit[::-1, ::-1]
    grid = affine_grid(torch.from_numpy(theta), [1, 1, *shape], align_corners=False)
    if lattice is not None:
        # linear, so M may be applied to the few control points instead of to every element
        field = torch.from_numpy((2 * lattice @ unit.T)[..., ::-1].astype(np.float32))
        for size in reversed(shape):
            field = torch.tensordot(_spline_weights(size), field, dims=([1], [ndim - 1]))
        grid += field
    return grid


def resample(
    image: torch.Tensor, target: torch.Tensor, grid: torch.Tensor, outside: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image (c, *space) by linear interpolation, target (*space) by nearest neighbour, at the grid's places.

    Beyond the window's elements the image is 0 and the target `outside`.
    """
    moved = grid_sample(image[None], grid, padding_mode="zeros", align_corners=False)[0]
    # what grid_sample puts outside is 0: `outside` is 0 for it
    labels = (target - outside).to(torch.float32)[None, None]
    labels = grid_sample(labels, grid, mode="nearest", padding_mode="zeros", align_corners=False)[0, 0]
    return moved, labels.to(target.dtype) + outside


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
