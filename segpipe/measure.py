"""Labels × regions × reference (× image) → tallies: the third stage, which never runs a model.

A measure stage is complete in itself: with its receipts (one tally a tile) and its ``info.json``
(names, units) every table can be made again.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.allocator import release
from segpipe.boxes import Box
from segpipe.classes import with_found
from segpipe.errors import StoppedError
from segpipe.inference.uncertainty import CHANNELS, LEVELS
from segpipe.labelled import LabelledScene, MeasurableScene
from segpipe.metrics import instances, intensity
from segpipe.metrics.calibration import Calibration, calibrate
from segpipe.metrics.instances import OverlapTable, overlap_tile
from segpipe.metrics.intensity import Channel, Intensity, measure_intensity
from segpipe.metrics.tally import SizeScale, Tally, add, measure_tile, measure_tiles
from segpipe.models.card import Class
from segpipe.reference import ReferenceLabels, find_reference, one_class, open_reference
from segpipe.regions import measured_regions
from segpipe.regions.base import RegionSet
from segpipe.sources.base import Pixels, Scaling
from segpipe.steps import Done
from segpipe.store import Stage, stage_key, stop_requested
from segpipe.surfaces import measure_surfaces, tolerances

SURFACES = "surfaces.json"
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
    surfaces: dict[str, Any] | None = None
    """See `segpipe.surfaces`; None: not requested, or no reference."""

    @property
    def values(self) -> list[int]:
        """Values found in the label map or its reference, ascending: a class that was missed is one too."""
        found = np.union1d(self.tally.label, self.tally.reference)
        return [int(v) for v in found[found >= 0]]


def measure_scene(scene: MeasurableScene, run: str) -> tuple[Measured, Done]:
    """Tally every tile of a finished label map that is not tallied yet.

    Raises:
        StoppedError: a stop was requested; the tiles tallied so far stay.
        SceneError: regions, reference or labels do not fit the scene, or cannot be read.
    """
    begun = time.perf_counter()
    computed = reused = 0
    with ExitStack() as stack:
        regions = stack.enter_context(measured_regions(scene.job.regions, scene.geometry))
        reference = _reference(scene, stack)
        stage = _stage(scene, regions, reference)
        objects = scene.job.measure.objects
        read = stack.enter_context(scene.open_labels(ids=objects))
        image = stack.enter_context(scene.open_image()) if scene.job.measure.intensity else None
        doubt = scene.open_uncertainty()
        done = stage.done()
        scale = SizeScale.of(scene.geometry)
        for number, box in enumerate(measure_tiles(scene.geometry)):
            name = f"{number:08d}"
            if name in done:
                reused += 1
                continue
            if stop_requested(scene.job.outputs.dir, run):
                raise StoppedError("the run was asked to stop; run it again to resume")
            truth = reference.read(box, ids=objects) if reference else None
            labels = read(box)
            shares = doubt(box) if doubt else None
            scene.check_labels()
            receipt: dict[str, Any] = {}
            if objects and truth is not None:
                receipt["objects"] = overlap_tile(labels, truth, box, scale).to_json()
                labels, truth = one_class(labels), one_class(truth)
            tally = measure_tile(labels, scene.nodata, truth, regions, box, scene.geometry.box, scale)
            receipt |= tally.to_json()
            if image is not None:
                found = measure_intensity(image.read(box), labels, scene.nodata, regions, box)
                receipt["intensity"] = found.to_json()
            if shares is not None:
                receipt |= _doubt(shares, labels, truth, scene.nodata, regions, box)
            stage.commit(name, receipt)
            computed += 1
            release()
        stage.write_json("info.json", _info(scene, regions, reference))
        stage.compact()
        if scene.job.measure.surface and reference and stage.read_json(SURFACES) is None:
            classes = shown_classes(scene, load_measured(stage).values)
            classed = stack.enter_context(scene.open_labels())
            stage.write_json(SURFACES, measure_surfaces(scene, classes, classed, reference, run))
            computed += 1
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
    """The numbers of a complete measure stage, from its receipts alone."""
    info = stage.read_json("info.json")
    receipts = stage.receipts().values()
    channels, doubts = info.get("intensity"), info.get("uncertainty")
    objects = [OverlapTable.from_json(r["objects"]) for r in receipts if "objects" in r]
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
        surfaces=stage.read_json(SURFACES),
    )


def _sum(receipts: Iterable[dict[str, Any]], name: str) -> Intensity:
    return intensity.add(Intensity.from_json(receipt[name]) for receipt in receipts)


def check_measure(scene: MeasurableScene) -> None:
    """Open regions and reference once, so that a mistake there is known before work starts.

    Raises:
        SceneError, RequestError: they do not fit the scene.
    """
    with ExitStack() as stack:
        stack.enter_context(measured_regions(scene.job.regions, scene.geometry))
        _reference(scene, stack)


def _reference(scene: MeasurableScene, stack: ExitStack) -> ReferenceLabels | None:
    config = scene.job.reference
    if config is None:
        return None
    uri = find_reference(config, scene.ref.name)
    return stack.enter_context(open_reference(config, uri, scene.geometry, objects=scene.job.measure.objects))


def _stage(scene: MeasurableScene, regions: RegionSet, reference: ReferenceLabels | None) -> Stage:
    parts = {
        "labels": scene.labels_key,
        "regions": regions.identity(),
        "reference": reference.identity if reference else None,
        "intensity": [c.to_json() for c in _channels(scene)],
        "uncertainty": list(scene.uncertainty),
        "objects": scene.job.measure.objects,
        "surface": _surface_parts(scene) if reference else None,
        "version": TALLY_VERSION,
    }
    return Stage(scene.job.outputs.dir, stage_key("measure", parts))


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
    names = scene.bands or [str(c + 1) for c in scene.channels]
    return [Channel(name, scaling) for name, scaling in zip(names, scene.scaling, strict=True)]


def _info(scene: MeasurableScene, regions: RegionSet, reference: ReferenceLabels | None) -> dict[str, Any]:
    notes = [*regions.notes, *(reference.notes if reference else ())]
    return {
        "scene": scene.ref.name,
        "regions": list(regions.names),
        "outside": [regions.outside(i) for i in range(len(regions.names))],
        "scale": SizeScale.of(scene.geometry).to_dict(),
        "reference": reference.uri if reference else None,
        "intensity": [c.to_json() for c in _channels(scene)],
        "uncertainty": list(scene.uncertainty),
        "notes": notes,
    }
