"""The recipe of a promptable model: the YAML of `python -m segpipe.training.prompted`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from segpipe.config.loading import load
from segpipe.config.types import Strict, Text


class Raster(Strict):
    """A labelled raster: connected parts of one class are objects."""

    name: str = Field(description="For people.")
    image: str = Field(description="File, relative to `data.root`.")
    labels: str = Field(description="File of class values on the same grid, relative to `data.root`.")
    bands: list[str] = Field(min_length=1, description="Names of the bands, in file order.")
    labels_shift: list[int] = Field(
        default_factory=lambda: [0, 0],
        min_length=2,
        max_length=2,
        description="Rows and columns that the labels are moved by, down and right: where a map does not lie "
        "on its image. `python -m benchmarks.registration` tells.",
    )
    values: list[int] = Field(min_length=1, description="Classes whose parts are objects to learn.")
    learned: list[int] | None = Field(
        None, min_length=2, max_length=2, description="First row to learn from, and one past the last."
    )
    judged: list[int] | None = Field(
        None, min_length=2, max_length=2, description="The same of rows that the model is judged by."
    )
    judged_values: list[int] = Field(
        default_factory=list, description="Classes whose parts the model is judged by."
    )
    composites: list[list[str]] = Field(
        default_factory=list, description="Bands, three at a time, that the model is judged on."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Raster:
        for name in ("learned", "judged"):
            rows = getattr(self, name)
            if rows is not None and not 0 <= rows[0] < rows[1]:
                raise ValueError(f"{name}: found {rows}; valid: two ascending rows")
        if (
            self.learned
            and self.judged
            and max(self.learned[0], self.judged[0]) < min(self.learned[1], self.judged[1])
        ):
            raise ValueError(f"judged: found rows {self.judged}; valid: rows outside {self.learned}")
        for bands in self.composites:
            if len(bands) != 3 or not set(bands) <= set(self.bands):
                raise ValueError(f"composites: found {bands}; valid: three of {', '.join(self.bands)}")
        return self


class Volumes(Strict):
    """Labelled volumes, whose slices along every axis are images."""

    name: str = Field(description="For people.")
    images: str = Field(description="Glob, relative to `data.root`.")
    labels: str = Field(description="Folder of files of the same names, relative to `data.root`.")
    groups: list[list[int]] = Field(
        min_length=1, description="Values that make an object: one, or several that are one together."
    )
    judged: list[str] = Field(
        default_factory=list, description="Names of cases (without .nii.gz) that are not learned from."
    )


class Data(Strict):
    """What the model learns from, beside drawn shapes."""

    root: Text = Field("data", description="Folder that other paths start from.")
    rasters: list[Raster] = Field(min_length=1, description="Labelled rasters.")
    volumes: list[Volumes] = Field(default_factory=list, description="Sets of labelled volumes.")


class Crops(Strict):
    """What one step sees: whole windows, or crops, in which small objects are learned at less cost."""

    part: int = Field(1, ge=1, le=8, description="Edge of a window over that of its crops.")
    times: int = Field(1, ge=1, description="Crops in place of each window.")


class Sampling(Strict):
    """Which windows and prompts are shown."""

    window: int = Field(256, ge=64, multiple_of=16, description="Elements of a window along each axis.")
    drawn: int = Field(2, ge=0, description="Windows of drawn shapes in a step.")
    raster: int = Field(1, ge=0, description="Windows of labelled rasters in a step.")
    volume: int = Field(1, ge=0, description="Windows of slices in a step.")
    cycle: list[Crops] = Field(
        default_factory=lambda: [Crops()], min_length=1, description="What steps see in turn."
    )
    objects: int = Field(5, ge=1, description="Objects of a window that are asked for, at most.")
    smallest: int = Field(12, ge=1, description="Elements of an object, at least.")
    jitter: float = Field(
        0.1, ge=0, le=0.5, description="Deviation of a box's edges, as a share of its size."
    )
    exact: float = Field(0.5, ge=0, le=1, description="Share of boxes without jitter.")
    again: int = Field(3, ge=1, description="Every so many steps objects are asked for again, corrected.")


class Optimise(Strict):
    """How the weights are found."""

    steps: int = Field(1000, ge=1, description="Steps of the optimiser.")
    rate: float = Field(1e-3, gt=0, description="Highest learning rate.")
    warmup: int = Field(100, ge=0, description="Steps in which the rate rises.")
    cooldown: int = Field(400, ge=0, description="Last steps, in which the rate falls to nothing.")
    decay: float = Field(0.01, ge=0, description="Weight decay of AdamW; not of biases and norms.")
    clip: float = Field(1.0, gt=0, description="Largest norm of a step's gradient.")
    ema: float = Field(0.998, ge=0, lt=1, description="The result is a moving average of the weights.")
    seed: int = Field(0, ge=0, description="Of weights, windows and prompts.")
    bf16: bool = Field(False, description="The network computes in bf16 while it learns.")
    threads: int = Field(2, ge=1, description="CPU threads.")
    every: int = Field(50, ge=1, description="Steps between two lines of progress.")
    minutes: float = Field(3.0, gt=0, description="Between two checkpoints.")


class PromptedRecipe(Strict):
    """How a promptable model is trained."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="Of the model that is made.")
    network: dict[str, Any] = Field(
        default_factory=dict, description="Arguments of `segpipe.prompts.segmenters.looknet.LookNet`."
    )
    data: Data = Field(description="What the model learns from.")
    sampling: Sampling = Field(default_factory=Sampling, description="Which windows and prompts are shown.")
    optimise: Optimise = Field(default_factory=Optimise, description="How the weights are found.")
    out: str = Field("runs/train", description="Folder of checkpoint and history.")
    export: str = Field(description="File that the trained weights are written to: ….safetensors.")

    @model_validator(mode="after")
    def _something_to_see(self) -> PromptedRecipe:
        if not self.sampling.drawn + self.sampling.raster + self.sampling.volume:
            raise ValueError("sampling: found no windows; valid: drawn, raster or volume above 0")
        if not self.export.endswith(".safetensors"):
            raise ValueError(f"export: found {self.export}; valid: a file named ….safetensors")
        if self.sampling.volume and not self.data.volumes:
            raise ValueError("sampling.volume: found no data.volumes; valid: 0")
        return self


def load_prompted_recipe(path: str | Path, overrides: Sequence[str] = ()) -> PromptedRecipe:
    """Read and validate a recipe: see `segpipe.config.loading.load`."""
    return load(PromptedRecipe, path, overrides)
