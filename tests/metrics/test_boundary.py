"""Boundary metrics by brute force."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist

from segpipe.metrics.surface_distances import MOST_SHIFTS, band_margin
from tests.metrics.masks import box_mask, few, measure, pairs


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
