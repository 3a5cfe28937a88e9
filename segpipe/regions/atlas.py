"""A label atlas as regions: used as it is on the scene's grid, else resampled to the nearest."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyproj import CRS, Transformer
from scipy.ndimage import find_objects

from segpipe.config.cells import CSV_ERRORS, plain_cell
from segpipe.config.job import Regions
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.alignment import element_map, same_grid
from segpipe.geometry.box import Box, grid_boxes
from segpipe.geometry.geometry import Geometry, RasterGeometry, horizontal_crs
from segpipe.regions.base import FULL, Cover, RegionSet, different
from segpipe.sources.labels import LabelFile

READ_LIMIT = 1 << 24
"""Most elements of an atlas read at once; a tile that needs more is halved."""


class AtlasRegions(RegionSet):
    """Regions that a label image draws over one scene; 0 and nodata are no region."""

    def __init__(self, file: LabelFile, scene: Geometry, names: dict[int, str]) -> None:
        self._file = file
        self._map: AtlasMap | None
        try:
            notes = same_grid(scene, file.geometry)
            self._map = None
        except SceneError:
            self._map = AtlasMap(scene, file.geometry)
            notes = ["on another grid than the scene: resampled to the nearest element"]
        self.notes = tuple(f"regions: {note}" for note in notes)
        found, outside = self._scan(scene)
        self._ids = np.array(sorted({*found, *names}), dtype=np.int64)
        self._outside = [outside.get(int(i), 0) for i in self._ids]
        self.names = different(names.get(int(i), str(i)) for i in self._ids)
        text = repr([(int(i), n) for i, n in zip(self._ids, self.names, strict=True)])
        self._names_digest = hashlib.sha256(text.encode()).hexdigest()

    def cover(self, tile: Box) -> Iterator[Cover]:
        """Whole elements only: each has one value."""
        labels = self.labels(tile)
        place = np.minimum(np.searchsorted(self._ids, labels), max(0, len(self._ids) - 1))
        code = np.where(self._ids[place] == labels, place + 1, 0) if len(self._ids) else labels
        for region, slices in enumerate(find_objects(code.astype(np.int32))):
            if slices is None:
                continue
            inside = code[slices] == region + 1
            box = Box(tuple(s.start for s in slices), tuple(s.stop for s in slices))
            fraction = None if inside.all() else inside.astype(np.uint32) * np.uint32(FULL)
            yield Cover(region, box.shift(tile.start), fraction)

    def outside(self, region: int) -> int:
        """Atlas elements whose centre is beyond the scene, by their mean size."""
        return self._outside[region]

    def identity(self) -> dict[str, Any]:
        """Of the file (size, time) and of the names."""
        return {"kind": "atlas", "source": self._file.source.identity, "names": self._names_digest}

    def close(self) -> None:
        """Release the atlas's file."""
        self._file.close()

    def labels(self, tile: Box) -> np.ndarray:
        """Atlas values on the scene's elements, int64; 0 where there is no region."""
        if self._map is None:
            return self._checked(tile)
        index = [np.floor(axis + 0.5).astype(np.int64) for axis in self._map.indices(tile)]
        shape = self._file.geometry.shape
        inside = np.logical_and.reduce(
            [(axis >= 0) & (axis < n) for axis, n in zip(index, shape, strict=True)]
        )
        result = np.zeros(tile.shape, dtype=np.int64)
        if not inside.any():
            return result
        picked = [axis[inside] for axis in index]
        window = Box(tuple(int(axis.min()) for axis in picked), tuple(int(axis.max()) + 1 for axis in picked))
        if window.size > READ_LIMIT and tile.size > 1:
            axis = int(np.argmax(tile.shape))
            half = (tile.start[axis] + tile.stop[axis]) // 2
            first = tile.narrowed(axis, tile.start[axis], half)
            second = tile.narrowed(axis, half, tile.stop[axis])
            return np.concatenate([self.labels(first), self.labels(second)], axis=axis)
        values = self._checked(window)
        offsets = zip(picked, window.start, strict=True)
        result[inside] = values[tuple(axis - start for axis, start in offsets)]
        return result

    def _checked(self, box: Box) -> np.ndarray:
        labels, _ = self._file.read(box)
        if labels.size and labels.min() < 0:
            raise SceneError(f"{self._file.uri}: holds {labels.min()}; region ids are 0 or more")
        return labels

    def _scan(self, scene: Geometry) -> tuple[set[int], dict[int, int]]:
        """Ids in the whole atlas, and the fixed-point cover of each beyond the scene."""
        atlas = self._file.geometry
        back = None if self._map is None else AtlasMap(atlas, scene)
        found: set[int] = set()
        beyond: dict[int, int] = {}
        step = (2048, 2048) if atlas.ndim == 2 else (128, 128, 128)
        for box in grid_boxes(atlas.shape, step):
            labels = self._checked(box)
            found.update(int(i) for i in np.unique(labels))
            if back is None:
                continue
            outside = np.logical_or.reduce(
                [
                    ~((axis >= -0.5) & (axis < n - 0.5))
                    for axis, n in zip(back.indices(box), scene.shape, strict=True)
                ]
            )
            for i, n in zip(*np.unique(labels[outside], return_counts=True), strict=True):
                beyond[int(i)] = beyond.get(int(i), 0) + int(n)
        found.discard(0)
        ratio = FULL if back is None else FULL * back.size_ratio
        return found, {i: round(n * ratio) for i, n in beyond.items()}


