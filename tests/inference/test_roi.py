"""The box of a first model: against laws over random masks, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.config.card import RegionOfInterest
from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import volume_geometry
from segpipe.geometry.grid_map import GridMap, model_grid
from segpipe.inference.roi import _native_box


def roi(margin: float = 0.1, projection: float = 0.02) -> RegionOfInterest:
    return RegionOfInterest(card="first.yaml", margin=margin, projection=projection)


def small_grid(native: tuple[int, ...], mask: tuple[int, ...], orientation: str) -> GridMap:
    """A scene of this shape sampled onto the mask's."""
    return model_grid(volume_geometry(native, np.eye(4)), orientation=orientation, shape=mask)


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """A filled box in a small grid, perhaps with holes."""
    shape = tuple(draw(st.integers(1, 9)) for _ in range(3))
    lows = [draw(st.integers(0, n - 1)) for n in shape]
    highs = [draw(st.integers(a + 1, n)) for a, n in zip(lows, shape, strict=True)]
    mask = np.zeros(shape, bool)
    mask[tuple(slice(a, b) for a, b in zip(lows, highs, strict=True))] = True
    return mask


@settings(max_examples=200, deadline=None)
@given(
    mask=masks(),
    native=st.tuples(*[st.integers(1, 20)] * 3),
    order=st.permutations("RAS"),
    flips=st.tuples(*[st.booleans()] * 3),
    margin=st.sampled_from([0.0, 0.1, 3.0]),
)
def test_a_native_box_is_never_empty_and_lies_in_the_scene(
    mask: np.ndarray, native: tuple[int, ...], order: list[str], flips: tuple[bool, ...], margin: float
) -> None:
    opposite = {"R": "L", "A": "P", "S": "I"}
    codes = "".join(opposite[c] if f else c for c, f in zip(order, flips, strict=True))
    grid = small_grid(native, mask.shape, codes)
    box = _native_box(mask, grid, roi(margin, projection=0.0))
    assert box.size > 0
    assert Box.whole(native).contains(box)
    for axis, along in enumerate(grid.axes):
        planes = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        low, high, count, length = planes[0], planes[-1] + 1, mask.shape[axis], native[along]
        if grid.flips[axis]:
            low, high = count - high, count - low
        start, stop = box.start[along], box.stop[along]
        wide = (high - low) * length / count * margin
        # within rounding of the mask's extent with its margin, wherever that leaves anything
        if (start, stop) != (0, length):
            assert abs(start - max(0, low * length / count - wide)) <= 1.5
            assert abs(stop - min(length, high * length / count + wide)) <= 1.5


@settings(max_examples=100, deadline=None)
@given(mask=masks(), native=st.tuples(*[st.integers(1, 20)] * 3), axis=st.integers(0, 2))
def test_a_mirrored_axis_gives_the_mirrored_box(mask: np.ndarray, native: tuple[int, ...], axis: int) -> None:
    letters = ["S", "A", "R"]
    straight = small_grid(native, mask.shape, "".join(letters))
    letters[axis] = {"S": "I", "A": "P", "R": "L"}[letters[axis]]
    mirrored = small_grid(native, mask.shape, "".join(letters))
    assert straight.axes == mirrored.axes == (0, 1, 2)
    assert [a != b for a, b in zip(straight.flips, mirrored.flips, strict=True)] == [
        a == axis for a in range(3)
    ]
    box = _native_box(mask, straight, roi(projection=0.0))
    other = _native_box(mask, mirrored, roi(projection=0.0))
    for along, length in enumerate(native):
        start, stop = box.start[along], box.stop[along]
        if along == axis:
            start, stop = length - stop, length - start
        assert (other.start[along], other.stop[along]) == (start, stop)


def test_boxes_by_hand() -> None:
    mask = np.zeros((8, 8, 8), bool)
    mask[2:4, 3:5, 6:8] = True
    same = small_grid((8, 8, 8), (8, 8, 8), "SAR")
    assert _native_box(mask, same, roi(margin=0)) == Box((2, 3, 6), (4, 5, 8))
    # margins of one extent a side: 2-4 → 0-6, 3-5 → 1-7, 6-8 → 4-10, cut at the scene's end
    assert _native_box(mask, same, roi(margin=1)) == Box((0, 1, 4), (6, 7, 8))
    twice = small_grid((16, 8, 8), (8, 8, 8), "SAR")
    assert _native_box(mask, twice, roi(margin=0)) == Box((4, 3, 6), (8, 5, 8))
    # one slice, and an axis of two: nothing is left of a quarter of an element, so all of it is taken
    thin = small_grid((1, 2, 8), (8, 8, 8), "SAR")
    box = _native_box(mask, thin, roi(margin=0))
    assert (box.start[0], box.stop[0]) == (0, 1)
    assert (box.start[1], box.stop[1]) == (0, 2)
    assert (box.start[2], box.stop[2]) == (6, 8)
    with pytest.raises(SceneError, match="too little foreground"):
        _native_box(mask, same, roi(projection=0.5))
