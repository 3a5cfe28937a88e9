"""Labels × regions × reference (× image) → tallies: the third stage, which never runs a model.

A measure stage is complete in itself: with its receipts (one tally a tile) and its ``info.json``
(names, units) every table can be made again.
"""

from __future__ import annotations

import io
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from segpipe.config.card import Class
from segpipe.config.classes import with_found
from segpipe.errors import DamagedError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import (
    Geometry,
    geometry_from_dict,
)
from segpipe.metrics import intensity
from segpipe.metrics.intensity import Channel, Intensity, measure_intensity
from segpipe.metrics.tally import (
    CHANNELS,
    LEVELS,
    Calibration,
    SizeScale,
    Tally,
    add,
    calibrate,
    measure_tile,
    measure_tiles,
)
from segpipe.objects import overlap_table as instances
from segpipe.objects.overlap_table import OverlapTable, overlap_tile
from segpipe.objects.table import FACTS, Members, ObjectTable, members_tile
from segpipe.objects.table import add as add_members
from segpipe.pipeline.given_scene import LabelledScene
from segpipe.pipeline.progress import Done
from segpipe.pipeline.scene import MeasurableScene, check_others
from segpipe.pipeline.surfaces import measure_surfaces, tolerances
from segpipe.pipeline.unmeasured import measuring
from segpipe.process.allocator import release
from segpipe.regions import measured_regions
from segpipe.regions.base import RegionSet
from segpipe.sources.base import Pixels, Scaling
from segpipe.sources.identity import check_unchanged, identified
from segpipe.sources.labels import IdRule, ReferenceLabels, find_reference, one_class, open_reference
from segpipe.store.stage import Stage, stage_key
from segpipe.store.stop import StopToken

S = TypeVar("S", bound=MeasurableScene)
SURFACES = "surfaces.json"
FOUND = "objects.npz"
FACTS_FILE = "facts.parquet"
TALLY_VERSION = 2
"""Raised when the definition of a number in a tally changes; part of every measure key."""


@dataclass(frozen=True)
class Measured:
    """A scene's numbers, before they become tables."""

    tally: Tally
    regions: tuple[str, ...]
    outside: tuple[int, ...]
    """Per region: cover beyond the scene, in 1/65536 elements."""
    unit: str
    scale: dict[str, Any]
    """`SizeScale.to_dict`."""
    reference: str | None
    """Where the truth came from; None: not requested."""
    notes: tuple[str, ...]
    stage: Stage
    intensity: Intensity | None = None
    """None: not requested."""
    channels: tuple[Channel, ...] = ()
    """Of the intensities."""
    uncertainty: Intensity | None = None
    """Of the map's shares, in 1/65535; None: not requested."""
    doubts: tuple[Channel, ...] = ()
    """Channels of that map."""
    calibration: Calibration | None = None
    """None: no uncertainty, or no reference."""
    objects: OverlapTable | None = None
    """None: not requested, or no reference."""
    found: ObjectTable | None = None
    """What a model found; None: labels, or a model without objects."""
    facts: pd.DataFrame | None = None
    """Further columns of these objects, by ``id``; None: there are none."""
    members: Members | None = None
    """Regions of these objects."""
    rule: IdRule | None = None
    """What the reference's values say of objects."""
    geometry: Geometry | None = None
    """Of the scene, where objects were found."""
    surfaces: dict[str, Any] | None = None
    """See `segpipe.pipeline.measure`; None: not requested, or no reference."""
    damaged: tuple[str, ...] = ()
    """Regions that cannot be measured, none of `regions`."""

    @property
    def values(self) -> list[int]:
        """Values found in the label map or its reference, ascending: a class that was missed is one too."""
        found = np.union1d(self.tally.label, self.tally.reference)
        return [int(v) for v in found[found >= 0]]


