"""What every set of regions offers: names, and fixed-point cover tile by tile.

Cover is a share of an element in 1/65536 (`FULL` is a whole one), so that sums are integers and
do not depend on their order. Regions may overlap; each is measured for itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry

SCENE = "scene"
"""Name of the region that is the whole scene; every scene has it."""
FULL = 1 << 16
"""Fixed-point cover of an element that lies wholly inside a region."""
GRID, H3 = "grid", "h3"


def is_grid(path: str) -> bool:
    """Whether `regions.path` names a grid and not a file."""
    return path.startswith((f"{GRID}:", f"{H3}:"))


def is_atlas(path: str) -> bool:
    """Whether `regions.path` names a label image, by its suffix; anything else is a layer."""
    from segpipe.sources.uri import NIFTI_SUFFIXES, RASTER_SUFFIXES  # its package reads files: slow

    return path.lower().endswith((*NIFTI_SUFFIXES, *RASTER_SUFFIXES))


@dataclass(frozen=True)
class Cover:
    """How much of each element of a box belongs to one region."""

    region: int
    """Index into `RegionSet.names`."""
    box: Box
    """Elements of the scene; everything of the tile outside it is not covered."""
    fraction: np.ndarray | None
    """uint32 in 1/65536, of the box's shape; None: every element wholly."""


class RegionSet(ABC):
    """The regions of one scene."""

    names: tuple[str, ...]
    """One per region, all different."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know (repaired polygons, a resampled atlas, …)."""
    damaged: tuple[str, ...] = ()
    """Regions that were given and cannot be measured; none of `names`."""

    @abstractmethod
    def cover(self, tile: Box) -> Iterator[Cover]:
        """The regions that touch a tile, in the order of their index, one at a time.

        Always the same bits for the same tile. Another tiling may differ in the last bit of a
        polygon's edge elements, so measure on one fixed lattice (`metrics.tally.measure_tiles`).
        """

    @abstractmethod
    def outside(self, region: int) -> int:
        """Fixed-point cover, in the scene's elements, of the part of a region beyond the scene.

        The whole of a region is what the tallies add up to plus this; 0 also for a region that
        misses the scene (nothing of it is seen either way).
        """

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON object that changes when the regions do: a part of the measure key."""

    def close(self) -> None:  # noqa: B027 (most sets hold nothing open)
        """Release files."""

    def __enter__(self) -> RegionSet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WholeScene(RegionSet):
    """One region: every element of the scene."""

    names = (SCENE,)

    def __init__(self, geometry: Geometry) -> None:
        self._box = geometry.box

    def cover(self, tile: Box) -> Iterator[Cover]:
        """All of the tile that is scene."""
        part = tile.intersect(self._box)
        if part.size:
            yield Cover(0, part, None)

    def outside(self, region: int) -> int:
        """Nothing of the scene is beyond it."""
        return 0

    def identity(self) -> dict[str, Any]:
        """The same for every scene: its shape is in the labels' key."""
        return {"kind": "scene"}


class WithScene(RegionSet):
    """The whole scene first, then the regions that were asked for: totals need no sum over regions."""

    def __init__(self, geometry: Geometry, regions: RegionSet) -> None:
        self._scene = WholeScene(geometry)
        self._regions = regions
        self.names = different((SCENE, *regions.names))
        self.notes, self.damaged = regions.notes, regions.damaged

    def cover(self, tile: Box) -> Iterator[Cover]:
        """The scene's cover, then the regions'."""
        yield from self._scene.cover(tile)
        for cover in self._regions.cover(tile):
            yield Cover(cover.region + 1, cover.box, cover.fraction)

    def outside(self, region: int) -> int:
        """Of the scene nothing; of a region what is beyond it."""
        return 0 if region == 0 else self._regions.outside(region - 1)

    def identity(self) -> dict[str, Any]:
        """That of the regions: the scene is always there."""
        return self._regions.identity()

    def close(self) -> None:
        """Release the regions' files."""
        self._regions.close()


def different(names: Iterable[str]) -> tuple[str, ...]:
    """The same names with `` (2)``, `` (3)``, … after those that stood before."""
    names = tuple(names)
    taken, count = set(names), Counter[str]()
    result = []
    for name in names:
        count[name] += 1
        new = name
        if count[name] > 1:
            while new in taken:
                new = f"{name} ({count[name]})"
                count[name] += new in taken
            taken.add(new)
        result.append(new)
    return tuple(result)
