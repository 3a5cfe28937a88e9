"""What people open: label files on the native grid, pictures, and the scene's record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segpipe import __version__
from segpipe.blocks import SceneBlocks
from segpipe.boxes import Box
from segpipe.config import Format, Keep
from segpipe.export.cog import write_cog, write_cog_scores
from segpipe.export.nifti import write_nifti, write_nifti_scores
from segpipe.geometry import Geometry, RasterGeometry, VolumeGeometry
from segpipe.inference.labels import nodata_value
from segpipe.measure import Measured
from segpipe.models.card import Interpolation
from segpipe.reference import find_reference, open_reference
from segpipe.report.pictures import Previews, dump_previews, load_previews
from segpipe.report.preview import raster_preview, volume_preview
from segpipe.report.record import GeometrySummary, SceneRecord
from segpipe.report.tables import write_atomic
from segpipe.run import Run, local_folder
from segpipe.scene import Scene
from segpipe.sources import package_file
from segpipe.sources.base import Pixels, SceneRef
from segpipe.steps import Done, read_labels


def export_scene(scene: Scene, measured: Measured, run: Run) -> dict[str, str]:
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
        picture = target / "preview.png"
        if not picture.exists():
            write_atomic(picture, previews.composite)
        files["preview"] = f"{base}/preview.png"
    return files


def _write_maps(scene: Scene, measured: Measured, target: Path) -> dict[str, Path]:
    geometry, card = scene.geometry, scene.card
    formats = scene.job.outputs.formats
    scores = scene.job.outputs.scores
    written: dict[str, Path] = {}
    if isinstance(geometry, RasterGeometry) and Format.cog in formats:
        tags = {"SEGPIPE_VERSION": __version__, "SEGPIPE_LABELS": scene.labels.key, "MODEL": card.name}
        written["labels"] = target / "labels.tif"
        if not written["labels"].exists():
            nodata = nodata_value(card)
            write_cog(read_labels(scene), geometry, card.classes, nodata, written["labels"], tags)
        if scores:
            written["scores"] = target / "scores.tif"
            if not written["scores"].exists():
                write_cog_scores(_scores(scene), geometry, card.classes, written["scores"], tags)
    if isinstance(geometry, VolumeGeometry) and Format.nifti in formats:
        header = _nifti_header(scene.ref.uri)
        written["labels"] = target / "labels.nii.gz"
        nodata_used = _has_nodata(measured)
        if not written["labels"].exists():
            nodata_or_none = nodata_value(card) if nodata_used else None
            path = written["labels"]
            write_nifti(read_labels(scene), geometry, header, card.classes, nodata_or_none, path)
        if scores:
            written["scores"] = target / "scores.nii.gz"
            if not written["scores"].exists():
                path = written["scores"]
                write_nifti_scores(_scores(scene), geometry, header, card.classes, path)
    return written


def _has_nodata(measured: Measured) -> bool:
    return bool((measured.tally.label < 0).any())


def _scores(scene: Scene) -> Any:
    array = scene.predict.array("scores")
    return lambda box: np.asarray(array[(slice(None), *box.slices)])


def _nifti_header(uri: str) -> str | None:
    """The scene's own NIfTI file, whose transforms the labels repeat; None for other formats."""
    location = uri.split("#")[0]
    if not location.endswith((".nii", ".nii.gz")):
        return None
    return str(package_file(location)) if location.startswith("pkg://") else location


def previews_name(scene: Scene) -> str:
    """Object that holds a scene's pictures beside its tallies: names, colours and bands are part of it."""
    shown = [scene.bands, [c.model_dump(include={"value", "name", "color"}) for c in scene.card.classes]]
    return f"previews-{hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]}.zip"


def _previews(scene: Scene, measured: Measured) -> Previews:
    """The scene's pictures: made once per measure key, then kept beside the tallies."""
    known = measured.stage.read_bytes(previews_name(scene))
    if known is not None:
        return load_previews(known)
    card, geometry = scene.card, scene.geometry
    nodata = nodata_value(card)
    reference = None
    if scene.job.reference is not None:
        uri = find_reference(scene.job.reference, scene.ref.name)
        reference = open_reference(scene.job.reference, uri, geometry)
    try:
        with SceneBlocks.of(scene) as store:

            def image(box: Box, channels: tuple[int, ...] | None = None, /) -> Pixels:
                pixels = store.read(box)
                return pixels if channels is None else Pixels(pixels.values[list(channels)], pixels.valid)

            labels = read_labels(scene)
            truth = reference.read if reference else None
            if isinstance(geometry, RasterGeometry):
                previews = raster_preview(image, labels, truth, geometry, scene.bands, card.classes, nodata)
            else:
                assert isinstance(geometry, VolumeGeometry)
                previews = volume_preview(image, labels, truth, geometry, card.classes, nodata)
    finally:
        if reference is not None:
            reference.close()
    measured.stage.write_bytes(previews_name(scene), dump_previews(previews))
    return previews


def drop_unkept(scene: Scene) -> None:
    """Remove the working arrays that the job does not keep."""
    keep = scene.job.outputs.keep
    if Keep.image not in keep and not scene.direct:
        scene.ingest.drop()
    if Keep.labels not in keep:
        for stage in {scene.predict, scene.labels}:
            stage.drop()


def done_record(
    scene: Scene,
    measured: Measured,
    files: Mapping[str, str],
    steps: Mapping[str, Done],
    attempts: int,
) -> SceneRecord:
    """The record of a scene that is done.

    Args:
        steps: by stage; a stage of which nothing was computed is listed as reused.
    """
    notes = [*scene.notes, *measured.notes]
    if scene.card.input.image_resampling is Interpolation.nearest and not scene.plan.grid.identity:
        notes.append("resampled by nearest neighbour, as the card's own pipeline does")
    return SceneRecord(
        name=scene.ref.name,
        uri=scene.ref.uri,
        state="done",
        notes=tuple(notes),
        geometry=geometry_summary(scene.geometry),
        keys={
            "ingest": scene.ingest.key,
            "predict": scene.predict.key,
            "labels": scene.labels.key,
            "measure": measured.stage.key,
            "previews": previews_name(scene),
        },
        plan=scene.plan.summary(),
        timings={name: round(step.seconds, 3) for name, step in steps.items()},
        attempts=attempts,
        files=dict(files),
        reused=tuple(name for name, step in steps.items() if not step.computed and step.reused),
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


def attempts_of(scene: Scene) -> int:
    """How often the scene's hardest block was tried."""
    receipts: Sequence[dict[str, Any]] = list(scene.predict.receipts().values())
    return max((int(r.get("attempts", 1)) for r in receipts), default=1)
