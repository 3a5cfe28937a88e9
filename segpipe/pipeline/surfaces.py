"""Surface distances of a scene: lengths of an element, tolerances, and the pass over labels and reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from segpipe.config.card import Class
from segpipe.config.job import Measure
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import (
    Geometry,
    RasterGeometry,
    VolumeGeometry,
    horizontal_crs,
    is_mercator,
)
from segpipe.metrics.surface import SurfaceCollector
from segpipe.metrics.tally import measure_tiles
from segpipe.pipeline.scene import MeasurableScene
from segpipe.process.allocator import release
from segpipe.sources.labels import ReferenceLabels
from segpipe.store.stop import StopToken

ORTHOGONAL = 1e-4
"""Greatest cosine between two axes that counts as a right angle."""


def surface_spacing(geometry: Geometry) -> tuple[tuple[float, ...], str, str]:
    """Edge lengths of an element in array order, their unit, and why there are none.

    Distances need one length per axis everywhere and right angles between the axes: a geographic
    or Mercator raster has no such length, and a sheared grid no such angles.
    """
    if isinstance(geometry, VolumeGeometry):
        if not _right_angles(geometry.matrix[:3, :3]):
            return (), "mm", "the affine is sheared: distances along its axes are not defined"
        return geometry.spacing, "mm", ""
    assert isinstance(geometry, RasterGeometry)
    if geometry.projection is None:
        return (1.0, 1.0), "px", ""
    crs = horizontal_crs(geometry.projection)
    if not crs.is_projected or is_mercator(crs):
        return (
            (),
            "m",
            f"pixels of {crs.name} have another length in every row; warp to a projected CRS",
        )
    a, b, _, d, e, _ = geometry.transform
    if not _right_angles(np.array([[a, b], [d, e]])):
        return (), "m", "the affine is sheared: distances along its axes are not defined"
    metres = crs.axis_info[0].unit_conversion_factor
    return tuple(s * metres for s in geometry.spacing or ()), "m", ""


def _right_angles(matrix: np.ndarray) -> bool:
    columns = matrix / np.linalg.norm(matrix, axis=0)
    return bool(np.abs(columns.T @ columns - np.eye(len(matrix))).max() <= ORTHOGONAL)


def tolerances(measure: Measure, classes: Sequence[Class]) -> dict[int, float]:
    """By class value.

    Raises:
        RequestError: `measure.tolerances` names a class that there is not.
    """
    known = {c.name: c.value for c in classes}
    unknown = [name for name in measure.tolerances if name not in known]
    if unknown:
        valid = ", ".join(known) or "a name in the job's `classes`, which it does not give"
        raise RequestError(f"measure.tolerances: found {unknown[0]!r}; valid: {valid}")
    given = {known[name]: value for name, value in measure.tolerances.items()}
    return {c.value: given.get(c.value, measure.tolerance) for c in classes}


def measure_surfaces(
    scene: MeasurableScene,
    classes: Sequence[Class],
    labels: Callable[[Box], np.ndarray],
    reference: ReferenceLabels,
    stop: StopToken | None,
) -> dict[str, Any]:
    """Metrics of every class but the background, as a JSON object.

    Raises:
        StoppedError: a stop was requested; what was gathered is lost.
    """
    measure = scene.job.measure
    spacing, unit, reason = surface_spacing(scene.geometry)
    asked = {"unit": unit, "width": measure.width, "reason": reason}
    if reason:
        return {**asked, "classes": {}}
    wanted = [c for c in classes if not c.background]
    limits = tolerances(measure, classes)
    collector = SurfaceCollector(
        [c.value for c in wanted], scene.geometry.box, spacing, limits, measure.width, scene.nodata
    )
    for box in measure_tiles(scene.geometry):
        if stop is not None:
            stop.check()
        part = collector.reads(box)
        collector.add(box, labels(part), reference.read(part))
        release()
    return {**asked, "classes": {str(v): _plain(asdict(s)) for v, s in collector.results().items()}}


def _plain(value: Any) -> Any:
    """NaN as None: JSON has no NaN."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
