"""A scene that has its label map: what measuring and export need to know of it, whoever drew the labels.

`MeasurableScene` is that; `LabelledScene` is one whose labels are a file that is measured as given.
`PredictedScene` is what the others share, whose labels a model makes: `segpipe.scene.Scene` and
`segpipe.prompts.scene.PromptScene`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.blocks import SceneBlocks
from segpipe.boxes import Box
from segpipe.classes import load_classes
from segpipe.config import Format, Job, Reference
from segpipe.errors import RequestError, SceneError
from segpipe.geometry import Geometry, VolumeGeometry
from segpipe.models.card import Card, Class
from segpipe.reference import IdRule, LabelFile, find_reference, one_class, same_grid
from segpipe.settings import Settings
from segpipe.sources import SceneRef, open_source
from segpipe.sources.base import Scaling, Source
from segpipe.store import Stage, stage_key

NO_LABEL = -1
"""What a reader of given labels answers where their file says nothing."""
NO_MODEL = Settings("cpu", "no model", "none", 1, 1, False)
"""Settings of a run without a model."""


@dataclass(frozen=True, kw_only=True)
class MeasurableScene(ABC):
    """A scene with a label map. Small, immutable, picklable; pixels never travel."""

    ref: SceneRef
    job: Job
    geometry: Geometry
    dtype: str
    """Of the stored pixels."""
    channels: tuple[int, ...]
    """The source's channels that are read, in this order."""
    bands: tuple[str, ...]
    """Names of those channels; empty where the file has none."""
    scaling: tuple[Scaling, ...]
    """One per channel."""
    identity: dict[str, Any]
    """Of the source."""
    notes: tuple[str, ...]

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

    @abstractmethod
    def check_labels(self) -> None:
        """Raises SceneError where what was read may not be the labels: asked after a read."""

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

    @property
    def prompted(self) -> bool:
        """Whether the objects were asked for (`segpipe.prompts.scene.PromptScene`)."""
        return False

    @property
    def uncertainty(self) -> tuple[str, ...]:
        """Channels of the uncertainty map; none where there is no such map."""
        return ()

    def open_uncertainty(self) -> Callable[[Box], np.ndarray] | None:
        """A reader of the map, (channel, …) uint16 in 1/65535; None where there is none."""
        return None

    def open_image(self) -> SceneBlocks:
        """A reader of the scene's own pixels, as stored: straight from the source."""
        return SceneBlocks(
            self.ref.uri, self.job.bands, self.channels, self.dtype, self.geometry, None, self.identity
        )


@dataclass(frozen=True, kw_only=True)
class PredictedScene(MeasurableScene):
    """A scene whose label map a model makes: classes, and ids where objects are found, in the store."""

    settings: Settings
    statistics: tuple[tuple[tuple[float, float], ...], ...]
    """Of the model's channels, for the steps of its card that need them; else empty."""
    labels: Stage
    """Where the finished label map is."""

    @property
    @abstractmethod
    def card(self) -> Card:
        """The model's card."""

    @property
    def labels_key(self) -> str:
        return self.labels.key

    @contextmanager
    def open_labels(self, ids: bool = False) -> Iterator[Callable[[Box], np.ndarray]]:
        """The finished label map in the store."""
        array = self.labels.array("instances" if ids else "labels")
        yield lambda box: np.asarray(array[box.slices])

    def check_labels(self) -> None:
        """Raises SceneError: a stage that was dropped meanwhile reads as nodata."""
        self.labels.check()

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


@dataclass(frozen=True, kw_only=True)
class LabelledScene(MeasurableScene):
    """A scene with a file of labels, which are measured as given."""

    listed: tuple[Class, ...]
    """Of the job's `classes`; empty: the values that are found."""
    labels: str
    """The file."""
    labels_identity: dict[str, Any]

    @property
    def classes(self) -> tuple[Class, ...]:
        return self.listed

    @property
    def nodata(self) -> int:
        return NO_LABEL

    @property
    def labels_key(self) -> str:
        """Of the file, and of the scene, whose pixels the pictures and intensities are made of."""
        return stage_key("labels", {"file": self.labels_identity, "scene": self.identity})

    @contextmanager
    def open_labels(self, ids: bool = False) -> Iterator[Callable[[Box], np.ndarray]]:
        """The reader answers int64, `NO_LABEL` where the file has no data.

        Raises:
            SceneError: the file changed since it was planned; when read, a value is no whole number, or
                is negative.
        """
        objects = self.job.measure.objects and not ids
        with _opened(self.labels) as file:
            if file.source.identity != self.labels_identity:
                raise SceneError(f"labels: {self.labels}: changed since it was planned; run the job again")

            def read(box: Box) -> np.ndarray:
                labels, valid = file.read(box)
                if labels.size and labels.min() < 0:
                    raise SceneError(f"{self.labels}: holds {labels.min()}; labels are 0 or more")
                labels = np.where(valid, labels, NO_LABEL)
                return one_class(labels) if objects else labels

            yield read

    def check_labels(self) -> None:
        """The file was held against the plan when it was opened."""


