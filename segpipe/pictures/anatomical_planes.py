"""Three anatomical planes of a volume, upright by the affine, with square millimetres.

Radiological convention: the viewer faces the patient, so the patient's right is on the left of
axial and coronal planes. The sagittal plane is seen from the patient's left: anterior is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from nibabel import orientations
from PIL import Image, ImageDraw

from segpipe.config.card import Class
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import VolumeGeometry
from segpipe.pictures.drawing import heat, layers, limits, resize, scale_bar, stretch, text_with_halo
from segpipe.pictures.sampling import ArrayReader, Readers, sample_image, sample_labels, thinned

CONVENTION = "Radiological convention: the patient's right is on the left."
SLAB_ELEMENTS = 2**24
"""Labels read at once while the largest structure is looked for."""
RIGHT, FRONT, UP = 0, 1, 2  # axes of RAS


class PlaneView(NamedTuple):
    """A plane by its axes of RAS: the one cut through, of the rows (top +) and of the columns (left +)."""

    name: str
    across: int
    top: int
    left: int


AXIAL = PlaneView("Axial", UP, FRONT, RIGHT)
_VIEWS = (AXIAL, PlaneView("Coronal", FRONT, UP, RIGHT), PlaneView("Sagittal", RIGHT, UP, FRONT))
LETTERS = (("R", "L"), ("A", "P"), ("S", "I"))
"""Plus and minus of each axis of RAS."""
_GAP, _FOOT = 8, 26
_AIR = 0.2
_OBLIQUE = 0.99
"""Cosine under which an axis is said to be oblique (8 degrees)."""


@dataclass(frozen=True)
class Anatomy:
    """How a volume's array lies in the patient: the closest axis of RAS for each of its own."""

    axis: tuple[int, int, int]
    """Array axis by axis of RAS."""
    sign: tuple[int, int, int]
    """By axis of RAS: +1 where the index grows toward right, front or up, else -1."""

    @classmethod
    def of(cls, geometry: VolumeGeometry) -> Anatomy:
        """By the affine."""
        known: Any = orientations  # nibabel is typed in parts
        # per voxel axis i, j, k: the closest axis of RAS, and +1 or -1 along it
        world = known.io_orientation(geometry.matrix)
        axis, sign = [0, 0, 0], [1, 1, 1]
        for voxel, (ras, direction) in enumerate(world):
            axis[int(ras)], sign[int(ras)] = 2 - voxel, int(direction)
        return cls((axis[0], axis[1], axis[2]), (sign[0], sign[1], sign[2]))

    def upright(self, array: np.ndarray, view: PlaneView) -> np.ndarray:
        """A cut (…, rows, columns), axes in array order, with the view's top and left where they belong."""
        turned = array if self.axis[view.top] < self.axis[view.left] else array.swapaxes(-1, -2)
        # anatomical plus is up and left, so an index that grows toward it is reversed
        return turned[..., :: -self.sign[view.top], :: -self.sign[view.left]]

    def millimetres(self, geometry: VolumeGeometry, view: PlaneView) -> tuple[float, float]:
        """Height and width of a cut."""
        high, wide = (
            geometry.shape[a] * geometry.spacing[a] for a in (self.axis[view.top], self.axis[view.left])
        )
        return high, wide


