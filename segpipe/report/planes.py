"""Three anatomical planes of a volume, upright by the affine, with square millimetres.

Radiological convention: the viewer faces the patient, so the patient's right is on the left of
axial and coronal planes. The sagittal plane is seen from the patient's left: anterior is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel import orientations
from PIL import Image, ImageDraw

from segpipe.boxes import Box
from segpipe.geometry import VolumeGeometry
from segpipe.models.card import Class
from segpipe.report.drawing import layers, limits, resize, scale_bar, stretch, text_with_halo
from segpipe.report.sampling import ArrayReader, ImageReader, sample_image, sample_labels, thinned

CONVENTION = "Radiological convention: the patient's right is on the left."
SLAB_ELEMENTS = 2**24
"""Labels read at once while the largest structure is looked for."""
_RIGHT, _FRONT, _UP = 0, 1, 2  # axes of RAS
_VIEWS = (  # name, RAS axis cut through, RAS axis of the rows (top +), of the columns (left +)
    ("Axial", _UP, _FRONT, _RIGHT),
    ("Coronal", _FRONT, _UP, _RIGHT),
    ("Sagittal", _RIGHT, _UP, _FRONT),
)
_LETTERS = (("R", "L"), ("A", "P"), ("S", "I"))
_GAP, _FOOT, _MARGIN = 8, 26, 18
_AIR = 0.2
_OBLIQUE = 0.99
"""Cosine under which an axis is said to be oblique (8 degrees)."""


@dataclass(frozen=True)
class VolumePictures:
    """The three planes in a row, once per kind of picture."""

    pictures: dict[str, np.ndarray]
    """RGBA by ``image``, ``labels``, ``reference``, ``difference``."""
    seen: tuple[np.ndarray, ...]
    """The labels in the planes, to know which classes the legend needs."""
    bounds: tuple[float, float]
    """Values shown black and white."""
    range: str
    """What these values are."""
    place: str
    """Where the planes are, in words."""
    notes: tuple[str, ...]


@dataclass(frozen=True)
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


def volume_pictures(
    read_image: ImageReader,
    read_labels: ArrayReader,
    read_reference: ArrayReader | None,
    geometry: VolumeGeometry,
    classes: Sequence[Class],
    nodata: int | None,
    width: int,
    channel: int,
) -> VolumePictures:
    """Cut, turn upright, draw, and lay the planes side by side at one scale."""
    centre, name = structure_centre(read_labels, geometry.shape, classes, nodata)
    cuts = [
        _cut(view, read_image, read_labels, read_reference, geometry, centre, channel, width)
        for view in _VIEWS
    ]
    every = np.concatenate([c.values.ravel() for c in cuts])
    seen = np.concatenate([c.valid.ravel() for c in cuts])
    bounds, what = tissue_limits(every, seen)
    room = width - 2 * _GAP
    scale = min(
        room / sum(c.millimetres[1] for c in cuts),
        0.75 * width / max(c.millimetres[0] for c in cuts),
    )
    drawn = []
    for cut in cuts:
        size = (
            max(1, int(cut.millimetres[0] * scale)),
            max(1, int(cut.millimetres[1] * scale)),
        )
        base = resize(stretch(cut.values[None], cut.valid, [bounds]), size, smooth=True)
        labels = resize(cut.labels, size, smooth=False)
        reference = None if cut.reference is None else resize(cut.reference, size, smooth=False)
        drawn.append(layers(base, labels, reference, classes, nodata))
    pictures = {key: _compose([d[key] for d in drawn], cuts, centre, geometry, 1 / scale) for key in drawn[0]}
    notes = [CONVENTION]
    matrix = geometry.matrix[:3, :3] / np.linalg.norm(geometry.matrix[:3, :3], axis=0)
    if np.abs(matrix).max(axis=0).min() < _OBLIQUE:
        notes.append("The volume is oblique: planes follow its own axes, named for the closest.")
    arrays = [c.labels for c in cuts] + [c.reference for c in cuts if c.reference is not None]
    place = f"through the median voxel of {name}" if name else "through the middle of the volume"
    return VolumePictures(pictures, tuple(a.ravel() for a in arrays), bounds, what, place, tuple(notes))


def structure_centre(
    read_labels: ArrayReader, shape: tuple[int, ...], classes: Sequence[Class], nodata: int | None
) -> tuple[tuple[int, ...], str | None]:
    """The median index, along each axis, of the class with most voxels, and its name.

    One pass over slabs; what is kept are counts per class and index. Ties go to the first class.
    The middle of the volume and None where there is no structure.
    """
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
    totals = counts[0].sum(axis=1)
    if not kept or totals.max() == 0:
        return tuple(n // 2 for n in shape), None
    largest = int(totals.argmax())
    half = (int(totals[largest]) + 1) // 2
    middle = (int(np.searchsorted(np.cumsum(c[largest]), half)) for c in counts)
    return tuple(middle), kept[largest].name


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
    view: tuple[str, int, int, int],
    read_image: ImageReader,
    read_labels: ArrayReader,
    read_reference: ArrayReader | None,
    geometry: VolumeGeometry,
    centre: tuple[int, ...],
    channel: int,
    width: int,
) -> _Cut:
    name, across, top, left = view
    anatomy: Any = orientations  # nibabel is typed in parts
    # per voxel axis i, j, k: the closest axis of RAS, and +1 or -1 along it
    world = anatomy.io_orientation(geometry.matrix)
    axis = {int(ras): 2 - voxel for voxel, (ras, _) in enumerate(world)}  # RAS to array axis
    sign = {int(ras): int(direction) for ras, direction in world}
    axes = (min(axis[top], axis[left]), max(axis[top], axis[left]))
    plane = thinned(geometry.shape, axes, centre[axis[across]], width)

    def upright(array: np.ndarray) -> np.ndarray:
        turned = array if axis[top] < axis[left] else array.swapaxes(-1, -2)
        # anatomical plus is up and left, so an index that grows toward it is reversed
        return turned[..., :: -sign[top], :: -sign[left]]

    values, valid = sample_image(read_image, plane, (channel,))
    return _Cut(
        name,
        (*_LETTERS[left], *_LETTERS[top]),
        (
            geometry.shape[axis[top]] * geometry.spacing[axis[top]],
            geometry.shape[axis[left]] * geometry.spacing[axis[left]],
        ),
        upright(values[0]),
        upright(valid),
        upright(sample_labels(read_labels, plane)),
        None if read_reference is None else upright(sample_labels(read_reference, plane)),
    )


def _compose(
    planes: Sequence[np.ndarray],
    cuts: Sequence[_Cut],
    centre: tuple[int, ...],
    geometry: VolumeGeometry,
    per_pixel: float,
) -> np.ndarray:
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
