"""Which objects lie in which regions: cover of each object in each region, tile by tile, exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from segpipe.geometry.box import Box
from segpipe.metrics.tally import SumTable, compact
from segpipe.regions.base import FULL, RegionSet


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
