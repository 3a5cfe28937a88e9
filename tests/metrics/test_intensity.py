"""Intensities: exact sums, the same for any tiling and order, and equal to numpy's numbers."""

import json
import random
import time
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.errors import SceneError
from segpipe.geometry.box import Box, grid_boxes
from segpipe.geometry.geometry import volume_geometry
from segpipe.metrics.intensity import (
    BINS,
    FLOAT_POINT,
    Channel,
    Intensity,
    add,
    bin_shift,
    measure_intensity,
    statistics,
)
from segpipe.regions.base import FULL, Cover, RegionSet, WholeScene
from segpipe.sources.base import Pixels, Scaling
from segpipe.tables.record import ClassInfo
from segpipe.tables.scene_tables import Intensities, SceneIntensity, intensity_table

NODATA = 255


class Weighted(RegionSet):
    """The whole scene, then one region with a share of every element."""

    names = ("scene", "weighted")

    def __init__(self, fraction):
        self.fraction = fraction

    def cover(self, tile):
        yield Cover(0, tile, None)
        yield Cover(1, tile, self.fraction[tile.slices])

    def outside(self, region):
        return 0

    def identity(self):
        return {"kind": "weighted"}


def whole(shape):
    return WholeScene(volume_geometry(shape, np.eye(4)))


def measure(values, valid, labels, regions, tile, order=None):
    boxes = list(grid_boxes(labels.shape, tile))
    if order is not None:
        random.Random(order).shuffle(boxes)
    parts = [
        measure_intensity(
            Pixels(values[(slice(None), *b.slices)], valid[b.slices]), labels[b.slices], NODATA, regions, b
        )
        for b in boxes
    ]
    return add(Intensity.from_json(json.loads(json.dumps(p.to_json()))) for p in parts)


def image(rng, kind, shape):
    """Two channels of a dtype, over much of its range and with repeated values."""
    if kind == "f":
        values = rng.standard_normal((2, *shape)) * 10.0 ** rng.integers(-44, 38, (2, *shape))
        values[rng.random(values.shape) < 0.2] = rng.choice([0.0, -0.0, 1.0, 1e-45])
        return values.astype(np.float32)
    dtype = {"u": np.uint8, "i": np.int16, "l": np.int32}[kind]
    limits = np.iinfo(dtype)
    wide = rng.integers(limits.min, limits.max, (2, *shape), endpoint=True)
    narrow = rng.integers(0, 9, (2, *shape))
    return np.where(rng.random(shape) < rng.random(), wide, narrow).astype(dtype)


def scene_of(seed, kind, shape):
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 3, 117, NODATA], np.uint8), shape)
    valid = rng.random(shape) < 0.9
    regions = Weighted(rng.choice(np.array([0, 1, 4711, FULL], np.uint32), shape))
    return image(rng, kind, shape), valid, labels, regions


