"""Which objects lie in which regions: cover of each object in each region, tile by tile, exact."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.geometry.box import Box
from segpipe.metrics.tally import compact
from segpipe.regions.base import FULL, RegionSet

_COLUMNS = ("region", "object", "cover")


@dataclass(frozen=True, eq=False)
class Members:
    """Sums by region and object: one row each, sorted, none twice; int64."""

    region: np.ndarray
    """Index into the region set's names."""
    object: np.ndarray
    """Id, above 0."""
    cover: np.ndarray
    """Elements of the object in the region, in 1/65536."""

    @classmethod
    def from_columns(cls, **columns: Any) -> Members:
        """Rows in any order, equal keys added up."""
        region, object_, cover = (np.asarray(columns[name], np.int64).ravel() for name in _COLUMNS)
        order = np.lexsort((object_, region))
        region, object_, cover = region[order], object_[order], cover[order]
        if not len(order):
            return cls(region, object_, cover)
        first = np.flatnonzero(np.r_[True, (np.diff(region) != 0) | (np.diff(object_) != 0)])
        return cls(region[first], object_[first], np.add.reduceat(cover, first))

    def to_json(self) -> dict[str, list[int]]:
        """A JSON object, exact; for receipts."""
        return {name: getattr(self, name).tolist() for name in _COLUMNS}

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


def add(parts: Iterable[Members]) -> Members:
    """The sum over a scene's tiles: the same bits in any order."""
    parts = list(parts)
    nothing = np.zeros(0, np.int64)
    columns = {n: np.concatenate([nothing, *(getattr(p, n) for p in parts)]) for n in _COLUMNS}
    return Members.from_columns(**columns)


def members_tile(ids: np.ndarray, regions: RegionSet, box: Box) -> Members:
    """The members of one tile.

    Args:
        ids: of objects over the box, 0 none; (y, x) or (z, y, x).
        regions: of the scene.
        box: the tile.
    """
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for cover in regions.cover(box):
        part = ids[cover.box.within(box)].ravel()
        inside = part > 0
        weights = np.full(part.shape, FULL) if cover.fraction is None else cover.fraction.ravel()
        inside &= weights > 0
        found, place = compact(part[inside].astype(np.int64))
        # whole numbers below 2**53, which float64 counts exactly
        sums = np.bincount(place, weights=weights[inside], minlength=len(found)).astype(np.int64)
        rows.append((np.full(len(found), cover.region), found, sums))
    nothing = np.zeros(0, np.int64)
    columns = [np.concatenate([nothing, *(row[i] for row in rows)]) for i in range(3)]
    return Members.from_columns(**dict(zip(_COLUMNS, columns, strict=True)))