def measure_scene(
    scene: MeasurableScene, stop: StopToken | None = None, unmeasured: Collection[str] = ()
) -> tuple[Measured, Done]:
    """Tally every tile of a finished label map that is not tallied yet.

    Args:
        scene: whose labels are finished.
        stop: looked at before every tile.
        unmeasured: parts that were found not to be measurable (`segpipe.pipeline.unmeasured`).

    Raises:
        StoppedError: a stop was requested; the tiles tallied so far stay.
        UnmeasuredError: regions or reference do not fit the scene or cannot be read, or its elements have
            no size; the labels may be fine.
        SceneError: the labels cannot be read.
    """
    begun = time.perf_counter()
    computed = reused = 0
    with ExitStack() as stack:
        with measuring("size"):
            scale = (SizeScale.elements if "size" in unmeasured else SizeScale.of)(scene.geometry)
        with measuring("regions"):
            regions = stack.enter_context(measured_regions(scene.job.regions, scene.geometry))
        with measuring("reference"):
            reference = _reference(scene, stack)
        parts = _parts(scene, regions, reference) | ({"size": scale.unit} if "size" in unmeasured else {})
        stage = Stage(scene.job.outputs.dir, stage_key("measure", parts))
        rule = scene.id_rule
        read = stack.enter_context(scene.open_labels(ids=rule is not None and not scene.finds_objects))
        found_ids = stack.enter_context(scene.open_labels(ids=True)) if scene.finds_objects else None
        with measuring("intensity"):
            image = stack.enter_context(scene.open_image()) if scene.job.measure.intensity else None
        doubt = scene.open_uncertainty()
        stage.scrub()
        done = stage.done()
        for number, box in enumerate(measure_tiles(scene.geometry)):
            name = f"{number:08d}"
            if name in done:
                reused += 1
                continue
            if stop is not None:
                stop.check()
            with measuring("reference"):
                truth, true_ids = reference.read_both(box) if reference else (None, None)
            labels = read(box)
            ids = found_ids(box) if found_ids else labels
            shares = doubt(box) if doubt else None
            receipt: dict[str, Any] = {}
            if found_ids:
                with measuring("regions"):
                    receipt["members"] = members_tile(ids, regions, box).to_json()
            if rule is not None and true_ids is not None:
                void = np.where(labels == scene.nodata, -1, ids.astype(np.int64)) if found_ids else ids
                receipt["objects"] = overlap_tile(void, true_ids, box, scale).to_json()
                labels = labels if found_ids else one_class(labels)
            with measuring("regions"):
                tally = measure_tile(labels, scene.nodata, truth, regions, box, scene.geometry.box, scale)
            receipt |= tally.to_json()
            if image is not None:
                with measuring("intensity"):
                    found = measure_intensity(image.read(box), labels, scene.nodata, regions, box)
                receipt["intensity"] = found.to_json()
            if shares is not None:
                receipt |= _doubt(shares, labels, truth, scene.nodata, regions, box)
            stage.commit(name, receipt, {})
            computed += 1
            release()
        beside = []
        if (objects := scene.objects_stage) is not None:
            stage.write_bytes(FOUND, ObjectTable.load(objects).dump())
            beside.append(FOUND)
            if scene.prompted:
                stage.write_bytes(FACTS_FILE, objects.read_part(FACTS))
                beside.append(FACTS_FILE)
        info = {**_info(scene, regions, reference, scale), "tiles": number + 1, "beside": beside}
        stage.write_json("info.json", info)
        stage.compact()
        if scene.job.measure.surface and reference and stage.read_json(SURFACES) is None:
            classes = shown_classes(scene, load_measured(stage).values)
            classed = stack.enter_context(scene.open_labels())
            with measuring("surface"):
                surfaces = measure_surfaces(scene, classes, classed, reference, stop)
            stage.write_json(SURFACES, surfaces)
            computed += 1
        if scene.job.measure.surface and reference:
            stage.write_json("info.json", {**info, "beside": [*beside, SURFACES]})
        _check_inputs(scene, parts, stage)
    seconds = time.perf_counter() - begun
    return load_measured(stage), Done(computed, reused, seconds, {"measure": seconds})


def _doubt(
    shares: np.ndarray,
    labels: np.ndarray,
    truth: np.ndarray | None,
    nodata: int,
    regions: RegionSet,
    box: Box,
) -> dict[str, Any]:
    """What a tile's receipt says of uncertainty, and of calibration where there is a reference."""
    pixels = Pixels(shares, np.ones(box.shape, dtype=bool))
    found: dict[str, Any] = {"uncertainty": measure_intensity(pixels, labels, nodata, regions, box).to_json()}
    if truth is not None:
        sure = shares[CHANNELS.index("confidence")]
        found["calibration"] = calibrate(sure, labels, nodata, truth).to_json()
    return found


def shown_classes(scene: MeasurableScene, values: Sequence[int]) -> tuple[Class, ...]:
    """The model's classes; of given labels the classes listed and the other values found."""
    return with_found(scene.classes, values) if isinstance(scene, LabelledScene) else scene.classes


