"""Pairs of masks, random and by hand, and their surfaces measured tile by tile."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segpipe.geometry.box import Box, grid_boxes
from segpipe.metrics.surface import SurfaceCollector

few = settings(max_examples=40, deadline=None)


def measure_labels(labels, reference, spacing, tolerance=1.0, width=1.0, classes=(1,), tile=None, **options):
    scene = Box.whole(labels.shape)
    collector = SurfaceCollector(classes, scene, spacing, dict.fromkeys(classes, tolerance), width, **options)
    for box in grid_boxes(labels.shape, tile or labels.shape):
        seen = collector.reads(box).slices
        collector.add(box, labels[seen], reference[seen])
    return collector.results()


def measure(predicted, actual, spacing, tolerance=1.0, width=1.0, tile=None):
    """The one class of two masks."""
    labels, reference = predicted.astype(np.uint8), actual.astype(np.int64)
    return measure_labels(labels, reference, spacing, tolerance, width, tile=tile)[1]


def box_mask(shape, start, stop):
    mask = np.zeros(shape, dtype=bool)
    mask[Box(start, stop).slices] = True
    return mask


@st.composite
def pairs(draw, most_2d=9, most_3d=6, both=True):
    """Two masks of one shape, and a spacing."""
    ndim = draw(st.integers(2, 3))
    most = most_2d if ndim == 2 else most_3d
    shape = draw(st.tuples(*[st.integers(1, most)] * ndim))
    masks = st.tuples(*[hnp.arrays(bool, shape)] * 2)
    if both:
        masks = masks.filter(lambda m: m[0].any() and m[1].any())
    return (*draw(masks), draw(st.tuples(*[st.sampled_from([0.7, 1.0, 1.3, 2.5])] * ndim)))


def two_pixels(shape, first, second):
    actual, predicted = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    actual[first] = predicted[second] = True
    return predicted, actual
