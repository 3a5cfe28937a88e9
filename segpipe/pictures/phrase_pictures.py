"""A picture of each phrase of a prompted run: its objects filled and outlined, everything else dim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL.ImageColor import getrgb

from segpipe.config.card import Class
from segpipe.geometry.geometry import VolumeGeometry
from segpipe.pictures.anatomical_planes import UP, Anatomy, ClassExtents
from segpipe.pictures.archive import Panel
from segpipe.pictures.axial_slices import lettered, sample_slices, slice_name
from segpipe.pictures.drawing import edges, webp
from segpipe.pictures.sampling import Plane, Readers

if TYPE_CHECKING:
    from segpipe.objects.scene_objects import SceneObjects

MOST = 12
"""Phrases with a picture: the first with objects, in the order asked."""
EDGE = 512
"""Longest side of a volume's slice, in pixels."""
DOT = 5
"""Objects smaller than this many pixels of the picture are drawn as dots of this size."""
_QUALITY = 75
_FILL, _OTHERS, _DIM = 0.45, 0.2, 0.55
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601


def phrases_with_objects(classes: Sequence[Class], asked: SceneObjects | None) -> list[Class]:
    """The classes with an object, in their order; none without a table of objects."""
    found = set() if asked is None else set(np.unique(asked.classes).tolist())
    return [c for c in classes if c.value in found and not c.background]


def shown_phrases(classes: Sequence[Class], asked: SceneObjects | None) -> list[Class]:
    """Those that get a picture."""
    return phrases_with_objects(classes, asked)[:MOST]


def left_out(classes: Sequence[Class], asked: SceneObjects | None) -> list[str]:
    """A note where some phrases have no picture."""
    number = len(phrases_with_objects(classes, asked))
    return [f"Pictures are of the first {MOST} of {number} phrases with objects."] if number > MOST else []


def highlighted(
    base: np.ndarray,
    labels: np.ndarray,
    shown: Class,
    classes: Sequence[Class],
    nodata: int | None,
    ids: np.ndarray | None,
) -> np.ndarray:
    """RGBA: one class filled and outlined over the picture, which is darker and greyer around it.

    Args:
        base: RGBA (rows, columns, 4).
        labels: class values (rows, columns).
        shown: the class.
        classes: all of them; objects of the others are seen as a faint veil.
        nodata: the label of elements without data.
        ids: of objects; each is outlined, also against its neighbour of the same class.
    """
    ground = [c.value for c in classes if c.background]
    mine = labels == shown.value
    others = ~mine & ~np.isin(labels, ground if nodata is None else [*ground, nodata])
    below = np.where(base[..., 3:] > 0, base[..., :3], 255).astype(np.float32)
    color = np.array(getrgb(shown.color), dtype=np.float32)
    dim = _DIM * (below + (below @ _LUMA)[..., None]) / 2
    dim[others] += _OTHERS * (255 - dim[others])
    filled = (1 - _FILL) * below + _FILL * color
    line = mine & edges(np.where(mine, labels if ids is None else ids, 0))
    picture = np.where(mine[..., None], filled, dim)
    picture[line] = color
    alpha = np.where(mine | others, 255, base[..., 3]).astype(np.uint8)
    return np.dstack([picture.round().astype(np.uint8), alpha])


def small_objects(
    asked: SceneObjects | None, value: int, plane: Plane, steps: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """(n, 2) rows and columns of the picture, float64: middles of boxes of objects too small to be seen.

    Args:
        asked: all objects; None: there are none.
        value: the class.
        plane: how the scene was thinned.
        steps: −1 where rows or columns were turned around, else 1.
        size: of the picture, (rows, columns).
    """
    if asked is None:
        return np.zeros((0, 2))
    own = asked.take(asked.classes == value)
    per_cell = np.array(size) / np.array(plane.size)
    scale = per_cell / np.array(plane.factors)  # pixels of the picture per element
    small = ((own.stop - own.start) * scale).max(axis=1, initial=0) < DOT
    middle = (own.start[small] + own.stop[small]) / 2 * scale
    return np.asarray(np.where(np.array(steps) < 0, np.array(size) - middle, middle))


def spotted(picture: np.ndarray, places: np.ndarray, color: str) -> np.ndarray:
    """The RGBA picture with a dot at each of the (n, 2) places, dark around its colour."""
    result = picture.copy()
    reach = DOT // 2 + 1
    offsets = np.mgrid[-reach : reach + 1, -reach : reach + 1].reshape(2, -1).T
    distance = np.hypot(*offsets.T)
    limit = np.array(picture.shape[:2])
    at = np.unique(np.floor(places).astype(int), axis=0)
    for radius, shade in ((DOT / 2 + 1, (16, 20, 26)), (DOT / 2, getrgb(color))):
        for offset in offsets[distance <= radius]:
            spots = at + offset
            rows, columns = spots[((spots >= 0) & (spots < limit)).all(axis=1)].T
            result[rows, columns] = (*shade, 255)
    return result


def phrase_slices(
    read: Readers,
    geometry: VolumeGeometry,
    shown: Sequence[Class],
    extents: ClassExtents,
    classes: Sequence[Class],
    nodata: int | None,
    bounds: tuple[float, float],
    channel: int,
) -> list[tuple[Class, np.ndarray, str]]:
    """The axial slice with most voxels of each phrase, upright, with square millimetres; read in one pass.

    Ties go to the smallest index; a phrase without a voxel has none.

    Returns:
        phrase, RGBA and where the slice is.
    """
    across = Anatomy.of(geometry).axis[UP]
    counts = {c.value: extents.along(c.value, across) for c in shown}
    drawn = [c for c in shown if counts[c.value].any()]
    if not drawn:
        return []
    at = np.unique([int(counts[c.value].argmax()) for c in drawn])
    sampled = sample_slices(read, geometry, at, bounds, channel, EDGE)
    result = []
    for item in drawn:
        index = int(counts[item.value].argmax())
        base, own, outlined = sampled(int(np.searchsorted(at, index)))
        picture = lettered(highlighted(base, own, item, classes, nodata, outlined))
        opaque = np.full((*picture.shape[:2], 1), 255, np.uint8)
        result.append((item, np.dstack([picture, opaque]), f"{slice_name(geometry, index)}, has most of it."))
    return result


def phrase_panels(drawn: Sequence[tuple[Class, np.ndarray, str]]) -> tuple[Panel, ...]:
    """Panels of phrases: the title is the phrase, the caption where the picture is, if anywhere special."""
    panels = []
    for number, (item, picture, place) in enumerate(drawn):
        high, wide = picture.shape[:2]
        said = f"{item.name}: its objects are filled and outlined, everything else is dim. {place}".strip()
        content = webp(picture, _QUALITY)
        panels.append(
            Panel(
                key=f"phrase-{number:02d}", title=item.name, caption=place, alt=said, content=content,
                width=wide, height=high, kind="webp",
            )
        )  # fmt: skip
    return tuple(panels)
