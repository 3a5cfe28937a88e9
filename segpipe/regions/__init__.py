"""Where numbers are reported: the whole scene, the polygons of a layer, a grid, or a label atlas."""

from __future__ import annotations

from segpipe.config import Regions
from segpipe.geometry import Geometry
from segpipe.regions.atlas import is_atlas, load_atlas
from segpipe.regions.base import FULL, SCENE, Cover, RegionSet, WholeScene, WithScene
from segpipe.regions.grids import is_grid, load_grid, parse_grid
from segpipe.regions.polygons import load_polygons

__all__ = [
    "FULL",
    "SCENE",
    "Cover",
    "RegionSet",
    "WholeScene",
    "is_grid",
    "load_regions",
    "measured_regions",
    "parse_grid",
]


def load_regions(config: Regions | None, geometry: Geometry) -> RegionSet:
    """The regions of one scene.

    Args:
        config: the job's `regions`; None: the whole scene, as one region named ``scene``.
        geometry: of the scene.

    Raises:
        RequestError: the layer, its attribute or its CRS cannot be used with any scene.
        SceneError: it cannot be used with this one (it misses it, no common CRS, …).
    """
    if config is None:
        return WholeScene(geometry)
    if is_grid(config.path):
        return load_grid(config, geometry)
    if is_atlas(config.path):
        return load_atlas(config, geometry)
    return load_polygons(config, geometry)


def measured_regions(config: Regions | None, geometry: Geometry) -> RegionSet:
    """What is measured: always the whole scene, and first; then the regions asked for.

    Args and errors as for `load_regions`.
    """
    regions = load_regions(config, geometry)
    return regions if config is None else WithScene(geometry, regions)
