"""Hold masks of single objects: logits around them on a window's lattice, and their cover of native boxes.

An element is object where the logits, taken between the centres of cells bilinearly and clamped at the
patch's edge, are above 0: what ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``
makes of the whole patch. It is reckoned from global positions in float64, element by element, so a box
changes no bit. A scale is a power of two, so weights are exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from segpipe.geometry.box import Box, grid_boxes
from segpipe.prompts.prompt_set import dump_arrays, load_arrays

TILE = {2: (1024, 1024), 3: (16, 256, 256)}
"""Shape, by axes, of the parts in which masks of any size are gone through."""
_TINY, _LARGE = (float(getattr(np.finfo(np.float16), name)) for name in ("smallest_subnormal", "max"))


@dataclass(frozen=True, eq=False)
class Patch:
    """One object's mask as a window shows it, cut to the object."""

    scale: int
    """Elements of the scene's plane per logit along each axis: 2**level."""
    origin: tuple[int, int]
    """(y, x) plane element at which the first logit begins."""
    logits: np.ndarray
    """(y, x) float16; above 0 is the object, what is outside the patch is none."""
    plane: tuple[int, int] | None = None
    """Of a volume: the axis that the slice cuts, and its index along it; None: a raster."""

    @property
    def extent(self) -> Box:
        """(y, x) elements of the plane that the logits stand for; may hang over the scene's trailing edge."""
        return Box.at(self.origin, [n * self.scale for n in self.logits.shape])


