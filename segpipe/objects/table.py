"""The table of a scene's objects: sizes and centroids by id, and their cover of each region, exact."""

from __future__ import annotations

import io
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np

from segpipe.geometry.box import Box
from segpipe.metrics.tally import SizeScale, SumTable, compact
from segpipe.objects.scene_objects import SceneObjects
from segpipe.regions.base import FULL, RegionSet
from segpipe.store.stage import Stage

TABLE = "objects"
"""Name of the part of a stage that holds the table."""


FACTS = "facts"
"""Name of the part with further columns of the objects, a Parquet table by ``id``; few models have any."""


@dataclass(frozen=True, eq=False)
class ObjectTable:
    """Every object of a scene, by id."""

    objects: SceneObjects
    size: np.ndarray
    """(n,) area or volume, int64 in `SizeScale`'s units."""
    sums: np.ndarray
    """(n, axes) sum of the positions of its elements, int64: over `elements` the centroid."""

    @property
    def centroids(self) -> np.ndarray:
        """(n, axes) mean position of the elements' centres, whole numbers at centres; float64."""
        return np.asarray(self.sums / self.objects.elements[:, None])

    def dump(self) -> bytes:
        """All columns, exact."""
        columns = {f.name: getattr(self.objects, f.name) for f in fields(SceneObjects)}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, size=self.size, sums=self.sums, **columns)
        return buffer.getvalue()

    @classmethod
    def load(cls, stage: Stage) -> ObjectTable:
        """Of a stage of joined objects.

        Raises:
            SceneError: another run dropped it.
        """
        return cls.of(stage.read_part(TABLE))

    @classmethod
    def of(cls, data: bytes) -> ObjectTable:
        """The inverse of `dump`."""
        with np.load(io.BytesIO(data)) as found:
            objects = SceneObjects(**{f.name: found[f.name] for f in fields(SceneObjects)})
            return cls(objects, found["size"], found["sums"])


def add_sizes(ids: np.ndarray, box: Box, scale: SizeScale, size: np.ndarray, sums: np.ndarray) -> None:
    """Add a block's elements to the sizes and position sums of their objects, in whole numbers.

    `np.add.at` on int64 is exact for any sum and as fast as `np.bincount`, whose float64 sums are exact
    below 2**53 only: 2048² elements of a scene of 1e6 objects take 0.2 s either way (NumPy 2.4).
    """
    at = np.nonzero(ids)
    which = ids[at].astype(np.int64) - 1
    np.add.at(size, which, scale.rows[at[0] + box.start[0]])
    for axis, place in enumerate(at):
        np.add.at(sums[:, axis], which, place + box.start[axis])


@dataclass(frozen=True, eq=False)
class Members(SumTable):
    """Sums by region and object: one row each, sorted, none twice; int64."""

    KEYS: ClassVar[int] = 2
    region: np.ndarray
    """Index into the region set's names."""
    object: np.ndarray
    """Id, above 0."""
    cover: np.ndarray
    """Elements of the object in the region, in 1/65536."""

    def homes(self, objects: int) -> np.ndarray:
        """For each object 1…n the region (not the whole scene, index 0) that has most of it; −1: none.

        Of regions with the same part of it, the first.
        """
        homes = np.full(objects, -1, np.int64)
        rows = self.region > 0
        region, object_, cover = self.region[rows], self.object[rows], self.cover[rows]
        order = np.lexsort((region, -cover, object_))
        first = order[np.flatnonzero(np.r_[True, np.diff(object_[order]) != 0][: len(order)])]
        homes[object_[first] - 1] = region[first]
        return homes


add = Members.sum


def members_tile(ids: np.ndarray, regions: RegionSet, box: Box) -> Members:
    """The members of one tile.

    Args:
        ids: of objects over the box, 0 none; (y, x) or (z, y, x).
        regions: of the scene.
        box: the tile.
    """
    parts: list[Members] = []
    for cover in regions.cover(box):
        part = ids[cover.box.within(box)].ravel()
        inside = part > 0
        weights = np.full(part.shape, FULL) if cover.fraction is None else cover.fraction.ravel()
        inside &= weights > 0
        found, place = compact(part[inside].astype(np.int64))
        # whole numbers below 2**53, which float64 counts exactly
        sums = np.bincount(place, weights=weights[inside], minlength=len(found)).astype(np.int64)
        region = np.full(len(found), cover.region)
        parts.append(Members.from_columns(region=region, object=found, cover=sums))
    return Members.sum(parts)
