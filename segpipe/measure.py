"""Labels × regions × reference → tallies: the third stage, which never runs a model.

A measure stage is complete in itself: with its receipts (one tally a tile) and its ``info.json``
(names, units) every table can be made again.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from segpipe.allocator import release
from segpipe.errors import StoppedError
from segpipe.inference.labels import nodata_value
from segpipe.metrics.tally import SizeScale, Tally, add, measure_tile, measure_tiles
from segpipe.reference import ReferenceLabels, find_reference, open_reference
from segpipe.regions import measured_regions
from segpipe.regions.base import RegionSet
from segpipe.scene import Scene
from segpipe.steps import Done, read_labels
from segpipe.store import Stage, stage_key, stop_requested

TALLY_VERSION = 1
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


def measure_scene(scene: Scene, run: str) -> tuple[Measured, Done]:
    """Tally every tile of a finished label map that is not tallied yet.

    Raises:
        StoppedError: a stop was requested; the tiles tallied so far stay.
        SceneError: regions or reference do not fit the scene.
    """
    begun = time.perf_counter()
    computed = reused = 0
    with ExitStack() as stack:
        regions = stack.enter_context(measured_regions(scene.job.regions, scene.geometry))
        reference = _reference(scene, stack)
        stage = _stage(scene, regions, reference)
        info = _info(scene, regions, reference)
        done = stage.done()
        read = read_labels(scene)
        scale = SizeScale.of(scene.geometry)
        for number, box in enumerate(measure_tiles(scene.geometry)):
            name = f"{number:08d}"
            if name in done:
                reused += 1
                continue
            if stop_requested(scene.job.outputs.dir, run):
                raise StoppedError("the run was asked to stop; run it again to resume")
            truth = reference.read(box) if reference else None
            nodata = nodata_value(scene.card)
            labels = read(box)
            scene.labels.check()  # a stage that is dropped meanwhile reads as nodata
            tally = measure_tile(labels, nodata, truth, regions, box, scene.geometry.box, scale)
            stage.commit(name, tally.to_json())
            computed += 1
            release()
        stage.write_json("info.json", info)
        stage.compact()
    seconds = time.perf_counter() - begun
    return load_measured(stage), Done(computed, reused, seconds, {"measure": seconds})


def load_measured(stage: Stage) -> Measured:
    """The numbers of a complete measure stage, from its receipts alone."""
    info = stage.read_json("info.json")
    tally = add(Tally.from_json(r) for r in stage.receipts().values())
    return Measured(
        tally=tally,
        regions=tuple(info["regions"]),
        outside=tuple(info["outside"]),
        unit=info["scale"]["unit"],
        scale=info["scale"],
        reference=info["reference"],
        notes=tuple(info["notes"]),
        stage=stage,
    )


def check_measure(scene: Scene) -> None:
    """Open regions and reference once, so that a mistake there is known before work starts.

    Raises:
        SceneError, RequestError: they do not fit the scene.
    """
    with ExitStack() as stack:
        stack.enter_context(measured_regions(scene.job.regions, scene.geometry))
        _reference(scene, stack)


def _reference(scene: Scene, stack: ExitStack) -> ReferenceLabels | None:
    config = scene.job.reference
    if config is None:
        return None
    uri = find_reference(config, scene.ref.name)
    return stack.enter_context(open_reference(config, uri, scene.geometry))


def _stage(scene: Scene, regions: RegionSet, reference: ReferenceLabels | None) -> Stage:
    parts = {
        "labels": scene.labels.key,
        "regions": regions.identity(),
        "reference": reference.identity if reference else None,
        "version": TALLY_VERSION,
    }
    return Stage(scene.job.outputs.dir, stage_key("measure", parts))


def _info(scene: Scene, regions: RegionSet, reference: ReferenceLabels | None) -> dict[str, Any]:
    notes = [*regions.notes, *(reference.notes if reference else ())]
    return {
        "scene": scene.ref.name,
        "regions": list(regions.names),
        "outside": [regions.outside(i) for i in range(len(regions.names))],
        "scale": SizeScale.of(scene.geometry).to_dict(),
        "reference": reference.uri if reference else None,
        "notes": notes,
    }
