"""Ground phrases as boxes: the interface of all grounders, and the one over a semantic model's score map.

Positions are those of `prompts.prompt_set`: fractional elements of the given array, array order, whole
numbers at centres; a box's corners are the outer edges of its elements, so they end in ½.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

import numpy as np
import shapely
from affine import Affine

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.objects.outlines import Pieces, block_pieces, dissolve
from segpipe.prompts.grounding.vocabulary import Meaning, PhraseMatch, Vocabulary
from segpipe.prompts.inputs.components import (
    Components,
    component_means,
    component_strips,
    deepest,
    find_components,
)
from segpipe.prompts.prompt_set import Columns


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections(Columns):
    """Objects that were detected for all phrases, in no other order than the grounder's own."""

    start: np.ndarray
    """(n, axes) float64: the corner of smallest positions."""
    stop: np.ndarray
    """(n, axes) float64: the opposite corner."""
    point: np.ndarray
    """(n, axes) float64: a position inside the object; NaN where a grounder knows boxes alone."""
    phrase: np.ndarray
    """(n,) int64: which of the phrases."""
    score: np.ndarray
    """(n,) float64, 0…1: how sure the grounder is."""
    label: tuple[str, ...]
    """What was seen, in the grounder's own words: a class, or the words of the phrases that a box answers."""
    outline: tuple[shapely.Geometry, ...] = ()
    """Coarse masks on a raster, as `prompts.prompt_set.Outlines`; empty: boxes are all that is known."""

    @classmethod
    def join(cls, parts: Sequence[Detections], axes: int) -> Detections:
        """Return the detections of all parts, if any, one part after the other."""
        none, number = np.zeros((0, axes)), np.zeros(0)
        empty = cls(start=none, stop=none, point=none, phrase=number.astype(np.int64), score=number, label=())
        return cls.concatenate([empty, *parts])


class Outcome(str, Enum):
    """What became of a phrase."""

    found = "found"
    below = "below threshold"
    absent = "not found"
    unknown = "not in the vocabulary"
    refused = "not understood"


@dataclass(frozen=True, kw_only=True)
class PhraseAccount:
    """What became of one phrase on one array: nothing that was seen is dropped unsaid."""

    phrase: str
    found: int
    """Detections of the phrase."""
    below: int
    """Candidates that are none because of their score; a detector has a fixed number of candidates."""
    best: float
    """Highest score of a candidate, found or not; NaN: there is none."""
    match: PhraseMatch | None = None
    """Of a vocabulary: what the phrase means."""
    small: int = 0
    """Candidates of a sufficient score that are none because of their size."""

    @property
    def outcome(self) -> Outcome:
        if self.match is not None and self.match.meaning is not Meaning.meant:
            unknown = self.match.meaning is Meaning.unknown
            return Outcome.unknown if unknown else Outcome.refused
        if self.found:
            return Outcome.found
        return Outcome.below if self.below or self.small else Outcome.absent

    def __str__(self) -> str:
        if self.outcome in (Outcome.unknown, Outcome.refused):
            return str(self.match)
        meant = "" if self.match is None else f" ({self.match})"
        lost = [
            f"{n} {why}" for n, why in ((self.below, "below the threshold"), (self.small, "too small")) if n
        ]
        if self.found:
            return ", ".join([f"{self.found} found", *lost]) + meant
        best = f": {', '.join(lost)}, the best with {self.best:.2f}" if lost else ""
        return f"not found{best}{meant}"


@dataclass(frozen=True, eq=False)
class Grounding:
    """Detections, and an account of every phrase in their order."""

    detections: Detections
    accounts: tuple[PhraseAccount, ...]


class Grounder(Protocol):
    """Finds what phrases name in an array."""

    def ground(self, window: np.ndarray, phrases: Sequence[str]) -> Grounding:
        """Detections in the window's own positions.

        Args:
            window: what the grounder looks at: an image (3, y, x).
            phrases: in words, at least one, none empty.
        """
        ...


ScoreReader = Callable[[Box], np.ndarray]
"""Probabilities of a box, (k, …) with the box's own axes behind; NaN: no data."""


