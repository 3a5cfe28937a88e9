"""How sure a prediction is, element by element, from its class scores.

- *entropy*: −Σ p·ln p over ln k, of the merged scores: 0 one class, 1 all alike.
- *margin*: the best score minus the second best: 1 sure, 0 a tie.
- *confidence*: the best score itself, for calibration.
- *disagreement*: entropy of the mean minus mean of the entropies, over the windows that overlap
  (`gaussian`) and the mirror images (`tta: flips`), over ln k: what of the entropy comes from answers that
  contradict each other (mutual information; Houlsby et al. 2011, arXiv:1112.5745; Smith & Gal 2018).
  Only where an element has more than one answer.
"""

from __future__ import annotations

import math

import numpy as np

from segpipe.metrics.tally import LEVELS


class Uncertainty:
    """The map of one block, class by class: only one plane of scores is needed at a time."""

    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        self._log = log_classes(classes)
        self._entropy = np.zeros(shape, np.float32)
        self._best = np.zeros(shape, np.float32)
        self._second = np.zeros(shape, np.float32)

    def add(self, plane: np.ndarray) -> None:
        """The probability of one class over the block, float32."""
        p = np.clip(plane, 0, 1)
        logs = np.log(p, out=np.zeros_like(p), where=p > 0)
        self._entropy -= p * logs
        np.maximum(self._second, np.minimum(self._best, p), out=self._second)
        np.maximum(self._best, p, out=self._best)

    def finish(self, expected: np.ndarray | None) -> np.ndarray:
        """(channel, …) uint16 in 1/65535.

        Args:
            expected: mean of the answers' entropies, a share of ln k; None: one answer an element.
        """
        shares = [self._entropy / self._log, self._best - self._second, self._best]
        if expected is not None:
            shares.append(shares[0] - expected)
        return np.stack([np.rint(np.clip(s, 0, 1) * LEVELS).astype(np.uint16) for s in shares])


def log_classes(classes: int) -> float:
    """Entropy of k classes all alike."""
    return math.log(max(classes, 2))
