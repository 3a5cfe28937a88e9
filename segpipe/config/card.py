"""The model card: everything segpipe needs to know of a model, as data.

A card is a YAML file under ``configs/models/``. It names a provider and an architecture, where the
weights are, what the model wants to see and what its outputs mean. Nothing in a card is code.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from enum import Enum
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from segpipe.config.builtin import find_card
from segpipe.config.loading import read_yaml, validate
from segpipe.config.types import Strict
from segpipe.errors import RequestError


class Interpolation(str, Enum):
    """How values are taken between voxel centres."""

    nearest = "nearest"
    linear = "linear"


class Subtract(Strict):
    """``x − value``, one number or one per channel, in real units."""

    op: Literal["subtract"]
    value: list[float]


class Divide(Strict):
    """``x / value``, one number or one per channel."""

    op: Literal["divide"]
    value: list[float]


class Scale(Strict):
    """``x · factor + offset``."""

    op: Literal["scale"]
    factor: float
    offset: float = 0.0


def _check_range(low: float, high: float) -> None:
    if low >= high:
        raise ValueError(f"low: found {low} with high {high}; valid: low below high")


class Clip(Strict):
    """Limits in real units, e.g. Hounsfield."""

    op: Literal["clip"]
    low: float
    high: float

    @model_validator(mode="after")
    def _not_empty(self) -> Clip:
        _check_range(self.low, self.high)
        return self


QUANTILE_SAMPLES = 1 << 24
"""Most elements that torch takes a quantile of."""


class SceneQuantiles(Strict):
    """Clip to two quantiles of the scene's valid elements and map them to 0…1, per channel.

    ``grid``: the quantiles are taken on the scene sampled (nearest) onto this many elements.
    """

    op: Literal["scene_quantiles"]
    low: float = Field(0.005, ge=0, le=1)
    high: float = Field(0.995, ge=0, le=1)
    grid: list[int] | None = None

    @model_validator(mode="after")
    def _small_enough(self) -> SceneQuantiles:
        _check_range(self.low, self.high)
        if self.grid is not None and math.prod(self.grid) > QUANTILE_SAMPLES:
            raise ValueError(
                f"grid: found {self.grid}; at most {QUANTILE_SAMPLES} elements, e.g. 256x256x256"
            )
        return self


class SceneZscore(Strict):
    """Subtract the mean and divide by the standard deviation of the scene's valid elements."""

    op: Literal["scene_zscore"]
    nonzero: bool = False


class WindowZscore(Strict):
    """The same over the window itself: only where the window is the whole scene (law 8)."""

    op: Literal["window_zscore"]


Step = Annotated[
    Subtract | Divide | Scale | Clip | SceneQuantiles | SceneZscore | WindowZscore,
    Field(discriminator="op"),
]


class Input(Strict):
    """What the model wants to see."""

    bands: list[str] = Field(
        default_factory=list,
        description="Channels by name, in the model's order. Empty for single-channel volumes.",
    )
    modality: str | None = Field(None, description="E.g. T1 MRI, CT, Sentinel-2 L1C reflectance.")
    orientation: str | None = Field(
        None,
        pattern=r"^[RL][AP][SI]$|^[RLAPSI]{3}$",
        description="Anatomical direction of the model's three axes, e.g. RAS. Empty: the file's own.",
    )
    spacing: list[float] | None = Field(
        None, description="Element size along the model's axes, in mm or m. Empty: the scene's own."
    )
    image_resampling: Interpolation = Interpolation.linear
    score_resampling: Interpolation = Interpolation.linear
    normalisation: list[Step] = Field(default_factory=list)


class WindowSpec(Strict):
    """How the model is laid over a scene."""

    size: list[int] | Literal["whole"] = Field(
        description="Elements per model axis, or whole: the scene in one pass."
    )
    shape: list[int] | None = Field(None, description="With whole: the scene is resampled to this shape.")
    halo: list[int] | Literal["auto"] = Field(
        default_factory=lambda: [0],
        description="Margin computed and not used; one number or one per axis. auto: as far as the network "
        "is found to look, measured once.",
    )
    stride: int = Field(
        1, ge=1, description="Total stride of the network: windows start and end at its multiples."
    )
    mirror: list[int] | None = Field(
        None,
        description="Axes, from 0, along which mirror images are as likely as the scene: those of test-time "
        "averaging. Left out: all; empty: none.",
    )
    fixed: bool = Field(
        False, description="The network takes this size only; a smaller scene is padded up to it."
    )
    forward_bytes: int = Field(
        400, ge=1, description="Peak memory of a forward pass, in bytes per element of the window."
    )
    padding: Literal["zero", "edge", "symmetric"] = Field(
        "zero", description="What stands beyond the scene's trailing edge, after normalisation."
    )

    @model_validator(mode="after")
    def _whole_is_whole(self) -> WindowSpec:
        if self.shape is not None and self.size != "whole":
            raise ValueError("`shape` goes with `size: whole`")
        return self