@dataclass(frozen=True)
class VocabularyGrounder:
    """Components of the class that a phrase means, in a semantic model's score map."""

    vocabulary: Vocabulary
    """The model's classes."""
    threshold: float = 0.5
    """Least mean probability of a component."""
    smallest: int = 1
    """Least number of elements."""
    spacing: Sequence[float] | None = None
    """Edge lengths of an element, for the place farthest from the outside; none: all equal."""

    def ground_scene(self, read: ScoreReader, shape: Sequence[int], phrases: Sequence[str]) -> Grounding:
        """The components of every phrase's class, where it is the most probable one.

        Components are those of the whole scene, parts that touch at a corner being one; memory holds a strip
        of it. Two phrases that mean one class get the same components each; `PhraseAccount.match` says so.

        Args:
            read: probabilities of a box, the vocabulary's classes in order.
            shape: of the scene, (y, x) or (z, y, x).
            phrases: in words.

        Raises:
            RequestError: the map has another number of classes, or a phrase is longer than the encoder takes.
        """
        matches = [self.vocabulary.match(phrase) for phrase in phrases]
        wanted = sorted({m.index for m in matches if m.meaning is Meaning.meant})
        found = self._components(read, shape, wanted) if wanted else {}
        rows, accounts = [], []
        for i, match in enumerate(matches):
            if match.meaning is not Meaning.meant:
                accounts.append(
                    PhraseAccount(phrase=match.phrase, found=0, below=0, best=math.nan, match=match)
                )
                continue
            part, below, small, best = found[match.index]
            account = PhraseAccount(
                phrase=match.phrase, found=len(part), below=below, best=best, match=match, small=small
            )
            accounts.append(account)
            rows.append(replace(part, phrase=np.full(len(part), i, np.int64)))
        return Grounding(Detections.join(rows, len(shape)), tuple(accounts))

    def _components(
        self, read: ScoreReader, shape: Sequence[int], wanted: Sequence[int]
    ) -> dict[int, tuple[Detections, int, int, float]]:
        """For each class: its components, how many score too low or are too small, and the highest score."""
        spacing = self.spacing or (1.0,) * len(shape)

        def labels(box: Box) -> np.ndarray:
            best = self._best(read(box))
            return np.where(np.isin(best, wanted), best + 1, 0)

        def best_scores(box: Box) -> np.ndarray:
            scores = read(box)
            best = np.maximum(self._best(scores), 0)[None]
            return np.asarray(np.take_along_axis(scores, best, axis=0)[0])

        all_of = find_components(labels, shape, ids=False)
        mean = component_means(labels, best_scores, shape, all_of)
        large = (mean >= self.threshold) & (all_of.elements >= self.smallest)
        outlines = _outlines(labels, shape, all_of, large) if len(shape) == 2 else {}
        result = {}
        for k in wanted:
            mine = np.flatnonzero(all_of.value == k + 1)
            sure = mine[mean[mine] >= self.threshold]
            kept = mine[large[mine]]
            points = [deepest(labels, all_of, i, False, spacing, shape) for i in kept.tolist()]
            part = Detections(
                start=all_of.start[kept] - 0.5, stop=all_of.stop[kept] - 0.5,
                point=np.array(points, np.float64).reshape(-1, len(shape)),
                phrase=np.zeros(len(kept), np.int64), score=mean[kept],
                label=(self.vocabulary.words[k].name,) * len(kept),
                outline=tuple(outlines[i] for i in kept.tolist()) if outlines else (),
            )  # fmt: skip
            best = float(mean[mine].max()) if len(mine) else float("nan")
            result[k] = part, len(mine) - len(sure), len(sure) - len(kept), best
        return result

    def _best(self, scores: np.ndarray) -> np.ndarray:
        """The most probable class of each element; −1: no data."""
        words = self.vocabulary.words
        if len(scores) != len(words):
            names = ", ".join(word.name for word in words)
            raise RequestError(f"score map: found {len(scores)} classes; valid: {len(words)}, {names}")
        return np.where(np.isnan(scores).any(axis=0), -1, scores.argmax(axis=0))


def _outlines(
    read: Callable[[Box], np.ndarray], shape: Sequence[int], found: Components, large: np.ndarray
) -> dict[int, shapely.Geometry]:
    """Outlines, in positions, of the components that are large enough, by place; memory follows them."""
    chosen = np.concatenate(([False], large))

    def pieces() -> Iterator[Pieces]:
        for box, numbers in component_strips(read, shape, False, found):
            yield block_pieces(np.where(chosen[numbers], numbers, 0), box)

    known, polygons = dissolve(pieces(), Affine.translation(-0.5, -0.5))
    return dict(zip((known - 1).tolist(), polygons, strict=True))
