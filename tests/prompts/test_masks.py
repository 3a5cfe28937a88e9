"""Masks on a scene are what torch's bilinear interpolation makes of them, in whatever box."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.geometry.box import Box
from segpipe.prompts.masks.patches import (
    Patch,
    check_patches,
    crop,
    dump_patches,
    load_patches,
    object_box,
    object_cover,
    patch_box,
    patch_cover,
    tiles,
)
from tests.prompts.patches import interpolated, placed, random_patch

SEEDS = st.integers(0, 9999)


def random_box(rng: np.random.Generator, shape: tuple[int, ...]) -> Box:
    corners = [np.sort(rng.integers(0, n + 1, 2)).tolist() for n in shape]
    return Box(tuple(a for a, _ in corners), tuple(b for _, b in corners))


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([1, 2, 4, 16]))
def test_an_object_cut_out_of_its_window_covers_what_the_window_did(seed: int, scale: int) -> None:
    """The rim is enough: torch interpolates the whole window, we the crop of it."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 12, 2)
    logits = rng.normal(-1, 1.2, size).astype(np.float16).astype(np.float32)
    origin = rng.integers(0, 40, 2).tolist()
    window = Box.at(origin, (size * scale).tolist())
    patch = crop(logits, window, scale, window.stop)
    want = interpolated(logits, scale)
    if patch is None:
        assert not (logits > 0).any() and not want.any()
        return
    np.testing.assert_array_equal(patch_cover(patch, window), want)
    assert patch_box(patch, window.stop) == patch.extent
    rows, columns = (np.flatnonzero((logits > 0).any(axis)) for axis in (1, 0))
    assert patch.logits.shape <= (np.ptp(rows) + 3, np.ptp(columns) + 3)  # no more than the rim


def test_cells_beyond_the_scene_are_no_object() -> None:
    logits = np.full((4, 4), 5, np.float32)
    patch = crop(logits, Box.at((8, 8), (16, 16)), 4, (17, 100))
    assert patch is not None and patch.logits.shape == (3, 4) and patch.extent == Box((8, 8), (20, 24))
    assert patch_box(patch, (17, 100)) == Box((8, 8), (17, 24))
    logits[:3] = -1  # only cells that begin at row 20 are above 0
    assert crop(logits, Box.at((8, 8), (16, 16)), 4, (17, 100)) is None
    assert crop(logits, Box.at((8, 8), (16, 16)), 4, (21, 100)) is not None


def test_float16_keeps_the_sign_of_every_logit() -> None:
    logits = np.array([[1e-12, -1e-12, 1e9, -1e9, 0.0, 3e-8]], np.float32)
    patch = crop(logits, Box((0, 0), (1, 6)), 1, (1, 6))
    assert patch is not None and np.isfinite(patch.logits).all()
    assert patch_cover(patch, Box((0, 0), (1, 6))).tolist() == [[True, False, True, False, False, True]]


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_any_box_gives_the_same_bits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (50, 60)
    patch, box = random_patch(rng, shape), random_box(rng, shape)
    whole = placed([patch], shape)
    np.testing.assert_array_equal(patch_cover(patch, box), whole[box.slices])
    outside = whole.copy()
    outside[patch_box(patch, shape).slices] = False
    assert not outside.any()
    parts = [patch_cover(patch, Box((y, 0), (y + 1, 60))) for y in range(50)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(0, 2))
def test_slices_of_a_volume(seed: int, axis: int) -> None:
    rng = np.random.default_rng(seed)
    shape = (14, 17, 11)
    across = [n for a, n in enumerate(shape) if a != axis]
    indices = rng.choice(shape[axis], 4, replace=False).tolist()
    patches = [random_patch(rng, across, (axis, i), 5) for i in indices]
    check_patches(patches)
    box, whole = random_box(rng, shape), placed(patches, shape)
    np.testing.assert_array_equal(object_cover(patches, box), whole[box.slices])
    hull = object_box(patches, shape)
    assert np.count_nonzero(whole[hull.slices]) == np.count_nonzero(whole)
    with pytest.raises(ValueError, match="one a slice of one axis"):
        check_patches([*patches, patches[0]])
    with pytest.raises(ValueError, match="in a scene of 2 axes"):
        patch_cover(patches[0], Box((0, 0), (3, 3)))


def test_tiles_partition_a_box() -> None:
    for box in (Box((5, 7), (2100, 1040)), Box((1, 2, 3), (40, 300, 600))):
        count = np.zeros(box.shape, np.int8)
        for tile in tiles(box):
            count[tile.within(box)] += 1
        assert (count == 1).all()


def test_memory_follows_the_box_and_not_the_patch() -> None:
    """A patch of 256 × 256 logits over a scene of 262144 × 262144 elements."""
    patch = Patch(1024, (0, 0), np.ones((256, 256), np.float16))
    tracemalloc.start()
    cover = patch_cover(patch, Box.at((100_000, 200_000), (256, 256)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert cover.all() and peak < 4 << 20


def test_patches_come_back_from_bytes_as_they_were() -> None:
    rng = np.random.default_rng(0)
    patches = [random_patch(rng, (5000, 5000), (1, k) if k % 3 else None) for k in range(2000)]
    data = dump_patches(patches)
    back = load_patches(data)
    assert len(back) == len(patches)
    for a, b in zip(patches, back, strict=True):
        assert (a.scale, a.origin, a.plane) == (b.scale, b.origin, b.plane)
        assert a.logits.dtype == b.logits.dtype and a.logits.tobytes() == b.logits.tobytes()
        assert a.logits.shape == b.logits.shape
    assert dump_patches(back) == data
    assert load_patches(dump_patches([])) == ()
