"""The Gaussian blend on its own: exact to rounding at the least weights, and the same for any partition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from segpipe.geometry.box import Box
from segpipe.inference.merge import GaussianScores
from segpipe.tiling.windows import Index, Lattice, make_lattice

EDGE = 16
SHAPE = (29, 40, 33)
FLOOR = 1e-8


@pytest.fixture(scope="module")
def lattice() -> Lattice:
    """Several windows along each axis, all inside the scene."""
    return make_lattice(SHAPE, (EDGE,) * 3, (4, 4, 4), 1, False)


@pytest.fixture(scope="module")
def answers(lattice: Lattice) -> dict[Index, np.ndarray]:
    """Two scores per element of each window: large and tiny ones side by side."""
    rng = np.random.default_rng(3)
    windows = lattice.windows(Box.whole(SHAPE), "gaussian")
    return {i: (10.0 ** rng.uniform(-6, 0, (2, EDGE, EDGE, EDGE))).astype(np.float32) for i in windows}


def merged(region: Box, lattice: Lattice, answers: dict[Index, np.ndarray]) -> np.ndarray:
    merger = GaussianScores(region, lattice, 2)
    for index in lattice.windows(region, "gaussian"):
        merger.aggregate(index, answers[index])
    return merger.finalize()


def test_means_are_exact_to_rounding_at_any_weight(
    lattice: Lattice, answers: dict[Index, np.ndarray]
) -> None:
    """Against the formula in float64: no term is negative, so errors are relative, in corners too."""
    line = np.exp(-0.5 * ((np.arange(EDGE) - (EDGE - 1) / 2) / (EDGE / 8)) ** 2)
    bell = np.einsum("i,j,k->ijk", line, line, line) / line.max() ** 3
    assert bell.min() < FLOOR / 10  # three axes: the floor is in use
    weight = np.maximum(bell, FLOOR)
    total, weights, count = np.zeros((2, *SHAPE)), np.zeros(SHAPE), np.zeros(SHAPE, int)
    for index, scores in answers.items():
        part = lattice.window(index).slices
        total[(slice(None), *part)] += scores.astype(np.float64) * weight
        weights[part] += weight
        count[part] += 1
    found = merged(Box.whole(SHAPE), lattice, answers)
    assert count[0, 0, 0] == 1 and count.max() >= 8
    np.testing.assert_allclose(found, total / weights, rtol=1e-6)
    np.testing.assert_allclose(found[:, 0, 0, 0], answers[(0, 0, 0)][:, 0, 0, 0], rtol=2e-7)


@settings(max_examples=20, deadline=None)
@given(
    cut=st.tuples(*[st.integers(1, n - 1) for n in SHAPE]),
    side=st.tuples(*[st.booleans()] * 3),
)
def test_a_part_of_the_scene_has_the_bits_of_the_whole(
    lattice: Lattice, answers: dict[Index, np.ndarray], cut: tuple[int, ...], side: tuple[bool, ...]
) -> None:
    start = tuple(c if s else 0 for c, s in zip(cut, side, strict=True))
    stop = tuple(n if s else c for c, n, s in zip(cut, SHAPE, side, strict=True))
    region = Box(start, stop)
    whole = merged(Box.whole(SHAPE), lattice, answers)
    np.testing.assert_array_equal(merged(region, lattice, answers), whole[(slice(None), *region.slices)])
