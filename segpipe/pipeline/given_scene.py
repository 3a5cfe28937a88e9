"""A scene whose labels are a file: they are measured as given, no model is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.config.card import Class
from segpipe.config.classes import load_classes
from segpipe.config.job import Identity, Job, Reference
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.alignment import same_grid
from segpipe.geometry.box import Box
from segpipe.pipeline.scene import MeasurableScene, open_scene
from segpipe.pipeline.scene_io import ScenePixels
from segpipe.sources import SceneRef
from segpipe.sources.identity import identified
from segpipe.sources.labels import LabelFile, find_reference, one_class
from segpipe.store.stage import stage_key

NO_LABEL = -1
"""What a reader of given labels answers where their file says nothing."""


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
    def inputs(self) -> list[Any]:
        return [self.pixels.identity, self.labels_identity]

    @property
    def labels_key(self) -> str:
        """Of the file, and of the scene, whose pixels the pictures and intensities are made of."""
        return stage_key("labels", {"file": self.labels_identity, "scene": self.pixels.identity})

    @contextmanager
    def open_labels(self, ids: bool = False) -> Iterator[Callable[[Box], np.ndarray]]:
        """The reader answers int64, `NO_LABEL` where the file has no data.

        Raises:
            SceneError: the file changed since it was planned; when read, a value is no whole number, or
                is negative.
        """
        objects = self.job.measure.objects and not ids
        with closing(LabelFile(self.labels)) as file:
            if identified(file.source.identity, self.job.identity) != self.labels_identity:
                raise SceneError(f"labels: {self.labels}: changed since it was planned; run the job again")

            def read(box: Box) -> np.ndarray:
                labels, valid = file.read(box)
                if labels.size and labels.min() < 0:
                    raise SceneError(f"{self.labels}: holds {labels.min()}; labels are 0 or more")
                labels = np.where(valid, labels, NO_LABEL)
                return one_class(labels) if objects else labels

            yield read


def prepare_labelled(job: Job, ref: SceneRef) -> LabelledScene:
    """Open a scene and its labels, and hold one against the other.

    Raises:
        SceneError: one of the two cannot be read, no file of labels fits the scene, or its grid is another.
        RequestError: `labels` or `classes` is wrong for every scene.
    """
    listed = load_classes(job.classes) if job.classes else ()
    with open_scene(job, ref) as source:
        labels = find_labels(job.labels, ref.name)
        with closing(LabelFile(labels)) as file:
            try:
                notes = same_grid(source.geometry, file.geometry)
            except SceneError as error:
                raise SceneError(f"labels {labels} lie on another grid than their scene: {error}") from error
            labels_identity = identified(file.source.identity, job.identity)
        return LabelledScene(
            ref=ref,
            job=job,
            pixels=ScenePixels.of(source, job.bands, how=job.identity),
            notes=(*source.notes, *(f"labels: {n}" for n in notes), f"labels measured as given: {labels}"),
            listed=listed,
            labels=labels,
            labels_identity=labels_identity,
        )


def labels_identity(uri: str, how: Identity) -> Any:
    """What tells that a file of labels changed."""
    with closing(LabelFile(uri)) as file:
        return identified(file.source.identity, how)


def find_labels(labels: str, scene_name: str) -> str:
    """The label map of a scene: as `segpipe.sources.labels.find_reference` finds a reference.

    Where a glob matches files in folders named for their scenes (``runs/*/*/scenes/*/labels.tif``),
    the folder decides.

    Raises:
        RequestError: the path does not exist, or a folder or glob holds no label file.
        SceneError: no file or several fit the scene; names the candidates.
    """
    if has_magic(labels) and "://" not in labels:
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
