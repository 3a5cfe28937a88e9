"""How often the vocabulary grounder takes a phrase for the wrong thing: ``python -m benchmarks.phrases``.

The limits are fitted on half of tests/prompts/phrases.csv (land cover of configs/models/landcover-unet.yaml);
both error rates are those of the other half, beside a threshold on the similarity alone, fitted alike.
"""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segpipe.config.card import load_card
from segpipe.prompts.grounding.vocabulary import (
    LIMITS,
    MatchLimits,
    PhraseMatch,
    Vocabulary,
    concepts,
)

ROOT = Path(__file__).parents[1]
PHRASES = ROOT / "tests" / "prompts" / "phrases.csv"
CARD = ROOT / "configs" / "models" / "landcover-unet.yaml"


@dataclass(frozen=True)
class Phrase:
    """A line of the list."""

    text: str
    expected: str
    """Class name; empty: none of the card's."""

    @property
    def fitting(self) -> bool:
        """Which half it is in, by its own hash: adding a phrase moves no other."""
        return hashlib.sha256(self.text.encode()).digest()[0] % 2 == 0


def read_phrases() -> list[Phrase]:
    """The whole list."""
    with PHRASES.open(encoding="utf-8", newline="") as stream:
        return [Phrase(row["phrase"], row["class"]) for row in csv.DictReader(stream)]


@dataclass(frozen=True, eq=False)
class Measured:
    """Phrases and what they are near to."""

    phrases: list[Phrase]
    matches: list[PhraseMatch]

    def half(self, fitting: bool) -> Measured:
        """Those of one half."""
        kept = [i for i, p in enumerate(self.phrases) if p.fitting is fitting]
        return Measured([self.phrases[i] for i in kept], [self.matches[i] for i in kept])

    @property
    def positive(self) -> np.ndarray:
        return np.array([bool(p.expected) for p in self.phrases])

    @property
    def right(self) -> np.ndarray:
        """Whether the nearest class is the expected one."""
        return np.array([m.name == p.expected for m, p in zip(self.matches, self.phrases, strict=True)])

    @property
    def similarity(self) -> np.ndarray:
        return np.array([m.similarity for m in self.matches])

    @property
    def anchor(self) -> np.ndarray:
        return np.array([m.anchor_similarity for m in self.matches])

    def taken(self, limits: MatchLimits) -> np.ndarray:
        """Whether a class is meant under these limits."""
        return limits.meant(self.similarity, self.anchor)

    def fit(self) -> MatchLimits:
        return fit_limits(self.similarity, self.anchor, self.right, self.positive)

    def fit_similarity_alone(self) -> MatchLimits:
        """A plain threshold, without anchors, of least balanced error."""

        def error(limits: MatchLimits) -> float:
            taken = self.taken(limits)
            missed = 1 - (taken & self.right)[self.positive].mean()
            return float(missed + taken[~self.positive].mean())

        return min((MatchLimits(float(t), -2.0) for t in np.unique(self.similarity)), key=error)


def fit_limits(
    similarity: np.ndarray, anchor: np.ndarray, right: np.ndarray, positive: np.ndarray
) -> MatchLimits:
    """The limits of least balanced error: the mean of the shares missed and wrongly taken.

    A positive phrase is missed when no class or another class is meant. Of limits that are equally good the
    middle is taken.

    Args:
        similarity: (n,) of phrases to their nearest class.
        anchor: (n,) of phrases to their nearest anchor.
        right: (n,) whether the nearest class is the expected one; of negatives, anything.
        positive: (n,) whether the phrase means a class.
    """
    lead = similarity - anchor
    margins, floors = _between(lead), _between(similarity)
    taken = (similarity >= floors[:, None, None]) & (lead >= margins[:, None])  # (floors, margins, n)
    missed = 1 - (taken & right)[..., positive].mean(axis=-1)
    wrong = taken[..., ~positive].mean(axis=-1)
    error = missed + wrong
    floor, margin = np.nonzero(error <= error.min() + 1e-12)
    middle = _middle(margin)
    return MatchLimits(float(floors[_middle(floor[margin == middle])]), float(margins[middle]))


def _middle(values: np.ndarray) -> int:
    return int(np.sort(values)[len(values) // 2])


def _between(values: np.ndarray) -> np.ndarray:
    """Thresholds that tell the values apart: halfway between neighbours."""
    ordered = np.unique(values)
    return np.asarray((ordered[1:] + ordered[:-1]) / 2)


def measure() -> Measured:
    """The list, looked up among the card's classes."""
    phrases = read_phrases()
    vocabulary = Vocabulary(concepts(load_card(CARD).classes))
    return Measured(phrases, [vocabulary.match(p.text) for p in phrases])


def _line(name: str, limits: MatchLimits, part: Measured) -> str:
    taken, positive, right = part.taken(limits), part.positive, part.right
    missed = int((positive & ~taken).sum())
    confused = int((positive & taken & ~right).sum())
    wrong = int((~positive & taken).sum())
    n, m = int(positive.sum()), int((~positive).sum())
    return (
        f"{name}: of {n} that mean a class: {missed} not found, {confused} given another class "
        f"({(missed + confused) / n:.1%}); of {m} that mean none: {wrong} given a class ({wrong / m:.1%})"
    )


def main() -> None:
    """Print the fitted limits and both error rates."""
    measured = measure()
    fitting, other = measured.half(True), measured.half(False)
    fitted, plain = fitting.fit(), fitting.fit_similarity_alone()
    print(f"fitted: similarity {fitted.similarity:.3f}, margin {fitted.margin:.3f}; in use: {LIMITS}")
    print(_line("fitting half", LIMITS, fitting))
    print(_line("other half  ", LIMITS, other))
    print(_line(f"other half, a similarity of {plain.similarity:.2f} alone", plain, other))
    taken = other.taken(LIMITS)
    for phrase, match, given in zip(other.phrases, other.matches, taken.tolist(), strict=True):
        if given != bool(phrase.expected) or (given and match.name != phrase.expected):
            expected = phrase.expected or "none"
            print(
                f"  {phrase.text!r}: expected {expected}, nearest {match.name} {match.similarity:.2f}, ",
                end="",
            )
            print(f"anchor {match.anchor!r} {match.anchor_similarity:.2f}: {match.meaning.value}")


if __name__ == "__main__":
    main()
