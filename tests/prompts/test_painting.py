"""Painting in blocks against a painter of the whole scene, and scikit-image's measures of both."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import regionprops

from segpipe.geometry.box import Box, grid_boxes
from segpipe.prompts.masks.patches import Patch
from segpipe.prompts.masks.scene_masks import PatchIndex, RasterisedMasks, rasterise_scene
from tests.instances.scene import by_first
from tests.prompts.patches import placed, random_patch, rectangle

SHAPES = {2: (70, 90), 3: (12, 20, 16)}


def random_masks(rng: np.random.Generator, axes: int, count: int = 25) -> PatchIndex:
    """Objects one over another, some empty, some in part beyond the scene."""
    shape = SHAPES[axes]
    if axes == 2:
        return PatchIndex(
            shape, tuple((random_patch(rng, shape, largest=12),)[: k % 9] for k in range(count))
        )
    objects: list[tuple[Patch, ...]] = []
    for _ in range(count):
        axis, where = int(rng.integers(3)), rng.integers(0, 8)
        across = [n for a, n in enumerate(shape) if a != axis]
        planes = [(axis, int(i)) for i in range(where, where + rng.integers(0, 5))]
        objects.append(tuple(random_patch(rng, across, plane, 5) for plane in planes))
    return PatchIndex(shape, tuple(objects))


def painted_whole(masks: PatchIndex, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Place + 1 in front at each element, the largest mask painted first; elements of the whole masks."""
    covers = [placed(patches, masks.shape) for patches in masks.patches]
    elements = np.array([np.count_nonzero(c) for c in covers])
    worst = [-1.0 if np.isnan(s) else s for s in scores.tolist()]
    front = np.zeros(masks.shape, np.int64)
    for place in sorted(range(len(masks)), key=lambda k: (-elements[k], worst[k], -k)):
        front[covers[place]] = place + 1
    return front, elements


def check_extents(painted: RasterisedMasks, masks: PatchIndex, ids: np.ndarray) -> None:
    """Against scikit-image: objects as they are to be seen, and whole masks."""
    objects = painted.objects
    for place, p in enumerate(regionprops(ids)):
        assert objects.elements[place] == p.area and objects.box(place) == Box(
            p.bbox[: ids.ndim], p.bbox[ids.ndim :]
        )
        assert objects.first[place] == np.flatnonzero(ids == p.label)[0]
        ends = [a == 0 or b == n for a, b, n in zip(p.bbox, p.bbox[ids.ndim :], ids.shape, strict=False)]
        assert objects.touches_edge[place] == any(ends)
    touches = painted.whole.touches_edge(masks.shape)
    for place, patches in enumerate(masks.patches):
        cover = placed(patches, masks.shape)
        [p] = regionprops(cover.astype(np.uint8)) or [None]
        assert painted.whole.elements[place] == np.count_nonzero(cover)
        if p is not None:
            assert painted.whole.first[place] == np.flatnonzero(cover)[0]
            assert (*painted.whole.start[place], *painted.whole.stop[place]) == p.bbox
            inner = cover[tuple(slice(1, -1) for _ in cover.shape)]
            assert touches[place] == (inner.sum() < cover.sum())
        else:
            assert not touches[place]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9999), st.sampled_from([2, 3]), st.data())
