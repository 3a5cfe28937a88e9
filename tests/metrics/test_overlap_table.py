"""The table of overlaps, tile by tile, and what it refuses."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.errors import SceneError
from segpipe.metrics.tally import MOST_ELEMENTS, SizeScale
from segpipe.objects.overlap_table import VOID, Objects, OverlapTable, overlap_tile, overlaps
from tests.metrics.objects import objects_of, scene_of, seeds, table_of


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=3), seeds, st.integers(1, 12), st.booleans())
def test_any_tiling_and_order_gives_the_same_table(shape, seed, step, geographic):
    rng = np.random.default_rng(seed)
    geometry = scene_of(tuple(shape), geographic)
    predicted = rng.choice([VOID, 0, 0, 1, 7, 2**62], shape)
    reference = rng.choice([-9, 0, 0, 3, 2**40], shape)
    whole = table_of(predicted, reference, geometry=geometry)
    tile = tuple(max(1, (step + i) % 7) for i in range(len(shape)))
    assert table_of(predicted, reference, tile, geometry, order=seed) == whole
    assert OverlapTable.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    # … and it is the joint histogram of the elements with an object
    pairs = Counter(
        zip(predicted.ravel().tolist(), np.maximum(reference, VOID).ravel().tolist(), strict=True)
    )
    expected = {pair: n for pair, n in pairs.items() if max(pair) > 0}
    got = dict(
        zip(zip(whole.predicted.tolist(), whole.reference.tolist(), strict=True), whole.count, strict=True)
    )
    assert got == expected
    assert list(got) == sorted(got)
    sizes = np.broadcast_to(geometry.element_sizes().reshape(-1, *[1] * (len(shape) - 1)), shape)
    for (p, r), units in zip(got, whole.size.tolist(), strict=True):
        here = (predicted == p) & (np.maximum(reference, VOID) == r)
        assert SizeScale.of(geometry).size(units) == pytest.approx(sizes[here].sum(), rel=1e-8)


def test_a_tile_of_another_shape_or_with_ids_too_large_is_refused():
    geometry = scene_of((4, 4))
    ids, scale = np.ones((4, 4), np.uint64), SizeScale.of(geometry)
    with pytest.raises(ValueError, match="another shape"):
        overlap_tile(ids[:3], ids, geometry.box, scale)
    with pytest.raises(SceneError, match=r"reference object id 9223372036854775808: .* 2\*\*63 - 1"):
        overlap_tile(ids, ids << np.uint64(63), geometry.box, scale)
    large = scene_of((MOST_ELEMENTS + 1, 1))
    empty = np.zeros(large.shape, np.uint8)
    with pytest.raises(ValueError, match="at most 4194304"):
        overlap_tile(empty, empty, large.box, SizeScale.of(large))


def test_objects_that_contradict_themselves_are_refused():
    with pytest.raises(SceneError, match="object id 4 occurs twice"):
        Objects.of([4, 2, 4], [1, 1, 2])
    with pytest.raises(SceneError, match="object id 0: ids are above 0"):
        Objects.of([0, 1], [1, 1])
    with pytest.raises(SceneError, match="object 3 has an infinite score"):
        Objects.of([2, 3], [1, 1], [0.5, np.inf])
    with pytest.raises(ValueError, match="2,"):
        Objects.of([2, 3], [1])
    ids = np.array([[1, 5]])
    with pytest.raises(SceneError, match="reference object 5 has elements, but no class"):
        overlaps(
            table_of(ids, ids), objects_of(ids), Objects.of([1, 2], [1, 1]), SizeScale.of(scene_of((1, 2)))
        )