class Crf(Strict):
    """A dense conditional random field over a window's probabilities (Krähenbühl & Koltun 2011)."""

    iterations: int = Field(10, ge=1, le=100)
    radius: int = Field(5, ge=1, description="Elements within which two influence each other.")
    appearance_weight: float = Field(10.0, ge=0)
    appearance_sigma: float = Field(80.0, gt=0, description="In elements.")
    image_sigma: float = Field(0.3, gt=0, description="In units of the normalised image.")
    smooth_weight: float = Field(3.0, ge=0)
    smooth_sigma: float = Field(3.0, gt=0, description="In elements.")


class Output(Strict):
    """What comes out of the network."""

    activation: Literal["softmax", "sigmoid", "none"] = "softmax"
    """softmax: logits, one channel a class. sigmoid: one logit, of the second of two classes.
    none: probabilities already."""
    crf: Crf | None = Field(
        None,
        description="Sharpen probabilities along edges; the halo needs (iterations + 1) × radius.",
    )
    kind: Literal["semantic", "instance", "panoptic", "prompted", "boxes", "names"] = "semantic"
    """semantic: a score per class. instance: objects of classes. panoptic: objects of the classes that
    are things, and one segment for each of the others. prompted: masks of what is pointed at. boxes: boxes
    of what is said in words. names: which of some words a picture shows."""
    score: float = Field(0.5, ge=0, le=1, description="Objects of a lower score are no objects.")
    mask: float = Field(0.5, ge=0, le=1, description="Probability from which an element is an object's.")
    overlap: float = Field(
        0.8, ge=0, le=1, description="Share of its mask that an object must keep against better ones."
    )


class Class(Strict):
    """One class; channel k of the output is the k-th class."""

    value: int = Field(ge=0, le=65534, description="Value in label maps.")
    name: str
    color: str = Field(pattern=r"^#[0-9a-fA-F]{6}$")
    background: bool = Field(False, description="Left out of means of Dice and IoU.")
    thing: bool = Field(
        True, description="Of panoptic cards: countable objects; false: one segment, as sky or forest."
    )
    synonyms: list[str] = Field(default_factory=list, description="Other words for it, for prompts.")
    description: str = Field("", description="What it is in a sentence, for prompts.")
    code: str | None = Field(
        None,
        pattern=r"^[^:\s]{1,16}:\S{1,64}$",
        description="Coded concept: scheme and value, e.g. SCT:12738006.",
    )


class RegionOfInterest(Strict):
    """A model that looks first and crops the scene for the second."""

    card: str = Field(description="Card of the first model (window whole), relative to this card.")
    threshold: float = 0.5
    projection: float = Field(
        0.02, description="A plane belongs to the box where this share of it is foreground."
    )
    margin: float = Field(0.1, description="Added on each side, as a share of the box.")


class CleanUp(Strict):
    """What is done to the finished label map of a scene."""

    largest_component: bool = Field(
        False, description="Keep each class's largest component (26- or 8-neighbours)."
    )
    fill_holes: bool = Field(False, description="Fill background enclosed in each class.")