def test_blocks_of_any_shape_are_painted_as_the_whole(seed: int, axes: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    masks = random_masks(rng, axes)
    scores = np.round(rng.random(len(masks)), 1)
    scores[::7] = np.nan
    classes = rng.integers(1, 5, len(masks))
    block = data.draw(st.tuples(*(st.integers(3, n + 5) for n in masks.shape)))
    boxes = list(grid_boxes(masks.shape, block))
    painted = rasterise_scene([boxes[k] for k in rng.permutation(len(boxes))], masks, classes, scores)
    front, _ = painted_whole(masks, scores)
    want = by_first(front)
    ids = np.zeros(masks.shape, np.int64)
    for box in grid_boxes(masks.shape, data.draw(st.tuples(*(st.integers(2, n + 5) for n in masks.shape)))):
        ids[box.slices] = painted.ids(box)
    np.testing.assert_array_equal(ids, want)
    firsts = [np.flatnonzero(want == k)[0] for k in range(1, want.max() + 1)]
    assert painted.row.tolist() == [front.flat[f] - 1 for f in firsts]
    assert painted.objects.classes.tolist() == classes[painted.row].tolist()
    np.testing.assert_array_equal(painted.objects.scores, scores[painted.row])
    everything = [*painted.row, *painted.hidden, *painted.small]
    assert sorted(everything) == list(range(len(masks)))
    assert not painted.whole.elements[painted.small].any() and painted.whole.elements[painted.hidden].all()
    check_extents(painted, masks, want)


def squares() -> PatchIndex:
    """A lake with an islet, a mask that the two of another pair cover, and a lake's equal."""
    lake, islet = rectangle((5, 5), (25, 25)), rectangle((10, 10), (12, 13))
    under, left, right = (rectangle((30, x), (34, x + w)) for x, w in ((0, 8), (0, 4), (4, 4)))
    equal = rectangle((5, 15), (25, 35))
    return PatchIndex((40, 40), tuple((p,) for p in (lake, islet, under, left, right, equal)))


def run(scores: list[float], **more: object) -> tuple[np.ndarray, RasterisedMasks]:
    masks = squares()
    whole = [Box.whole(masks.shape)]
    painted = rasterise_scene(whole, masks, np.arange(6), np.array(scores), **more)  # type: ignore[arg-type]
    return painted.ids(whole[0]), painted


def test_smaller_objects_are_in_front_whatever_their_score() -> None:
    ids, painted = run([0.9, 0.1, 0.9, 0.1, 0.1, 0.8])
    assert ids.dtype == np.uint32
    assert painted.row.tolist() == [0, 5, 1, 3, 4]
    assert painted.hidden.tolist() == [2] and painted.small.tolist() == []
    assert (ids[10:12, 10:13] == 3).all() and ids[9, 10] == 1
    assert (ids[5:25, 15:25] == 1).all() and (ids[5:25, 25:35] == 2).all()  # as large: the higher score
    assert painted.objects.elements.tolist() == [394, 200, 6, 16, 16]
    assert painted.whole.elements.tolist() == [400, 6, 32, 16, 16, 400]
    assert painted.objects.touches_edge.tolist() == [False, False, False, True, False]
    swapped, _ = run([float("nan"), 0.1, 0.9, 0.1, 0.1, 0.0])
    assert (swapped[5:25, 15:25] == 2).all()  # none is lower than any score
    first, _ = run([0.5] * 6)
    assert (first[5:25, 15:25] == 1).all()  # the first that is listed


def test_masks_of_too_few_elements_are_not_painted() -> None:
    ids, painted = run([0.5] * 6, minimum=17)
    assert painted.small.tolist() == [1, 3, 4] and painted.hidden.tolist() == []
    assert painted.row.tolist() == [0, 5, 2]
    assert (ids[10:12, 10:13] == 1).all() and (ids[30:34, 0:8] == 3).all()


def test_elements_without_data_are_no_object() -> None:
    there = np.ones((40, 40), bool)
    there[:, 20:] = False
    there[30:34, :4] = False
    ids, painted = run([0.5] * 6, valid=lambda box: there[box.slices])
    assert not ids[~there].any() and (ids[5:25, 5:20] > 0).all()
    assert painted.hidden.tolist() == [2, 3, 5]
    assert painted.objects.elements.tolist() == [20 * 15 - 6, 6, 16]
    assert painted.whole.elements[3] == 16


def test_a_scene_without_objects() -> None:
    masks = PatchIndex((8, 9), ((), ()))
    painted = rasterise_scene([Box.whole((8, 9))], masks, np.zeros(2, np.int64), np.zeros(2))
    assert len(painted.objects) == 0 and painted.small.tolist() == [0, 1]
    assert not painted.ids(Box((1, 2), (8, 9))).any()
    none = rasterise_scene([Box.whole((8, 9))], PatchIndex((8, 9), ()), np.zeros(0, np.int64), np.zeros(0))
    assert len(none.objects) == 0 and not none.ids(Box.whole((8, 9))).any()
    with pytest.raises(ValueError, match="one a slice"):
        PatchIndex((8, 9), ((rectangle((0, 0), (1, 1)), rectangle((2, 2), (3, 3))),))
