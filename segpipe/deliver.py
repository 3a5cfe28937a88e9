"""What people open: label files on the native grid, pictures, and the scene's record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from segpipe import __version__
from segpipe.boxes import Box
from segpipe.config import Format, Keep
from segpipe.export.cog import write_cog, write_cog_ids, write_cog_scores
from segpipe.export.common import LabelReader, ScoreReader
from segpipe.export.nifti import write_nifti, write_nifti_ids, write_nifti_scores
from segpipe.export.objects import coco_facts, write_coco, write_object_polygons
from segpipe.export.regions import MOST_CLASSES, write_regions
from segpipe.geometry import Geometry, RasterGeometry, VolumeGeometry
from segpipe.inference.uncertainty import LEVELS
from segpipe.labelled import LabelledScene, MeasurableScene
from segpipe.measure import Measured, shown_classes
from segpipe.metrics.tally import SizeScale
from segpipe.models.card import Class, Interpolation
from segpipe.reference import find_reference, open_reference
from segpipe.regions import region_layer
from segpipe.report.found import SceneFound, found_table
from segpipe.report.pictures import FORMAT, Previews, dump_previews, load_previews
from segpipe.report.preview import raster_preview, volume_preview
from segpipe.report.record import AskedPhrase, GeometrySummary, SceneRecord
from segpipe.report.tables import SceneResult, metric_table, region_table, write_atomic
from segpipe.run import Run, local_folder
from segpipe.scene import Scene
from segpipe.sources import package_file
from segpipe.sources.base import Pixels, SceneRef
from segpipe.steps import Done
from segpipe.store import Stage

if TYPE_CHECKING:
    from segpipe.prompts.scene import PromptScene

LARGEST_EXPORTED = 65534
"""Greatest label that the files of people's tools are written with."""


def export_scene(scene: MeasurableScene, measured: Measured, run: Run) -> dict[str, str]:
    """Write a scene's files into the run's folder; those that are there already stay.

    Returns:
        What each file is, to its path relative to the run's folder.
    """
    previews = _previews(scene, measured)
    base = f"scenes/{scene.ref.name}"
    files: dict[str, str] = {}
    with local_folder(run) as folder:
        target = folder / base
        target.mkdir(parents=True, exist_ok=True)
        for name, path in _write_maps(scene, measured, target).items():
            files[name] = f"{base}/{path.name}"
        if _write_regions(scene, measured, target / "regions.gpkg"):
            files["regions"] = f"{base}/regions.gpkg"
        picture = target / "preview.png"
        if not picture.exists():
            write_atomic(picture, previews.composite)
        files["preview"] = f"{base}/preview.png"
    return files


def _write_maps(scene: MeasurableScene, measured: Measured, target: Path) -> dict[str, Path]:
    """The label map, what a model found, and the scores that the job wants: COG, or NIfTI for volumes."""
    geometry, formats = scene.geometry, scene.job.outputs.formats
    classes = shown_classes(scene, measured.values)
    if isinstance(geometry, RasterGeometry) and Format.cog in formats:
        suffix = ".tif"
    elif isinstance(geometry, VolumeGeometry) and Format.nifti in formats:
        suffix = ".nii.gz"
    else:
        return {}
    written: dict[str, Path] = {}
    if not _why_no_file(classes):
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


def _write_regions(scene: MeasurableScene, measured: Measured, path: Path) -> bool:
    """The polygons with their numbers, where the regions are polygons and not too many classes."""
    classes = shown_classes(scene, measured.values)
    layer = region_layer(scene.job.regions, scene.geometry) if scene.job.regions else None
    if layer is None or len(classes) > MOST_CLASSES:
        return False
    if not path.exists():
        scale, attempts = SizeScale.from_dict(measured.scale), attempts_of(scene)
        found = SceneResult(
            scene.ref.name, measured.regions, attempts, measured.tally, scale, measured.outside
        )
        metrics = metric_table([found], classes) if measured.reference else None
        write_regions(layer, region_table([found], classes), metrics, path)
    return True


