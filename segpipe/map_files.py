"""Maps of a scene as files on its own grid: labels, ids of objects, scores, uncertainty."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from segpipe import __version__
from segpipe.boxes import Box
from segpipe.config import Format
from segpipe.export.cog import write_cog, write_cog_ids, write_cog_scores
from segpipe.export.common import LabelReader, ScoreReader
from segpipe.export.nifti import write_nifti, write_nifti_ids, write_nifti_scores
from segpipe.export.objects import coco_facts, write_coco, write_object_polygons
from segpipe.geometry import RasterGeometry, VolumeGeometry
from segpipe.inference.uncertainty import LEVELS
from segpipe.labelled import MeasurableScene, PredictedScene
from segpipe.measure import Measured, shown_classes
from segpipe.models.card import Class
from segpipe.report.found import SceneFound, found_table
from segpipe.scene import Scene
from segpipe.sources import package_file
from segpipe.store import Stage

LARGEST_EXPORTED = 65534
"""Greatest label that the files of people's tools are written with."""


def write_maps(scene: MeasurableScene, measured: Measured, target: Path) -> dict[str, Path]:
    """The label map, what a model found, and the scores that the job wants: COG, or NIfTI for volumes.

    Files that are there already stay. Returns what each is (`labels`, `instances`, `scores`, …), to its path.
    """
    geometry, formats = scene.geometry, scene.job.outputs.formats
    classes = shown_classes(scene, measured.values)
    if isinstance(geometry, RasterGeometry) and Format.cog in formats:
        suffix = ".tif"
    elif isinstance(geometry, VolumeGeometry) and Format.nifti in formats:
        suffix = ".nii.gz"
    else:
        return {}
    written: dict[str, Path] = {}
    if not why_no_file(classes):
        written["labels"] = target / f"labels{suffix}"
        if not written["labels"].exists():
            _write_labels(scene, measured, classes, written["labels"])
    if scene.objects_stage is not None:
        written |= _write_objects(scene, scene.objects_stage, measured, target, suffix)
    for name, shares in _shares(scene).items():
        written[name] = target / f"{name}{suffix}"
        if not written[name].exists():
            _write_shares(scene, shares, written[name])
    return written


def _write_objects(
    scene: MeasurableScene, stage: Stage, measured: Measured, target: Path, suffix: str
) -> dict[str, Path]:
    """Ids of objects on the scene's grid; of rasters the objects as polygons and as COCO's JSON too."""
    assert measured.found is not None
    geometry, found, dtype = scene.geometry, measured.found.objects, stage.array("instances").dtype
    written = {"instances": target / f"instances{suffix}"}
    with scene.open_labels(ids=True) as ids:
        if isinstance(geometry, VolumeGeometry):
            if not written["instances"].exists():
                header = _nifti_header(scene.ref.uri)
                write_nifti_ids(ids, geometry, header, dtype, written["instances"])
            return written
        assert isinstance(geometry, RasterGeometry)
        polygons = {"objects": target / "instances.gpkg", "geoparquet": target / "instances.parquet"}
        written |= {**polygons, "coco": target / "instances.json"}
        if not written["instances"].exists():
            write_cog_ids(ids, geometry, dtype, written["instances"], _tags(scene))
        table = _object_table(scene, measured)
        if not all(path.exists() for path in polygons.values()):
            write_object_polygons(ids, geometry, table, *polygons.values())
        if not written["coco"].exists():
            name = scene.ref.uri.rsplit("/", 1)[-1]
            shape = (geometry.shape[0], geometry.shape[1])
            facts = None if measured.facts is None else coco_facts(table, _points(measured.facts))
            write_coco(ids, shape, found, scene.classes, name, written["coco"], facts)
    return written


def _object_table(scene: MeasurableScene, measured: Measured) -> pd.DataFrame:
    """A row an object, as in ``instances.csv``."""
    reference = scene.job.reference
    one = SceneFound.of(scene.ref.name, measured, reference.values if reference else {})
    stuff = [c.value for c in scene.classes if not (c.thing or c.background)]
    return found_table([one], scene.classes, scene.job.measure.smallest, stuff)


