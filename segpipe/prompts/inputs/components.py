"""Find the components of a label map, read strip by strip, and make prompts of them.

The answer does not depend on how the map is cut. In memory are one strip of about four million elements (at
least one row or slice), the table of components and, for a place inside, one component of the same size. The
labels of a previous run become the box of every object, and a point inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Literal

import cc3d
import numpy as np
import shapely
from affine import Affine
from scipy.ndimage import distance_transform_edt, find_objects
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from segpipe.errors import SceneError
from segpipe.geometry.alignment import same_grid
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry, RasterGeometry
from segpipe.metrics.tally import compact
from segpipe.objects.outlines import block_pieces, dissolve
from segpipe.prompts.inputs.rows import Attributes, Collector, FileAccount
from segpipe.prompts.inputs.to_grid import ToGrid
from segpipe.prompts.prompt_set import (
    PromptSet,
    element_corners,
    make_boxes,
    make_outlines,
    make_points,
    make_prompts,
)
from segpipe.sources.base import LabelReader
from segpipe.sources.labels import LabelFile

STRIP = 1 << 22
"""Elements of a strip, and of the part of a component in which the deepest element is looked for."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Components:
    """Components in the order of their first elements; all int64."""

    value: np.ndarray
    """(n,) the label."""
    elements: np.ndarray
    """(n,) how many."""
    first: np.ndarray
    """(n,) smallest element, as a position in C order."""
    start: np.ndarray
    """(n, axes) bounding box."""
    stop: np.ndarray
    """(n, axes) one past its last corner."""
    numbers: tuple[np.ndarray, ...]
    """For each strip: the component, from 1, of each of its pieces, and 0 for what is none."""

    def __len__(self) -> int:
        return len(self.value)

    def box(self, item: int) -> Box:
        """Bounding box of a component."""
        return Box(tuple(self.start[item].tolist()), tuple(self.stop[item].tolist()))


def find_components(read: LabelReader, shape: Sequence[int], ids: bool, strip: int = STRIP) -> Components:
    """The components of the labels above 0.

    Args:
        read: labels of a box, whole numbers.
        shape: of the map, (y, x) or (z, y, x).
        ids: elements of one label are one object wherever they lie; else those that touch, also at
            corners (8 or 26 neighbours), are one.
        strip: elements read at once; the answer does not depend on it.
    """
    rows, pairs, counts, values = [], [], [], []
    before: tuple[np.ndarray, np.ndarray] | None = None
    known = 0
    for box in strips(shape, strip):
        labels = _labels(read, box)
        pieces = _pieces(labels, ids)
        table = _table(pieces, labels, box, shape)
        if not ids and before is not None:
            pairs.append(_touching(before, (labels[0], _shifted(pieces[0], known))))
        before = labels[-1], _shifted(pieces[-1], known)
        known += len(table)
        rows.append(table)
        counts.append(len(table))
        values.append(table[:, 0])
    table = np.concatenate(rows)
    groups = np.unique(table[:, 0], return_inverse=True)[1] if ids else joined(pairs, known)
    return _merged(table, groups.reshape(-1), counts, len(shape))


def component_strips(
    read: LabelReader, shape: Sequence[int], ids: bool, found: Components, strip: int = STRIP
) -> Iterator[tuple[Box, np.ndarray]]:
    """The same strips again, each element with the number of its component from 1; 0 none.

    Args as for `find_components`; ``strip`` as it was there.
    """
    for box, numbers in zip(strips(shape, strip), found.numbers, strict=True):
        yield box, numbers[_pieces(_labels(read, box), ids)]


def component_means(
    read: LabelReader, scores: Callable[[Box], np.ndarray], shape: Sequence[int], found: Components
) -> np.ndarray:
    """(n,) mean score of the elements of each component.

    Args:
        read: as for `find_components`, without ids.
        scores: of the elements of a box; NaN counts as 0.
        shape: of the map.
        found: the components.
    """
    total = np.zeros(len(found) + 1)
    for box, number in component_strips(read, shape, False, found):
        total += np.bincount(number.ravel(), np.nan_to_num(scores(box)).ravel(), len(total))
    return np.asarray(total[1:] / found.elements)


def deepest(
    read: LabelReader, found: Components, item: int, ids: bool, spacing: Sequence[float], shape: Sequence[int]
) -> tuple[int, ...]:
    """The element of a component that is farthest from everything else; the first of several.

    Of a component whose box has more than `STRIP` elements, only a part around its first element is
    looked at, so that the answer is inside but may not be the deepest.

    Args:
        read: as for `find_components`.
        found: the components.
        item: which.
        ids: as it was for them.
        spacing: size of an element along each axis, in any unit.
        shape: of the map; what is beyond it is not of the component.
    """
    first = [int(i) for i in np.unravel_index(int(found.first[item]), tuple(shape))]
    box = _part(found.box(item), first)
    labels = read(box)
    inside = labels == found.value[item]
    if not ids:
        pieces = cc3d.connected_components(inside, connectivity=_neighbours(inside.ndim))
        inside = pieces == pieces[tuple(f - a for f, a in zip(first, box.start, strict=True))]
    depth = distance_transform_edt(np.pad(inside, 1), sampling=tuple(spacing))
    place = np.unravel_index(int(depth.argmax()), depth.shape)
    return tuple(int(i) - 1 + a for i, a in zip(place, box.start, strict=True))