def crop(
    logits: np.ndarray, window: Box, scale: int, shape: Sequence[int], plane: tuple[int, int] | None = None
) -> Patch | None:
    """The object in a window's logits, with a rim of one logit where there is one; None: no logit is above 0.

    The rim makes the cover that of the window's logits inside the scene: around the object all are 0 or less.
    Cells that lie beyond the scene are left out. Float16 keeps every sign.

    Args:
        logits: (y, x) of the window, floating point.
        window: elements (y, x) of the plane that they stand for.
        scale: elements per logit along each axis.
        shape: (y, x) of the scene, or of the volume's plane.
        plane: of a volume: axis and index of the slice.
    """
    seen = [
        max(0, min(n, -(-(end - a) // scale)))
        for n, a, end in zip(logits.shape, window.start, shape, strict=True)
    ]
    inside = logits[: seen[0], : seen[1]]
    some = inside > 0
    if not some.any():
        return None
    ranges = []
    for axis, count in enumerate(seen):
        at = np.flatnonzero(some.any(axis=1 - axis))
        ranges.append((max(0, int(at[0]) - 1), min(count, int(at[-1]) + 2)))
    (y0, y1), (x0, x1) = ranges
    part = inside[y0:y1, x0:x1]
    half = np.clip(part, -_LARGE, _LARGE).astype(np.float16)
    half[(part > 0) & (half == 0)] = _TINY
    return Patch(scale, (window.start[0] + y0 * scale, window.start[1] + x0 * scale), half, plane)


def patch_box(patch: Patch, shape: Sequence[int]) -> Box:
    """The native elements that could be object.

    Args:
        patch: of the scene.
        shape: of the scene: (y, x), or (z, y, x) where the patch is of a slice.
    """
    return _lift(patch, len(shape)).intersect(Box.whole(shape))


def patch_cover(patch: Patch, box: Box) -> np.ndarray:
    """Which elements of a box are object, bool of the box's shape; the same whatever the box.

    In memory is the common part of the box and the patch.

    Args:
        patch: of the scene.
        box: native elements: (y, x), or (z, y, x) where the patch is of a slice.
    """
    return object_cover((patch,), box)


def object_cover(patches: Iterable[Patch], box: Box) -> np.ndarray:
    """Which elements of a box are object in any of its patches; otherwise as `patch_cover`."""
    cover = np.zeros(box.shape, bool)
    for patch in patches:
        common = box.intersect(_lift(patch, box.ndim))
        if common.size:
            along = [a for a in range(box.ndim) if patch.plane is None or a != patch.plane[0]]
            y, x = (np.arange(common.start[a], common.stop[a]) for a in along)
            found = _object(patch, y, x)
            if patch.plane is not None:
                found = np.expand_dims(found, patch.plane[0])
            cover[common.within(box)] |= found
    return cover


def object_box(patches: Sequence[Patch], shape: Sequence[int]) -> Box:
    """The hull of `patch_box` of all patches; of no size where there are none."""
    boxes = [patch_box(patch, shape) for patch in patches]
    return reduce(Box.hull, boxes) if boxes else Box.whole([0] * len(shape))


def tiles(box: Box) -> Iterator[Box]:
    """Boxes of at most `TILE` that partition a box, in C order."""
    return (part.shift(box.start) for part in grid_boxes(box.shape, TILE[box.ndim]))


def check_patches(patches: Sequence[Patch]) -> None:
    """A raster's object has at most one patch, a volume's at most one a slice, along one axis.

    Raises:
        ValueError: this one has others.
    """
    planes = [patch.plane for patch in patches]
    axes = {plane and plane[0] for plane in planes}
    if len(set(planes)) < len(planes) or len(axes) > 1:
        raise ValueError(f"an object's patches of planes {planes}; valid: one, or one a slice of one axis")


def dump_patches(patches: Sequence[Patch]) -> bytes:
    """All of them, exact; the same patches are the same bytes."""
    shapes = np.array([p.logits.shape for p in patches], np.int64).reshape(-1, 2)
    return dump_arrays(
        True, scale=np.array([p.scale for p in patches], np.int64),
        origin=np.array([p.origin for p in patches], np.int64).reshape(-1, 2),
        plane=np.array([p.plane or (-1, -1) for p in patches], np.int64).reshape(-1, 2), shape=shapes,
        logits=np.concatenate([np.zeros(0, np.float16), *(p.logits.ravel() for p in patches)]),
    )  # fmt: skip


def load_patches(data: bytes) -> tuple[Patch, ...]:
    """The inverse of `dump_patches`."""
    found = load_arrays(data)
    columns = [found[name].tolist() for name in ("scale", "origin", "plane", "shape")]
    logits = found["logits"]
    stops = np.cumsum([y * x for y, x in columns[3]], dtype=np.int64).tolist()
    return tuple(
        Patch(
            scale,
            (origin[0], origin[1]),
            logits[stop - shape[0] * shape[1] : stop].reshape(shape),
            None if plane[0] < 0 else (plane[0], plane[1]),
        )
        for scale, origin, plane, shape, stop in zip(*columns, stops, strict=True)
    )


def slice_box(plane: Box, axis: int, index: int) -> Box:
    """A box (y, x) of the slice at ``index`` across an axis, as a box of the volume."""
    start, stop = list(plane.start), list(plane.stop)
    start.insert(axis, index)
    stop.insert(axis, index + 1)
    return Box(tuple(start), tuple(stop))


def _lift(patch: Patch, axes: int) -> Box:
    """A patch's extent among the scene's axes."""
    if (patch.plane is None) != (axes == 2):
        raise ValueError(f"a patch of plane {patch.plane} in a scene of {axes} axes")
    return patch.extent if patch.plane is None else slice_box(patch.extent, *patch.plane)


def _object(patch: Patch, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Whether elements (y) × (x) of the plane, all inside the patch, are object; bool."""
    if patch.scale == 1:
        return np.asarray(
            patch.logits[y[0] - patch.origin[0] :, x[0] - patch.origin[1] :][: len(y), : len(x)] > 0
        )
    (y0, y1, wy), (x0, x1, wx) = (
        _cells(at, origin, patch.scale, count)
        for at, origin, count in zip((y, x), patch.origin, patch.logits.shape, strict=True)
    )
    near = patch.logits[y0[0] : y1[-1] + 1, x0[0] : x1[-1] + 1].astype(np.float64)
    some = near > 0
    if some.all() or not some.any():  # so is all that lies between
        return np.full((len(y), len(x)), some[0, 0])
    y0, y1, x0, x1 = y0 - y0[0], y1 - y0[0], x0 - x0[0], x1 - x0[0]
    rows = near[y0] * (1 - wy)[:, None] + near[y1] * wy[:, None]
    return np.asarray(rows[:, x0] * (1 - wx) + rows[:, x1] * wx > 0)


def _cells(at: np.ndarray, origin: int, scale: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The cells before and after the centres of elements along an axis, and the later one's weight."""
    place = np.clip((2 * (at - origin) + 1 - scale) / (2 * scale), 0, count - 1)
    before = place.astype(np.int64)
    return before, np.minimum(before + 1, count - 1), place - before
