"""What people open of a scene: its maps, regions and pictures as files, and its record."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import geopandas
import numpy as np
import pandas as pd

from segpipe.config.card import Class
from segpipe.config.job import Format, Keep
from segpipe.export.maps import export_notes, seal_keys, seal_scene, why_no_file, write_maps
from segpipe.export.objects import write_gpkg
from segpipe.export.run_folder import RunFolder, local_folder, sealed_files
from segpipe.export.staging import commit, staging
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry, VolumeGeometry
from segpipe.metrics.tally import LEVELS
from segpipe.pictures.archive import FORMAT, Previews, dump_previews, load_previews
from segpipe.pictures.preview import raster_preview, volume_preview
from segpipe.pictures.sampling import Readers
from segpipe.pipeline.measure import Measured, shown_classes
from segpipe.pipeline.model_scene import Scene
from segpipe.pipeline.progress import Done
from segpipe.pipeline.scene import MeasurableScene
from segpipe.pipeline.unmeasured import measuring
from segpipe.redact import clean
from segpipe.regions import region_layer
from segpipe.sources.base import Pixels, SceneRef
from segpipe.sources.labels import find_reference, open_reference
from segpipe.store.location import sweep_drafts, write_atomic
from segpipe.tables.overlap_tables import SceneTallies, metric_table, region_table
from segpipe.tables.record import AskedPhrase, GeometrySummary, SceneRecord

if TYPE_CHECKING:
    from segpipe.regions.layer import Layer

REGION_FACTS = ("seen", "state")
"""Columns that are the same for every class of a region."""
PER_CLASS = ("area_m2", "area_px", "share", "iou", "dice")
MOST_CLASSES = 300
"""A GeoPackage's table has at most 2,000 columns."""


def export_scene(scene: MeasurableScene, measured: Measured, run: RunFolder) -> dict[str, str]:
    """Write a scene's files into the run's folder, unless all are there as they were sealed.

    Returns:
        What each file is, to its path relative to the run's folder.
    """
    previews = _previews(scene, measured)
    base = f"scenes/{scene.ref.name}"
    files: dict[str, str] = {}
    with local_folder(run) as folder:
        kept = sealed_files(folder, scene.ref.name, seal_keys(scene, measured))
        if kept is not None:
            return kept
        target = folder / base
        target.mkdir(parents=True, exist_ok=True)
        sweep_drafts(target)
        for name, path in write_maps(scene, measured, target).items():
            files[name] = path.relative_to(folder).as_posix()
        if _write_regions(scene, measured, target / "regions.gpkg"):
            files["regions"] = f"{base}/regions.gpkg"
        write_atomic(target / "preview.png", previews.composite)
        files["preview"] = f"{base}/preview.png"
        run.check()
        return seal_scene(scene, measured, run, folder, files)


def _write_regions(scene: MeasurableScene, measured: Measured, path: Path) -> bool:
    """The polygons with their numbers, where the regions are polygons and not too many classes."""
    classes = shown_classes(scene, measured.values)
    with measuring("regions"):
        layer = region_layer(scene.job.regions, scene.geometry) if scene.job.regions else None
    if layer is None or len(classes) > MOST_CLASSES:
        return False
    tallies = [SceneTallies.of(scene.ref.name, measured)]
    if measured.damaged:
        tallies.append(SceneTallies(scene.ref.name, regions=measured.damaged))
    metrics = metric_table(tallies, classes) if measured.reference else None
    write_regions(layer, region_table(tallies, classes), metrics, path)
    return True


def write_regions(layer: Layer, regions: pd.DataFrame, metrics: pd.DataFrame | None, path: Path) -> None:
    """One feature a region, one column a class and number: ``forest area_m2``, ``forest iou``.

    Args:
        layer: polygons by the names of the region table, in their own CRS; others are left out.
        regions: the region table of this scene, of at most `MOST_CLASSES` classes.
        metrics: its metric table, where there is a reference.
        path: of the file; whole or not there at all.
    """
    measured = np.isin(layer.names, regions["region"].unique())
    names = np.array(layer.names)[measured]
    first = regions.drop_duplicates("region").set_index("region")
    columns: dict[str, Any] = {
        "region": names,
        **{f: first[f].reindex(names).to_numpy() for f in REGION_FACTS},
    }
    titles = _titles(regions)
    for value, title in titles.items():
        for table in (t for t in (regions, metrics) if t is not None):
            rows = table[table["value"] == value].set_index("region")
            for number in (n for n in PER_CLASS if n in table):
                columns[f"{title} {number}"] = rows[number].reindex(names).to_numpy(dtype=np.float64)
    frame = geopandas.GeoDataFrame(columns, geometry=layer.polygons[measured], crs=layer.crs)
    with staging(path) as folder:
        write_gpkg(frame, folder / path.name, "regions")
        commit(folder / path.name, path)


