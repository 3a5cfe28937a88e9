"""A scene that has its label map: what measuring and export need to know of it, whoever drew the labels.

`MeasurableScene` is that; `LabelledScene` is one whose labels are a file that is measured as given.
`PredictedScene` is what the others share, whose labels a model makes: `model_scene.Scene` and
`segpipe.prompts.prompt_scene.PromptScene`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from segpipe.config.card import Card, Class
from segpipe.config.job import Format, Job
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry
from segpipe.inference.settings import Settings
from segpipe.pipeline.scene_io import SceneBlocks, ScenePixels
from segpipe.regions import measured_regions
from segpipe.sources import SceneRef, open_source
from segpipe.sources.base import Source
from segpipe.sources.labels import IdRule, find_reference, open_reference
from segpipe.store.stage import Stage


@dataclass(frozen=True, kw_only=True)
class SceneAccount:
    """What the record of a scene says of the way to its labels."""

    keys: Mapping[str, str] = field(default_factory=dict)
    """Of the stages before the labels."""
    plan: Mapping[str, Any] = field(default_factory=dict)
    """Windows, blocks and passes."""
    notes: tuple[str, ...] = ()
    asked: tuple[Mapping[str, Any], ...] = ()
    """What became of each phrase: a row of `AskedPhrase` each."""
    prompts: tuple[str, ...] = ()
    """What became of the prompts, in words."""


def hardest(stage: Stage) -> int:
    """The greatest number of attempts in a stage's receipts; 1 where there is none."""
    return max((int(r.get("attempts", 1)) for r in stage.receipts().values()), default=1)


@dataclass(frozen=True, kw_only=True)
class MeasurableScene(ABC):
    """A scene with a label map. Small, immutable, picklable; pixels never travel."""

    ref: SceneRef
    job: Job
    pixels: ScenePixels
    notes: tuple[str, ...]

    @property
    def geometry(self) -> Geometry:
        """The native grid."""
        return self.pixels.geometry

    @property
    def inputs(self) -> list[Any]:
        """Identities of the files that the labels are made of, from before they were read."""
        return [self.pixels.identity]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What was made of these files."""
        return ()

    @property
    @abstractmethod
    def classes(self) -> tuple[Class, ...]:
        """The classes listed; the label map may hold others."""

    @property
    @abstractmethod
    def nodata(self) -> int:
        """The label of elements without one."""

    @property
    @abstractmethod
    def labels_key(self) -> str:
        """Changes when the label map does: a part of the measure key."""

    @abstractmethod
    def open_labels(self, ids: bool = False) -> AbstractContextManager[Callable[[Box], np.ndarray]]:
        """A windowed reader of the label map: integers of the box's shape.

        Args:
            ids: where the labels are ids of objects, answer these and not `OBJECT`.
        """

    @property
    def id_rule(self) -> IdRule | None:
        """What the reference's values say of objects; None: they are plain classes."""
        return IdRule() if self.job.measure.objects else None

    @property
    def objects_stage(self) -> Stage | None:
        """Where the found objects' ids (`instances`) and table are; None: no model found any."""
        return None

    @property
    def finds_objects(self) -> bool:
        """Whether a model found objects, which have ids beside their classes."""
        return self.objects_stage is not None

    def account(self) -> SceneAccount:
        """The way to the labels, for the scene's record; empty where they are given."""
        return SceneAccount()

    def attempts(self) -> int:
        """How often the scene's hardest block was tried; 1 where none was predicted."""
        return 1

    @property
    def prompted(self) -> bool:
        """Whether the objects were asked for (`segpipe.prompts.prompt_scene.PromptScene`)."""
        return self.job.kind == "prompted"

    @property
    def uncertainty(self) -> tuple[str, ...]:
        """Channels of the uncertainty map; none where there is no such map."""
        return ()

    def open_uncertainty(self) -> Callable[[Box], np.ndarray] | None:
        """A reader of the map, (channel, …) uint16 in 1/65535; None where there is none."""
        return None

    def open_image(self) -> SceneBlocks:
        """A reader of the scene's own pixels, as stored: straight from the source."""
        return SceneBlocks(self.pixels)


@dataclass(frozen=True, kw_only=True)
class PredictedScene(MeasurableScene):
    """A scene whose label map a model makes: classes, and ids where objects are found, in the store."""

    card: Card
    """The model's card, as it was planned with."""
    settings: Settings
    statistics: tuple[tuple[tuple[float, float], ...], ...]
    """Of the model's channels, for the steps of its card that need them; else empty."""
    labels: Stage
    """Where the finished label map is."""

    @property
    def labels_key(self) -> str:
        return self.labels.key

    @contextmanager
    def open_labels(self, ids: bool = False) -> Iterator[Callable[[Box], np.ndarray]]:
        """The finished label map in the store."""
        name = "instances" if ids else "labels"
        yield lambda box: self.labels.read(name, box.slices)

    @property
    def id_rule(self) -> IdRule | None:
        if not self.finds_objects:
            return None
        ground = next(c.value for c in self.classes if c.background)
        reference = self.job.reference
        if reference is not None and reference.divisor:
            return IdRule(reference.divisor, ground=ground)
        if not self.job.measure.objects:
            return None
        return IdRule(value=next(c.value for c in self.classes if not c.background), ground=ground)


def open_scene(job: Job, ref: SceneRef) -> Source:
    """Open a scene's source, held against the files that the job wants beside it.

    Raises:
        SceneError: as `open_source`; or DICOM SEG is wanted and the series has not the UIDs for it.
        RequestError: as `open_source`.
    """
    source = open_source(ref.uri, band_names=job.bands)
    if Format.dicomseg in job.outputs.formats and source.slices:
        from segpipe.sources.dicom.series import require_uids  # loads pydicom's dictionaries

        require_uids(source.uri, source.slices)
    return source


def check_others(job: Job, ref: SceneRef, geometry: Geometry) -> None:
    """Open the regions and the reference of a scene, and hold them against its grid.

    Raises:
        SceneError, RequestError: they do not fit the scene.
    """
    measured_regions(job.regions, geometry).close()
    if job.reference is not None:
        open_reference(job.reference, find_reference(job.reference, ref.name), geometry).close()