def load_measured(stage: Stage) -> Measured:
    """The numbers of a complete measure stage, from its receipts alone.

    Raises:
        DamagedError: something of it is missing or damaged.
    """
    info = stage.read_json("info.json")
    receipts = stage.receipts().values()
    if info is None or len(receipts) != info["tiles"] or not all(stage.read_bytes(n) for n in info["beside"]):
        raise DamagedError(
            f"{stage.key}: measurements are missing or damaged in the store; run the job again, which "
            "measures what is missing"
        )
    channels, doubts = info.get("intensity"), info.get("uncertainty")
    objects = [OverlapTable.from_json(r["objects"]) for r in receipts if "objects" in r]
    found, facts = stage.read_bytes(FOUND), stage.read_bytes(FACTS_FILE)
    calibrated = [Calibration.from_json(r["calibration"]) for r in receipts if "calibration" in r]
    return Measured(
        tally=add(Tally.from_json(r) for r in receipts),
        regions=tuple(info["regions"]),
        outside=tuple(info["outside"]),
        unit=info["scale"]["unit"],
        scale=info["scale"],
        reference=info["reference"],
        notes=tuple(info["notes"]),
        stage=stage,
        intensity=_sum(receipts, "intensity") if channels else None,
        channels=tuple(Channel.from_json(c) for c in channels or ()),
        uncertainty=_sum(receipts, "uncertainty") if doubts else None,
        doubts=tuple(Channel(name, Scaling(1 / LEVELS)) for name in doubts or ()),
        calibration=sum(calibrated, Calibration.empty()) if calibrated else None,
        objects=instances.add(objects) if objects else None,
        found=None if found is None else ObjectTable.of(found),
        facts=None if facts is None else pd.read_parquet(io.BytesIO(facts)),
        members=add_members(Members.from_columns(**r["members"]) for r in receipts) if found else None,
        rule=IdRule(**info["rule"]) if info.get("rule") else None,
        geometry=geometry_from_dict(info["geometry"]) if found else None,
        surfaces=stage.read_json(SURFACES),
        damaged=tuple(info.get("damaged", ())),
    )


def _sum(receipts: Iterable[dict[str, Any]], name: str) -> Intensity:
    return intensity.add(Intensity.from_json(receipt[name]) for receipt in receipts)


def check_measure(scene: S) -> S:
    """Open regions and reference once, so that a mistake there is known before work starts; the same scene.

    Raises:
        SceneError, RequestError: they do not fit the scene.
    """
    check_others(scene.job, scene.ref, scene.geometry)
    return scene


def _reference(scene: MeasurableScene, stack: ExitStack) -> ReferenceLabels | None:
    config = scene.job.reference
    if config is None:
        return None
    uri = find_reference(config, scene.ref.name)
    return stack.enter_context(open_reference(config, uri, scene.geometry, scene.id_rule))


def _check_inputs(scene: MeasurableScene, parts: Mapping[str, Any], stage: Stage) -> None:
    """Take the identity of all that was read again, at the end of the scene's work.

    Raises:
        SceneError: a file is another one now. What was made of it is dropped: the file may come back.
    """
    try:
        check_unchanged(scene.inputs)
    except SceneError:
        for made in (stage, *scene.stages):
            made.drop()
        raise
    for part in ("regions", "reference"):
        try:
            with measuring(part):
                check_unchanged(parts[part])
        except SceneError:
            stage.drop()
            raise


def _parts(scene: MeasurableScene, regions: RegionSet, reference: ReferenceLabels | None) -> dict[str, Any]:
    """What a scene's numbers depend on."""
    how = scene.job.identity
    return {
        "labels": scene.labels_key,
        "regions": identified(regions.identity(), how),
        "reference": identified(reference.identity, how) if reference else None,
        "intensity": [c.to_json() for c in _channels(scene)],
        "uncertainty": list(scene.uncertainty),
        "objects": scene.job.measure.objects or scene.finds_objects,
        "surface": _surface_parts(scene) if reference else None,
        "version": TALLY_VERSION,
    }


def _surface_parts(scene: MeasurableScene) -> dict[str, Any] | None:
    """What the surface metrics depend on beside labels and reference."""
    measure = scene.job.measure
    if not measure.surface:
        return None
    limits = {str(value): limit for value, limit in tolerances(measure, scene.classes).items()}
    background = [c.value for c in scene.classes if c.background]
    return {"tolerance": measure.tolerance, **limits, "width": measure.width, "background": background}


def _channels(scene: MeasurableScene) -> list[Channel]:
    """What intensities are measured of; empty where they are not requested."""
    if not scene.job.measure.intensity:
        return []
    names = scene.pixels.bands or [str(c + 1) for c in scene.pixels.channels]
    return [Channel(name, scaling) for name, scaling in zip(names, scene.pixels.scaling, strict=True)]


def _info(
    scene: MeasurableScene, regions: RegionSet, reference: ReferenceLabels | None, scale: SizeScale
) -> dict[str, Any]:
    return {
        "scene": scene.ref.name,
        "regions": list(regions.names),
        "outside": [regions.outside(i) for i in range(len(regions.names))],
        "damaged": list(regions.damaged),
        "scale": scale.to_dict(),
        "reference": reference.uri if reference else None,
        "intensity": [c.to_json() for c in _channels(scene)],
        "uncertainty": list(scene.uncertainty),
        "rule": None if scene.id_rule is None else asdict(scene.id_rule),
        "geometry": scene.geometry.to_dict(),
        "notes": [*regions.notes, *(reference.notes if reference else ())],
    }