def exact(value):
    return Fraction(int(value)) if isinstance(value, np.integer) else Fraction(float(value))


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=3).map(tuple),
    st.integers(0, 2**32 - 1),
    st.sampled_from("uilf"),
    st.integers(1, 7),
)
def test_any_tiling_and_order_gives_the_same_and_exact_sums(shape, seed, kind, step):
    values, valid, labels, regions = scene_of(seed, kind, shape)
    answer = measure(values, valid, labels, regions, shape)
    tiles = tuple(1 + (step + i) % 5 for i in range(len(shape)))
    assert measure(values, valid, labels, regions, tiles, order=seed) == answer
    weights = [np.full(shape, FULL), regions.fraction.astype(np.int64)]
    keys = set()
    for region, value, channel in np.ndindex(2, 256, 2):
        here = valid & (labels == value) & (weights[region] > 0) & (labels != NODATA)
        if not here.any():
            continue
        key = region, value, channel
        keys.add(key)
        cell = answer.cells[key]
        w, v = weights[region][here], values[channel][here]
        # rational arithmetic is the oracle
        assert cell.cover == w.sum()
        step_ = 1 << answer.point
        assert Fraction(cell.total, step_) == sum(int(a) * exact(b) for a, b in zip(w, v, strict=True))
        squares = sum(int(a) * exact(b) ** 2 for a, b in zip(w, v, strict=True))
        assert Fraction(cell.squares, step_**2) == squares
        assert (cell.low, cell.high) == (v.min(), v.max())
        assert cell.weights.sum() == cell.cover
        assert cell.bins[-1] - cell.bins[0] < BINS
        width = Fraction(2) ** cell.shift
        places = [int(exact(b) // width) for b in v]
        assert dict(zip(cell.bins.tolist(), cell.weights.tolist(), strict=True)) == {
            p: sum(int(a) for a, q in zip(w, places, strict=True) if q == p) for p in set(places)
        }
    assert set(answer.cells) == keys


@pytest.mark.parametrize("kind", ["narrow", "wide", "float"])
def test_numbers_equal_numpy(kind):
    rng = np.random.default_rng(3)
    shape = (40, 50, 30)
    values = {
        "narrow": rng.normal(40, 60, shape).round().astype(np.int16),
        "wide": rng.integers(-30_000, 30_000, shape).astype(np.int16),
        "float": rng.gamma(2.0, 0.1, shape),
    }[kind]
    labels = rng.choice(np.array([1, 2, NODATA], np.uint8), shape)
    regions = Weighted(rng.integers(0, FULL, shape, endpoint=True).astype(np.uint32))
    answer = measure(values[None], np.ones(shape, bool), labels, regions, (16, 16, 16))
    for region, label in np.ndindex(2, 3):
        if label == 0:
            continue
        here = labels == label
        w = (np.full(shape, FULL) if region == 0 else regions.fraction)[here].astype(np.float64)
        v = values[here].astype(np.float64)
        s = statistics(answer.cells[region, label, 0], answer.point, Scaling())
        mean = np.average(v, weights=w)
        assert s.n == pytest.approx(w.sum() / FULL, rel=1e-12)
        # float64 is rounded to float32 value by value
        near = {"rel": 1e-7 if kind == "float" else 1e-12}
        assert s.mean == pytest.approx(mean, **near)
        assert s.sd == pytest.approx(np.sqrt(np.average((v - mean) ** 2, weights=w)), **near)
        assert (s.min, s.max) == pytest.approx((v[w > 0].min(), v[w > 0].max()), **near)
        expected = np.quantile(v, [0.05, 0.5, 0.95], weights=w, method="inverted_cdf")
        if kind == "narrow":
            assert s.bin == 1
            assert s.percentiles == tuple(expected)  # bins of one value: exact
        else:
            assert np.abs(np.array(s.percentiles) - expected).max() < s.bin
            assert s.bin <= 4 * np.ptp(v) / BINS


def test_a_mean_that_floats_would_lose():
    """A million elements near 1e8 whose spread is 1: variance by float sums of squares is noise."""
    values = (np.arange(1_000_000) % 2 + 100_000_000).astype(np.int32).reshape(1, 1000, 1000)
    labels = np.ones((1000, 1000), np.uint8)
    answer = measure(values, np.ones((1000, 1000), bool), labels, whole((1, 1000, 1000)[1:]), (300, 300))
    s = statistics(answer.cells[0, 1, 0], answer.point, Scaling())
    assert (s.mean, s.sd) == (100_000_000.5, 0.5)


@pytest.mark.parametrize("scale", [0.5, -0.5])
def test_real_units(scale):
    """CT as often stored: HU = stored · scale − 1024; a negative scale turns the order."""
    values = np.array([[[0, 2, 4, 6, 1000]]], dtype=np.uint16)
    labels = np.ones((1, 5), np.uint8)
    answer = measure(values, np.ones((1, 5), bool), labels, whole((1, 5)), (1, 5))
    s = statistics(answer.cells[0, 1, 0], answer.point, Scaling(scale, -1024.0))
    real = values.ravel() * scale - 1024
    assert (s.n, s.mean) == (5, real.mean())
    assert s.sd == pytest.approx(real.std(), rel=1e-12)
    assert (s.min, s.max) == (real.min(), real.max())
    assert s.percentiles[1] == np.median(real)
    assert s.percentiles[0] < s.percentiles[1] < s.percentiles[2]
    assert s.bin == 0.5


def test_bins_grow_with_the_range_only():
    assert bin_shift(5, 5) == 0
    assert bin_shift(0, BINS - 1) == 0
    assert bin_shift(0, BINS) == 1
    assert bin_shift(-1000, 1000) == 1
    assert bin_shift(0.0, 0.0) == -FLOAT_POINT
    assert bin_shift(1.0, 1.0) == -23  # the step of float32 at 1
    assert bin_shift(0.0, 1023 / 1024) == -10


@pytest.mark.parametrize(
    "values, match",
    [
        (np.array([[[2**40]]]), "holds 1099511627776"),
        (np.array([[[1e300]]]), r"holds 1e\+300, beyond float32"),
    ],
)
def test_what_cannot_be_summed_is_refused(values, match):
    one, box = np.ones((1, 1), np.uint8), Box((0, 0), (1, 1))
    with pytest.raises(SceneError, match=match):
        measure_intensity(Pixels(values, one > 0), one, None, whole((1, 1)), box)
    # … but not where it does not count
    nothing = measure_intensity(Pixels(values, one == 0), one, None, whole((1, 1)), box)
    assert nothing.cells == {}


def test_the_table_says_what_is_absent():
    values = np.array([[[7, 9, 100]]], dtype=np.uint8)
    labels = np.array([[1, 1, 5]], dtype=np.uint8)
    fraction = np.array([[FULL, FULL // 2, 0]], dtype=np.uint32)
    answer = measure(values, np.ones((1, 3), bool), labels, Weighted(fraction), (1, 3))
    classes = [ClassInfo(1, "one", "#000000"), ClassInfo(2, "two", "#000000")]
    regions = ("scene", "part", "empty")
    done = SceneIntensity("a", Intensities(regions, (Channel("red", Scaling()),), answer))
    failed = SceneIntensity("b", reason="damaged")
    table = intensity_table([done, failed], classes)
    rows = {(r.scene, r.region, r["class"]): r for _, r in table.iterrows()}
    assert list(rows) == [
        *(("a", "scene", c) for c in ("one", "two", "5")),
        *(("a", r, c) for r in ("part", "empty") for c in ("one", "two")),
        ("b", "", "one"),
        ("b", "", "two"),
    ]
    part = rows["a", "part", "one"]
    assert (part.n, part["mean"], part.channel) == (1.5, (7 + 9 / 2) / 1.5, "red")
    absent = rows["a", "scene", "two"]
    assert (absent.state, absent.n, absent.reason) == (
        "measured",
        0,
        "no valid pixel of the class in the region",
    )
    assert pd.isna(absent["mean"])
    unseen = rows["a", "empty", "one"]
    assert (unseen.state, pd.isna(unseen.n)) == ("no_data", True)
    assert (rows["b", "", "one"].state, rows["b", "", "one"].reason) == ("failed", "damaged")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_a_whole_tile_is_fast(dtype):
    shape = (2048, 2048)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 8, shape).astype(np.uint8)
    values = rng.integers(0, 10_000, (1, *shape)).astype(dtype)
    clock = time.perf_counter()
    answer = measure(values, np.ones(shape, bool), labels, whole(shape), shape)
    seconds = time.perf_counter() - clock
    print(dtype.__name__, seconds)
    assert sum(c.cover for c in answer.cells.values()) == labels.size * FULL
    assert seconds < 5  # 0.5 to 1 s on an idle machine
