"""The numbers of the uncertainty map against scipy's, and analytic cases."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy

from segpipe.inference.block_result import entropy
from segpipe.inference.uncertainty import Uncertainty
from segpipe.metrics.tally import LEVELS

HALF_STEP = 0.5 / LEVELS + 1e-6


def probabilities(classes: int, elements: int, seed: int) -> np.ndarray:
    """(k, n) float32; sharp and flat ones, some of them certain."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(classes, rng.choice([0.1, 1.0, 20.0])), elements).T.astype(np.float32)
    p[:, 0] = np.eye(classes)[0]
    p[:, -1] = 1 / classes
    return p


def mapped(p: np.ndarray, expected: np.ndarray | None = None) -> np.ndarray:
    block = Uncertainty(p.shape[1:], len(p))
    for plane in p:
        block.add(plane)
    return block.finish(expected) / LEVELS


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 50), st.integers(0, 10**6))
def test_entropy_margin_and_confidence_are_scipys_and_numpys(k: int, n: int, seed: int) -> None:
    p = probabilities(k, n, seed)
    found = mapped(p)
    ordered = np.sort(p, axis=0)
    np.testing.assert_allclose(found[0], scipy_entropy(p, base=k, axis=0), atol=HALF_STEP + 1e-5)
    np.testing.assert_allclose(found[1], ordered[-1] - ordered[-2], atol=HALF_STEP)
    np.testing.assert_allclose(found[2], ordered[-1], atol=HALF_STEP)
    assert found[0][0] == 0 and found[1][0] == 1 and found[2][0] == 1  # certain
    np.testing.assert_allclose(found[:, -1], [1, 0, 1 / k], atol=HALF_STEP + 1e-5)  # a tie of all


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.integers(2, 50), st.integers(0, 10**6))
def test_disagreement_of_two_answers_is_the_jensen_shannon_divergence(k: int, n: int, seed: int) -> None:
    p, q = probabilities(k, n, seed), probabilities(k, n, seed + 1)
    both = torch.from_numpy(np.stack([p, q]))
    expected = entropy(both).mean(0)[0].numpy()
    found = mapped((p + q) / 2, expected)
    divergence = jensenshannon(p.astype(float), q.astype(float), base=k, axis=0) ** 2
    np.testing.assert_allclose(found[3], np.nan_to_num(divergence), atol=HALF_STEP + 2e-5)


def test_answers_that_agree_do_not_disagree_however_unsure() -> None:
    p = probabilities(4, 30, 3)
    found = mapped(p, entropy(torch.from_numpy(p[None]))[0, 0].numpy())
    assert found[3].max() <= HALF_STEP + 1e-5


def test_answers_that_contradict_each_other_disagree_wholly() -> None:
    certain = torch.eye(2)[:, :, None]  # two answers, sure of different classes
    found = mapped(certain.mean(0).numpy(), entropy(certain).mean(0)[0].numpy())
    assert found[3] == 1
