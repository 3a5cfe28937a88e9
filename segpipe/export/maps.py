"""Maps of a scene as files on its own grid: labels, ids of objects, scores, uncertainty."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from segpipe import __version__
from segpipe.config.card import Class, nodata_of
from segpipe.config.job import Format
from segpipe.errors import SceneError
from segpipe.export.bids import NAMED, parse_bids
from segpipe.export.cog import write_cog, write_cog_ids, write_cog_scores
from segpipe.export.footprint import why_no_place
from segpipe.export.hide_paths import hide_paths
from segpipe.export.nifti import write_nifti, write_nifti_ids, write_nifti_scores
from segpipe.export.objects import coco_facts, write_coco, write_object_polygons
from segpipe.export.ome_zarr import write_ome_zarr
from segpipe.export.run_folder import ITEM, MANIFEST, Seal, hash_files, own_files, write_seal
from segpipe.export.staging import json_text
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry, VolumeGeometry
from segpipe.metrics.tally import LEVELS
from segpipe.models.plugins import provider_spec
from segpipe.models.weights import weights_fingerprint
from segpipe.pipeline.measure import Measured, shown_classes
from segpipe.pipeline.model_scene import Scene
from segpipe.pipeline.scene import MeasurableScene, PredictedScene
from segpipe.sources import open_source, package_file
from segpipe.sources.base import LabelReader, ScoreReader
from segpipe.sources.identity import identified
from segpipe.sources.remote import fetch, is_remote
from segpipe.sources.uri import parse_frame
from segpipe.store.location import write_atomic
from segpipe.store.stage import Stage
from segpipe.tables.object_tables import SceneDetections, detections_table

if TYPE_CHECKING:
    from segpipe.export.dicom_seg import Algorithm
    from segpipe.export.run_folder import RunFolder

LARGEST_EXPORTED = 65534
"""Greatest label that the files of people's tools are written with."""


def write_maps(scene: MeasurableScene, measured: Measured, target: Path) -> dict[str, Path]:
    """The label map, what a model found, and the scores that the job wants: COG, or NIfTI for volumes.

    The label map as OME-Zarr too, and of a DICOM series as DICOM SEG, where the job wants that.

    Returns what each is (`labels`, `instances`, `scores`, …), to its path.
    """
    geometry, formats = scene.geometry, scene.job.outputs.formats
    classes = shown_classes(scene, measured.values)
    if isinstance(geometry, RasterGeometry) and Format.cog in formats:
        suffix = ".tif"
    elif isinstance(geometry, VolumeGeometry) and {Format.nifti, Format.bids} & set(formats):
        suffix = ".nii.gz"
    else:
        suffix = ""
    written = _write_segments(scene, classes, target) | _write_levels(scene, measured, classes, target)
    if not suffix:
        return written
    if not why_no_file(classes):
        written["labels"] = target / f"labels{suffix}"
        _write_labels(scene, measured, classes, written["labels"])
    if scene.objects_stage is not None:
        written |= _write_objects(scene, scene.objects_stage, measured, target, suffix)
    for name, shares in _shares(scene).items():
        written[name] = target / f"{name}{suffix}"
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
            with _nifti_header(scene.ref.uri) as header:
                write_nifti_ids(ids, geometry, header, dtype, written["instances"])
            return written
        assert isinstance(geometry, RasterGeometry)
        polygons = {"objects": target / "instances.gpkg", "geoparquet": target / "instances.parquet"}
        written |= {**polygons, "coco": target / "instances.json"}
        write_cog_ids(ids, geometry, dtype, written["instances"], _tags(scene))
        table = _object_table(scene, measured)
        write_object_polygons(ids, geometry, table, *polygons.values())
        name = scene.ref.uri.rsplit("/", 1)[-1]
        shape = (geometry.shape[0], geometry.shape[1])
        facts = None if measured.facts is None else coco_facts(table, _points(measured.facts))
        write_coco(ids, shape, found, scene.classes, name, written["coco"], facts)
    return written