def strips(shape: Sequence[int], strip: int = STRIP) -> list[Box]:
    """Boxes of whole rows (or slices) that partition a map."""
    rows = max(1, strip // math.prod(shape[1:]))
    rest, ends = (0,) * (len(shape) - 1), tuple(shape[1:])
    return [Box((a, *rest), (min(a + rows, shape[0]), *ends)) for a in range(0, shape[0], rows)]


def _labels(read: LabelReader, box: Box) -> np.ndarray:
    labels = np.asarray(read(box))
    return np.where(labels > 0, labels, 0)


def _neighbours(ndim: int) -> Literal[8, 26]:
    return 8 if ndim == 2 else 26


def _pieces(labels: np.ndarray, ids: bool) -> np.ndarray:
    """Pieces of one strip, from 1; 0 where the label is 0."""
    if ids:
        known, code = compact(labels)
        return np.asarray(code + (known[0] != 0), np.int64)
    return np.asarray(cc3d.connected_components(labels, connectivity=_neighbours(labels.ndim)), np.int64)


def _shifted(pieces: np.ndarray, known: int) -> np.ndarray:
    """Pieces from 1 as places in the table of all strips; −1 none."""
    return np.where(pieces > 0, pieces + (known - 1), -1)


def _table(pieces: np.ndarray, labels: np.ndarray, box: Box, shape: Sequence[int]) -> np.ndarray:
    """A row a piece: value, elements, first, start, stop."""
    flat = pieces.reshape(-1)
    there = np.flatnonzero(flat)[::-1]
    elements = np.bincount(flat)[1:]
    first = np.zeros(len(elements) + 1, np.int64)
    first[flat[there]] = there  # from the last to the first, which stays
    first = first[1:]
    value = labels.reshape(-1)[first]
    corners = [
        [*(s.start for s in part), *(s.stop for s in part)]
        for part in find_objects(pieces, len(elements))
        if part is not None
    ]
    bounds = np.array(corners, np.int64).reshape(len(elements), 2 * len(shape))
    bounds[:, [0, len(shape)]] += box.start[0]
    offset = box.start[0] * math.prod(shape[1:])
    return np.column_stack((value, elements, first + offset, bounds)).astype(np.int64)


def _touching(before: tuple[np.ndarray, np.ndarray], after: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Pairs (n, 2) of pieces of one label that are neighbours across two adjoining rows or slices.

    Args:
        before: labels and pieces of the last row of a strip.
        after: of the first row of the next one.
    """
    found = []
    for shift in product((-1, 0, 1), repeat=before[0].ndim):
        here = tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(shift, before[0].shape, strict=True))
        there = tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(shift, before[0].shape, strict=True))
        same = (before[0][here] == after[0][there]) & (before[0][here] > 0)
        found.append(np.column_stack((before[1][here][same], after[1][there][same])))
    return np.unique(np.concatenate(found), axis=0)


def joined(pairs: Sequence[np.ndarray], count: int) -> np.ndarray:
    """The group of each of ``count`` pieces of which these pairs are one."""
    one, two = np.concatenate([np.zeros((0, 2), np.int64), *pairs]).T
    graph = coo_array((np.ones(len(one), bool), (one, two)), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1])


def _merged(table: np.ndarray, groups: np.ndarray, counts: Sequence[int], axes: int) -> Components:
    """Rows of pieces as rows of components, and the numbers of these."""
    total = int(groups.max(initial=-1)) + 1
    first = np.full(total, np.iinfo(np.int64).max)
    np.minimum.at(first, groups, table[:, 2])
    order = np.argsort(first)
    rank = np.empty(total, np.int64)
    rank[order] = np.arange(total)
    item = rank[groups]
    value, elements = np.zeros(total, np.int64), np.zeros(total, np.int64)
    value[item] = table[:, 0]
    np.add.at(elements, item, table[:, 1])
    start = np.full((total, axes), np.iinfo(np.int64).max)
    stop = np.zeros((total, axes), np.int64)
    np.minimum.at(start, item, table[:, 3 : 3 + axes])
    np.maximum.at(stop, item, table[:, 3 + axes :])
    ends = np.cumsum(counts)
    numbers = tuple(np.r_[0, item[end - n : end] + 1] for n, end in zip(counts, ends, strict=True))
    return Components(
        value=value, elements=elements, first=first[order], start=start, stop=stop, numbers=numbers
    )


def _part(box: Box, first: Sequence[int]) -> Box:
    """A box, or a part of it around an element on its first face that is no larger than `STRIP`."""
    if box.size <= STRIP:
        return box
    edge = int(STRIP ** (1 / box.ndim))
    start = [
        min(max(f - edge // 2, a), max(a, b - edge))
        for f, a, b in zip(first, box.start, box.stop, strict=True)
    ]
    return Box.at(start, [edge] * box.ndim).intersect(box)


POINT_TOLERANCE = 0.1
"""How near to the deepest place of a polygon its point is, in elements."""


def read_labels(
    path: str | Path,
    geometry: Geometry,
    *,
    ids: bool,
    names: Mapping[int, str] | None = None,
    smallest: int = 1,
) -> tuple[PromptSet, FileAccount]:
    """The objects of a label file (GeoTIFF, NIfTI, …) as prompts; 0 and nodata are none.

    A map's labels may lie on any grid in any CRS, coarser ones too: their components' polygons are taken to
    the scene. A volume's must lie on the scene's grid.

    Args:
        path: of the file.
        geometry: of the scene.
        ids: values are ids of objects, which stay their numbers; else classes, whose connected
            components are numbered from 1 by their first elements.
        names: phrase of each class value.
        smallest: elements of the smallest object that is taken, of the file's grid.

    Raises:
        SceneError: the file cannot be read or is on a grid that cannot be used.
    """
    file = LabelFile(str(path))

    def read(box: Box) -> np.ndarray:
        return file.read(box)[0]

    source = Path(path).name
    try:
        try:
            same_grid(geometry, file.geometry)
        except SceneError as error:
            if not isinstance(geometry, RasterGeometry) or not isinstance(file.geometry, RasterGeometry):
                raise SceneError(f"prompts {source} lie on another grid than the scene: {error}") from error
            return _on_other_grid(read, file.geometry, geometry, source, ids, names or {}, smallest)
        return label_prompts(read, geometry, source, ids=ids, names=names, smallest=smallest)
    finally:
        file.close()


def label_prompts(
    read: LabelReader,
    geometry: Geometry,
    source: str,
    *,
    ids: bool,
    names: Mapping[int, str] | None = None,
    smallest: int = 1,
) -> tuple[PromptSet, FileAccount]:
    """The same from a reader of labels on the scene's grid, such as a label map of the store.

    Args:
        source: what they are, for the account.
    """
    found, kept, objects, remarks = _chosen(read, geometry, ids, smallest)
    spacing = geometry.spacing or (1.0,) * geometry.ndim
    points, boxes = [], []
    for item, number in zip(kept, objects, strict=True):
        place = deepest(read, found, item, ids, spacing, geometry.shape)
        points.append((number, place, True))
        boxes.append((number, *element_corners(found.box(item))))
    axes = geometry.ndim
    prompts, _ = make_prompts(
        make_points(points, axes), make_boxes(boxes, axes), make_outlines([]),
        {o: (names or {}).get(int(found.value[i]), "") for o, i in zip(objects, kept, strict=True)},
    )  # fmt: skip
    used = tuple(range(1, len(kept) + 1))
    return prompts, FileAccount(source=source, given=len(kept), used=used, remarks=remarks)


def _chosen(
    read: LabelReader, geometry: Geometry, ids: bool, smallest: int
) -> tuple[Components, list[int], list[int], tuple[str, ...]]:
    """Components, those that are large enough, their numbers as objects, and what is to be said."""
    found = find_components(read, geometry.shape, ids)
    kept = np.flatnonzero(found.elements >= smallest)
    if ids:
        kept = kept[np.argsort(found.value[kept])]
    objects = found.value[kept].tolist() if ids else list(range(1, len(kept) + 1))
    small = len(found) - len(kept)
    remarks = (f"objects of fewer than {smallest} elements left out: {small}",) if small else ()
    return found, kept.tolist(), objects, remarks


def _on_other_grid(
    read: LabelReader, own: RasterGeometry, geometry: RasterGeometry, source: str, ids: bool,
    names: Mapping[int, str], smallest: int,
) -> tuple[PromptSet, FileAccount]:  # fmt: skip
    """Components as polygons of their own grid, taken to the scene like polygons that were drawn."""
    found, kept, objects, remarks = _chosen(read, own, ids, smallest)
    phrases = tuple(names.get(int(found.value[i]), "") for i in kept)
    attributes = Attributes(tuple(objects), (True,) * len(kept), phrases, remarks)
    to_grid = ToGrid(geometry, own.projection, source)
    collector = Collector(source, geometry, attributes, outlines=False)
    parts = (block_pieces(numbers, box) for box, numbers in component_strips(read, own.shape, ids, found))
    polygons = dissolve(parts, Affine.translation(-0.5, -0.5))[1][kept]
    points = []
    for row, polygon in enumerate(polygons):
        world = shapely.transform(polygon, lambda xy: own.to_world(xy[:, ::-1]))
        placed = to_grid.polygon(world)
        collector.add_polygon(row, placed)
        if not placed.polygon.is_empty:
            points.append((objects[row], inner_point(placed.polygon), True))
    prompts, account = collector.result()
    return replace(prompts, points=make_points(points, 2)), account


def inner_point(polygon: shapely.Geometry) -> tuple[float, float]:
    """Position (y, x) inside a polygon in positions, about as far from its edge as can be."""
    line = shapely.maximum_inscribed_circle(polygon, tolerance=POINT_TOLERANCE)
    x, y = line.coords[0]
    return y, x