class AtlasMap:
    """From the elements of one grid to the indices of another, through space."""

    def __init__(self, start: Geometry, end: Geometry) -> None:
        """Relate two grids.

        Raises:
            SceneError: one is a raster and the other a volume, or only one has a CRS.
        """
        if start.kind != end.kind:
            raise SceneError(f"the scene and its atlas are a {start.kind} and a {end.kind}")
        self._transformer: Transformer | None = None
        if isinstance(start, RasterGeometry) and isinstance(end, RasterGeometry):
            if (start.projection is None) != (end.projection is None):
                raise SceneError(
                    "of the scene and its atlas only one has a CRS and their grids differ; "
                    "put them on one grid, or give both a CRS"
                )
            if start.projection is not None and end.projection is not None:
                first, second = horizontal_crs(start.projection), horizontal_crs(end.projection)
                self._transformer = _transformer(first, second)
        self._start, self._end = start, end
        self._matrix = element_map(start, end)

    @property
    def size_ratio(self) -> float:
        """Size of a start element in end elements; for grids with sizes by row, of their means."""
        if self._start.size_unit == "px":
            return abs(float(np.linalg.det(self._matrix)))
        return float(self._start.element_sizes().mean() / self._end.element_sizes().mean())

    def indices(self, box: Box) -> list[np.ndarray]:
        """Index along each array axis of the end grid (whole at centres) of each element of a box.

        Each is computed from the element's own index alone, so that it does not depend on the box.
        """
        ranges = [np.arange(a, b, dtype=np.float64) for a, b in zip(box.start, box.stop, strict=True)]
        axes = np.meshgrid(*ranges, indexing="ij", sparse=True)[::-1]  # x, y (, z)
        if self._transformer is None:
            found = [
                sum((row[i] * axis for i, axis in enumerate(axes)), start=row[-1])
                for row in self._matrix[:-1]
            ]
        else:
            assert isinstance(self._start, RasterGeometry)
            assert isinstance(self._end, RasterGeometry)
            there: Any = self._start.affine  # takes arrays too, which its types do not say
            x, y = np.broadcast_arrays(*(there @ (axes[0] + 0.5, axes[1] + 0.5)))
            moved = self._transformer.transform(x, y)
            ends = [np.where(np.isfinite(axis), axis, -1e15) for axis in moved]
            found = [axis - 0.5 for axis in ~self._end.affine @ ends]
        far = 2.0**40  # beyond any grid, and safe as an integer
        return [np.clip(np.broadcast_to(axis, box.shape), -far, far) for axis in found[::-1]]


def _transformer(first: CRS, second: CRS) -> Transformer | None:
    return None if first == second else Transformer.from_crs(first, second, always_xy=True)


def open_atlas(config: Regions) -> tuple[LabelFile, dict[int, str]]:
    """The file of an atlas and the names of its regions, before any scene is seen.

    Raises:
        RequestError: `regions.layer` is set, `regions.name` is no CSV with value,name, or the atlas is no
            file of labels.
    """
    if config.layer:
        raise RequestError(f"regions.layer: {config.path} is a label atlas and has no layers")
    names = read_names(config.name) if config.name else {}
    try:
        return LabelFile(config.path), names
    except SceneError as error:
        raise RequestError(f"regions.path: {error}") from error


def load_atlas(config: Regions, geometry: Geometry) -> AtlasRegions:
    """The regions of an atlas over one scene.

    Raises:
        RequestError: as `open_atlas`.
        SceneError: the atlas holds no labels, or cannot be related to the scene.
    """
    file, names = open_atlas(config)
    try:
        regions = AtlasRegions(file, geometry, names)
    except SceneError as error:
        file.close()
        raise SceneError(f"regions.path: {config.path}: {error}") from error
    if not regions.names:
        file.close()
        raise SceneError(f"regions.path: {config.path} holds no region: all its values are 0")
    return regions


DIGITS = 18
"""Of a region's value, which must be one of 64 bits."""


def read_names(path: str) -> dict[int, str]:
    """Region names by value, from a CSV with the columns ``value`` and ``name``.

    Raises:
        RequestError: no such file, another kind of file, a column is missing, or a value is no
            whole number above 0 or stands twice.
    """
    if not path.lower().endswith(".csv"):
        raise RequestError(
            f"regions.name: found {path!r}; for a label atlas, give a CSV with columns value,name"
        )
    try:
        rows = csv.DictReader(Path(path).read_text(encoding="utf-8-sig").splitlines())
        columns = rows.fieldnames = [c.strip() for c in rows.fieldnames or ()]
        numbered = [(rows.line_num, row) for row in rows]
    except CSV_ERRORS as error:
        raise RequestError(f"regions.name: {path} cannot be read ({error})") from error
    if not {"value", "name"} <= set(columns):
        raise RequestError(
            f"regions.name: {path} has columns {', '.join(columns) or 'none'}; needed: value, name"
        )
    names: dict[int, str] = {}
    for line, row in numbered:
        value = (row["value"] or "").strip()
        if not value.isdecimal() or len(value) > DIGITS or int(value) == 0 or int(value) in names:
            raise RequestError(
                f"regions.name: {path} line {line}: found value {value!r}; "
                "each is a whole number above 0 and stands once"
            )
        names[int(value)] = plain_cell((row["name"] or "").strip()) or value
    return names
