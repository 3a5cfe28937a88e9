"""The recipe: one set of pydantic models, augmentation among them, that is the YAML of `segpipe train`."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from segpipe.config.card import Card
from segpipe.config.job import Precision, Reference
from segpipe.config.loading import load
from segpipe.config.losses import LossName, LossTerm
from segpipe.config.types import Address, AutoNumber, AutoSize, Memory, Strict, Text, as_text


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


class SplitBy(str, Enum):
    """What is kept together when the data is split."""

    scene = "scene"
    block = "block"


class Split(Strict):
    """Which elements are learned from, and which the model is judged by."""

    by: SplitBy = Field(SplitBy.scene, description="scene: whole scenes. block: squares of a scene.")
    folds: int = Field(5, ge=2, le=100, description="Parts of about the same size; one is kept apart.")
    fold: Annotated[str, BeforeValidator(as_text)] = Field(
        "0",
        pattern=r"^(\d+|all|none)$",
        description="The part kept apart, from 0; all: one after another; none: learn from everything.",
    )
    block: int = Field(128, ge=1, description="Edge of a block, in elements of the model's grid.")
    buffer: int = Field(0, ge=0, description="Elements around a block kept apart that are not learned from.")
    seed: int = Field(0, ge=0, description="Of the random assignment.")

    @model_validator(mode="after")
    def _fold_exists(self) -> Split:
        if self.fold.isdigit() and int(self.fold) >= self.folds:
            raise ValueError(f"fold: found {self.fold}; valid: 0 to {self.folds - 1}, all or none")
        return self

    @property
    def chosen(self) -> list[int | None]:
        """The folds to train, each by the part that is kept apart; None: nothing is."""
        if self.fold == "none":
            return [None]
        return list(range(self.folds)) if self.fold == "all" else [int(self.fold)]


class Data(Strict):
    """What the model learns from."""

    scenes: list[Address] = Field(min_length=1, description="Files, globs, folders or URLs.")
    reference: Reference = Field(description="The labels, in the values of the card's classes.")
    objects: bool = Field(
        False,
        description="The reference holds ids of objects: 0 is the background, all others the other class. "
        "With `reference.divisor`: class × divisor + number.",
    )
    bands: list[str] = Field(default_factory=list, description="Names of the scenes' bands, in file order.")
    description: str = Field("", description="For the card: what this data is, and whose.")


class Windows(Strict):
    """What one forward pass sees in training."""

    size: AutoSize = Field("auto", description="auto: the card's; else elements, e.g. 256 or 40x56x40.")
    balance: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of windows around an element of a class, each class as often; others anywhere.",
    )


class Optimise(Strict):
    """How the weights are found."""

    steps: int = Field(1000, ge=1, description="Steps of the optimiser.")
    batch: int = Field(4, ge=1, description="Windows in one forward pass.")
    accumulate: int = Field(1, ge=1, description="Forward passes whose gradients make one step.")
    rate: float = Field(1e-3, gt=0, description="Highest learning rate; it rises, then falls as a cosine.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps in which the rate rises.")
    decay: float = Field(1e-4, ge=0, description="Weight decay of AdamW; not of biases and norms.")
    clip: float = Field(1.0, gt=0, description="Largest norm of a step's gradient.")
    ema: float = Field(
        0.99, ge=0, lt=1, description="The result is a moving average of the weights; 0: the last ones."
    )
    seed: int = Field(0, ge=0, description="Of weights, windows and augmentation.")


class KeptWeights(str, Enum):
    """Whose weights are the result."""

    last = "last"
    best = "best"


class Judge(Strict):
    """When the model is tried on what is kept apart, and when that is enough."""

    every: int = Field(200, ge=1, description="Steps between two trials.")
    scenes: int = Field(24, ge=1, description="Scenes in a trial during training, at most; the last has all.")
    keep: KeptWeights = Field(
        KeptWeights.last,
        description="last: no score picks the weights. best: those of the best trial, whose score flatters.",
    )
    patience: int = Field(0, ge=0, description="Trials without a better one after which to stop; 0: never.")


class TrainCompute(Strict):
    """Where and how."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:1.")
    precision: Precision = Field(
        Precision.auto, description="auto: bf16 where the device computes it, else fp32. fp16: with a scaler."
    )
    threads: AutoNumber = Field("auto", description="CPU threads; auto: all cores.")
    memory: Memory = Field("2GiB", description="Upper bound for scenes kept in memory; others are read.")
    minutes: float = Field(
        0.0,
        ge=0,
        description="Stop with a checkpoint after so many minutes; the next call goes on. 0: never.",
    )


class Stored(str, Enum):
    """How weights are stored."""

    fp32 = "fp32"
    fp16 = "fp16"


def default_loss() -> list[LossTerm]:
    """Cross-entropy and Dice, alike."""
    return [LossTerm(name=LossName.cross_entropy), LossTerm(name=LossName.dice)]


class Recipe(Strict):
    """How a model is trained: data, card, windows, augmentation, loss, optimiser."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Of the model that is made.")
    card: Card = Field(description="The card to make: all but name, weights and scores.")
    start: Text = Field("", description="Card (path or name) of a trained model, to begin with its weights.")
    data: Data = Field(description="What the model learns from.")
    split: Split = Field(default_factory=Split, description="What is kept apart.")
    windows: Windows = Field(default_factory=Windows, description="What one forward pass sees.")
    augment: Augmentation = Field(default_factory=Augmentation, description="How windows are varied.")
    loss: list[LossTerm] = Field(
        default_factory=default_loss,
        min_length=1,
        description="Terms of a weighted sum.",
    )
    optimise: Optimise = Field(default_factory=Optimise, description="How the weights are found.")
    judge: Judge = Field(default_factory=Judge, description="When the model is tried.")
    compute: TrainCompute = Field(default_factory=TrainCompute, description="Where and how.")
    weights: Stored = Field(
        Stored.fp32, description="fp16: files of half the size; scores are taken with them."
    )
    out: str = Field("runs/train", description="Folder of the results, each recipe's in one of its own.")

    @model_validator(mode="before")
    @classmethod
    def _card_is_named(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("card"), dict):
            return {**data, "card": {"name": data.get("name"), **data["card"]}}
        return data

    @property
    def measure(self) -> str:
        """What the score of a trial is, for people."""
        return "Mean Dice" if self.card.output.kind == "semantic" else "Panoptic quality"

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.card.output.kind == "semantic" and self.card.output.activation == "none":
            raise ValueError("card.output.activation: found none; trained networks end in softmax or sigmoid")
        if self.card.weights:
            raise ValueError("card.weights: leave it out; `start` names the card to begin with")
        if self.data.objects and not self.data.reference.divisor and len(self.card.classes) != 2:
            raise ValueError("data.objects: ids have two classes, background first")
        if self.card.output.kind != "semantic":
            if not self.data.objects:
                raise ValueError("data.objects: found false; networks that find objects learn from ids")
            if "loss" in self.model_fields_set and self.loss != default_loss():
                raise ValueError("loss: leave it out; networks that find objects have their library's own")
        if any(t.name is LossName.border for t in self.loss) and not self.data.objects:
            raise ValueError("loss: border weights need ids of objects: `data.objects: true`")
        if any(step.op == "window_zscore" for step in self.card.input.normalisation):
            raise ValueError("card.input.normalisation: window_zscore is not for training; use scene_zscore")
        return self


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe: see `segpipe.config.loading.load`."""
    return load(Recipe, path, overrides)