def _object_table(scene: MeasurableScene, measured: Measured) -> pd.DataFrame:
    """A row an object, as in ``instances.csv``."""
    reference = scene.job.reference
    one = SceneDetections.of(scene.ref.name, measured, reference.values if reference else {})
    stuff = [c.value for c in scene.classes if not (c.thing or c.background)]
    return detections_table([one], scene.classes, scene.job.measure.smallest, stuff)


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
    geometry, nodata = scene.geometry, _nodata(scene, measured, classes)
    with scene.open_labels() as read:
        labels = _with_nodata(read, scene.nodata, nodata)
        if isinstance(geometry, RasterGeometry):
            write_cog(labels, geometry, classes, nodata, path, _tags(scene))
        else:
            assert isinstance(geometry, VolumeGeometry)
            with _nifti_header(scene.ref.uri) as header:
                write_nifti(labels, geometry, header, classes, nodata, path)


def _nodata(scene: MeasurableScene, measured: Measured, classes: Sequence[Class]) -> int | None:
    """The value of elements without data in the files of labels; None: there are none."""
    predicted_raster = isinstance(scene, PredictedScene) and isinstance(scene.geometry, RasterGeometry)
    return nodata_of(c.value for c in classes) if predicted_raster or has_nodata(measured) else None


def _write_levels(
    scene: MeasurableScene, measured: Measured, classes: Sequence[Class], target: Path
) -> dict[str, Path]:
    """The label map as OME-Zarr, where the job wants it."""
    if Format.ome_zarr not in scene.job.outputs.formats or why_no_file(classes):
        return {}
    folder, nodata = target / "labels.ome.zarr", _nodata(scene, measured, classes)
    with scene.open_labels() as read:
        labels = _with_nodata(read, scene.nodata, nodata)
        write_ome_zarr(labels, scene.geometry, classes, nodata, folder)
    return {"ome-zarr": folder / "zarr.json"}


def _write_segments(scene: MeasurableScene, classes: Sequence[Class], target: Path) -> dict[str, Path]:
    """DICOM SEG, where the job wants it, the source is a DICOM series and a class is no background.

    Raises:
        SceneError: the series changed since it was planned, or cannot be read.
    """
    wanted = Format.dicomseg in scene.job.outputs.formats and isinstance(scene.geometry, VolumeGeometry)
    if not wanted or why_no_file(classes) or all(c.background for c in classes):
        return {}
    # Imported here: they load pydicom's dictionaries and highdicom, which few runs need.
    from segpipe.export.dicom_seg import write_dicom_seg

    path = target / "labels.dcm"
    with open_source(scene.ref.uri) as source, scene.open_labels() as read:
        if not source.slices:
            return {}
        if identified(source.identity, scene.job.identity) != scene.pixels.identity:
            raise SceneError(f"{scene.ref.uri}: changed since it was planned; run the job again")
        write_dicom_seg(read, source, classes, scene.nodata, _drawn_by(scene), path)
    return {"dicomseg": path}


def _drawn_by(scene: MeasurableScene) -> Algorithm:
    """What DICOM SEG says of the labels' origin."""
    from segpipe.export.dicom_seg import Algorithm

    if not isinstance(scene, PredictedScene):
        return Algorithm("labels as given", scene.labels_key, automatic=False, learned=False)
    card = scene.card
    version = f"card {card.prediction_fingerprint()[:12]}, weights {weights_fingerprint(card)[:12] or 'none'}"
    return Algorithm(card.name, version, not scene.prompted, provider_spec(card).learned)


def _with_nodata(read: LabelReader, before: int, after: int | None) -> LabelReader:
    """The reader with another number for no data; None: as it is."""
    if after is None or before == after:
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

        def scores(box: Box, /) -> np.ndarray:
            return scene.predict.read("scores", (slice(None), *box.slices))

        found["scores"] = _Shares(scores, scene.classes)
    doubt = scene.open_uncertainty()
    if doubt is not None:

        def read(box: Box, /) -> np.ndarray:
            shares = doubt(box).astype(np.float32) / np.float32(LEVELS)
            labels = scene.labels.read("labels", box.slices)
            return np.where(labels == scene.nodata, np.float32(np.nan), shares)

        names = enumerate(scene.uncertainty)
        found["uncertainty"] = _Shares(read, tuple(Class(value=i, name=n, color="#000000") for i, n in names))
    return found