def _titles(regions: pd.DataFrame) -> dict[int, str]:
    """Class value to name; those that differ in case only get their value too: SQL knows no case."""
    found = regions.drop_duplicates("value")
    values, names = found["value"].tolist(), found["class"].tolist()
    times = Counter(name.lower() for name in names)
    return {
        v: f"{name} ({v})" if times[name.lower()] > 1 else name for v, name in zip(values, names, strict=True)
    }


def previews_name(scene: MeasurableScene, classes: Sequence[Class] | None = None) -> str:
    """Object that holds a scene's pictures beside its tallies: names, colours and bands are part of it.

    Args:
        classes: as shown (`shown_classes`); left out: the model's.
    """
    listed = scene.classes if classes is None else classes
    shown = [FORMAT, scene.pixels.bands, [c.model_dump(include={"value", "name", "color"}) for c in listed]]
    if scene.finds_objects:
        shown.append("outlined by ids")
    if scene.prompted:
        shown.append("a picture a phrase")
    return f"previews-{hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:12]}.zip"


def _previews(scene: MeasurableScene, measured: Measured) -> Previews:
    """The scene's pictures: made once per measure key, then kept beside the tallies."""
    classes = shown_classes(scene, measured.values)
    name = previews_name(scene, classes)
    known = measured.stage.read_if_good(name)
    if known is not None:
        return load_previews(known)
    geometry, nodata = scene.geometry, scene.nodata
    with ExitStack() as stack:
        store = stack.enter_context(scene.open_image())
        labels = stack.enter_context(scene.open_labels())
        truth = None
        if scene.job.reference is not None:
            with measuring("reference"):
                uri = find_reference(scene.job.reference, scene.ref.name)
                reference = open_reference(scene.job.reference, uri, geometry, scene.id_rule)
            truth = measuring("reference")(stack.enter_context(reference).read)

        def image(box: Box, channels: tuple[int, ...] | None = None, /) -> Pixels:
            pixels = store.read(box)
            return pixels if channels is None else Pixels(pixels.values[list(channels)], pixels.valid)

        doubt = _entropy(scene)
        ids = stack.enter_context(scene.open_labels(ids=True)) if scene.finds_objects else None
        asked = measured.found.objects if scene.prompted and measured.found else None
        read = Readers(image, labels, truth, doubt, ids)
        if isinstance(geometry, RasterGeometry):
            count = len(scene.pixels.channels)
            previews = raster_preview(
                read, geometry, scene.pixels.bands, classes, nodata, count=count, asked=asked
            )
        else:
            assert isinstance(geometry, VolumeGeometry)
            previews = volume_preview(read, geometry, classes, nodata, asked=asked)
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
    unmeasured: Mapping[str, str] | None = None,
) -> SceneRecord:
    """The record of a scene whose map is written: it is done if all of it was measured.

    Args:
        steps: by stage; a stage of which nothing was computed is listed as reused.
        unmeasured: what could not be measured, to the reason.
    """
    unmeasured = {part: clean(" ".join(reason.split())) for part, reason in (unmeasured or {}).items()}
    if measured.damaged:
        which = ", ".join(measured.damaged[:5])
        more = f" and {len(measured.damaged) - 5} more" if len(measured.damaged) > 5 else ""
        unmeasured["regions"] = f"vertices that are not finite in {which}{more}"
    told = [f"{part}: {reason}" for part, reason in unmeasured.items()]
    classes = shown_classes(scene, measured.values)
    notes = [*scene.notes, *measured.notes, *export_notes(scene), *(f"not measured: {t}" for t in told)]
    account = scene.account()
    notes += account.notes
    keys = {**account.keys, "labels": scene.labels_key, "measure": measured.stage.key}
    keys["previews"] = previews_name(scene, classes)
    if scene.job.outputs.formats and why_no_file(classes):
        notes.append(f"no file of labels was written: {why_no_file(classes)}")
    if Format.dicomseg in scene.job.outputs.formats and classes and all(c.background for c in classes):
        notes.append("no DICOM SEG was written: no class but background")
    if scene.job.regions and len(classes) > MOST_CLASSES:
        notes.append(f"no regions.gpkg was written: {len(classes)} classes, over {MOST_CLASSES}")
    return SceneRecord(
        name=scene.ref.name,
        uri=str(scene.ref.uri),
        state="failed" if told else "done",
        error=f"not measured: {'; '.join(told)}" if told else "",
        unmeasured=unmeasured,
        notes=tuple(notes),
        geometry=geometry_summary(scene.geometry),
        keys=keys,
        plan=dict(account.plan),
        timings={name: round(step.seconds, 3) for name, step in steps.items()},
        attempts=scene.attempts(),
        files=dict(files),
        reused=tuple(name for name, step in steps.items() if not step.computed and step.reused),
        asked=tuple(AskedPhrase(**row) for row in account.asked),
        prompts=account.prompts,
    )


def failed_record(ref: SceneRef, error: str, attempts: int = 1) -> SceneRecord:
    """The record of a scene that failed, with its cause in one line."""
    line = clean(" ".join(error.split()))
    return SceneRecord(name=ref.name, uri=str(ref.uri), state="failed", error=line, attempts=attempts)


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
