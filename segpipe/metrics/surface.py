"""Surface and boundary metrics of one scene, class by class: how far two surfaces are apart.

Two definitions of a surface are in use and give different numbers, so both are here, by name:

* ``element``: DeepMind's surface-distance. Surface elements lie on the corners between elements,
  weighted by their length (2D) or area (3D); averages and percentiles are of length or area.
* ``voxel``: MONAI's default. Elements of the mask with a face neighbour outside it, all weighted alike.

Everything outside the scene is background. So is, in prediction and reference both, an element
without a valid pixel or with an ignored reference: its border is a surface of both.

A scene is fed tile by tile. What is kept are its surface points (9 and 8 bytes each) and whole
numbers, put in order at the end, so memory follows the surface and no number depends on the tiles.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from segpipe.geometry.box import Box
from segpipe.metrics import surface_distances
from segpipe.metrics.overlap import ABSENT_IN_BOTH, NOT_IN_REFERENCE, NOT_PREDICTED, share
from segpipe.metrics.tally import NODATA


@dataclass(frozen=True)
class Boundary:
    """Agreement of the boundaries at one width. NaN: not defined."""

    iou: float
    """Boundary IoU (Cheng et al. 2021, arXiv:2103.16562): ``common / (predicted + actual - common)``."""
    precision: float
    """Share of the predicted edge elements within the width of a reference edge element."""
    recall: float
    """Share of the reference edge elements within the width of a predicted edge element."""
    f1: float
    """Boundary F1 (Csurka et al. 2013): harmonic mean of precision and recall; 0 where nothing is
    near, or one of the masks is empty."""
    predicted: int
    """Elements of the prediction within the width of its own boundary (`boundary_band`)."""
    actual: int
    """Elements of the reference within the width of its own boundary."""
    common: int
    """Elements in both bands."""


@dataclass(frozen=True)
class Surface:
    """Surface and boundary metrics of one class in one scene."""

    element: surface_distances.Distances
    """Of weighted surface elements: DeepMind's definition."""
    voxel: surface_distances.Distances
    """Of edge elements: MONAI's definition."""
    boundary: Boundary
    tolerance: float
    """Of the surface Dice, in the unit of the spacing."""
    width: float
    """Of the boundary metrics, in the unit of the spacing."""
    reason: str
    """Why numbers are NaN; empty when all are defined."""


_REASONS = {
    (True, True): "",
    (False, True): NOT_PREDICTED,
    (True, False): NOT_IN_REFERENCE,
    (False, False): ABSENT_IN_BOTH,
}
"""By whether the class is predicted, and in the reference."""


