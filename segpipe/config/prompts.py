"""What a job asks of a promptable model: the `prompts` part of a job, of the command line and of the form."""

from __future__ import annotations

from enum import Enum
from typing import Literal

from pydantic import Field, model_validator

from segpipe.config.types import AddressText, Memory, Strict, Text


class Choice(str, Enum):
    """Which of a prompt's candidates is taken. None that is empty is, unless all are."""

    score = "score"
    """The one of highest predicted IoU."""
    small = "small"
    """The one of fewest elements: a part."""
    medium = "medium"
    """The one between; of two, the smaller."""
    large = "large"
    """The one of most elements: the whole."""
    box = "box"
    """The one whose bounding box agrees best with the prompt's box; without a box, as `score`."""


class PlaneOf(str, Enum):
    """Slices of a volume that prompts are on and that are segmented one by one."""

    auto = "auto"
    axial = "axial"
    coronal = "coronal"
    sagittal = "sagittal"


class PointGrid(Strict):
    """Masks of everything, without prompts, by a grid of points (Kirillov et al. 2023, appendix B)."""

    points: int = Field(32, ge=1, le=256, description="Points along an edge of a window.")
    iou: float = Field(0.88, ge=0, le=1, description="Least IoU that the model predicts of its mask.")
    stability: float = Field(
        0.95, ge=0, le=1, description="Least IoU of a mask with its shrunk and grown self."
    )
    overlap: float = Field(
        0.7, gt=0, le=1, description="IoU of two boxes from which the lesser mask is dropped."
    )
    levels: int = Field(
        1, ge=1, le=8, description="Sizes of windows: 1 the finest, 2 also twice as large ones, and so on."
    )


class Volume(Strict):
    """How a mask on one slice of a volume becomes a solid: from slice to slice, until a rule stops it."""

    plane: PlaneOf = Field(PlaneOf.auto, description="auto: the slices that are farthest apart.")
    least_iou: float = Field(
        0.5, ge=0, le=1, description="Least IoU that the model predicts of a slice's mask."
    )
    least_overlap: float = Field(
        0.3, ge=0, le=1, description="Least IoU of the masks of neighbouring slices."
    )
    change: float = Field(
        3.0, ge=1, description="Most times that an area grows or shrinks from slice to slice."
    )
    reach: int = Field(0, ge=0, description="Slices at most on each side; 0: as far as the rules let it.")


class PromptOptions(Strict):
    """What a promptable model is asked. Any of `text`, `path`, `earlier` and `everything`."""

    text: list[str] = Field(
        default_factory=list,
        description="Phrases to look for, e.g. lakes and reservoirs. One an entry, or several with full "
        "stops between them.",
    )
    grounder: Text = Field(
        "",
        description="Model card (path or name) that finds phrases: any semantic model (its classes and their "
        "synonyms are the vocabulary), or a detector that takes text. Needed with `text`.",
    )
    threshold: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Least score of what a phrase finds: lower finds more, also what is none.",
    )
    text_threshold: float = Field(
        0.25,
        ge=0,
        le=1,
        description="Of detectors that tell which words a box answers: least score of a word.",
    )
    scales: int = Field(
        2, ge=1, le=8, description="Of detectors: sizes of windows, each twice as large as the one before."
    )
    path: AddressText = Field("", description="Points, boxes or polygons: GeoJSON, GeoPackage or CSV.")
    crs: Text = Field("", description="Of a CSV's x and y, e.g. EPSG:32617; scene: the scene's own.")
    layer: Text = Field("", description="Layer of a file with several.")
    polygons: Literal["box", "outline"] = Field(
        "box", description="box: a polygon is a box around an object. outline: also its coarse mask."
    )
    earlier: AddressText = Field(
        "",
        description="Labels of an earlier run as prompts: a file, or a folder or glob matched by name.",
    )
    earlier_ids: bool = Field(False, description="Their values are ids of objects, not classes.")
    names: dict[int, str] = Field(
        default_factory=dict, description="Phrase of each class value of the earlier labels."
    )
    everything: bool = Field(False, description="Masks of everything, without prompts: see `grid`.")
    labeller: Text = Field(
        "",
        description="Model card (path or name) of a CLIP that names the masks of `everything` by the phrases "
        "of `text`.",
    )
    grid: PointGrid = Field(default_factory=PointGrid, description="How everything is found.")
    choice: Choice = Field(
        Choice.score,
        description="Of three candidates: score: the best predicted IoU; box: the best agreement with the "
        "box; small, medium, large: by size.",
    )
    margin: float = Field(
        0.25, ge=0, le=2, description="Context around an object in its window, as a share of its size."
    )
    same: float = Field(
        0.7, gt=0, le=1, description="IoU of two masks from which they are one object, if text found them."
    )
    bands: list[str] = Field(
        default_factory=list,
        description="Bands shown in place of the model's, by name, e.g. nir, red, green.",
    )
    volume: Volume = Field(default_factory=Volume, description="How slices of a volume become solids.")
    cache: Memory = Field(
        "20GiB", description="Most that embeddings take on disk; those not used for longest go first."
    )

    @property
    def asked(self) -> bool:
        """Whether anything is."""
        return bool(self.text or self.path or self.earlier or self.everything)

    @model_validator(mode="after")
    def _complete(self) -> PromptOptions:
        if self.labeller and not (self.everything and self.text):
            raise ValueError("`labeller` goes with `everything` and `text`")
        if self.text and not (self.grounder or self.labeller):
            raise ValueError(
                "`text` needs a `grounder`: a model card, e.g. configs/models/landcover-unet.yaml"
            )
        if self.grounder and self.labeller:
            raise ValueError("`grounder` and `labeller`: give one: who finds phrases, or who names masks")
        if self.grounder and not self.text:
            raise ValueError("`grounder` goes with `text`")
        for field in ("crs", "layer"):
            if getattr(self, field) and not self.path:
                raise ValueError(f"`{field}` goes with `path`")
        if (self.names or self.earlier_ids) and not self.earlier:
            raise ValueError("`names` and `earlier_ids` go with `earlier`")
        return self
