"""The pyramid against a list of all its windows, made from the rule alone."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.errors import RequestError
from segpipe.tiling.pyramid import Pyramid, Window

WINDOW = 8


def all_windows(shape):
    """(level, index, origin, edge): edges W·2^l until one holds the scene, origins every half edge."""
    level, edge = 0, WINDOW
    while True:
        axes = []
        for n in shape:
            origins = [0]
            while origins[-1] + edge < n:
                origins.append(origins[-1] + edge // 2)
            axes.append(list(enumerate(origins)))
        for combination in product(*axes):
            yield level, tuple(i for i, _ in combination), tuple(o for _, o in combination), edge
        if all(len(a) == 1 for a in axes):
            return
        level, edge = level + 1, edge * 2


def take(shape, start, stop, margin, least=0):
    """The rule, by trying every window: finest, nearest, smallest."""
    low, high = np.array(start) + 0.5, np.array(stop) + 0.5
    reach = margin * (high - low).max()
    low_m, high_m = np.maximum(low - reach, 0), np.minimum(high + reach, shape)
    centre = (low + high) / 2
    windows = list(all_windows(shape))
    least = min(least, windows[-1][0])
    fitting = [
        (level, float(((np.array(origin) + edge / 2 - centre) ** 2).sum()), index)
        for level, index, origin, edge in windows
        if level >= least and (np.array(origin) <= low_m).all() and (high_m <= np.array(origin) + edge).all()
    ]
    level, _, index = min(fitting)
    return Window(level, index)


@st.composite
def scenes(draw):
    """A shape, and boxes in it with corners at quarters of elements."""
    shape = tuple(draw(st.integers(1, 75)) for _ in range(2))
    boxes = []
    for _ in range(draw(st.integers(1, 6))):
        ends = [sorted((draw(st.integers(0, 4 * n)), draw(st.integers(0, 4 * n)))) for n in shape]
        boxes.append(([a / 4 - 0.5 for a, _ in ends], [b / 4 - 0.5 for _, b in ends]))
    return shape, np.array([a for a, _ in boxes]), np.array([b for _, b in boxes])


@given(scenes(), st.sampled_from([0.0, 0.125, 0.25, 1.0]), st.integers(0, 5))
@settings(max_examples=60)
def test_each_box_takes_the_window_that_the_rule_says(scene, margin, least):
    shape, start, stop = scene
    pyramid = Pyramid(shape, WINDOW, margin)
    levels, indices = pyramid.windows_of(start, stop, least)
    for k in range(len(start)):
        expected = take(shape, start[k], stop[k], margin, least)
        assert Window(int(levels[k]), tuple(indices[k].tolist())) == expected
        assert pyramid.window_of(start[k], stop[k], least) == expected


@given(scenes(), st.floats(0, 1))
@settings(max_examples=40)
def test_held_with_margin_and_no_finer_window_would(scene, margin):
    """The properties themselves, at any margin, up to rounding."""
    shape, start, stop = scene
    pyramid = Pyramid(shape, WINDOW, margin)
    for low, high in zip(start + 0.5, stop + 0.5, strict=True):
        window = pyramid.window_of(low - 0.5, high - 0.5)
        reach = margin * (high - low).max()
        first, last = np.maximum(low - reach, 0), np.minimum(high + reach, shape)
        box = pyramid.box(window)
        assert (np.array(box.start) <= first + 1e-9).all()
        assert (np.array(box.stop) >= last - 1e-9).all()
        finer = [w for w in all_windows(shape) if w[0] < window.level]
        held = [
            (np.array(o) <= first - 1e-9).all() and (np.array(o) + e >= last + 1e-9).all()
            for _, _, o, e in finer
        ]
        assert not any(held)


@given(scenes(), st.randoms(use_true_random=False))
@settings(max_examples=40)
def test_no_order_and_no_neighbour_changes_a_window(scene, random):
    """What is needed is the union of what each needs; each row is answered by its own box alone."""
    shape, start, stop = scene
    pyramid = Pyramid(shape, WINDOW, 0.25)
    windows, which = pyramid.needed(start, stop)
    own = [pyramid.window_of(a, b) for a, b in zip(start, stop, strict=True)]
    assert [windows[k] for k in which] == own
    assert list(windows) == sorted(set(own))
    order = list(range(len(start)))
    random.shuffle(order)
    again, other = pyramid.needed(start[order], stop[order])
    assert again == windows
    assert other.tolist() == which[order].tolist()


@given(st.integers(1, 200), st.integers(1, 200))
@settings(max_examples=40)
def test_the_extent_of_the_pyramid(rows, columns):
    """Levels, counts and boxes are those of the list; none but a scene's only window hangs over by half."""
    pyramid = Pyramid((rows, columns), WINDOW, 0.1)
    listed = list(all_windows((rows, columns)))
    assert pyramid.levels == listed[-1][0] + 1
    assert sum(int(np.prod(pyramid.counts(level))) for level in range(pyramid.levels)) == len(listed)
    for level, index, origin, edge in listed:
        box = pyramid.box(Window(level, index))
        assert box.start == origin
        assert box.shape == (edge, edge)
        for axis, n in enumerate((rows, columns)):
            assert box.stop[axis] - n < edge // 2 or pyramid.counts(level)[axis] == 1


