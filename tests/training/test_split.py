"""Splits: every element is judged in one fold, and never learned from there or in the buffer around."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_cdt

from segpipe.config.recipe import Split, SplitBy
from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.training.split import Fold

Shapes = dict[str, tuple[int, ...]]
sides = st.integers(1, 23)
rasters = st.dictionaries(st.sampled_from("abcdef"), st.tuples(sides, sides), min_size=1)
volumes = st.dictionaries(st.sampled_from("abc"), st.tuples(*[st.integers(1, 9)] * 3), min_size=1)


def folds_of(split: Split, shapes: Shapes) -> list[Fold]:
    return [Fold.of(split, shapes, apart) for apart in range(split.folds)]


@given(count=st.integers(2, 30), folds=st.integers(2, 6), seed=st.integers(0, 99))
@settings(max_examples=30)
def test_each_scene_is_judged_in_one_fold_and_learned_from_in_the_others(
    count: int, folds: int, seed: int
) -> None:
    shapes: Shapes = {f"s{i}": (3, 4) for i in range(count)}
    split = Split(folds=folds, seed=seed)
    if count < folds:
        with pytest.raises(
            RequestError, match=rf"found {folds}; there are {count} scenes: valid: 2 to {count}"
        ):
            Fold.of(split, shapes, 0)
        return
    judged = np.array([[len(f.judged(name)) for name in shapes] for f in folds_of(split, shapes)])
    learned = np.array([[f.learns(name) for name in shapes] for f in folds_of(split, shapes)])
    assert (judged.sum(0) == 1).all()
    assert (learned == (judged == 0)).all()
    sizes = judged.sum(1)
    assert sizes.max() - sizes.min() <= 1
    fold = folds_of(split, shapes)[0]
    for name in shapes:
        whole = Box.whole(shapes[name])
        assert fold.is_judged(name, whole).all() == (not fold.learns(name))
        assert (fold.is_learned(name, whole) == ~fold.is_judged(name, whole)).all()


@given(
    shapes=rasters | volumes,
    block=st.integers(1, 8),
    buffer=st.integers(0, 5),
    seed=st.integers(0, 99),
    data=st.data(),
)
@settings(max_examples=60)
def test_blocks_are_judged_once_and_the_buffer_is_a_chessboard_distance(
    shapes: Shapes, block: int, buffer: int, seed: int, data: st.DataObject
) -> None:
    split = Split(by=SplitBy.block, folds=2, block=block, buffer=buffer, seed=seed)
    if len(Fold(split, tuple(sorted(shapes)), shapes, None).blocks()) < 2:
        with pytest.raises(RequestError, match=r"there are 1 blocks: .* or a smaller split\.block"):
            Fold.of(split, shapes, 0)
        return
    folds = folds_of(split, shapes)
    name = data.draw(st.sampled_from(sorted(shapes)))
    whole = Box.whole(shapes[name])
    assert (sum(f.is_judged(name, whole).astype(int) for f in folds) == 1).all()
    fold = folds[0]
    judged, learned = fold.is_judged(name, whole), fold.is_learned(name, whole)
    if judged.any():
        away = distance_transform_cdt(~judged, metric="chessboard")
        np.testing.assert_array_equal(learned, away > buffer)
    else:
        assert learned.all()
    start = [data.draw(st.integers(-3, n - 1)) for n in whole.shape]
    box = Box.at(start, [data.draw(st.integers(1, 12)) for _ in start])
    inside = box.intersect(whole)
    np.testing.assert_array_equal(fold.is_judged(name, inside), judged[inside.slices])
    np.testing.assert_array_equal(fold.is_learned(name, inside), learned[inside.slices])
    everywhere = np.argwhere(np.ones(whole.shape, bool))
    np.testing.assert_array_equal(fold.learned_at(name, everywhere), np.argwhere(learned))
    mask = np.zeros(whole.shape, int)
    for judged_box in fold.judged(name):
        mask[judged_box.slices] += 1
    np.testing.assert_array_equal(mask, judged)


def test_the_seed_decides() -> None:
    shapes: Shapes = {f"s{i}": (64, 64) for i in range(9)}

    def judged(seed: int, names: list[str]) -> list[list[Box]]:
        split = Split(by=SplitBy.block, folds=3, block=16, seed=seed)
        fold = Fold.of(split, {n: shapes[n] for n in names}, 1)
        return [fold.judged(n) for n in sorted(names)]

    names = list(shapes)
    assert judged(4, names) == judged(4, names[::-1])
    assert judged(4, names) != judged(5, names)


def test_nothing_kept_apart() -> None:
    fold = Fold.of(Split(folds=5), {"a": (3, 4)}, None)
    assert fold.judged("a") == []
    assert fold.learns("a")
    assert fold.is_learned("a", Box.whole((3, 4))).all()
    assert not fold.is_judged("a", Box.whole((3, 4))).any()


def test_a_raster_of_many_blocks_is_asked_quickly() -> None:
    """One window's question must not walk through all blocks in Python."""
    split = Split(by=SplitBy.block, folds=4, block=8, buffer=3)
    fold = Fold.of(split, {"a": (1600, 1600)}, 0)
    box = Box((1000, 1000), (1256, 1256))
    fold.is_learned("a", box)
    begun = time.process_time()
    for _ in range(20):
        fold.is_learned("a", box)
    assert time.process_time() - begun < 1
