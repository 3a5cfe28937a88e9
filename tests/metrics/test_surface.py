"""Surface metrics against surface-distance, MONAI and shapes whose answer is known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance, compute_surface_dice

from tests.metrics.masks import box_mask, few, measure, pairs, two_pixels

# --- surface-distance: its published tests, and the package itself -----------------------------


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


# --- the collector ----------------------------------------------------------------------------


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
