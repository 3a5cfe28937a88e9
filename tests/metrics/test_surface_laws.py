"""Laws of the surface metrics, what is not defined, and what the collector holds and refuses."""

import math
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from segpipe.geometry.box import Box
from segpipe.metrics.overlap import ABSENT_IN_BOTH, NOT_IN_REFERENCE, NOT_PREDICTED
from segpipe.metrics.surface import SurfaceCollector
from segpipe.metrics.tally import NODATA
from segpipe.sources.labels import IGNORED
from tests.metrics.masks import few, measure, measure_labels, pairs, two_pixels

# --- laws -------------------------------------------------------------------------------------


@st.composite
def scenes(draw):
    """Labels and reference of three classes with nodata and ignored elements, and a tile."""
    ndim = draw(st.integers(2, 3))
    shape = draw(st.tuples(*[st.integers(1, 12 if ndim == 2 else 6)] * ndim))
    labels = draw(hnp.arrays(np.int16, shape, elements=st.sampled_from([0, 1, 7, NODATA])))
    reference = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([0, 1, 7, IGNORED])))
    return labels, reference, draw(st.tuples(*[st.integers(1, 7)] * ndim))


@few
@given(scene=scenes(), width=st.sampled_from([0.5, 1.0, 2.6]))
def test_any_tiling_gives_the_same_bits(scene, width):
    labels, reference, tile = scene
    options = {"spacing": (1.3, 0.7, 2.0)[: labels.ndim], "width": width, "classes": (0, 1, 7)}
    whole = measure_labels(labels, reference, **options)
    tiled = measure_labels(labels, reference, **options, tile=tile)
    np.testing.assert_equal(
        {c: asdict(s) for c, s in tiled.items()}, {c: asdict(s) for c, s in whole.items()}
    )


@few
@given(scene=scenes())
def test_class_among_others_is_its_mask_alone(scene):
    """Classes share passes; each is what its own mask gives, invalid elements being background."""
    labels, reference, tile = scene
    valid = (labels != NODATA) & (reference != IGNORED)
    spacing = (1.3, 0.7, 2.0)[: labels.ndim]
    found = measure_labels(labels, reference, spacing, classes=(7, 0), tile=tile)
    for value, surface in found.items():
        alone = measure((labels == value) & valid, (reference == value) & valid, spacing)
        np.testing.assert_equal(asdict(surface), asdict(alone))


@few
@given(case=pairs())
def test_swapping_the_masks_swaps_the_directed_numbers_only(case):
    predicted, actual, spacing = case
    one, other = measure(predicted, actual, spacing), measure(actual, predicted, spacing)
    for a, b in ((one.element, other.element), (one.voxel, other.voxel)):
        assert (a.hausdorff, a.hausdorff95) == (b.hausdorff, b.hausdorff95)
        assert (a.to_reference, a.to_prediction) == (b.to_prediction, b.to_reference)
        assert (a.symmetric, a.dice) == pytest.approx((b.symmetric, b.dice))
    assert one.boundary.iou == other.boundary.iou
    assert one.boundary.f1 == pytest.approx(other.boundary.f1)
    assert one.boundary.precision == other.boundary.recall


@few
@given(case=pairs(both=False))
def test_equal_masks_agree_fully_or_not_at_all(case):
    mask, _, spacing = case
    found = measure(mask, mask, spacing, tolerance=0)
    if mask.any():
        assert (found.voxel.hausdorff, found.element.symmetric) == (0, 0)
        assert (found.voxel.dice, found.element.dice) == (1, 1)
        assert (found.boundary.iou, found.boundary.f1, found.reason) == (1, 1, "")
    else:
        assert found.reason == ABSENT_IN_BOTH


# --- what is not defined ----------------------------------------------------------------------

DISTANCES = ("hausdorff", "hausdorff95", "to_reference", "to_prediction", "symmetric")