def _points(facts: pd.DataFrame) -> dict[int, np.ndarray]:
    """The points that objects were asked with, by id: (p, 2) positions."""
    pairs = zip(facts["id"].tolist(), facts["points"].tolist(), strict=True)
    return {number: np.array(json.loads(text)).reshape(-1, 2) for number, text in pairs}


def why_no_file(classes: Sequence[Class]) -> str:
    """Why no file can hold a label map of these classes; empty: one can."""
    if not classes:
        return "the label map has no valid element"
    largest = max(c.value for c in classes)
    return f"its values go up to {largest}, over {LARGEST_EXPORTED}" if largest > LARGEST_EXPORTED else ""


def _write_labels(scene: MeasurableScene, measured: Measured, classes: Sequence[Class], path: Path) -> None:
    geometry = scene.geometry
    predicted_raster = isinstance(scene, PredictedScene) and isinstance(geometry, RasterGeometry)
    nodata = None
    if predicted_raster or _has_nodata(measured):
        nodata = 255 if max(c.value for c in classes) < 255 else 65535
    with scene.open_labels() as read:
        labels = read if nodata is None else _with_nodata(read, scene.nodata, nodata)
        if isinstance(geometry, RasterGeometry):
            write_cog(labels, geometry, classes, nodata, path, _tags(scene))
        else:
            assert isinstance(geometry, VolumeGeometry)
            write_nifti(labels, geometry, _nifti_header(scene.ref.uri), classes, nodata, path)


def _with_nodata(read: LabelReader, before: int, after: int) -> LabelReader:
    """The reader with another number for no data."""
    if before == after:
        return read

    def renamed(box: Box, /) -> np.ndarray:
        labels = read(box)
        return np.where(labels == before, after, labels)

    return renamed


@dataclass(frozen=True)
class _Shares:
    """A map of several channels, each a share of 1."""

    read: ScoreReader
    channels: tuple[Class, ...]
    """Only their names count."""


def _shares(scene: MeasurableScene) -> dict[str, _Shares]:
    """The maps beside the labels that the job wants, by their file's name."""
    found: dict[str, _Shares] = {}
    if not isinstance(scene, Scene):
        return found
    if scene.job.outputs.scores:
        array = scene.predict.array("scores")
        found["scores"] = _Shares(lambda box: np.asarray(array[(slice(None), *box.slices)]), scene.classes)
    doubt = scene.open_uncertainty()
    if doubt is not None:
        labels = scene.labels.array("labels")

        def read(box: Box, /) -> np.ndarray:
            shares = doubt(box).astype(np.float32) / np.float32(LEVELS)
            return np.where(np.asarray(labels[box.slices]) == scene.nodata, np.float32(np.nan), shares)

        names = enumerate(scene.uncertainty)
        found["uncertainty"] = _Shares(read, tuple(Class(value=i, name=n, color="#000000") for i, n in names))
    return found


def _write_shares(scene: MeasurableScene, shares: _Shares, path: Path) -> None:
    geometry = scene.geometry
    if isinstance(geometry, RasterGeometry):
        write_cog_scores(shares.read, geometry, shares.channels, path, _tags(scene))
    else:
        assert isinstance(geometry, VolumeGeometry)
        write_nifti_scores(shares.read, geometry, _nifti_header(scene.ref.uri), shares.channels, path)


def _tags(scene: MeasurableScene) -> dict[str, str]:
    model = {"MODEL": scene.card.name} if isinstance(scene, PredictedScene) else {}
    return {"SEGPIPE_VERSION": __version__, "SEGPIPE_LABELS": scene.labels_key, **model}


def _has_nodata(measured: Measured) -> bool:
    return bool((measured.tally.label < 0).any())


def _nifti_header(uri: str) -> str | None:
    """The scene's own NIfTI file, whose transforms the labels repeat; None for other formats."""
    location = uri.split("#")[0]
    if not location.endswith((".nii", ".nii.gz")):
        return None
    return str(package_file(location)) if location.startswith("pkg://") else location