class Card(Strict):
    """A model card."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    title: str = ""
    kind: Literal["raster", "volume"]
    provider: str = Field(
        description="Who builds the network: smp, monai, transformers, torchvision, literature, classical, "
        "bundle, nnunet, onnx, exported, torchscript, ensemble, or the name under which an installed package "
        "adds another (entry points of the group segpipe.providers)."
    )
    architecture: str | None = Field(None, description="Class or model name at the provider.")
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str = Field(
        "",
        description="A path relative to the card, pkg://distribution/file, or hf://org/name@revision. Empty "
        "where the provider needs none (classical, ensemble), and in a recipe for training.",
    )
    input: Input
    window: WindowSpec
    output: Output = Field(default_factory=Output)
    classes: list[Class] = Field(
        default_factory=list, description="Two or more; none of prompted models and of those that give boxes."
    )
    roi: RegionOfInterest | None = None
    cleanup: CleanUp = Field(default_factory=CleanUp)
    allow_torchscript: bool = Field(
        False, description="TorchScript is a program: it runs only when the card says so."
    )
    data: str = Field("", description="What it was trained on.")
    scores: str = Field("", description="How good it is, measured how.")
    limits: str = Field("", description="Where not to use it.")
    licence: str = ""
    source: str = Field("", description="Who made it, and where it is published.")

    _folder: Path = PrivateAttr(default=Path())

    @property
    def folder(self) -> Path:
        """Where the card lies; relative paths start here."""
        return self._folder

    @property
    def channels(self) -> int:
        """Input channels of the network."""
        return max(1, len(self.input.bands))

    @property
    def ndim(self) -> int:
        """Spatial axes of the network."""
        return 2 if self.kind == "raster" else 3

    @property
    def window_shape(self) -> tuple[int, ...] | None:
        """Elements per model axis in one pass; None: as many as the scene has."""
        size = self.window.shape if self.window.size == "whole" else self.window.size
        return None if size is None else self._per_axis(size)

    @property
    def halo(self) -> tuple[int, ...] | None:
        """Margin per model axis; None: to be measured."""
        return None if self.window.halo == "auto" else self._per_axis(self.window.halo)

    @property
    def mirror(self) -> tuple[int, ...]:
        """Model axes of test-time mirror images, array order."""
        return tuple(range(self.ndim)) if self.window.mirror is None else tuple(self.window.mirror)

    def _per_axis(self, sizes: list[int]) -> tuple[int, ...]:
        return tuple(sizes) if len(sizes) == self.ndim else tuple(sizes) * self.ndim

    @property
    def values(self) -> tuple[int, ...]:
        """Class value of each output channel."""
        return tuple(c.value for c in self.classes)

    @property
    def label_dtype(self) -> str:
        """Of its label maps: uint8 where all values and the nodata value 255 fit, else uint16 with 65535."""
        return "uint8" if self.nodata == 255 else "uint16"

    @property
    def nodata(self) -> int:
        """The label of elements where the scene is not valid."""
        return nodata_of(self.values)

    def error(self, field: str, text: str) -> RequestError:
        """A mistake in the card, told as ``card: field: what was found; what is valid``."""
        return RequestError(f"{self.name}: {field}: {text}")

    @property
    def output_channels(self) -> int:
        """Channels the network answers with: one a class, or one in all under a sigmoid."""
        return 1 if self.output.activation == "sigmoid" else len(self.classes)

    @property
    def answers_prompts(self) -> bool:
        """Whether it has no classes of its own: what it finds is what is asked for."""
        return self.output.kind in ("prompted", "boxes", "names")

    @model_validator(mode="after")
    def _consistent(self) -> Card:
        if self.answers_prompts and self.classes:
            raise ValueError(f"classes: a card of kind {self.output.kind} has none; leave them out")
        if not self.answers_prompts and len(self.classes) < 2:
            raise ValueError(f"classes: found {len(self.classes)}; valid: two or more")
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"classes: values must differ; found {list(self.values)}")
        names = [c.name for c in self.classes]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"classes: names must differ; found twice: {', '.join(twice)}")
        if self.output.activation == "sigmoid" and len(self.classes) != 2:
            raise ValueError("output.activation: sigmoid has two classes, background first")
        window_steps = [s for s in self.input.normalisation if s.op == "window_zscore"]
        if window_steps and self.window.size != "whole":
            raise ValueError(
                "input.normalisation: window_zscore would make the answer depend on the tiling; "
                "use scene_zscore, or window.size: whole"
            )
        if len(set(self.mirror)) < len(self.mirror) or not set(self.mirror) <= set(range(self.ndim)):
            raise ValueError(f"window.mirror: found {list(self.mirror)}; valid: axes 0 to {self.ndim - 1}")
        if self.kind == "raster" and self.input.orientation:
            raise ValueError("input.orientation is for volumes")
        for field in ("size", "shape", "halo"):
            sizes = getattr(self.window, field)
            if isinstance(sizes, list) and len(sizes) not in (1, self.ndim):
                raise ValueError(
                    f"window.{field}: found {sizes}; valid: one number, or {self.ndim} for a {self.kind}"
                )
        return self

    def prediction_fingerprint(self) -> str:
        """Hash of everything in the card that can change a label; names and colours cannot."""
        parts = self.model_dump(
            mode="json",
            include={
                "kind",
                "provider",
                "architecture",
                "arguments",
                "input",
                "window",
                "output",
                "roi",
            },
        )
        parts["input"].pop("modality")
        parts["window"].pop("forward_bytes")
        parts["values"] = self.values
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def nodata_of(values: Iterable[int]) -> int:
    """What stands for no data in a file of labels with these classes."""
    return 255 if max(values) < 255 else 65535


def load_card(path: str | Path) -> Card:
    """Read and validate a model card.

    Args:
        path: of its file, or its name (`segpipe.config.builtin.find_card`).

    Raises:
        RequestError: the file or a key is wrong; names it and what would be valid.
    """
    path = find_card(path)
    card = validate(Card, read_yaml(path), str(path))
    card._folder = Path(path).resolve().parent
    return card


def read_card(path: str) -> Card:
    """A card by path or name, read once per process and again when its file has changed."""
    path = str(find_card(path))
    try:
        stat = Path(path).stat()
    except OSError:
        return load_card(path)  # says what is wrong
    return _read_card(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _read_card(path: str, mtime: int, size: int) -> Card:
    return load_card(path)
