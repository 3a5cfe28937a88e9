"""The job: one set of pydantic models that is the YAML, the ``--set`` keys, the UI's form and the schema.

Values such as ``auto``, ``512`` or ``whole`` are strings with a pattern, not unions: forms show
unions badly. An unknown key is a mistake; a mistake is reported with its path and what is valid.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, model_validator

from segpipe.config.loading import load
from segpipe.config.prompts import PromptOptions
from segpipe.config.types import (
    Address,
    AddressText,
    AutoNumber,
    AutoSize,
    Memory,
    Name,
    Several,
    Strict,
    Text,
    WindowSize,
    form,
)
from segpipe.errors import RequestError

SceneKind = Literal["given", "predicted", "prompted"]
"""What the labels of a scene come from: a file, a model, or prompts that a model answers."""


class Blend(str, Enum):
    """How overlapping windows become one answer."""

    trim = "trim"
    gaussian = "gaussian"


class StoreMode(str, Enum):
    """Where blocks are read from."""

    zarr = "zarr"
    direct = "direct"


class Precision(str, Enum):
    """Arithmetic of the forward pass. ``auto``: bf16 on CUDA, fp32 elsewhere."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class TTA(str, Enum):
    """Test-time augmentation: scores averaged over these views."""

    none = "none"
    flips = "flips"


class Runner(str, Enum):
    """Who runs the batches of blocks."""

    threads = "threads"
    dask = "dask"
    dask_cuda = "dask-cuda"
    kubernetes = "kubernetes"
    slurm = "slurm"


class Identity(str, Enum):
    """What tells that a file is another one."""

    sampled = "sampled"
    content = "content"


class Format(str, Enum):
    """Files for people; a format that does not suit a scene is skipped there."""

    cog = "cog"
    nifti = "nifti"
    ome_zarr = "ome-zarr"
    bids = "bids"
    dicomseg = "dicomseg"


class Keep(str, Enum):
    """Working arrays kept in the store after the run."""

    image = "image"
    labels = "labels"


class Tiling(Strict):
    """How a scene is cut. None of this changes the answer but `window`, `halo` and `blend`."""

    window: WindowSize = Field(
        "auto",
        description="What the model sees at once: auto (the card's), 512, 96x128x128, or whole.",
    )
    halo: AutoSize = Field(
        "auto",
        description="Margin of a window, computed and thrown away or blended: auto (the card's) or elements.",
    )
    block: AutoSize = Field(
        "auto", description="Unit of writing and of resuming: auto or elements of the native grid."
    )
    blend: Blend = Field(
        Blend.trim,
        description="trim: each pixel from one window. gaussian: weighted mean of all that cover it.",
    )
    memory: Memory = Field("4GiB", description="Upper bound for one worker's working set, e.g. 512MiB, 4GiB.")
    store: StoreMode = Field(
        StoreMode.zarr,
        description="zarr: ingest into the working store first; direct: read a local tiled source in place.",
    )


class Compute(Strict):
    """Where and how the model runs."""

    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:1.")
    precision: Precision = Field(Precision.auto, description="auto: bf16 on CUDA, fp32 on CPU.")
    batch: AutoNumber = Field("auto", description="Windows per forward pass; short batches are padded to it.")
    tta: TTA = Field(
        TTA.none,
        description="flips: mean over the mirror images along the card's mirror axes (of 2 or 3: 4 or 8).",
    )
    compile: bool = Field(
        False,
        description="Compile the network by torch.compile, which takes a minute; PyTorch models.",
    )
    runner: Runner = Field(
        Runner.threads,
        description="threads: this machine. dask: worker processes here, or the cluster at `address`. "
        "dask-cuda: one for each GPU here. kubernetes, slurm: a cluster for this run, by `cluster`.",
    )
    workers: int = Field(
        1, ge=1, le=1024, description="Batches of blocks in progress at once; one per device."
    )
    threads: AutoNumber = Field("auto", description="CPU threads per worker; auto: all cores.")
    least: int = Field(
        0,
        ge=0,
        le=1024,
        description="Above 0: the cluster grows and shrinks with the work, from this many workers to "
        "`workers`. 0: always `workers`.",
    )
    address: Text = Field(
        "", description="Of a Dask scheduler that runs already, e.g. tcp://host:8786; with runner dask."
    )
    cluster: Text = Field(
        "",
        description="YAML file of the cluster's own settings (image, queue, memory, …): keyword arguments of "
        "LocalCluster, LocalCUDACluster, KubeCluster or SLURMCluster.",
    )
    retries: int = Field(
        2,
        ge=0,
        le=10,
        description="Times a batch is tried again after a passing fault (storage, memory).",
    )
    batch_minutes: float = Field(
        2.0, gt=0, le=60, description="Work aimed at in one Prefect task, in minutes."
    )

    @model_validator(mode="after")
    def _what_goes_with_the_runner(self) -> Compute:
        if self.address and self.runner is not Runner.dask:
            raise ValueError("compute.address needs compute.runner: dask")
        if self.cluster and (self.address or not self.clustered):
            beside = "compute.address" if self.address else "compute.runner: threads"
            raise ValueError(f"compute.cluster is of no use with {beside}: no cluster is made")
        if self.least and not self.clustered:
            raise ValueError(f"compute.least: found {self.least} with runner: threads; valid: 0")
        if self.least > self.workers:
            raise ValueError(
                f"compute.least: found {self.least}; valid: up to compute.workers, {self.workers}"
            )
        return self

    @property
    def clustered(self) -> bool:
        """Whether tasks go to processes of a Dask cluster."""
        return self.runner is not Runner.threads


