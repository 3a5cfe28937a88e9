"""Phrases in the field's syntax, envelopes of objects, outlines as masks of a window."""

from __future__ import annotations

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.prompts.phrases import parse_phrases
from segpipe.prompts.prompt_set import (
    PromptSet,
    PromptSource,
    element_corners,
    make_boxes,
    make_outlines,
    make_points,
    make_prompts,
    outline_cover,
)


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("lake . dock . field", ("lake", "dock", "field")),
        ("a cat. a remote control.", ("a cat", "a remote control")),  # Grounding DINO's own example
        ("lake.dock", ("lake", "dock")),
        ("lake\ndock\r\nfield\n", ("lake", "dock", "field")),
        (["lake", "dock . field"], ("lake", "dock", "field")),
        ("a 2.5 m boat . dock.", ("a 2.5 m boat", "dock")),
        ("  small   lake\t. dock", ("small lake", "dock")),
        ("cafe\u0301", ("caf\u00e9",)),
    ],
)
def test_phrases(text, phrases):
    found = parse_phrases(text)
    assert found.phrases == phrases
    assert found.notes == ()


def test_what_is_left_out_is_said():
    found = parse_phrases("Lake . dock . . lake . LAKE . ?? . ")
    assert found.phrases == ("Lake", "dock")
    assert found.notes == (
        "named more than once, looked for once: 'Lake'",
        "no words, left out: '??'",
        "1 empty phrase left out",
    )
    assert parse_phrases(["lake", "", " "]).notes == ("2 empty phrases left out",)


@pytest.mark.parametrize("text", ["", " . ", [], ["\n"], "?"])
def test_no_phrase_is_an_error(text):
    with pytest.raises(RequestError, match=r"found no phrase.*valid: phrases such as"):
        parse_phrases(text)


def test_extents_hold_what_is_positive():
    """Object 4 has a box and a point beside it; object 9 two points; object 12 an outline."""
    points = make_points(
        [(4, (50.0, 60.0), False), (9, (3.0, 1.5), True), (9, (2.0, 7.0), True), (2, (0.0, 0.0), False)], 2
    )
    boxes = make_boxes([(4, (10.5, 20.5), (30.5, 40.5))], 2)
    outlines = make_outlines([(12, shapely.Polygon([(1, 2), (5, 2), (3, 9)]))])
    prompts, lost = make_prompts(points, boxes, outlines, {4: "lake"})
    assert lost == (2,)
    assert prompts.objects.tolist() == [4, 9, 12]
    assert prompts.phrases == ("lake", "", "")
    extents = prompts.extents()
    assert extents.start.tolist() == [[10.5, 20.5], [2.0, 1.5], [2.0, 1.0]]
    assert extents.stop.tolist() == [[30.5, 40.5], [3.0, 7.0], [9.0, 5.0]]


def test_sets_are_numbered_one_after_the_other():
    none = make_boxes([], 2), make_outlines([])
    one, _ = make_prompts(make_points([(4, (2.0, 3.0), True)], 2), *none, {4: "lake"})
    box = make_boxes([(1, (0.0, 0.0), (5.0, 5.0)), (7, (7.0, 7.0), (9.0, 9.0))], 2)
    two, _ = make_prompts(make_points([], 2), box, make_outlines([]), {7: "dock"}, PromptSource.TEXT)
    whole = PromptSet.concatenate([one, two])
    assert whole.objects.tolist() == [1, 2, 3]
    assert whole.phrases == ("lake", "", "dock")
    assert whole.source.tolist() == [PromptSource.DRAWN, PromptSource.TEXT, PromptSource.TEXT]
    assert whole.extents().stop.tolist() == [[2.0, 3.0], [5.0, 5.0], [9.0, 9.0]]
    assert whole.points.objects.tolist() == [1]
    again = PromptSet.load(whole.dump())
    assert again.phrases == whole.phrases
    np.testing.assert_array_equal(again.boxes.start, whole.boxes.start)
    last = whole.of_objects(np.array([1, 3]))
    assert (last.phrases, last.boxes.objects.tolist()) == (("lake", "dock"), [3])


@given(
    st.lists(st.tuples(st.floats(-3, 40), st.floats(-3, 30)), min_size=3, max_size=6),
    st.integers(-8, 8),
    st.integers(-8, 8),
)
@settings(max_examples=25)
def test_outline_cover_is_the_area_in_each_cell(corners, top, left):
    """Against shapely's intersections: a window of 32 × 24 elements, in 8 × 12 cells."""
    polygon = shapely.convex_hull(shapely.MultiPoint(corners))
    if polygon.geom_type != "Polygon":
        return
    box = Box((top, left), (top + 32, left + 24))
    cover = outline_cover(polygon, box, (8, 12))
    (y0, x0), _ = element_corners(box)
    for r in range(8):
        for c in range(12):
            cell = shapely.box(x0 + 2 * c, y0 + 4 * r, x0 + 2 * c + 2, y0 + 4 * r + 4)
            assert abs(cover[r, c] - cell.intersection(polygon).area / 8) < 2e-5


def test_element_corners_are_outer_edges():
    assert element_corners(Box((3, 0), (4, 10))) == ((2.5, -0.5), (3.5, 9.5))
    assert np.subtract(*element_corners(Box((3, 0), (4, 10)))).tolist() == [-1.0, -10.0]
