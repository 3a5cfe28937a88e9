"""Where numbers are reported: the whole scene, the polygons of a layer, a grid, or a label atlas.

What draws regions is imported where a job has some: geopandas takes most of a second.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from segpipe.config.job import Regions
from segpipe.geometry.geometry import Geometry, RasterGeometry
from segpipe.regions.base import SCENE, RegionSet, WholeScene, WithScene, different, is_atlas, is_grid

if TYPE_CHECKING:
    from segpipe.regions.layer import Layer


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
        from segpipe.regions.grids import load_grid

        return load_grid(config, geometry)
    if is_atlas(config.path):
        from segpipe.regions.atlas import load_atlas

        return load_atlas(config, geometry)
    from segpipe.regions.polygons import load_polygons

    return load_polygons(config, geometry)


def check_regions(config: Regions) -> None:
    """Read what can be read of regions before any scene is seen.

    Raises:
        RequestError: as `load_regions`.
    """
    if is_grid(config.path):
        from segpipe.regions.grids import parse_grid

        parse_grid(config)
    elif is_atlas(config.path):
        from segpipe.regions.atlas import open_atlas

        open_atlas(config)[0].close()
    else:
        from segpipe.regions.layer import read_layer

        read_layer(config)


def region_layer(config: Regions, geometry: Geometry) -> Layer | None:
    """The polygons of a scene's regions as they were given, by the names they are measured under.

    A grid's layer may hold cells that only come near the scene. None where regions are no polygons.
    """
    if not isinstance(geometry, RasterGeometry) or is_atlas(config.path):
        return None
    from segpipe.regions.grids import grid_layer, parse_grid
    from segpipe.regions.layer import read_layer

    grid = is_grid(config.path)
    layer = grid_layer(parse_grid(config), geometry) if grid else read_layer(config)
    return replace(layer, names=different((SCENE, *layer.names))[1:])


def measured_regions(config: Regions | None, geometry: Geometry) -> RegionSet:
    """What is measured: always the whole scene, and first; then the regions asked for.

    Args and errors as for `load_regions`.
    """
    regions = load_regions(config, geometry)
    return regions if config is None else WithScene(geometry, regions)
