"""What the tests of regions share: files of polygons, and cover added up or laid out."""

from pathlib import Path

import geopandas
import numpy as np
import pytest
import shapely
from pyproj import CRS

from segpipe.geometry.box import grid_boxes
from segpipe.regions.base import FULL

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
UTM = CRS("EPSG:32616").to_wkt()


def data(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    return path


def write(path, polygons, crs="EPSG:32616", **attributes):
    frame = geopandas.GeoDataFrame({**attributes, "geometry": polygons}, crs=crs)
    frame.to_file(path)
    return str(path)


def fixed(regions, shape, tile):
    """Fixed-point cover per region, summed over tiles."""
    total = [0] * len(regions.names)
    for box in grid_boxes(shape, tile):
        for cover in regions.cover(box):
            assert box.contains(cover.box)
            whole = cover.fraction is None
            total[cover.region] += cover.box.size * FULL if whole else int(cover.fraction.sum(dtype=np.int64))
    return total


def dense(regions, shape, tile, region=0):
    result = np.zeros(shape, dtype=np.int64)
    for box in grid_boxes(shape, tile):
        for cover in regions.cover(box):
            if cover.region == region:
                result[cover.box.slices] += FULL if cover.fraction is None else cover.fraction
    return result


def star(seed, centre=(50, 40), radius=35, points=11):
    """A simple, star-shaped polygon."""
    rng = np.random.default_rng(seed)
    angles = np.sort(rng.uniform(0, 2 * np.pi, points))
    far = rng.uniform(0.3, 1, points) * radius
    xy = np.column_stack((np.cos(angles), np.sin(angles))) * far[:, None] + centre
    return shapely.make_valid(shapely.Polygon(xy)).buffer(0)
