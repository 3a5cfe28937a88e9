"""Objects in arrays, random and by hand, and their overlaps."""

import random

import cc3d
import numpy as np
from hypothesis import strategies as st
from pyproj import CRS
from scipy.ndimage import gaussian_filter
from skimage.measure import label

from segpipe.geometry.box import grid_boxes
from segpipe.geometry.geometry import RasterGeometry, volume_geometry
from segpipe.metrics.tally import SizeScale
from segpipe.objects.overlap_table import VOID, Objects, add, overlap_tile, overlaps

seeds = st.integers(0, 2**32 - 1)
dimensions = st.sampled_from([2, 3])


def scene_of(shape, geographic=False):
    if len(shape) == 3:
        return volume_geometry(shape, np.diag([0.7, 1.1, 2.3, 1]))
    if geographic:
        return RasterGeometry(shape, (0.3, 0, -80, 0, -0.3, 60), CRS("EPSG:4326").to_wkt())
    return RasterGeometry(shape, (2.0, 0, 630534, 0, -2.0, 228114), CRS("EPSG:32616").to_wkt())


def table_of(predicted, reference, tile=None, geometry=None, order=None):
    geometry = geometry or scene_of(predicted.shape)
    boxes = list(grid_boxes(geometry.shape, tile or geometry.shape))
    if order is not None:
        random.Random(order).shuffle(boxes)
    scale = SizeScale.of(geometry)
    return add(overlap_tile(predicted[b.slices], reference[b.slices], b, scale) for b in boxes)


def objects_of(ids, classes=1, scores=None):
    """Every object in an array; ``classes`` and ``scores`` by id, or one class for all."""
    found = np.unique(ids[ids > 0]).tolist()
    return Objects.of(
        found,
        [classes if isinstance(classes, int) else classes[i] for i in found],
        None if scores is None else [scores[i] for i in found],
    )


def pairs_of(predicted, reference, classes=(1, 1), scores=None, geometry=None, **options):
    geometry = geometry or scene_of(predicted.shape)
    return overlaps(
        table_of(predicted, reference, geometry=geometry),
        objects_of(predicted, classes[0], scores),
        objects_of(reference, classes[1]),
        SizeScale.of(geometry),
        **options,
    )


def components(mask):
    """Objects of a mask by faces: scikit-image's in 2D, cc3d's in 3D."""
    if mask.ndim == 2:
        return label(mask, connectivity=1).astype(np.int64)
    return cc3d.connected_components(mask, connectivity=6).astype(np.int64)


def blobs(rng, ndim=2, change=0.5, void=False):
    """Objects of a random field, and of the same field somewhat changed: (predicted, reference)."""
    shape = (40, 47) if ndim == 2 else (14, 15, 16)
    field, other = (gaussian_filter(rng.normal(size=shape), 1.7) for _ in range(2))
    predicted = components(field + change * other > 0.3 * field.std())
    reference = components(field > 0.3 * field.std())
    if void:
        predicted[gaussian_filter(rng.normal(size=shape), 3) > 0.15 * (1.3 - 0.3 * ndim)] = VOID
        reference[gaussian_filter(rng.normal(size=shape), 3) > 0.1 * (1.3 - 0.3 * ndim)] = VOID
    return predicted, reference


def classes_of(rng, ids, values=(1, 2, 3)):
    return {i: int(rng.choice(values)) for i in np.unique(ids[ids > 0]).tolist()}


def boxes_at(shape, *slices):
    """Ids 1, 2 … in these places."""
    ids = np.zeros(shape, np.int64)
    for i, place in enumerate(slices, 1):
        ids[place] = i
    return ids
