"""Augmentation: what a training window may look like."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, Field

from segpipe.config.types import Strict

if TYPE_CHECKING:
    pass


def _ascending(values: list[float]) -> list[float]:
    if values[0] > values[1]:
        raise ValueError(f"found {values}; valid: the smaller number first")
    return values


def _at_most_one(values: list[float]) -> list[float]:
    if values[1] > 1:
        raise ValueError(f"found {values}; valid: numbers up to 1")
    return values


Probability = Annotated[float, Field(ge=0, le=1)]


Axis = Annotated[int, Field(ge=0, le=2)]


Range = Annotated[list[float], Field(min_length=2, max_length=2), AfterValidator(_ascending)]
"""Smallest and largest value of a uniform draw."""


PositiveRange = Annotated[
    list[Annotated[float, Field(gt=0)]], Field(min_length=2, max_length=2), AfterValidator(_ascending)
]


class Augmentation(Strict):
    """Random changes of a training window: first where things are, then what values they have.

    Images are normalised before (mean about 0, standard deviation about 1): shifts and noise are in
    these units.
    """

    flip: Probability = Field(0.5, description="Probability of a mirror image, for each axis on its own.")
    flip_axes: list[Axis] = Field(
        [], description="Axes that may be mirrored, in array order (0: z or y, …); empty: all."
    )
    rotate90: Probability = Field(
        0.0,
        description="Probability of a turn by 90, 180 or 270 degrees in the plane of the last two axes; "
        "by 180 only where that plane is no square.",
    )
    rotate: Probability = Field(0.3, description="Probability of a rotation.")
    degrees: float = Field(
        30.0,
        ge=0,
        le=180,
        description="Largest angle of `rotate`, to either side; volumes turn about every axis.",
    )
    scale: Probability = Field(0.3, description="Probability of a change of size.")
    scale_range: PositiveRange = Field(
        [0.7, 1.4], description="Factors of `scale`, drawn on a log scale; above 1: things become larger."
    )
    elastic: Probability = Field(0.2, description="Probability of an elastic deformation.")
    elastic_size: float = Field(
        0.05,
        ge=0,
        le=0.1,
        description="Largest shift of `elastic` along an axis, as a share of the window; up to 0.1 nothing "
        "folds.",
    )
    brightness: Probability = Field(0.15, description="Probability of a shift of all values of a band.")
    brightness_range: Range = Field([-0.3, 0.3], description="Shifts of `brightness`.")
    contrast: Probability = Field(0.15, description="Probability of a gain about a band's mean.")
    contrast_range: PositiveRange = Field([0.75, 1.25], description="Factors of `contrast`.")
    gamma: Probability = Field(
        0.15, description="Probability of a power between a band's least and largest value."
    )
    gamma_range: PositiveRange = Field([0.7, 1.5], description="Exponents of `gamma`, drawn on a log scale.")
    bands_alike: bool = Field(
        False,
        description="One draw of brightness, contrast and gamma for all bands, instead of one for each.",
    )
    noise: Probability = Field(0.15, description="Probability of Gaussian noise.")
    noise_range: PositiveRange = Field([0.01, 0.2], description="Standard deviations of `noise`.")
    blur: Probability = Field(0.1, description="Probability of a Gaussian blur.")
    blur_range: PositiveRange = Field([0.5, 1.0], description="Standard deviations of `blur`, in elements.")
    low_resolution: Probability = Field(
        0.15, description="Probability of a coarser image, brought back to the same size."
    )
    low_resolution_range: Annotated[PositiveRange, AfterValidator(_at_most_one)] = Field(
        [0.5, 1.0], description="Share of the elements along an axis that `low_resolution` keeps."
    )

    @classmethod
    def none(cls) -> Augmentation:
        """No change at all."""
        return cls(
            flip=0,
            rotate90=0,
            rotate=0,
            scale=0,
            elastic=0,
            brightness=0,
            contrast=0,
            gamma=0,
            noise=0,
            blur=0,
            low_resolution=0,
        )
