"""What a card's `arguments` may say, per architecture."""

from __future__ import annotations

from pydantic import Field, model_validator

from segpipe.config.types import Strict

Share = float
"""A quantile, 0 to 1."""


class Feature(Strict):
    """One number per element, from the bands as the card normalises them."""

    normalised_difference: tuple[str, str] | None = Field(
        None, description="Two bands a and b: (a − b) / (a + b), e.g. [green, nir] for water."
    )
    linear: dict[str, float] | None = Field(None, description="A factor per band; the products are added.")

    @model_validator(mode="after")
    def _one(self) -> Feature:
        if (self.normalised_difference is None) == (not self.linear):
            raise ValueError(
                "feature: give one of normalised_difference: [band, band] or linear: {band: factor}"
            )
        return self

    @property
    def bands(self) -> tuple[str, ...]:
        """The bands it is made of."""
        return self.normalised_difference or tuple(self.linear or ())


class Arguments(Strict):
    """What every method without labels takes."""

    feature: Feature | None = Field(
        None, description="What is compared; may be left out where there is one band."
    )
    nonzero: bool | None = Field(
        None,
        description="Elements that are 0 in every band take no part: 0 is what stands where the scene has no "
        "value. Left out: true for rasters, false for volumes, whose zeros are mostly measured.",
    )


class Otsu(Arguments):
    """Classes are intervals of the feature; the first class is the lowest."""

    thresholds: list[float] | None = Field(
        None, description="One less than classes, rising. Left out: those of the whole scene."
    )
    bins: int = Field(256, ge=2, le=65536, description="Of the histogram, over the feature's range.")


class RegionGrowing(Arguments):
    """The second class is whatever hangs together with a seed."""

    seed: Share = Field(ge=0, le=1, description="Elements above this quantile of the feature are seeds.")
    grow: Share = Field(ge=0, le=1, description="They grow over neighbours above this quantile.")

    @model_validator(mode="after")
    def _below(self) -> RegionGrowing:
        if self.grow > self.seed:
            raise ValueError(f"grow: found {self.grow}; valid: at most seed {self.seed}")
        return self


class Watershed(Arguments):
    """Classes are flooded from their markers up to the ridges of the gradient between them."""

    markers: list[tuple[Share, Share]] = Field(
        min_length=2,
        description="Per class, rising, two quantiles of the feature: what lies between is surely it.",
    )

    @model_validator(mode="after")
    def _rising(self) -> Watershed:
        ends = [q for pair in self.markers for q in pair]
        if ends != sorted(ends) or ends[0] < 0 or ends[-1] > 1:
            raise ValueError(
                f"markers: found {self.markers}; valid: quantiles from 0 to 1 that rise, [low, high] each"
            )
        return self


class GraphCut(Arguments):
    """Two means, and a price per border between neighbours of different class."""

    smoothness: float = Field(
        0.5,
        ge=0,
        le=100,
        description="Price of one border; changing an element from one mean to the other costs 1.",
    )
    bins: int = Field(256, ge=2, le=65536, description="Of the histogram that the two means come from.")


class NormalisedCut(Arguments):
    """Superpixels, cut apart where they are unlike; classes by Otsu on the means of what is left."""

    segments: int = Field(400, ge=2, le=10_000, description="Superpixels, about.")
    compactness: float = Field(1.0, gt=0, description="SLIC: nearness against likeness, bands scaled to 0…1.")
    sigma: float = Field(0.004, gt=0, description="Likeness of neighbours is exp(−|difference|² / sigma).")
    cut: float = Field(0.5, gt=0, le=2, description="No further cut where its normalised cost is above this.")
    bins: int = Field(256, ge=2, le=65536, description="Of the histogram that the classes come from.")