def open_scene(job: Job, ref: SceneRef) -> Source:
    """Open a scene's source, held against the files that the job wants beside it.

    Raises:
        SceneError: as `open_source`; or DICOM SEG is wanted and the series has not the UIDs for it.
        RequestError: as `open_source`.
    """
    source = open_source(ref.uri, band_names=job.bands)
    if Format.dicomseg in job.outputs.formats and isinstance(source.geometry, VolumeGeometry):
        # Imported here: pydicom loads its dictionaries, which rasters never need.
        from segpipe.sources.dicom import DicomSource
        from segpipe.sources.dicom_series import require_uids

        if isinstance(source, DicomSource):
            require_uids(source.uri, source.slices)
    return source


def prepare_labelled(job: Job, ref: SceneRef) -> LabelledScene:
    """Open a scene and its labels, and hold one against the other.

    Raises:
        SceneError: one of the two cannot be read, no file of labels fits the scene, or its grid is another.
        RequestError: `labels` or `classes` is wrong for every scene.
    """
    listed = load_classes(job.classes) if job.classes else ()
    with open_scene(job, ref) as source:
        labels = find_labels(job.labels, ref.name)
        with _opened(labels) as file:
            try:
                notes = same_grid(source.geometry, file.geometry)
            except SceneError as error:
                raise SceneError(f"labels {labels} lie on another grid than their scene: {error}") from error
            labels_identity = file.source.identity
        return LabelledScene(
            ref=ref,
            job=job,
            geometry=source.geometry,
            dtype=str(source.dtype),
            channels=tuple(range(source.count)),
            bands=source.bands,
            scaling=source.scaling,
            identity=source.identity,
            notes=(*source.notes, *(f"labels: {n}" for n in notes), f"labels measured as given: {labels}"),
            listed=listed,
            labels=labels,
            labels_identity=labels_identity,
        )


def labels_identity(uri: str) -> dict[str, Any]:
    """What tells that a file of labels changed."""
    with _opened(uri) as file:
        return file.source.identity


@contextmanager
def _opened(uri: str) -> Iterator[LabelFile]:
    file = LabelFile(uri)
    try:
        yield file
    finally:
        file.close()


def find_labels(labels: str, scene_name: str) -> str:
    """The label map of a scene: as `segpipe.reference.find_reference` finds a reference.

    Where a glob matches files in folders named for their scenes (``runs/*/*/scenes/*/labels.tif``),
    the folder decides.

    Raises:
        RequestError: the path does not exist, or a folder or glob holds no label file.
        SceneError: no file or several fit the scene; names the candidates.
    """
    if has_magic(labels):
        found = sorted(glob(labels, recursive=True))  # noqa: PTH207 (absolute patterns)
        inside = [f for f in found if Path(f).parent.name == scene_name]
        if len(inside) > 1:
            more = ", ".join(inside[:3])
            raise SceneError(f"scene {scene_name!r}: several label maps fit: {more}; narrow `labels`")
        if inside:
            return inside[0]
    try:
        return find_reference(Reference(path=labels), scene_name)
    except (RequestError, SceneError) as error:
        raise type(error)(_said_of_labels(str(error))) from error


def _said_of_labels(message: str) -> str:
    """A message about references in the words of the key that was given."""
    for theirs, ours in (
        ("reference.path: ", "labels: "),
        ("several references fit", "several label maps fit"),
        ("no reference fits", "no label map fits"),
        ("`reference.path`", "`labels`"),
    ):
        message = message.replace(theirs, ours, 1)
    return message
