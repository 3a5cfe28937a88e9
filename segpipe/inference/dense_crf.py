"""Labels that follow the edges of the image: mean field in a dense conditional random field.

Krähenbühl and Koltun, "Efficient Inference in Fully Connected CRFs with Gaussian Edge Potentials", NIPS
2011, arXiv:1210.5644, with messages from a window alone, as in Teichmann and Cipolla, "Convolutional CRFs
for Semantic Segmentation", BMVC 2019, arXiv:1805.04777. The window is what makes tiles possible: an answer
depends on elements at most (iterations + 1) · radius away along each axis, for each iteration passes messages
over the radius, and the kernels' sums look one radius further. A tile with that halo is answered as the whole
scene is.

Elements i and j at p with image values I attract one another (Potts) by

    w_a · exp(−|p_i − p_j|² / 2σ_a² − |(I_i − I_j) / σ_I|² / 2)  +  w_s · exp(−|p_i − p_j|² / 2σ_s²)

where each kernel is divided by √(n_i n_j), n its sum over the window (i itself counted), as in the authors'
own code: a weight then means about the same for every σ and radius, and beside a border. Each iteration is
Q_i(l) ∝ P_i(l) · exp(Σ_{j ≠ i} k_ij Q_j(l)), for all elements at once (j ≠ i as in the paper; both authors'
codes let an element send itself a message).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

PROBABILITY_FLOOR = 1e-5
"""Least probability of a class, so that certainty can be overruled (pydensecrf's value)."""

Slices = tuple[Any, ...]
"""An index: all channels, then a slice per axis."""


@dataclass(frozen=True)
class _Pair:
    """All pairs of elements at one offset: the slices of the one and of the other."""

    one: Slices
    other: Slices
    appearance: float
    """Spatial part of the appearance kernel."""
    smooth: float
    """The smoothness kernel."""


def dense_crf(
    probabilities: torch.Tensor,
    image: torch.Tensor,
    *,
    iterations: int = 10,
    radius: int = 5,
    appearance_weight: float = 10.0,
    appearance_sigma: float = 80.0,
    image_sigma: float | Sequence[float] = 13.0,
    smooth_weight: float = 3.0,
    smooth_sigma: float = 3.0,
    valid: torch.Tensor | None = None,
) -> torch.Tensor:
    """Probabilities after mean-field inference; the formula is in the module's docstring.

    Defaults are those of pydensecrf's example and of Teichmann's code, for images of 0…255. Kernels are made
    anew in each iteration instead of kept: memory is a few times that of the probabilities, and time grows
    with iterations × (2·radius + 1)² × (k + c).

    Args:
        probabilities: (k, y, x) or (k, z, y, x), float32, of each class.
        image: (c, y, x) or (c, z, y, x), float32, on the same grid and device.
        iterations: of the mean field.
        radius: of the window, in elements along each axis.
        appearance_weight: w_a.
        appearance_sigma: σ_a, in elements.
        image_sigma: σ_I, in the image's units, one number or one per channel.
        smooth_weight: w_s.
        smooth_sigma: σ_s, in elements.
        valid: bool (y, x) or (z, y, x): where the image has values. Elsewhere probabilities stay as they are
            and no message comes from there.

    Returns:
        float32, shaped like `probabilities`; where valid, an element's sum is 1.

    Raises:
        ValueError: shapes do not fit one another, or a number is out of its range.
    """
    _check(probabilities, image, valid)
    _check_numbers(iterations, radius, (appearance_weight, smooth_weight), (appearance_sigma, smooth_sigma))
    image = image.float() / _sigmas(image, image_sigma)
    unary = probabilities.float().clamp_min(PROBABILITY_FLOOR).log()
    if valid is not None:
        image = image.where(valid, 0)
        unary = unary.where(valid, 0)
    pairs = list(_pairs(image.shape[1:], radius, appearance_sigma, smooth_sigma))
    scales = _scales(image, pairs, (appearance_weight, smooth_weight), valid)
    found = unary.softmax(0)
    for _ in range(iterations):
        found = _messages(found, image, pairs, scales).add_(unary).softmax(0)
    return found if valid is None else found.where(valid, probabilities.float())


def _pairs(
    shape: Sequence[int], radius: int, appearance_sigma: float, smooth_sigma: float
) -> Iterator[_Pair]:
    """Each unordered pair of elements within the window once: half of the window's offsets."""
    offsets = itertools.product(range(-radius, radius + 1), repeat=len(shape))
    for offset in itertools.islice(offsets, (2 * radius + 1) ** len(shape) // 2):
        if any(abs(d) >= n for d, n in zip(offset, shape, strict=True)):
            continue
        square = sum(d * d for d in offset)
        yield _Pair(
            one=(..., *(slice(max(0, -d), n - max(0, d)) for d, n in zip(offset, shape, strict=True))),
            other=(..., *(slice(max(0, d), n - max(0, -d)) for d, n in zip(offset, shape, strict=True))),
            appearance=math.exp(-square / (2 * appearance_sigma**2)),
            smooth=math.exp(-square / (2 * smooth_sigma**2)),
        )


def _appearance(image: torch.Tensor, pair: _Pair) -> torch.Tensor:
    """The appearance kernel of all pairs at one offset; image in units of σ_I."""
    square = (image[pair.one] - image[pair.other]).square_().sum(0)
    return square.mul_(-0.5).exp_().mul_(pair.appearance)


def _scales(
    image: torch.Tensor, pairs: list[_Pair], weights: tuple[float, float], valid: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """√(w / n_i) of the appearance and of the smoothness kernel; 0 where not valid.

    Both the normalisation and the weight of a pair are then the product of its two elements' scales.
    """
    inside = torch.ones_like(image[0]) if valid is None else valid.to(image.dtype)
    sums = inside.clone(), inside.clone()
    for pair in pairs:
        kernels: tuple[torch.Tensor | float, ...] = (_appearance(image, pair), pair.smooth)
        for total, kernel in zip(sums, kernels, strict=True):
            total[pair.one] += kernel * inside[pair.other]
            total[pair.other] += kernel * inside[pair.one]
    appearance, smooth = (
        inside * (w / total.clamp_min(1)).sqrt() for w, total in zip(weights, sums, strict=True)
    )
    return appearance, smooth


def _messages(
    q: torch.Tensor,
    image: torch.Tensor,
    pairs: list[_Pair],
    scales: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """Σ_{j ≠ i} k_ij Q_j(l) over the window, shaped like q."""
    appearance, smooth = scales
    out = torch.zeros_like(q)
    for pair in pairs:
        kernel = _appearance(image, pair) * appearance[pair.one] * appearance[pair.other]
        kernel += pair.smooth * smooth[pair.one] * smooth[pair.other]
        out[pair.one] += kernel * q[pair.other]
        out[pair.other] += kernel * q[pair.one]
    return out


def _sigmas(image: torch.Tensor, image_sigma: float | Sequence[float]) -> torch.Tensor:
    """σ_I, to be divided by: (1 or c, 1, …)."""
    sigma = torch.as_tensor(image_sigma, dtype=torch.float32, device=image.device).reshape(-1)
    if len(sigma) not in (1, len(image)) or not bool((sigma > 0).all()):
        raise ValueError(f"image_sigma: found {image_sigma}; valid: 1 or {len(image)} numbers above 0")
    return sigma.reshape(-1, *[1] * (image.ndim - 1))


def _check(probabilities: torch.Tensor, image: torch.Tensor, valid: torch.Tensor | None) -> None:
    space = probabilities.shape[1:]
    if len(space) not in (2, 3) or image.shape[1:] != space:
        raise ValueError(
            f"probabilities {tuple(probabilities.shape)}, image {tuple(image.shape)}; "
            "valid: (k, y, x) and (c, y, x), or (k, z, y, x) and (c, z, y, x)"
        )
    if valid is not None and (valid.shape != space or valid.dtype != torch.bool):
        raise ValueError(f"valid: found {valid.dtype} {tuple(valid.shape)}; valid: bool {tuple(space)}")


def _check_numbers(
    iterations: int, radius: int, weights: tuple[float, float], sigmas: tuple[float, float]
) -> None:
    if min(iterations, radius) < 1:
        raise ValueError(f"iterations {iterations}, radius {radius}; valid: 1 or more")
    if min(weights) < 0 or min(sigmas) <= 0:
        raise ValueError(f"weights {weights}, sigmas {sigmas}; valid: weights 0 or more, sigmas above 0")
