"""Axial slices of a volume, labels over the image, to leaf through: small pictures from one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from segpipe.config.card import Class
from segpipe.geometry.geometry import VolumeGeometry
from segpipe.pictures.anatomical_planes import AXIAL, CONVENTION, LETTERS, UP, Anatomy
from segpipe.pictures.archive import SlicePicture, SliceStack
from segpipe.pictures.drawing import jpeg, layers, resize, stretch, text_with_halo
from segpipe.pictures.sampling import Readers, Stack, sample_image, sample_labels

SLICES = 48
EDGE = 256
"""Longest side of a slice, in pixels."""
BYTES = 600_000
"""Most bytes of a stack: quality gives way first, then the number of slices."""
_QUALITIES = (80, 65, 50, 35)


def axial_slices(
    read: Readers,
    geometry: VolumeGeometry,
    classes: Sequence[Class],
    nodata: int | None,
    bounds: tuple[float, float],
    centre: tuple[int, ...],
    channel: int,
) -> SliceStack:
    """At most `SLICES` evenly spaced slices from the feet up, upright, with square millimetres.

    Args:
        read: of the scene; image and labels are streamed once.
        geometry: of the scene.
        classes: values, names and colours.
        nodata: the label of voxels without data.
        bounds: values shown black and white.
        centre: voxel, array order, whose slice is shown first.
        channel: of the image to show.
    """
    anatomy = Anatomy.of(geometry)
    across = anatomy.axis[UP]
    number = geometry.shape[across]
    at = np.unique(((np.arange(SLICES) + 0.5) * number / SLICES).astype(int))
    sampled = sample_slices(read, geometry, at, bounds, channel, EDGE)
    order = range(len(at)) if anatomy.sign[UP] > 0 else range(len(at) - 1, -1, -1)
    drawn, captions = [], []
    for i in order:
        base, shown, outlined = sampled(i)
        drawn.append(lettered(layers(base, shown, None, classes, nodata, outlined)["labels"]))
        captions.append(slice_name(geometry, int(at[i])))
    pictures = _encoded(drawn)
    step = -(-len(drawn) // len(pictures))
    slices = tuple(SlicePicture(p, c) for p, c in zip(pictures, captions[::step], strict=True))
    nearest = [abs(int(at[i]) - centre[across]) for i in order][::step]
    caption = f"Axial slices from the feet up, predicted classes over the image. {CONVENTION}"
    high, wide = drawn[0].shape[:2]
    return SliceStack(
        slices=slices, first=int(np.argmin(nearest)), width=wide, height=high, caption=caption
    )  # fmt: skip


def sample_slices(
    read: Readers,
    geometry: VolumeGeometry,
    at: np.ndarray,
    bounds: tuple[float, float],
    channel: int,
    edge: int,
) -> Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Read axial slices in one pass; return what draws the i-th of them upright, with square millimetres.

    Args:
        read: of the scene.
        geometry: of the scene.
        at: indices of the slices, ascending.
        bounds: values shown black and white.
        channel: of the image to show.
        edge: longest side of a picture, in pixels.

    Returns:
        A function of a place in ``at``: RGBA of the image, labels, and ids of objects (or the labels).
    """
    anatomy = Anatomy.of(geometry)
    across = anatomy.axis[UP]
    sides = anatomy.millimetres(geometry, AXIAL)
    high, wide = (max(1, round(edge * side / max(sides))) for side in sides)
    longest = max(n for axis, n in enumerate(geometry.shape) if axis != across)
    # thinned to between 1 and 2 cells a pixel, the rest is done by resampling
    stack = Stack(geometry.shape, across, tuple(at.tolist()), max(1, longest // edge))
    values, valid = sample_image(read.image, stack, (channel,))
    labels = sample_labels(read.labels, stack)
    ids = labels if read.ids is None else sample_labels(read.ids, stack)

    def draw(i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        base = stretch(anatomy.upright(values[:, i], AXIAL), anatomy.upright(valid[i], AXIAL), [bounds])
        parts = (resize(anatomy.upright(p[i], AXIAL), (high, wide), smooth=False) for p in (labels, ids))
        return resize(base, (high, wide), smooth=True), next(parts), next(parts)

    return draw


def slice_name(geometry: VolumeGeometry, index: int) -> str:
    """Which of the axial slices it is, counted from the feet, and where."""
    anatomy = Anatomy.of(geometry)
    across = anatomy.axis[UP]
    number = geometry.shape[across]
    rank = index + 1 if anatomy.sign[UP] > 0 else number - index
    return f"Slice {rank} of {number}, {_height(geometry, across, index)}"


def _height(geometry: VolumeGeometry, across: int, index: int) -> str:
    """Where the middle of a slice is along RAS's third axis."""
    voxel = [(n - 1) / 2 for n in geometry.shape]
    voxel[across] = index
    millimetres = float(geometry.matrix[2] @ [*voxel[::-1], 1.0])
    return f"{LETTERS[UP][millimetres < 0]} {abs(millimetres):.1f} mm"


def lettered(picture: np.ndarray) -> np.ndarray:
    """RGB on black, with the letters of left and right."""
    alpha = picture[..., 3:].astype(np.float32) / 255
    image = Image.fromarray((picture[..., :3] * alpha).round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    right, left = LETTERS[AXIAL.left]
    text_with_halo(draw, (4, image.height / 2), right, 13, "lm")
    text_with_halo(draw, (image.width - 4, image.height / 2), left, 13, "rm")
    return np.asarray(image)


def _encoded(pictures: Sequence[np.ndarray]) -> list[bytes]:
    """JPEG bytes that fit `BYTES` together."""
    step = 1
    while True:
        for quality in _QUALITIES:
            result = [jpeg(p, quality) for p in pictures[::step]]
            if sum(map(len, result)) <= BYTES or len(result) == 1:
                return result
        step += 1
