"""Surface metrics against surface-distance, MONAI, brute force and shapes whose answer is known."""

import math
import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import (
    compute_average_surface_distance,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy import ndimage
from scipy.spatial.distance import cdist

from segpipe.boxes import Box, grid_boxes
from segpipe.metrics.overlap import ABSENT_IN_BOTH, NOT_IN_REFERENCE, NOT_PREDICTED
from segpipe.metrics.surface import SurfaceCollector
from segpipe.metrics.surface_points import MOST_SHIFTS, band_margin
from segpipe.metrics.tally import IGNORED, NODATA

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


# --- surface-distance: its published tests, and the package itself -----------------------------


def two_pixels(shape, first, second):
    actual, predicted = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    actual[first] = predicted[second] = True
    return predicted, actual


@pytest.mark.parametrize(
    ("masks", "spacing"),
    [
        (two_pixels((128, 128), (50, 70), (50, 72)), (2, 1)),
        (two_pixels((64, 64, 128), (50, 60, 70), (50, 60, 72)), (3, 2, 1)),
    ],
)
def test_published_two_pixels_two_mm_apart(masks, spacing):
    """google-deepmind/surface-distance, surface_distance_test.py, test_on_2_pixels_2mm_away."""
    found = measure(*masks, spacing, tolerance=1).element
    assert (found.to_reference, found.to_prediction, found.symmetric) == pytest.approx((1.5, 1.5, 1.5))
    assert (found.hausdorff, found.hausdorff95) == (2, 2)
    assert found.dice == pytest.approx(0.5)
    assert found.predicted == found.actual == 2 ** len(spacing)


def test_published_cubes_shifted_by_one_voxel():
    """surface_distance_test.py, test_two_cubes_shifted_by_one_pixel: to three places, as there."""
    actual = box_mask((100, 100, 100), (0, 0, 0), (50, 100, 100))
    predicted = box_mask((100, 100, 100), (0, 0, 0), (51, 100, 100))
    found = measure(predicted, actual, (2, 1, 1), tolerance=1).element
    assert found.to_prediction == pytest.approx(0.322, abs=5e-4)
    assert found.to_reference == pytest.approx(0.339, abs=5e-4)
    assert (found.hausdorff, found.hausdorff95) == (2, 2)
    assert found.dice == pytest.approx(0.836, abs=5e-4)


@pytest.fixture(scope="module")
def deepmind():
    package = pytest.importorskip("surface_distance")
    with pytest.MonkeyPatch.context() as patch:  # version 0.1 is older than numpy 2
        patch.setattr(np, "Inf", np.inf, raising=False)
        patch.setattr(np, "NaN", np.nan, raising=False)
        yield package


@few
@given(case=pairs(), tolerance=st.sampled_from([0.0, 0.7, 1.0, 1.3, 2.6]))
def test_element_definition_is_deepminds(deepmind, case, tolerance):
    predicted, actual, spacing = case
    oracle = deepmind.compute_surface_distances(actual, predicted, spacing)
    found = measure(predicted, actual, spacing, tolerance).element
    expected = deepmind.compute_average_surface_distance(oracle)
    assert (found.to_prediction, found.to_reference) == pytest.approx(expected, rel=1e-6)
    assert found.hausdorff == pytest.approx(deepmind.compute_robust_hausdorff(oracle, 100))
    # where a share falls on 95 % exactly, the package's answer hangs on its rounding
    low, high = (deepmind.compute_robust_hausdorff(oracle, p) for p in (94.9999, 95.0001))
    assert low * (1 - 1e-9) <= found.hausdorff95 <= high * (1 + 1e-9)
    assert found.dice == pytest.approx(
        deepmind.compute_surface_dice_at_tolerance(oracle, tolerance * (1 + 1e-6)), rel=1e-6
    )
    assert found.predicted == len(oracle["distances_pred_to_gt"])
    assert found.actual == len(oracle["distances_gt_to_pred"])
    weights = [oracle["surfel_areas_gt"], oracle["surfel_areas_pred"]]
    both = np.r_[oracle["distances_gt_to_pred"], oracle["distances_pred_to_gt"]]
    assert found.symmetric == pytest.approx(np.average(both, weights=np.r_[tuple(weights)]), rel=1e-6)


# --- MONAI ------------------------------------------------------------------------------------


@few
@given(case=pairs(), tolerance=st.sampled_from([0.0, 0.7, 1.0, 1.3, 2.6]))
def test_voxel_definition_is_monais(case, tolerance):
    predicted, actual, spacing = case
    found = measure(predicted, actual, spacing, tolerance)
    masks = [torch.from_numpy(m)[None, None].float() for m in (predicted, actual)]

    def oracle(function, one, other, **options):
        return float(function(one, other, include_background=True, spacing=list(spacing), **options))

    voxel = found.voxel
    assert voxel.hausdorff == pytest.approx(oracle(compute_hausdorff_distance, *masks), rel=1e-6)
    assert voxel.hausdorff95 == pytest.approx(
        oracle(compute_hausdorff_distance, *masks, percentile=95), rel=1e-5
    )
    average = compute_average_surface_distance
    assert voxel.to_reference == pytest.approx(oracle(average, *masks), rel=1e-5)
    assert voxel.to_prediction == pytest.approx(oracle(average, *masks[::-1]), rel=1e-5)
    assert voxel.symmetric == pytest.approx(oracle(average, *masks, symmetric=True), rel=1e-5)
    limits = [tolerance * (1 + 1e-6)]
    assert voxel.dice == pytest.approx(
        oracle(compute_surface_dice, *masks, class_thresholds=limits), rel=1e-6
    )
    assert found.element.dice == pytest.approx(
        oracle(compute_surface_dice, *masks, class_thresholds=limits, use_subvoxels=True), rel=1e-5
    )


# --- shapes whose answer is known -------------------------------------------------------------


def test_concentric_spheres():
    spacing, small, large = (0.5, 0.8, 1.0), 8.0, 11.0
    axes = np.meshgrid(*[np.arange(-12, 12.01, s) for s in spacing], indexing="ij")
    radius = np.sqrt(sum(a**2 for a in axes))
    found = measure(radius <= small, radius <= large, spacing, tolerance=large - small + 1)
    voxel = math.hypot(*spacing)
    for distances in (found.element, found.voxel):
        assert distances.hausdorff == pytest.approx(large - small, abs=voxel)
        assert distances.symmetric == pytest.approx(large - small, abs=voxel / 2)
        assert distances.hausdorff >= distances.hausdorff95 >= distances.symmetric
        assert distances.dice == 1
    assert measure(radius <= small, radius <= large, spacing, tolerance=1.0).voxel.dice == 0


def test_shifted_boxes():
    """A 6 × 10 box shifted by 3 columns of 0.7: the far side is 2.1 away, the near rows overlap."""
    actual = box_mask((20, 30), (5, 5), (11, 15))
    predicted = box_mask((20, 30), (5, 8), (11, 18))
    found = measure(predicted, actual, (1.3, 0.7), tolerance=2.1, width=1.4)
    for distances in (found.element, found.voxel):
        assert distances.hausdorff == pytest.approx(2.1)
        assert distances.dice == 1  # 3 × 0.7 is within 2.1
    # 28 edge elements a side. 7 of the other's columns are shared: 2 × 7 on the rows, and its end
    # column crosses the shared part: the ends of those are shared. Sums by hand:
    # own end column: 6 × 2.1; the two columns before it on both rows: 2 × (1.4 + 0.7);
    # the other end lies inside: 4 inner elements at min(2 rows, 3 columns): 1.3, 2.1, 2.1, 1.3
    expected = (6 * 2.1 + 2 * (1.4 + 0.7) + 2 * 1.3 + 2 * 2.1) / 28
    assert found.voxel.to_reference == pytest.approx(expected)
    assert found.voxel.to_prediction == pytest.approx(expected)
    assert found.voxel.predicted == found.voxel.actual == 28
    # within 1.4: all but 6 of the end and the 2 inner ones at 2.1
    assert found.boundary.precision == found.boundary.recall == pytest.approx(20 / 28)
    assert found.boundary.f1 == pytest.approx(20 / 28)


def test_tolerance_of_one_element_holds_far_from_the_origin():
    actual = box_mask((3, 1_000_000), (1, 999_000), (2, 999_900))
    predicted = box_mask((3, 1_000_000), (1, 999_001), (2, 999_901))
    found = measure(predicted, actual, (0.7, 0.7), tolerance=0.7, width=0.7)
    assert found.voxel.dice == found.element.dice == found.boundary.f1 == 1
    assert found.voxel.hausdorff == 0.7


def test_frame_of_a_square_is_its_boundary_band():
    """A band of k pixels of an n × n square holds n² − (n − 2k)² pixels."""
    n, k, shift = 20, 3, 2
    actual = box_mask((40, 40), (5, 5), (5 + n, 5 + n))
    predicted = box_mask((40, 40), (5, 5 + shift), (5 + n, 5 + n + shift))
    found = measure(predicted, actual, (1.0, 1.0), width=float(k)).boundary
    band = n**2 - (n - 2 * k) ** 2
    assert found.predicted == found.actual == band
    # rows of the top and bottom: 2k · (n − s); between them: k − s columns on each side
    common = 2 * k * (n - shift) + 2 * (n - 2 * k) * (k - shift)
    assert found.common == common
    assert found.iou == pytest.approx(common / (2 * band - common))


# --- boundary metrics by brute force ----------------------------------------------------------


def band_by_hand(mask, spacing, width):
    """Elements whose centre is within the width of a centre outside, and edge elements."""
    padded = np.pad(mask, 1)
    inside, outside = (np.argwhere(m) * np.array(spacing) for m in (padded, ~padded))
    near = cdist(inside, outside).min(axis=1) <= width * (1 + 1e-9) if len(inside) else []
    band = np.zeros_like(padded)
    band[padded] = near
    return band[(slice(1, -1),) * mask.ndim] | mask & ~ndimage.binary_erosion(mask)


def shares_by_hand(one, other, spacing, width):
    """Share of the edge elements of one that are within the width of one of the other."""
    edges = [np.argwhere(m & ~ndimage.binary_erosion(m)) * np.array(spacing) for m in (one, other)]
    return np.mean(cdist(*edges).min(axis=1) <= width * (1 + 1e-9))


@few
@given(case=pairs(), width=st.sampled_from([0.3, 0.7, 1.4, 2.5, 3.9]), step=st.integers(1, 5))
def test_boundary_metrics_by_brute_force(case, width, step):
    predicted, actual, spacing = case
    found = measure(predicted, actual, spacing, width=width, tile=(step,) * len(spacing)).boundary
    bands = [band_by_hand(m, spacing, width) for m in (predicted, actual)]
    assert found.iou == (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()
    assert found.precision == pytest.approx(shares_by_hand(predicted, actual, spacing, width))
    assert found.recall == pytest.approx(shares_by_hand(actual, predicted, spacing, width))
    p, r = found.precision, found.recall
    assert found.f1 == pytest.approx(2 * p * r / (p + r) if p + r else 0)


@pytest.mark.parametrize(
    ("spacing", "width", "shape", "tile"),
    [
        ((1.0, 0.8), 20.0, (80, 70), (80, 70)),
        ((1.0, 0.8), 20.0, (80, 70), (16, 23)),
        ((13.0, 1.0, 1.0), 12.0, (3, 34, 36), (2, 34, 10)),  # slices thicker than the width
    ],
)
def test_wide_band_by_brute_force(spacing, width, shape, tile):
    assert np.prod([2 * m + 1 for m in band_margin(spacing, width)]) > MOST_SHIFTS
    masks = []
    for share in (0.3, 0.25):
        mask = box_mask(shape, (0,) * len(shape), (*shape[:-1], shape[-1] - 2))
        mask[tuple(int(share * n) for n in shape)] = False
        masks.append(mask)
    found = measure(*masks, spacing, width=width, tile=tile).boundary
    bands = [band_by_hand(m, spacing, width) for m in masks]
    assert [found.predicted, found.actual] == [b.sum() for b in bands]
    assert found.predicted < masks[0].sum()
    assert found.common == (bands[0] & bands[1]).sum()


@few
@given(case=pairs().filter(lambda c: len(c[2]) == 2))
def test_band_of_one_pixel_is_that_of_the_published_boundary_iou(case):
    """bowenc0221/boundary-iou-api, mask_to_boundary: the mask less its erosion by 3 × 3, zeros around."""
    predicted, actual, _ = case
    bands = [m & ~ndimage.binary_erosion(m, np.ones((3, 3))) for m in (predicted, actual)]
    found = measure(predicted, actual, (1.0, 1.0), width=math.sqrt(2)).boundary
    assert found.iou == (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()


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


@pytest.mark.parametrize(("predicted_there", "actual_there"), [(False, True), (True, False), (False, False)])
def test_published_empty_masks(deepmind, predicted_there, actual_there):
    """surface_distance_test.py, test_empty_prediction_mask, test_empty_gt_mask and test_both_empty_masks.

    The package answers infinity or NaN where a distance is not defined, here NaN with a reason; where it
    answers a number, the same number.
    """
    mask = np.zeros((128, 128, 128), bool)
    mask[50, 60, 70] = True
    predicted, actual = mask & predicted_there, mask & actual_there
    oracle = deepmind.compute_surface_distances(actual, predicted, (3, 2, 1))
    found = measure(predicted, actual, (3, 2, 1), 1.0)
    to_prediction, to_reference = deepmind.compute_average_surface_distance(oracle)
    hausdorff = [deepmind.compute_robust_hausdorff(oracle, percent) for percent in (100, 95)]
    theirs = [to_prediction, to_reference, *hausdorff]
    assert not np.isfinite(theirs).any()
    element = found.element
    ours = [element.to_prediction, element.to_reference, element.hausdorff, element.hausdorff95]
    assert np.isnan(ours).all() and found.reason
    dice = deepmind.compute_surface_dice_at_tolerance(oracle, 1)
    np.testing.assert_equal(element.dice, 0.0 if dice == 0 else np.nan)
    assert np.isnan(dice) == (not predicted_there and not actual_there)