class Regions(Strict):
    """Where numbers are reported: a polygon layer or a label atlas."""

    path: Address = Field(
        description="Vector layer (GeoPackage, GeoJSON, Shapefile, GeoParquet, …), label atlas (NIfTI, "
        "GeoTIFF), or a grid: grid:1000 (squares of 1000 units of the scene's CRS), h3:7."
    )
    name: Text = Field(
        "",
        description="Attribute that names a polygon; for an atlas: a CSV with columns value,name.",
    )
    layer: Text = Field("", description="Layer of a file with several.")


class Reference(Strict):
    """The truth to compare with."""

    path: Address = Field(description="A label file, or a folder or glob matched to the scenes by name.")
    values: dict[int, int | None] = Field(
        default_factory=dict,
        description="Reference value to class value; null: ignored. Others stay as they are.",
    )
    divisor: int = Field(
        0,
        ge=0,
        description="Of a reference of objects whose values are class × divisor + number, e.g. 1000. "
        "0: plain classes, or ids with `measure.objects`.",
    )


class Measure(Strict):
    """What is measured beside areas and overlap."""

    objects: bool = Field(
        False,
        description="The reference (and `labels`, where these are given) holds ids of objects (0: none), "
        "which are matched: precision, recall, F1, AP, PQ.",
    )
    smallest: int = Field(1, ge=1, description="Elements of the smallest object that counts.")
    surface: bool = Field(
        False, description="Distances between surfaces, surface Dice, boundary IoU and F1, per class."
    )
    tolerance: float = Field(
        1.0, gt=0, description="Distance up to which a surface counts as met, in mm or m (px without a CRS)."
    )
    tolerances: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="The same for single classes, by name, over `tolerance`."
    )
    groups: Text = Field(
        "",
        description="CSV with columns scene,group (a patient, a site): intervals resample these, not scenes.",
    )
    width: float = Field(
        2.0, gt=0, description="Width of the band along the boundary for boundary IoU, in mm or m."
    )
    intensity: bool = Field(
        False, description="Statistics of the image per region, class and channel: mean, sd, percentiles."
    )