@pytest.mark.parametrize(
    ("empty", "reason", "undefined"),
    [("predicted", NOT_PREDICTED, "precision"), ("actual", NOT_IN_REFERENCE, "recall")],
)
@pytest.mark.parametrize("ndim", [2, 3])
def test_one_empty_mask(empty, reason, undefined, ndim):
    """The literature says infinite; here NaN with a reason, and 0 for what has no overlap."""
    masks = {"predicted": np.zeros((8,) * ndim, bool), "actual": np.zeros((8,) * ndim, bool)}
    masks[({"predicted", "actual"} - {empty}).pop()][(4,) * ndim] = True
    found = measure(**masks, spacing=(3.0, 2.0, 1.0)[:ndim])
    for distances in (found.element, found.voxel):
        assert all(math.isnan(getattr(distances, name)) for name in DISTANCES)
        assert distances.dice == 0
        assert getattr(distances, empty) == 0
    assert (found.boundary.iou, found.boundary.f1, found.reason) == (0, 0, reason)
    other = {"precision": "recall", "recall": "precision"}[undefined]
    assert math.isnan(getattr(found.boundary, undefined))
    assert getattr(found.boundary, other) == 0


def test_both_empty():
    nothing = np.zeros((8, 8), bool)
    found = measure(nothing, nothing, (1.0, 1.0))
    for distances in (found.element, found.voxel):
        assert all(math.isnan(getattr(distances, name)) for name in (*DISTANCES, "dice"))
    boundary = found.boundary
    assert all(math.isnan(v) for v in (boundary.iou, boundary.precision, boundary.recall, boundary.f1))
    assert found.reason == ABSENT_IN_BOTH


def test_far_apart_boundaries_have_f1_zero():
    predicted, actual = two_pixels((9, 9), (1, 1), (7, 7))
    assert measure(predicted, actual, (1.0, 1.0), width=2.0).boundary.f1 == 0


def test_nodata_value_of_unsigned_labels():
    labels = np.full((6, 6), 255, dtype=np.uint8)
    labels[:, :4] = 1
    reference = np.ones((6, 6), dtype=np.int64)
    found = measure_labels(labels, reference, (1.0, 1.0), nodata=255)[1]
    assert (found.voxel.hausdorff, found.boundary.iou) == (0, 1)
    assert measure_labels(labels, reference, (1.0, 1.0))[1].voxel.hausdorff == 2


# --- the collector ----------------------------------------------------------------------------


def test_memory_follows_the_surface():
    """Of a 2048² scene, less is held than one byte for each of its elements."""
    size, tile = 2048, 256
    y, x = np.ogrid[:size, :size]
    predicted = (y - 1000) ** 2 + (x - 1000) ** 2 < 700**2
    actual = (y - 1010) ** 2 + (x - 1000) ** 2 < 700**2
    labels, reference = predicted.astype(np.uint8), actual.astype(np.int8)
    tracemalloc.start()
    found = measure_labels(labels, reference, (1.0, 1.0), width=3.0, tile=(tile, tile))[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.voxel.hausdorff == pytest.approx(10, abs=0.5)
    assert peak < size**2


def test_margin_is_what_decides_the_band():
    collector = SurfaceCollector((1,), Box.whole((50, 50)), (2.0, 0.1), {1: 1.0}, 0.3)
    assert collector.margin == (1, 3)
    assert collector.reads(Box((0, 10), (20, 20))) == Box((0, 7), (21, 23))


def test_wrong_use_is_refused():
    scene = Box.whole((4, 4))
    for wrong in (
        {"spacing": (1.0,)},
        {"spacing": (1.0, 0.0)},
        {"width": math.inf},
        {"tolerance": {1: -1.0}},
        {"tolerance": {2: 1.0}},
        {"classes": (-1,), "tolerance": {-1: 1.0}},
        {"classes": (1, 1)},
    ):
        given_ = {"classes": (1,), "spacing": (1.0, 1.0), "tolerance": {1: 1.0}, "width": 1.0} | wrong
        with pytest.raises(ValueError):
            SurfaceCollector(scene=scene, **given_)
    collector = SurfaceCollector((1,), scene, (1.0, 1.0), {1: 1.0}, 1.0)
    half, zeros = Box((0, 0), (2, 4)), np.zeros((3, 4), np.uint8)
    with pytest.raises(ValueError, match="do not cover"):
        collector.add(half, zeros[:2], zeros)
    collector.add(half, zeros, zeros)
    with pytest.raises(ValueError, match="tiles of 8 elements were added; the scene has 16"):
        collector.results()