def _write_shares(scene: MeasurableScene, shares: _Shares, path: Path) -> None:
    geometry = scene.geometry
    if isinstance(geometry, RasterGeometry):
        write_cog_scores(shares.read, geometry, shares.channels, path, _tags(scene))
    else:
        assert isinstance(geometry, VolumeGeometry)
        with _nifti_header(scene.ref.uri) as header:
            write_nifti_scores(shares.read, geometry, header, shares.channels, path)


def _tags(scene: MeasurableScene) -> dict[str, str]:
    model = {"MODEL": scene.card.name} if isinstance(scene, PredictedScene) else {}
    return {"SEGPIPE_VERSION": __version__, "SEGPIPE_LABELS": scene.labels_key, **model}


def has_nodata(measured: Measured) -> bool:
    """Whether some element has no label."""
    return bool((measured.tally.label < 0).any())


@contextmanager
def _nifti_header(uri: str) -> Iterator[str | None]:
    """The scene's own NIfTI file, whose transforms the labels repeat; None for other formats."""
    location = parse_frame(uri)[0]
    if not location.endswith((".nii", ".nii.gz")):
        yield None
    elif is_remote(location):
        copy = fetch(location)
        yield str(copy.path)
    else:
        yield str(package_file(location)) if location.startswith("pkg://") else location


def seal_scene(
    scene: MeasurableScene, measured: Measured, run: RunFolder, folder: Path, files: Mapping[str, str]
) -> dict[str, str]:
    """Write what a scene's finished files are: a STAC item of a raster, and their checksums, last.

    Args:
        folder: local, of the run.
        files: what each is, to its path relative to that.

    Returns:
        All files, as ``files``.
    """
    base = f"scenes/{scene.ref.name}"
    others = (f"/{MANIFEST}", ".html")  # the seal itself, and pages, which are the run's
    own = [p for p in own_files(folder, base) if not p.endswith((*others, f"/{ITEM}"))]
    names, hidden = dict(files), scene.job.outputs.hide_paths
    if isinstance(scene.geometry, RasterGeometry) and not why_no_place(scene.geometry):
        from segpipe.export.stac import scene_item  # here: volumes never need pystac

        classes = shown_classes(scene, measured.values)
        card = scene.card if isinstance(scene, PredictedScene) else None
        item = scene_item(
            identifier=f"{run.job}-{run.name}-{scene.ref.name}",
            uri=scene.ref.uri,
            identity=scene.pixels.identity,
            geometry=scene.geometry,
            classes=classes,
            nodata=_nodata(scene, measured, classes) if classes else None,
            card=card,
            weights=weights_fingerprint(card) if card else "",
            labels_key=scene.labels_key,
            files=files,
            marks=hash_files(folder, own),
            folder=folder,
            created=run.started,
        )
        if hidden:
            item = json_text(hide_paths(json.loads(item)))
        write_atomic(folder / base / ITEM, item.encode())
        names["item"] = f"{base}/{ITEM}"
        own.append(names["item"])
    source = {"uri": scene.ref.uri, "identity": scene.pixels.identity}
    seal = Seal(hide_paths(source) if hidden else source, seal_keys(scene, measured), names)
    write_seal(folder, scene.ref.name, seal, own)
    return names


def seal_keys(scene: MeasurableScene, measured: Measured) -> dict[str, str]:
    """Of the stages that a scene's files are made from."""
    return {"labels": scene.labels_key, "measure": measured.stage.key}


def export_notes(scene: MeasurableScene) -> list[str]:
    """What was not written of what one could expect, and why."""
    geometry, notes = scene.geometry, []
    if isinstance(geometry, RasterGeometry) and (why := why_no_place(geometry)):
        notes.append(f"no STAC item was written: {why}")
    wanted = Format.bids in scene.job.outputs.formats and isinstance(geometry, VolumeGeometry)
    if wanted and parse_bids(scene.ref.uri) is None:
        notes.append(f"no BIDS derivative was written: the scene's file is not named {NAMED}")
    return notes
