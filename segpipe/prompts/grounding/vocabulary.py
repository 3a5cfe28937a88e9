"""Which class of a model a phrase means, or that it means none.

A phrase is compared with the texts of every class (name, synonyms, description) by the cosine of their
sentence vectors. The nearest class is meant if it is near enough, and nearer by a margin than every general
concept that is no class (`anchors`): "swimming pool" is near "water", but nearer to "bathroom
fixture". Anything else is not in the vocabulary: no class is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import numpy as np

from segpipe.config.card import Class
from segpipe.prompts.grounding.anchors import ANCHORS
from segpipe.prompts.grounding.sentence_encoder import Encoder, sentence_encoder

SAME = 0.75
"""Cosine from which an anchor says the same as a class, and is none; a group goes with its hypernym."""

_NEGATION = re.compile(r"\b(no|not|non|without|except|but|excluding|anything)\b|n't\b", re.IGNORECASE)
_LIST = re.compile(r"\s*(?:,|;|/|&|\band\b|\bor\b)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Concept:
    """A class as words."""

    name: str
    texts: tuple[str, ...]
    """Name, synonyms, description."""
    background: bool = False
    """Nobody's object: a phrase that means it is understood, and grounds nothing."""


def concepts(classes: Sequence[Class]) -> tuple[Concept, ...]:
    """The classes of a card as words, in the order of its score maps."""
    result = []
    for c in classes:
        texts = [re.sub(r"[_\s]+", " ", text).strip() for text in (c.name, *c.synonyms, c.description)]
        result.append(Concept(c.name, tuple(dict.fromkeys(filter(None, texts))), c.background))
    return tuple(result)


@dataclass(frozen=True)
class Limits:
    """When the nearest class is meant."""

    similarity: float
    """Least cosine of phrase and class."""
    margin: float
    """Least lead of that cosine over the nearest anchor's."""

    def meant(self, similarity: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        """Whether phrases with these cosines to their nearest class and anchor mean the class: (n,) bool."""
        return np.asarray((similarity >= self.similarity) & (similarity - anchor >= self.margin))


LIMITS = Limits(similarity=0.39, margin=0.05)
"""Fitted on half of tests/prompts/phrases.csv; benchmarks/phrases.py prints the errors on the other half."""


class Meaning(str, Enum):
    """What became of a phrase before a pixel was looked at."""

    meant = "in the vocabulary"
    background = "background"
    unknown = "not in the vocabulary"
    several = "several classes"
    negated = "negated"


@dataclass(frozen=True)
class Match:
    """What a phrase means to a model."""

    phrase: str
    meaning: Meaning
    index: int
    """Of the nearest class, in the order of the score map."""
    name: str
    """Of the nearest class."""
    similarity: float
    """Cosine of the phrase and the nearest text of that class."""
    anchor: str
    """The nearest concept that is no class."""
    anchor_similarity: float
    classes: tuple[str, ...] = ()
    """With `several`: the classes that its parts mean."""

    def __str__(self) -> str:
        nearest = f"{self.name} with {self.similarity:.2f}"
        match self.meaning:
            case Meaning.meant:
                return f"class {nearest}"
            case Meaning.background:
                return f"not found: it means {nearest}, the background, which has no objects"
            case Meaning.several:
                parts = " . ".join(self.classes)
                return f"not found: it names several classes; ask for each: {parts}"
            case Meaning.negated:
                return "not found: a negation is not understood; name what is wanted"
            case Meaning.unknown:
                other = f"; {self.anchor!r}, which is no class, has {self.anchor_similarity:.2f}"
                return f"not found: nearest is {nearest}{other}"


class Vocabulary:
    """The classes of a model, to look phrases up in."""

    def __init__(
        self,
        words: Sequence[Concept],
        encode: Encoder | None = None,
        limits: Limits = LIMITS,
        anchors: Mapping[str, Sequence[str]] = ANCHORS,
    ) -> None:
        """``encode``: the package's sentence encoder where none is given.

        Raises:
            RequestError: the encoder's package is not installed.
        """
        self.words = tuple(words)
        self.limits = limits
        self._encode = encode or sentence_encoder()
        self._owner = np.repeat(np.arange(len(self.words)), [len(w.texts) for w in self.words])
        self._texts = self._encode([text for w in self.words for text in w.texts])
        self.anchors = self._other(anchors)
        self._anchors = self._encode(self.anchors)

    def _other(self, anchors: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """Anchors that say nothing that a class says."""

        def differ(texts: Sequence[str]) -> np.ndarray:
            return np.asarray((self._encode(texts) @ self._texts.T).max(axis=1) < SAME)

        heads = np.array(list(anchors), dtype=object)[differ(list(anchors))]
        kept = [anchor for head in heads for anchor in (head, *anchors[head])]
        return tuple(np.array(kept, dtype=object)[differ(kept)]) if kept else ()

    def match(self, phrase: str) -> Match:
        """What a phrase means.

        Raises:
            RequestError: the phrase is longer than the encoder takes.
        """
        whole = self._nearest(phrase)
        if whole.similarity > 1 - 1e-4:  # the class's own words, an "and" among them or not
            return whole
        if _NEGATION.search(phrase):
            return replace(whole, meaning=Meaning.negated)
        parts = [self._nearest(part) for part in _LIST.split(phrase) if part]
        named = dict.fromkeys(p.name for p in parts if p.meaning is not Meaning.unknown)
        if len(parts) > 1 and len(named) > 1:
            return replace(whole, meaning=Meaning.several, classes=tuple(named))
        return whole

    def _nearest(self, phrase: str) -> Match:
        row = self._encode([phrase])[0]
        texts, anchors = self._texts @ row, self._anchors @ row
        best = int(texts.argmax())
        other = int(anchors.argmax()) if len(anchors) else -1
        near, far = float(texts[best]), float(anchors[other]) if len(anchors) else -1.0
        word = self.words[int(self._owner[best])]
        meaning = Meaning.unknown
        if self.limits.meant(np.array(near), np.array(far)):
            meaning = Meaning.background if word.background else Meaning.meant
        anchor = self.anchors[other] if len(anchors) else ""
        return Match(phrase, meaning, int(self._owner[best]), word.name, near, anchor, far)


def fit_limits(similarity: np.ndarray, anchor: np.ndarray, right: np.ndarray, positive: np.ndarray) -> Limits:
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
    return Limits(float(floors[_middle(floor[margin == middle])]), float(margins[middle]))


def _middle(values: np.ndarray) -> int:
    return int(np.sort(values)[len(values) // 2])


def _between(values: np.ndarray) -> np.ndarray:
    """Thresholds that tell the values apart: halfway between neighbours."""
    ordered = np.unique(values)
    return np.asarray((ordered[1:] + ordered[:-1]) / 2)
