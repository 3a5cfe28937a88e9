"""A scan: which lake, what is done with each new scene, how much at once."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from pathlib import Path

from pydantic import ConfigDict, Field, field_validator, model_validator

from segpipe.config.job import Identity, Job, Request
from segpipe.config.loading import load
from segpipe.config.types import Address, Memory, Name, Strict, Text, form


class LakeKind(str, Enum):
    """How scenes are found in a lake."""

    files = "files"
    stac = "stac"
    bids = "bids"
    dicom = "dicom"


class LakeIdentity(str, Enum):
    """What tells that a file of a lake is another one."""

    stat = "stat"
    content = "content"


class StacFilter(Strict):
    """Which items of a STAC catalogue or API are scenes, and which of their assets."""

    assets: list[str] = Field(
        default_factory=list,
        description="Keys of the assets that are the scene; several are stacked as bands in this order. "
        "Empty: the one asset of the item that is a GeoTIFF with the role data.",
    )
    collections: list[str] = Field(default_factory=list, description="Ids of collections; empty: all.")
    bbox: list[float] = Field(
        default_factory=list,
        max_length=4,
        description="West, south, east, north in degrees; empty: anywhere.",
    )
    begin: datetime | None = Field(None, description="Not before this time.")
    end: datetime | None = Field(None, description="Not after this time.")
    cloud_cover: float = Field(
        100.0,
        ge=0,
        le=100,
        description="Most clouds in per cent (eo:cloud_cover); items that don't say pass.",
    )

    @field_validator("bbox")
    @classmethod
    def _four_numbers(cls, bbox: list[float]) -> list[float]:
        if len(bbox) not in (0, 4):
            raise ValueError(f"found {len(bbox)} numbers; valid: west, south, east, north")
        return bbox


class BidsFilter(Strict):
    """Which files of a BIDS tree are scenes."""

    suffix: str = Field(
        "T1w", pattern=r"^[A-Za-z0-9]+$", description="Of the file's name: T1w, FLAIR, bold …"
    )
    datatype: Text = Field("", description="Folder such as anat; empty: any.")
    subjects: list[str] = Field(default_factory=list, description="Labels without sub-; empty: all.")
    sessions: list[str] = Field(default_factory=list, description="Labels without ses-; empty: all.")


class Lake(Strict):
    """Where scenes arrive."""

    location: Address = Field(
        min_length=1,
        description="Folder, glob or object store prefix (s3://, gs://, az://); a STAC catalogue's or API's "
        "URL or file; a BIDS or DICOM folder.",
    )
    kind: LakeKind = Field(
        LakeKind.files,
        description="files: rasters and NIfTI. stac: items. bids: by suffix. dicom: series, grouped by UID.",
    )
    pattern: Text = Field(
        "", description="Of files: a glob below the location, e.g. 2026/**/*_B4.tif; empty: known suffixes."
    )
    settle_seconds: float = Field(
        60.0,
        ge=0,
        description="A scene written more recently may be half uploaded and waits for the next scan.",
    )
    identity: LakeIdentity = Field(
        LakeIdentity.stat,
        description="stat: as the scan's identity says. content: the same as identity: content, so that a "
        "file that was only touched, or uploaded again, is not done again.",
    )
    stac: StacFilter = Field(default_factory=StacFilter, description="For kind stac.")
    bids: BidsFilter = Field(default_factory=BidsFilter, description="For kind bids.")


class ScanLimits(Strict):
    """How much one scan does; what is over waits for the next."""

    scenes: int = Field(10_000, ge=1, description="Most scenes.")
    size: Memory = Field(
        "100TiB", description="Most data, by the sizes listed; a scene that is larger alone is passed over."
    )
    device_minutes: float = Field(
        0.0, ge=0, description="No scene is begun after so much work of devices, in minutes; 0: no limit."
    )


class Scan(Request):
    """A scan of a lake: every new scene is done once.

    Required: `lake`, and a `model`.
    """

    model_config = ConfigDict(
        json_schema_extra=form(
            "name", "lake", "model", "dry_run", "limits", "regions", "outputs", "description", "attempts",
            "lease_seconds", "bands", "reference", "prompts", "measure", "tiling", "compute",
            "identity",
        )
    )  # fmt: skip

    name: Name = Field("scan", description="Names the folder of the results.")
    lake: Lake = Field(description="Where scenes arrive.")
    dry_run: bool = Field(False, description="Only say what would be done.")
    limits: ScanLimits = Field(default_factory=ScanLimits, description="How much one scan does.")
    attempts: int = Field(
        3,
        ge=1,
        le=10,
        description="Scans that try a scene which fails by a passing fault, each with the job's retries, or "
        "at which the process dies, before it is put in quarantine; one that cannot be done at all goes "
        "there at once.",
    )
    lease_seconds: float = Field(
        120.0,
        ge=1,
        description="A scene whose worker gave no sign for so long may be taken over by another scan.",
    )

    @model_validator(mode="after")
    def _is_a_job(self) -> Scan:
        if not self.model:
            raise ValueError("`model` is missing: give a model card, e.g. configs/models/landcover-unet.yaml")
        self.job(["any"])
        return self

    def job(self, scenes: Sequence[str]) -> Job:
        """The job of some scenes of the lake."""
        fields = self.model_dump(include=set(Job.model_fields))
        if self.lake.identity is LakeIdentity.content:
            fields["identity"] = Identity.content
        if self.lake.kind is LakeKind.stac and len(self.lake.stac.assets) > 1 and not self.bands:
            fields["bands"] = list(self.lake.stac.assets)
        return Job.model_validate({**fields, "scenes": list(scenes)})


def load_scan(path: str | Path, overrides: Sequence[str] = ()) -> Scan:
    """Read and validate a scan file: see `segpipe.config.loading.load`."""
    return load(Scan, path, overrides)
