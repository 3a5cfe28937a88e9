"""Cards of provider `classical`: what their arguments may say, and the method bound to them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from pydantic import Field, model_validator

from segpipe.config.card import Card
from segpipe.config.loading import validate
from segpipe.config.types import Strict
from segpipe.models.base import Network
from segpipe.models.card_checks import known, only_arguments
from segpipe.models.providers.classical import graphs, regions
from segpipe.models.providers.classical.forest import load_forest
from segpipe.models.weights import resolve_weights

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


FOREST = "random-forest"
METHODS: dict[str, type[Arguments]] = {
    "otsu": Otsu,
    "multi-otsu": Otsu,
    "region-growing": RegionGrowing,
    "watershed": Watershed,
    "graph-cut": GraphCut,
    "normalised-cut": NormalisedCut,
}
TWO_CLASSES = ("otsu", "region-growing", "graph-cut")
MOST_STEPS = 200_000_000
"""Of the search for thresholds, which tries each choice of bins: about ten seconds."""

Segmenter = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""bands (c, …), feature (…) and known (…) to the class index of each element."""


@dataclass
class ClassicalNetwork:
    """A method without weights; it computes on the CPU, window by window."""

    segment: Segmenter
    feature: Callable[[np.ndarray], np.ndarray]
    nonzero: bool
    classes: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    parameters: int | None = 0

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """1 for the class of each element and 0 for the others, float32 (n, k, …)."""
        return torch.stack([self._window(window.numpy()) for window in batch])

    def _window(self, bands: np.ndarray) -> torch.Tensor:
        known = np.ones(bands.shape[1:], dtype=bool)
        if self.nonzero:
            np.any(bands, axis=0, out=known)
        labels = self.segment(bands, self.feature(bands), known)
        scores = labels[None] == np.arange(self.classes).reshape(-1, *[1] * labels.ndim)
        return torch.from_numpy(scores.astype(np.float32))


def check(card: Card) -> None:
    """Whether method, arguments, classes and window fit one another.

    Raises:
        RequestError: they do not; names the field and what would be valid.
    """
    name = known(card, [*METHODS, FOREST])
    if card.output.activation != "none":
        raise card.error(
            "output.activation",
            f"found {card.output.activation}; valid: none: {name} answers with probabilities",
        )
    if name == FOREST:
        only_arguments(card, ())
        if not card.weights:
            raise card.error("weights", "missing; valid: a file that save_forest wrote")
        return
    if card.weights:
        raise card.error("weights", f"found {card.weights!r}; {name} has none: leave it out")
    arguments = _arguments(card)
    _check_classes(card, name, arguments)
    _check_feature(card, arguments.feature)
    if not isinstance(arguments, Otsu) or arguments.thresholds is None:
        _check_whole(card, name)


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The method, or the forest with the card's weights on the device.

    Raises:
        RequestError: as `check`; or the forest's file is damaged, or for other bands or classes.
    """
    check(card)
    if card.architecture == FOREST:
        return load_forest(resolve_weights(card), card.channels, len(card.classes), device, threads)
    arguments = _arguments(card)
    return ClassicalNetwork(
        _segmenter(arguments, len(card.classes)),
        _feature(card, arguments.feature),
        card.kind == "raster" if arguments.nonzero is None else arguments.nonzero,
        len(card.classes),
    )


def _arguments(card: Card) -> Arguments:
    return validate(METHODS[str(card.architecture)], card.arguments, f"{card.name}: arguments")


def _check_classes(card: Card, name: str, arguments: Arguments) -> None:
    count = len(card.classes)
    if name in TWO_CLASSES and count != 2:
        raise card.error("classes", f"found {count}; valid: 2, {name} parts two classes")
    if isinstance(arguments, Watershed) and len(arguments.markers) != count:
        found = len(arguments.markers)
        raise card.error("arguments.markers", f"found {found}; valid: {count}, one pair a class")
    given = arguments.thresholds if isinstance(arguments, Otsu) else None
    if given is not None:
        if len(given) != count - 1 or any(a >= b for a, b in itertools.pairwise(given)):
            raise card.error(
                "arguments.thresholds", f"found {given}; valid: {count - 1} that rise, for {count} classes"
            )
    elif isinstance(arguments, Otsu | NormalisedCut) and math.comb(arguments.bins, count - 1) > MOST_STEPS:
        raise card.error(
            "classes",
            f"found {count} with {arguments.bins} bins, too long a search; valid: up to 5 with 256 "
            "bins, 7 with 64, or fewer arguments.bins",
        )


def _check_feature(card: Card, feature: Feature | None) -> None:
    bands = card.input.bands
    if feature is None:
        if card.channels > 1:
            raise card.error(
                "arguments.feature",
                f"missing; valid with {card.channels} bands: {{linear: {{band: factor}}}} or "
                f"{{normalised_difference: [{bands[0]}, {bands[1]}]}}",
            )
        return
    for band in feature.bands:
        if band not in bands:
            raise card.error(
                "arguments.feature", f"found {band!r}; valid: {', '.join(bands) or 'a card with input.bands'}"
            )


def _check_whole(card: Card, name: str) -> None:
    """What is found in a window would depend on the tiling (law 8); padding is no part of the scene."""
    if card.window.size != "whole":
        hint = ", or arguments.thresholds" if name in ("otsu", "multi-otsu") else ""
        raise card.error(
            "window.size",
            f"found {card.window.size}; {name} looks at the whole scene, its answer would depend on the "
            f"windows; valid: whole{hint}",
        )
    if card.window.stride != 1:
        raise card.error("window.stride", f"found {card.window.stride}; valid: 1, so that nothing is padded")


def _feature(card: Card, feature: Feature | None) -> Callable[[np.ndarray], np.ndarray]:
    """From bands (c, …) to the feature (…), float32."""
    if feature is None:
        return lambda bands: np.asarray(bands[0])
    places = [card.input.bands.index(band) for band in feature.bands]
    if feature.linear is not None:
        factors = np.array(list(feature.linear.values()), dtype=np.float32)
        return lambda bands: np.einsum("c,c...->...", factors, bands[places])
    return lambda bands: normalised_difference(*bands[places])


def normalised_difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a − b) / (a + b); 0 where the sum is 0."""
    total = a + b
    return np.asarray(np.divide(a - b, total, out=np.zeros_like(total), where=total != 0))


def _segmenter(arguments: Arguments, classes: int) -> Segmenter:
    """The method with its arguments."""
    match arguments:
        case Otsu(thresholds=list() as thresholds):
            return lambda bands, feature, known: regions.by_thresholds(feature, thresholds)
        case Otsu(bins=bins):
            return lambda bands, feature, known: regions.by_thresholds(
                feature, regions.otsu_thresholds(regions.known_values(feature, known), classes, bins)
            )
        case RegionGrowing(seed=seed, grow=grow):
            return lambda bands, feature, known: regions.region_growing(feature, known, seed, grow)
        case Watershed(markers=markers):
            return lambda bands, feature, known: regions.watershed(feature, known, markers)
        case GraphCut(smoothness=smoothness, bins=bins):
            return lambda bands, feature, known: graphs.graph_cut(feature, known, smoothness, bins)
        case NormalisedCut():
            settings = arguments.model_dump(exclude={"feature", "nonzero"})
            return lambda bands, feature, known: graphs.normalised_cut(
                bands, feature, known, classes, **settings
            )
    raise ValueError(f"no method takes {type(arguments).__name__}")
