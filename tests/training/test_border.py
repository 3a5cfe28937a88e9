"""Border weights against every pair of elements by hand, and gaps whose width is known."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from scipy.spatial.distance import cdist

from segpipe.training.losses import border_weights


def all_pairs(ids, w0, sigma, spacing):
    """Eq. 2 with the distance from every element to every element of every object."""
    points = np.array(list(product(*map(range, ids.shape)))) * spacing
    flat = ids.ravel()
    objects = [cdist(points, points[flat == i]).min(axis=1) for i in np.unique(flat[flat > 0])]
    if len(objects) < 2:
        return np.zeros(ids.shape)
    first, second = np.sort(objects, axis=0)[:2]
    return np.where(flat > 0, 0, w0 * np.exp(-((first + second) ** 2) / (2 * sigma**2))).reshape(ids.shape)


@st.composite
def scattered(draw):
    """Ids, few and far from 1 … n, some of them touching, some in several parts."""
    shape = draw(st.one_of(st.tuples(*[st.integers(1, 14)] * 2), st.tuples(*[st.integers(1, 6)] * 3)))
    values = st.sampled_from([0, -1, 3, 4, 1_000_000_007])
    ids = draw(arrays(np.int64, shape, elements=values, fill=st.just(0)))
    return ids, tuple(draw(st.sampled_from([0.5, 1.0, 2.5])) for _ in shape)


@settings(max_examples=80, deadline=None)
@given(case=scattered(), sigma=st.sampled_from([0.3, 1.0, 5.0]), w0=st.sampled_from([1.0, 10.0]))
def test_every_pair_of_elements(case, sigma, w0):
    """Also with a sigma so small that most of the image is out of reach: 1.6e-8 of w0 is all that is cut."""
    ids, spacing = case
    found = border_weights(ids, w0, sigma, spacing)
    np.testing.assert_allclose(found, all_pairs(ids, w0, sigma, spacing), rtol=2e-5, atol=2e-8 * w0)


def test_full_distance_transforms_of_many_cells():
    """Cells scattered over an image that is far larger than the reach of one."""
    rng = np.random.default_rng(3)
    ids = np.zeros((300, 400), dtype=np.int32)
    rows, columns = np.indices(ids.shape)
    for label, (row, column) in enumerate(rng.integers(0, ids.shape, size=(40, 2)), start=1):
        cell = (rows - row) ** 2 / rng.integers(9, 200) + (columns - column) ** 2 / rng.integers(9, 200) < 1
        ids[cell] = label
    ids[:, 150:180] = 0  # a gap near the reach
    far = [ndimage.distance_transform_edt(ids != label) for label in np.unique(ids[ids > 0])]
    first, second = np.sort(far, axis=0)[:2]
    expected = np.where(ids > 0, 0, 10 * np.exp(-((first + second) ** 2) / 50))
    found = border_weights(ids)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-7)
    assert expected.max() > 8
    assert found.dtype == np.float32


@pytest.mark.parametrize("gap", [1, 2, 7])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gap_between_two_walls(gap, axis):
    """Across a gap of g elements of edge s, d1 + d2 = (g + 1)·s everywhere."""
    ids = np.zeros((12, 12, 12), dtype=np.uint16)
    walls = np.moveaxis(ids, axis, 0)
    walls[:2], walls[2 + gap :] = 7, 9
    spacing = (2.0, 0.5, 1.0)
    found = np.moveaxis(border_weights(ids, w0=3.0, sigma=4.0, spacing=spacing), axis, 0)
    np.testing.assert_allclose(
        found[2 : 2 + gap], 3 * np.exp(-(((gap + 1) * spacing[axis]) ** 2) / 32), rtol=1e-5
    )
    assert not found[:2].any()
    assert not found[2 + gap :].any()


def test_sigma_is_in_the_unit_of_spacing():
    ids = np.zeros((40, 40), dtype=np.int64)
    ids[5:15, 5:15], ids[18:30, 5:30] = 1, 2
    in_mm = border_weights(ids, sigma=2.5, spacing=(0.5, 0.5))
    np.testing.assert_allclose(in_mm, border_weights(ids, sigma=5.0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "ids", [np.zeros((5, 5), int), np.pad(np.ones((3, 3), int), 4), -np.eye(4, dtype=int)]
)
def test_fewer_than_two_objects_have_no_border(ids):
    assert not border_weights(ids).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": np.zeros((3, 3))}, "ids: found 2 axes of float64"),
        ({"ids": np.zeros(3, int)}, "ids: found 1 axes"),
        ({"sigma": 0.0}, "must be positive and finite"),
        ({"w0": float("nan")}, "must be positive and finite"),
        ({"spacing": (1.0, -1.0)}, "must be positive and finite"),
        ({"spacing": (1.0, 1.0, 1.0)}, "one number for each of 2 axes"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        border_weights(**{"ids": np.zeros((3, 3), int), **arguments})