@dataclass(frozen=True, eq=False)
class ClassExtents:
    """How many voxels the structures have at each index along each axis."""

    classes: tuple[Class, ...]
    counts: tuple[np.ndarray, ...]
    """By axis: (classes, indices), int64."""

    def along(self, value: int, axis: int) -> np.ndarray:
        """(indices,) of one class, int64; zeros where it is none of them."""
        own = [k for k, c in enumerate(self.classes) if c.value == value]
        return np.asarray(self.counts[axis][own].sum(axis=0))

    def centre(self) -> tuple[tuple[int, ...], str | None]:
        """The median index, along each axis, of the class with most voxels, and its name.

        Ties go to the first class. The middle of the volume and None where there is no structure.
        """
        totals = self.counts[0].sum(axis=1)
        if not self.classes or totals.max() == 0:
            return tuple(c.shape[1] // 2 for c in self.counts), None
        largest = int(totals.argmax())
        half = (int(totals[largest]) + 1) // 2
        middle = (int(np.searchsorted(np.cumsum(c[largest]), half)) for c in self.counts)
        return tuple(middle), self.classes[largest].name


@dataclass(frozen=True, kw_only=True)
class VolumePictures:
    """The three planes in a row, once per kind of picture."""

    pictures: dict[str, np.ndarray]
    """RGBA by ``image``, ``labels``, ``reference``, ``difference``, ``uncertainty``."""
    axial: np.ndarray
    """RGBA: the labels in the axial plane alone, for a thumbnail."""
    centre: tuple[int, ...]
    """Voxel that the planes go through, array order."""
    seen: tuple[np.ndarray, ...]
    """The labels in the planes, to know which classes the legend needs."""
    bounds: tuple[float, float]
    """Values shown black and white."""
    range: str
    """What these values are."""
    place: str
    """Where the planes are, in words."""
    notes: tuple[str, ...]
    extents: ClassExtents


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """One plane as sampled, turned upright."""

    name: str
    letters: tuple[str, str, str, str]
    """At the left, right, top and bottom."""
    millimetres: tuple[float, float]
    """Height and width."""
    values: np.ndarray
    valid: np.ndarray
    labels: np.ndarray
    reference: np.ndarray | None
    uncertainty: np.ndarray | None
    ids: np.ndarray | None


def volume_pictures(
    read: Readers,
    geometry: VolumeGeometry,
    classes: Sequence[Class],
    nodata: int | None,
    width: int,
    channel: int,
) -> VolumePictures:
    """Cut, turn upright, draw, and lay the planes side by side at one scale."""
    extents = structure_extents(read.labels, geometry.shape, classes, nodata)
    centre, name = extents.centre()
    cuts = [_cut(view, read, geometry, centre, channel, width) for view in _VIEWS]
    every = np.concatenate([c.values.ravel() for c in cuts])
    seen = np.concatenate([c.valid.ravel() for c in cuts])
    bounds, what = tissue_limits(every, seen)
    room = width - 2 * _GAP
    scale = min(
        room / sum(c.millimetres[1] for c in cuts), 0.75 * width / max(c.millimetres[0] for c in cuts)
    )
    drawn = [_draw(cut, scale, bounds, classes, nodata) for cut in cuts]
    pictures = {key: _compose([d[key] for d in drawn], cuts, 1 / scale) for key in drawn[0]}
    notes = [CONVENTION]
    matrix = geometry.matrix[:3, :3] / np.linalg.norm(geometry.matrix[:3, :3], axis=0)
    if np.abs(matrix).max(axis=0).min() < _OBLIQUE:
        notes.append("The volume is oblique: planes follow its own axes, named for the closest.")
    arrays = [c.labels for c in cuts] + [c.reference for c in cuts if c.reference is not None]
    place = f"through the median voxel of {name}" if name else "through the middle of the volume"
    return VolumePictures(
        pictures=pictures, axial=drawn[0]["labels"], centre=centre, seen=tuple(a.ravel() for a in arrays),
        bounds=bounds, range=what, place=place, notes=tuple(notes), extents=extents,
    )  # fmt: skip


def _draw(
    cut: _Cut, scale: float, bounds: tuple[float, float], classes: Sequence[Class], nodata: int | None
) -> dict[str, np.ndarray]:
    """A cut's pictures by key, at ``scale`` pixels a millimetre."""
    size = (max(1, int(cut.millimetres[0] * scale)), max(1, int(cut.millimetres[1] * scale)))
    base = resize(stretch(cut.values[None], cut.valid, [bounds]), size, smooth=True)
    labels = resize(cut.labels, size, smooth=False)
    reference = None if cut.reference is None else resize(cut.reference, size, smooth=False)
    ids = None if cut.ids is None else resize(cut.ids, size, smooth=False)
    pictures = layers(base, labels, reference, classes, nodata, ids)
    if cut.uncertainty is not None:
        pictures["uncertainty"] = heat(resize(cut.uncertainty, size, smooth=False), labels, nodata)
    return pictures


def structure_extents(
    read_labels: ArrayReader, shape: tuple[int, ...], classes: Sequence[Class], nodata: int | None
) -> ClassExtents:
    """Where the classes are that are not background, in one pass over slabs."""
    kept = [c for c in classes if not c.background and c.value != nodata]
    counts = [np.zeros((len(kept), n), dtype=np.int64) for n in shape]
    step = max(1, SLAB_ELEMENTS // max(1, shape[1] * shape[2]))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        labels = np.asarray(read_labels(Box((start, 0, 0), (stop, shape[1], shape[2]))))
        found = set(np.unique(labels).tolist())
        for index, item in enumerate(kept):
            if item.value in found:
                mask = labels == item.value
                counts[0][index, start:stop] += mask.sum(axis=(1, 2))
                counts[1][index] += mask.sum(axis=(0, 2))
                counts[2][index] += mask.sum(axis=(0, 1))
    return ClassExtents(tuple(kept), tuple(counts))


def tissue_limits(values: np.ndarray, valid: np.ndarray) -> tuple[tuple[float, float], str]:
    """Black and white of a volume's picture, in stored values, and how to call them.

    Where a fifth or more of the planes is air (values within a twentieth of the bottom of the
    range), percentiles are taken above the threshold midway between the means of both sides, so
    that the patient and not the air has the contrast.
    """
    (low, high) = limits(values[None], valid)[0]
    seen = values[valid & np.isfinite(values)]
    air = seen <= low + (high - low) / 20
    if seen.size == 0 or air.mean() < _AIR or high <= low:
        return (low, high), "2nd to 98th percentile of the planes"
    threshold = (low + high) / 2
    for _ in range(20):
        above = seen > threshold
        threshold = float(seen[above].mean() + seen[~above].mean()) / 2
    inside = limits(seen[None], seen > threshold)[0]
    return inside, "2nd to 98th percentile of the planes without air"


def _cut(
    view: PlaneView,
    read: Readers,
    geometry: VolumeGeometry,
    centre: tuple[int, ...],
    channel: int,
    width: int,
) -> _Cut:
    anatomy = Anatomy.of(geometry)
    rows, columns = sorted((anatomy.axis[view.top], anatomy.axis[view.left]))
    plane = thinned(geometry.shape, (rows, columns), centre[anatomy.axis[view.across]], width)

    def sampled(reader: ArrayReader | None) -> np.ndarray | None:
        return None if reader is None else anatomy.upright(sample_labels(reader, plane), view)

    values, valid = sample_image(read.image, plane, (channel,))
    return _Cut(
        name=view.name, letters=(*LETTERS[view.left], *LETTERS[view.top]),
        millimetres=anatomy.millimetres(geometry, view), values=anatomy.upright(values[0], view),
        valid=anatomy.upright(valid, view), labels=anatomy.upright(sample_labels(read.labels, plane), view),
        reference=sampled(read.reference), uncertainty=sampled(read.uncertainty), ids=sampled(read.ids),
    )  # fmt: skip


def _compose(planes: Sequence[np.ndarray], cuts: Sequence[_Cut], per_pixel: float) -> np.ndarray:
    """Planes in a row on black, with letters at their sides and the convention below."""
    high = max(p.shape[0] for p in planes)
    wide = sum(p.shape[1] for p in planes) + _GAP * (len(planes) - 1)
    canvas = Image.new("RGBA", (wide, high + _FOOT), (13, 17, 23, 255))
    draw = ImageDraw.Draw(canvas)
    x = 0
    for index, (plane, cut) in enumerate(zip(planes, cuts, strict=True)):
        y = (high - plane.shape[0]) // 2
        shown = scale_bar(plane, per_pixel, "mm") if index == 0 else plane
        picture = Image.fromarray(shown)
        canvas.paste(picture, (x, y), picture)
        rows, columns = plane.shape[:2]
        left, right, top, bottom = cut.letters
        places = (
            ((x + 5, y + rows / 2), left, "lm"),
            ((x + columns - 5, y + rows / 2), right, "rm"),
            ((x + columns / 2, y + 4), top, "mt"),
            ((x + columns / 2, y + rows - 4), bottom, "mb"),
        )
        for place, letter, anchor in places:
            text_with_halo(draw, place, letter, 15, anchor)
        text_with_halo(draw, (x + 6, 5), cut.name, 13, "lt")
        x += columns + _GAP
    text_with_halo(draw, (8, high + _FOOT / 2), CONVENTION, 13, "lm")
    return np.asarray(canvas)