def _why_no_file(classes: Sequence[Class]) -> str:
    """Why no file can hold a label map of these classes; empty: one can."""
    if not classes:
        return "the label map has no valid element"
    largest = max(c.value for c in classes)
    return f"its values go up to {largest}, over {LARGEST_EXPORTED}" if largest > LARGEST_EXPORTED else ""


def _write_labels(scene: MeasurableScene, measured: Measured, classes: Sequence[Class], path: Path) -> None:
    geometry = scene.geometry
    predicted_raster = not isinstance(scene, LabelledScene) and isinstance(geometry, RasterGeometry)
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
    asked = _asked(scene)
    card = scene.card if isinstance(scene, Scene) else asked.card if asked else None
    model = {"MODEL": card.name} if card else {}
    return {"SEGPIPE_VERSION": __version__, "SEGPIPE_LABELS": scene.labels_key, **model}


def _has_nodata(measured: Measured) -> bool:
    return bool((measured.tally.label < 0).any())


def _nifti_header(uri: str) -> str | None:
    """The scene's own NIfTI file, whose transforms the labels repeat; None for other formats."""
    location = uri.split("#")[0]
    if not location.endswith((".nii", ".nii.gz")):
        return None
    return str(package_file(location)) if location.startswith("pkg://") else location


def previews_name(scene: MeasurableScene, classes: Sequence[Class] | None = None) -> str:
    """Object that holds a scene's pictures beside its tallies: names, colours and bands are part of it.

    Args:
        classes: as shown (`shown_classes`); left out: the model's.
    """
    listed = scene.classes if classes is None else classes
    shown = [FORMAT, scene.bands, [c.model_dump(include={"value", "name", "color"}) for c in listed]]
    if scene.finds_objects:
        shown.append("outlined by ids")
    if scene.prompted:
        shown.append("a picture a phrase")
    return f"previews-{hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]}.zip"


def _previews(scene: MeasurableScene, measured: Measured) -> Previews:
    """The scene's pictures: made once per measure key, then kept beside the tallies."""
    classes = shown_classes(scene, measured.values)
    name = previews_name(scene, classes)
    known = measured.stage.read_bytes(name)
    if known is not None:
        return load_previews(known)
    geometry, nodata = scene.geometry, scene.nodata
    with ExitStack() as stack:
        store = stack.enter_context(scene.open_image())
        labels = stack.enter_context(scene.open_labels())
        truth = None
        if scene.job.reference is not None:
            uri = find_reference(scene.job.reference, scene.ref.name)
            reference = open_reference(scene.job.reference, uri, geometry, scene.id_rule)
            truth = stack.enter_context(reference).read

        def image(box: Box, channels: tuple[int, ...] | None = None, /) -> Pixels:
            pixels = store.read(box)
            return pixels if channels is None else Pixels(pixels.values[list(channels)], pixels.valid)

        doubt = _entropy(scene)
        ids = stack.enter_context(scene.open_labels(ids=True)) if scene.finds_objects else None
        asked = measured.found.objects if scene.prompted and measured.found else None
        if isinstance(geometry, RasterGeometry):
            previews = raster_preview(
                image, labels, truth, geometry, scene.bands, classes, nodata,
                count=len(scene.channels), read_uncertainty=doubt, read_ids=ids, asked=asked,
            )  # fmt: skip
        else:
            assert isinstance(geometry, VolumeGeometry)
            previews = volume_preview(
                image, labels, truth, geometry, classes, nodata,
                read_uncertainty=doubt, read_ids=ids, asked=asked,
            )  # fmt: skip
    measured.stage.write_bytes(name, dump_previews(previews))
    return previews


def _entropy(scene: MeasurableScene) -> Callable[[Box], np.ndarray] | None:
    """A reader of the uncertainty map's entropy, a share of 1; None where there is no such map."""
    doubt = scene.open_uncertainty()
    if doubt is None:
        return None
    at = scene.uncertainty.index("entropy")
    return lambda box: doubt(box)[at] / LEVELS


