"""Small measured scenes for the tests of tables."""

import numpy as np
from pyproj import CRS

from segpipe.config.card import Class
from segpipe.geometry.box import grid_boxes
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.metrics.tally import SizeScale, add, measure_tile
from segpipe.regions import load_regions
from segpipe.tables.overlap_tables import SceneTallies

CLASSES = [
    Class(value=0, name="background", color="#000000", background=True),
    Class(value=1, name="water", color="#0000ff"),
    Class(value=7, name="forest", color="#00ff00"),
]
NAMES = ("tp", "fp", "fn", "iou", "dice", "precision", "recall")
SIZES = ("predicted_m2", "reference_m2", "difference_m2", "size_ratio")


def result(name, labels, reference=None, spacing=2.0, tile=None, **more):
    """A scene of 2 m pixels in UTM (or 2 mm voxels), measured tile by tile."""
    labels = np.asarray(labels, dtype=np.uint8)
    if labels.ndim == 2:
        wkt = CRS(32616).to_wkt()
        geometry = RasterGeometry(labels.shape, (spacing, 0, 0, 0, -spacing, 0), wkt)
    else:
        geometry = volume_geometry(labels.shape, np.diag([spacing] * 3 + [1]))
    regions, scale = load_regions(None, geometry), SizeScale.of(geometry)
    truth = None if reference is None else np.asarray(reference)
    tally = add(
        measure_tile(
            labels[b.slices],
            255,
            None if truth is None else truth[b.slices],
            regions,
            b,
            geometry.box,
            scale,
        )
        for b in grid_boxes(labels.shape, tile or labels.shape)
    )
    return SceneTallies(name, regions=regions.names, tally=tally, scale=scale, **more)


def rows(table, *columns):
    return [tuple(row) for row in table[list(columns)].itertuples(index=False)]