@given(st.floats(0, 1000), st.floats(0, 1000), st.floats(0.1, 1), st.floats(0.1, 1))
@settings(max_examples=40)
def test_half_a_window_is_always_held_on_the_finest_level(y, x, height, width):
    pyramid = Pyramid((1200, 1300), 64, 0.25)
    size = np.array([height, width]) * (32 / 1.5)  # with a margin of a quarter on each side: half a window
    start = np.array([y, x])
    assert pyramid.window_of(start, start + size).level == 0


def test_a_worked_example():
    """W = 8 over 40 × 40, no margin. Origins 0, 4, 8 … on level 0, 0, 8, 16 … on level 1.

    - elements 4…11 are exactly the second window;
    - elements 3…11 are 9 long: level 1, where only the window from 0 begins at or before 3;
    - elements 6…9 fit the second window alone (4…12): those from 0 and 8 cut it;
    - a point in the middle of element 5 (5.5 from the corner) is nearest to the centre of the first (4);
      one at 6 from the corner lies half way between the centres 4 and 8: the smaller.
    """
    pyramid = Pyramid((40, 40), 8, 0.0)
    assert pyramid.levels == 4
    assert pyramid.window_of((3.5, 3.5), (11.5, 11.5)) == Window(0, (1, 1))
    assert pyramid.window_of((2.5, 3.5), (11.5, 11.5)) == Window(1, (0, 0))
    assert pyramid.window_of((5.5, 5.5), (9.5, 9.5)) == Window(0, (1, 1))
    assert pyramid.window_of((5.0, 5.5), (5.0, 5.5)) == Window(0, (0, 0))
    assert pyramid.window_of((-0.5, -0.5), (39.5, 39.5)) == Window(3, (0, 0))


@given(st.integers(0, 3), st.tuples(st.integers(0, 5), st.integers(0, 5)))
@settings(max_examples=20)
def test_window_elements_are_means_of_scene_elements(level, index):
    """The centre of window element w is the mean position of the 2^l elements from origin + w·2^l on."""
    pyramid = Pyramid((4000, 4000), 8, 0.1)
    window = Window(level, index)
    box = pyramid.box(window)
    w = np.arange(8)
    centres = np.array(
        [[np.arange(o + k * 2**level, o + (k + 1) * 2**level).mean() for o in box.start] for k in w]
    )
    ours = pyramid.to_scene(np.column_stack((w, w)).astype(float), window)
    np.testing.assert_array_equal(ours, centres)
    np.testing.assert_array_equal(pyramid.to_window(ours, window), np.column_stack((w, w)))
    edges = np.array([[a - 0.5 for a in box.start], [b - 0.5 for b in box.stop]])
    np.testing.assert_array_equal(pyramid.to_window(edges, window), [[-0.5, -0.5], [7.5, 7.5]])


def test_what_cannot_be_is_refused():
    with pytest.raises(RequestError, match="window: found 7; valid: an even number"):
        Pyramid((10, 10), 7, 0.1)
    with pytest.raises(RequestError, match="margin: found -1"):
        Pyramid((10, 10), 8, -1)
    pyramid = Pyramid((10, 10), 8, 0.1)
    for start, stop in (((11, 0), (12, 1)), ((5, 5), (4, 6)), ((np.nan, 0), (1, 1)), ((-3, 0), (-1, 1))):
        with pytest.raises(ValueError, match="is not in a scene"):
            pyramid.windows_of(np.array([start]), np.array([stop]))