def _folder(value: object) -> object:
    """A folder with ``~`` written out."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("no folder is named (a bare ~ is YAML's null); valid: runs, '~/runs', . or a URL")
    if isinstance(value, str) and value.startswith("~"):
        try:
            return str(Path(value).expanduser())
        except RuntimeError as error:
            raise ValueError("there is no such user; valid: a folder or URL") from error
    return value


class Outputs(Strict):
    """What is written, and where."""

    dir: Annotated[Address, BeforeValidator(_folder)] = Field(
        "runs",
        description="Folder or URL (s3://…) for the store and for the runs, each in a folder of its own.",
    )
    formats: list[Format] = Field(
        [Format.cog, Format.nifti],  # no factory: the form shows what it is told
        description="cog for rasters, nifti for volumes, ome-zarr for both; bids: derivatives of volumes "
        "whose files bear BIDS names (sub-01_T1w.nii.gz); dicomseg: DICOM SEG beside a DICOM series, "
        "which bears the patient's tags as the series does.",
    )
    scores: bool = Field(False, description="Also write the probability of each class.")
    uncertainty: bool = Field(
        False,
        description="Also map and report how sure the model is: entropy, margin, confidence and, with "
        "blending or test-time augmentation, disagreement.",
    )
    hide_paths: bool = Field(
        False, description="Tell file names instead of absolute paths of this machine in the run's folder."
    )
    keep: list[Keep] = Field(
        [Keep.labels],
        description="Working arrays that stay in the store; scores stay with the labels.",
    )


class Request(Strict):
    """What every request says; `Job`, `PromptJob` and `Scan` are views of it, with forms of their own."""

    name: Name = Field("segment", description="Names the folder of the results.")
    model: Text = Field("", description="Model card: path of its YAML file, or its name.")
    bands: list[str] = Field(
        default_factory=list,
        description="Names of the scene's bands in file order, where the file has none.",
    )
    regions: Regions | None = Field(None, description="Where numbers are reported; empty: the whole scene.")
    reference: Reference | None = Field(None, description="The truth to compare with.")
    outputs: Outputs = Field(default_factory=Outputs, description="What is written, and where.")
    description: str = Field("", description="What the reader of the report should know.")
    tiling: Tiling = Field(default_factory=Tiling, description="How a scene is cut.")
    compute: Compute = Field(default_factory=Compute, description="Where and how the model runs.")
    measure: Measure = Field(default_factory=Measure, description="Further measurements.")
    identity: Identity = Field(
        Identity.sampled,
        description="What tells that a file changed. sampled: ETag or version; of local files size, time and "
        "the hash of sixteen ranges. content: the hash of all bytes, so that a copy or a touch is no change.",
    )
    prompts: PromptOptions = Field(
        default_factory=PromptOptions, description="What a promptable model is asked."
    )


class Job(Request):
    """A segmentation job: which scenes, which model, what to report.

    Required: `scenes`, and one of `model` or `labels`.
    """

    model_config = ConfigDict(
        json_schema_extra=form(
            "name", "scenes", "model", "labels", "classes", "bands", "regions", "reference", "outputs",
            "description", "tiling", "compute", "measure", "prompts", "identity",
        )
    )  # fmt: skip

    scenes: Annotated[list[Address], Several] = Field(
        min_length=1, description="Files, globs, folders or URLs."
    )
    labels: AddressText = Field(
        "",
        description="Instead of a model: existing label maps, a file, folder or glob matched by name.",
    )
    classes: Text = Field(
        "",
        description="Classes of `labels`: a CSV or YAML file with value, name (, color, background); "
        "empty: the values that are found, there or in the reference.",
    )

    @property
    def kind(self) -> SceneKind:
        """What the labels of its scenes come from."""
        return "given" if self.labels else "prompted" if self.prompts.asked else "predicted"

    @model_validator(mode="after")
    def _one_of_model_or_labels(self) -> Job:
        if bool(self.model) == bool(self.labels):
            found = "both" if self.model else "neither"
            raise ValueError(f"give one of `model` or `labels`; found {found}")
        if self.model and self.classes:
            raise ValueError("`classes` goes with `labels`; a model's card has its own")
        for field in ("scores", "uncertainty"):
            if self.labels and getattr(self.outputs, field):
                raise ValueError(f"`outputs.{field}` needs a model; labels that are given have no scores")
        return self

    @model_validator(mode="after")
    def _nothing_asked_for_in_vain(self) -> Job:
        """A key that would be ignored is refused."""
        if self.measure.objects and not self.reference:
            raise ValueError("`measure.objects` needs a `reference` of object ids")
        if self.labels and self.reference and self.reference.divisor:
            raise ValueError("`reference.divisor` needs a model that finds objects of several classes")
        if self.labels and self.prompts.asked:
            raise ValueError("`prompts` need a promptable model; labels that are given answer none")
        return self


class PromptJob(Job):
    """Which scenes, which promptable model, and what it is asked.

    Required: `scenes`, `model`, and under `prompts` any of `text`, `path`, `earlier` and `everything`.
    """

    model_config = ConfigDict(
        json_schema_extra=form(
            "scenes", "model", "prompts", "name", "bands", "regions", "reference", "outputs", "description",
            "measure", "compute", "tiling", "identity",
        )
    )  # fmt: skip

    name: Name = Field("prompt", description="Names the folder of the results.")
    model: str = Field(
        min_length=1, description="Card of a promptable model, e.g. configs/models/starter-sam.yaml."
    )
    prompts: PromptOptions = Field(description="What is asked.")
    tiling: Tiling = Field(
        default_factory=Tiling, description="How a scene is cut; here only `block` and `memory`."
    )


def load_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """Read and validate a job file: see `segpipe.config.loading.load`."""
    return load(Job, path, overrides)


def parse_memory(text: Memory) -> int:
    """Bytes of ``512MiB``, ``4GiB`` or ``1.5TiB``."""
    number, unit = text[:-3], text[-3:]
    return int(float(number) * 1024 ** {"MiB": 2, "GiB": 3, "TiB": 4}[unit])


def parse_size(text: str, ndim: int, field: str) -> tuple[int, ...]:
    """``512`` or ``96x128x128`` as one number per axis.

    Raises:
        RequestError: another number of axes than the scene has, or a zero where that is no size.
    """
    parts = tuple(int(part) for part in text.split("x"))
    sizes = parts * ndim if len(parts) == 1 else parts
    if len(sizes) != ndim:
        raise RequestError(
            f"{field}: found {text!r} with {len(sizes)} axes; the scene has {ndim}: give one number or {ndim}"
        )
    if 0 in sizes and field != "tiling.halo":
        raise RequestError(f"{field}: found {text!r}; valid: numbers above 0")
    return sizes