def drop_unkept(scene: Scene) -> None:
    """Remove the working arrays that the job does not keep."""
    keep = scene.job.outputs.keep
    if Keep.image not in keep and not scene.direct:
        scene.ingest.drop()
    if Keep.labels not in keep:
        for stage in {scene.predict, scene.labels}:
            stage.drop()


def done_record(
    scene: MeasurableScene,
    measured: Measured,
    files: Mapping[str, str],
    steps: Mapping[str, Done],
    attempts: int,
) -> SceneRecord:
    """The record of a scene that is done.

    Args:
        steps: by stage; a stage of which nothing was computed is listed as reused.
    """
    classes = shown_classes(scene, measured.values)
    notes = [*scene.notes, *measured.notes]
    keys = {"labels": scene.labels_key, "measure": measured.stage.key}
    keys["previews"] = previews_name(scene, classes)
    plan: dict[str, Any] = {}
    if isinstance(scene, Scene):
        keys = {"ingest": scene.ingest.key, "predict": scene.predict.key, **keys}
        plan = scene.plan.summary()
        if scene.card.input.image_resampling is Interpolation.nearest and not scene.plan.grid.identity:
            notes.append("resampled by nearest neighbour, as the card's own pipeline does")
    asked: tuple[AskedPhrase, ...] = ()
    said: tuple[str, ...] = ()
    if (asking := _asked(scene)) is not None:
        from segpipe.prompts.finding import account_of, summary_of

        keys = {"embed": asking.embeddings.stage.key, "answers": asking.answers.key, **keys}
        plan = summary_of(asking)
        account = account_of(asking)
        asked = tuple(AskedPhrase(**row) for row in account["asked"])
        said = tuple(account["prompts"])
    if scene.job.outputs.formats and _why_no_file(classes):
        notes.append(f"no file of labels was written: {_why_no_file(classes)}")
    if scene.job.regions and len(classes) > MOST_CLASSES:
        notes.append(f"no regions.gpkg was written: {len(classes)} classes, over {MOST_CLASSES}")
    return SceneRecord(
        name=scene.ref.name,
        uri=scene.ref.uri,
        state="done",
        notes=tuple(notes),
        geometry=geometry_summary(scene.geometry),
        keys=keys,
        plan=plan,
        timings={name: round(step.seconds, 3) for name, step in steps.items()},
        attempts=attempts,
        files=dict(files),
        reused=tuple(name for name, step in steps.items() if not step.computed and step.reused),
        asked=asked,
        prompts=said,
    )


def failed_record(ref: SceneRef, error: str, attempts: int = 1) -> SceneRecord:
    """The record of a scene that failed, with its cause in one line."""
    line = " ".join(error.split())
    return SceneRecord(name=ref.name, uri=ref.uri, state="failed", error=line, attempts=attempts)


def geometry_summary(geometry: Geometry) -> GeometrySummary:
    """Where a scene is, in words."""
    if isinstance(geometry, VolumeGeometry):
        return GeometrySummary("volume", geometry.shape, None, geometry.spacing, "mm", geometry.orientation)
    assert isinstance(geometry, RasterGeometry)
    crs = geometry.projection
    unit = ""
    if crs is not None:
        unit = crs.axis_info[0].unit_name if crs.axis_info else ""
        unit = {"metre": "m", "degree": "°"}.get(unit, unit)
    return GeometrySummary("raster", geometry.shape, crs.name if crs else None, geometry.spacing, unit)


def _asked(scene: MeasurableScene) -> PromptScene | None:
    """The scene, if its objects were asked for; only then is its module loaded, and torch with it."""
    if not scene.prompted:
        return None
    from segpipe.prompts.scene import PromptScene

    assert isinstance(scene, PromptScene)
    return scene


def attempts_of(scene: MeasurableScene) -> int:
    """How often the scene's hardest block was tried; 1 where none was predicted."""
    if isinstance(scene, Scene):
        stage = scene.predict
    elif (asking := _asked(scene)) is not None:
        stage = asking.answers
    else:
        return 1
    receipts: Sequence[dict[str, Any]] = list(stage.receipts().values())
    return max((int(r.get("attempts", 1)) for r in receipts), default=1)