class SurfaceCollector:
    """Gathers the surfaces of a scene from its tiles, in any order, then measures them."""

    def __init__(
        self,
        classes: Sequence[int],
        scene: Box,
        spacing: Sequence[float],
        tolerance: Mapping[int, float],
        width: float,
        nodata: int | None = NODATA,
    ) -> None:
        """Begin a scene.

        Args:
            classes: values to measure, none negative.
            scene: the whole scene, 2D or 3D.
            spacing: edge lengths of an element in array order; its unit is that of every distance.
            tolerance: of the surface Dice, by class value.
            width: of the boundary's IoU and F1.
            nodata: value of the labels where there is no valid pixel; None: all are valid.
        """
        if scene.ndim not in (2, 3) or len(spacing) != scene.ndim:
            raise ValueError(f"{len(spacing)} spacings for {scene}; 2 or 3 axes can be measured")
        if not all(0 < v < math.inf for v in (*spacing, width)):
            raise ValueError(f"spacing {tuple(spacing)} or width {width:g} is not positive and finite")
        if not all(0 <= tolerance.get(c, math.nan) < math.inf for c in classes):
            raise ValueError(f"tolerances {dict(tolerance)}; each class needs one, 0 or more and finite")
        if len(set(classes)) != len(classes) or min(classes, default=0) < 0:
            raise ValueError(f"classes {list(classes)} repeat or have a negative value")
        self.classes, self.scene, self.nodata = tuple(classes), scene, nodata
        self.spacing, self.width = tuple(map(float, spacing)), float(width)
        self.tolerance = {c: float(tolerance[c]) for c in classes}
        self.margin = surface_distances.band_margin(self.spacing, self.width)
        self._sizes, self._bits = surface_distances.element_table(self.spacing)
        # by side (0 predicted, 1 reference) and class code: one entry per tile
        self._corners: defaultdict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
        self._neighbours: defaultdict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
        self._edges: defaultdict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
        self._bands = np.zeros((3, len(self.classes) + 1), dtype=np.int64)
        """Elements of the bands by predicted, actual, common and class code."""
        self._added = 0

    def reads(self, box: Box) -> Box:
        """What `add` needs to see of a tile: it and its margin, clipped at the scene's border."""
        return _grow(box, self.margin).intersect(self.scene)

    def add(self, box: Box, labels: np.ndarray, reference: np.ndarray) -> None:
        """Add one tile.

        Args:
            box: the tile; the scene's tiles must not overlap.
            labels: predicted class values of ``reads(box)``; negative or `nodata`: no valid pixel.
            reference: class values of ``reads(box)``; negative: ignored.
        """
        view = self.reads(box)
        if not self.scene.contains(box) or labels.shape != view.shape or reference.shape != view.shape:
            raise ValueError(f"labels {labels.shape} or reference {reference.shape} do not cover {view}")
        valid = (labels >= 0) & (reference >= 0)
        if self.nodata is not None:
            valid &= labels != self.nodata
        last = [a == b for a, b in zip(box.stop, self.scene.stop, strict=True)]
        inside = box.within(_grow(box, self.margin))
        inners, bands = [], []
        for side, values in enumerate((labels, reference)):
            frame = self._frame(values, valid, view, box)
            for code, at, around in surface_distances.surface_elements(frame, self.margin, last, self._bits):
                self._corners[side, code].append(self._places(at, box, 1))
                self._neighbours[side, code].append(around)
            inner = frame[inside]
            at = np.stack(np.nonzero(surface_distances.edge_elements(frame, self.margin) & (inner > 0)))
            places, on = self._places(at, box, 0), inner[tuple(at)]
            for one in np.unique(on).tolist():
                self._edges[side, one].append(places[on == one])
            inners.append(inner)
            bands.append(surface_distances.boundary_band(frame, self.margin, self.spacing, self.width))
        common = bands[0] & bands[1] & (inners[0] == inners[1])
        for row, inner, band in zip(self._bands, (*inners, inners[0]), (*bands, common), strict=True):
            row += np.bincount(inner[band], minlength=len(row))
        self._added += box.size

    def results(self, workers: int = 1) -> dict[int, Surface]:
        """The metrics by class value, after all tiles; `workers` threads look up neighbours."""
        if self._added != self.scene.size:
            raise ValueError(f"tiles of {self._added} elements were added; the scene has {self.scene.size}")
        return {c: self._measure(c, code, workers) for code, c in enumerate(self.classes, start=1)}

    def _frame(self, values: np.ndarray, valid: np.ndarray, view: Box, box: Box) -> np.ndarray:
        """Class codes of a tile and its whole margin."""
        codes = np.zeros(values.shape, dtype=np.min_scalar_type(len(self.classes)))
        for code, value in enumerate(self.classes, start=1):
            codes[values == value] = code
        codes *= valid
        full = _grow(box, self.margin)
        before = (a - b for a, b in zip(view.start, full.start, strict=True))
        after = (b - a for a, b in zip(view.stop, full.stop, strict=True))
        return np.pad(codes, list(zip(before, after, strict=True)))

    def _places(self, at: np.ndarray, box: Box, extra: int) -> np.ndarray:
        """Positions relative to a tile (axis, point) as flat places on the scene's grid, int64."""
        shape = tuple(n + extra for n in self.scene.shape)
        start = [a - b for a, b in zip(box.start, self.scene.start, strict=True)]
        return np.asarray(np.ravel_multi_index(tuple(at + np.array(start)[:, None]), shape), np.int64)

    def _measure(self, value: int, code: int, workers: int) -> Surface:
        """The metrics of one class."""
        tolerance = self.tolerance[value]
        corners, weights, edges = [], [], []
        for side in (0, 1):
            places = _joined(self._corners[side, code], np.int64)
            order = np.argsort(places)  # the same sums in the same order, whatever the tiles
            corners.append(places[order])
            weights.append(self._sizes[_joined(self._neighbours[side, code], np.uint8)[order]])
            edges.append(np.sort(_joined(self._edges[side, code], np.int64)))
        far = self._both_ways(corners, 1, workers)
        element = surface_distances.summarise(
            far, weights, surface_distances.weighted_percentile95, tolerance
        )
        far = self._both_ways(edges, 0, workers)
        voxel = surface_distances.summarise(
            far, [np.ones(len(d)) for d in far], surface_distances.percentile95, tolerance
        )
        boundary = self._boundary(code, far)
        reason = _REASONS[boundary.predicted > 0, boundary.actual > 0]
        return Surface(element, voxel, boundary, tolerance, self.width, reason)

    def _boundary(self, code: int, far: Sequence[np.ndarray]) -> Boundary:
        """Agreement of the boundaries, from the bands and the edge elements' distances."""
        precision, recall = (
            share(int((d <= self.width * surface_distances.SLACK).sum()), len(d)) for d in far
        )
        predicted, actual, common = self._bands[:, code].tolist()
        both = precision + recall
        return Boundary(
            iou=share(common, predicted + actual - common),
            precision=precision,
            recall=recall,
            f1=2 * precision * recall / both if both > 0 else 0.0 if predicted or actual else math.nan,
            predicted=predicted,
            actual=actual,
            common=common,
        )

    def _both_ways(self, sides: Sequence[np.ndarray], extra: int, workers: int) -> list[np.ndarray]:
        """Distances of the prediction's flat places to the reference's, and of those to these."""
        far = []
        for one, other in (sides, sides[::-1]):
            distances = np.zeros(len(one))
            apart = ~np.isin(one, other, assume_unique=True)  # places in both need no search
            points, others = self._points(one[apart], extra), self._points(other, extra)
            distances[apart] = surface_distances.nearest(points, others, self.spacing, workers)
            far.append(distances)
        return far

    def _points(self, places: np.ndarray, extra: int) -> np.ndarray:
        """Flat places as positions (point, axis), int32."""
        shape = tuple(n + extra for n in self.scene.shape)
        return np.stack(np.unravel_index(places, shape), axis=1).astype(np.int32)


def _grow(box: Box, margin: Sequence[int]) -> Box:
    """The box with a margin on every side."""
    return Box(
        tuple(a - m for a, m in zip(box.start, margin, strict=True)),
        tuple(b + m for b, m in zip(box.stop, margin, strict=True)),
    )


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    """All parts in one array, also when there are none."""
    return np.concatenate([np.zeros(0, dtype), *parts])
