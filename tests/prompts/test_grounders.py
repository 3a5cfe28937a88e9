"""Objects of a score map: against scikit-image, brute force and shapes whose numbers are known."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
import shapely
import shapely.affinity
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.features import rasterize
from scipy.spatial.distance import cdist
from skimage.measure import label, regionprops

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.prompts.grounding.base import Grounding, Outcome, VocabularyGrounder
from segpipe.prompts.grounding.vocabulary import Concept, Vocabulary
from segpipe.prompts.inputs import components as strips


def spelled(texts: Sequence[str]) -> np.ndarray:
    """An encoder for which texts are alike if they are equal: rows of random signs from their hashes."""
    rows = [
        np.frombuffer(hashlib.sha512(t.lower().encode()).digest() * 4, np.uint8) / 127.5 - 1 for t in texts
    ]
    return np.array([r / np.linalg.norm(r) for r in rows]).reshape(-1, 256)


WORDS = [
    Concept("land", ("land",), background=True),
    Concept("water", ("water", "lake")),
    Concept("wood", ("wood",)),
]


class InMemory(VocabularyGrounder):
    """Of probabilities (k, y, x) or (k, z, y, x) in memory."""

    def ground(self, window: np.ndarray, phrases: Sequence[str]) -> Grounding:
        return self.ground_scene(lambda box: window[(slice(None), *box.slices)], window.shape[1:], phrases)


def grounder(**options: object) -> InMemory:
    return InMemory(Vocabulary(WORDS, spelled), **options)  # type: ignore[arg-type]


def scores_of(best: np.ndarray, sure: np.ndarray) -> np.ndarray:
    """(3, …) probabilities: ``sure`` (above 1/2) for the best class, the rest shared."""
    rest = np.repeat(((1 - sure) / 2)[None], 3, axis=0)
    np.put_along_axis(rest, best[None], sure[None], axis=0)
    return rest


@st.composite
def maps(draw: st.DrawFn) -> np.ndarray:
    axes = draw(st.integers(2, 3))
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=axes, max_size=axes)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    share = draw(st.sampled_from([0.2, 0.5, 0.8]))
    best = np.where(rng.random(shape) < share, rng.integers(1, 3, shape), 0)
    return scores_of(best, rng.uniform(0.55, 0.99, shape))


@settings(max_examples=60, deadline=None)
@given(maps(), st.sampled_from([0.5, 0.75]), st.integers(1, 4))
def test_objects_are_those_of_scikit_image(scores: np.ndarray, threshold: float, smallest: int) -> None:
    axes = scores.ndim - 1
    found = grounder(threshold=threshold, smallest=smallest).ground(scores, ["lake", "wood"])
    for phrase, k in ((0, 1), (1, 2)):
        inside = scores.argmax(axis=0) == k
        numbered = label(inside, connectivity=axes)
        objects = regionprops(numbered, intensity_image=scores[k])
        kept = [o for o in objects if o.intensity_mean >= threshold and o.num_pixels >= smallest]
        mine = found.detections.phrase == phrase
        account = found.accounts[phrase]
        below = sum(o.intensity_mean < threshold for o in objects)
        assert (account.found, account.below) == (len(kept), below)
        assert account.small == len(objects) - len(kept) - below
        if objects:
            assert account.best == pytest.approx(max(o.intensity_mean for o in objects))
        else:
            assert np.isnan(account.best)
        expected = sorted((*np.subtract(o.bbox, 0.5), o.intensity_mean) for o in kept)
        d = found.detections
        got = sorted(zip(*d.start[mine].T, *d.stop[mine].T, d.score[mine], strict=True))
        np.testing.assert_allclose(got, expected, atol=1e-9)
        for point, start in zip(d.point[mine], d.start[mine], strict=True):
            _is_deepest(numbered, point, start)


def _is_deepest(numbered: np.ndarray, point: np.ndarray, start: np.ndarray) -> None:
    """The distance to the nearest element outside is the largest of the component's, by brute force."""
    padded = np.pad(numbered, 1)
    at = tuple(int(p) + 1 for p in point)
    number = padded[at]
    assert number > 0 and (point > start).all()
    nearest = cdist(np.argwhere(padded == number), np.argwhere(padded != number)).min(axis=1)
    here = cdist([at], np.argwhere(padded != number)).min()
    assert here == pytest.approx(nearest.max())


def test_a_disc_a_ring_and_a_lake_cut_by_the_border() -> None:
    y, x = np.mgrid[:60, :100]
    disc = np.hypot(y - 20, x - 25) <= 12
    ring = (np.hypot(y - 30, x - 70) <= 18) & (np.hypot(y - 30, x - 70) > 10)
    cut = (y >= 50) & (x < 9)
    best = (disc | ring | cut).astype(int)
    found = grounder().ground(scores_of(best, np.full(best.shape, 0.9)), ["lake"])
    d = found.detections
    np.testing.assert_array_equal(d.start, [[7.5, 12.5], [11.5, 51.5], [49.5, -0.5]])
    np.testing.assert_array_equal(d.stop, [[32.5, 37.5], [48.5, 88.5], [59.5, 8.5]])
    np.testing.assert_array_equal(d.point[0], [20, 25])
    assert ring[tuple(d.point[1].astype(int))], "a ring's own centre is not inside"
    np.testing.assert_array_equal(d.point[2], [54, 4])
    np.testing.assert_allclose(d.score, 0.9)
    assert d.label == ("water",) * 3


def test_spacing_moves_the_place_farthest_from_the_outside() -> None:
    """An L of two arms, 3 rows and 4 columns thick: which is thicker depends on the size of an element."""
    best = np.zeros((14, 30), int)
    best[1:4, 1:29] = 1  # three rows
    best[4:13, 1:5] = 1  # four columns
    scores = scores_of(best, np.full(best.shape, 0.8))
    flat = grounder(spacing=(0.5, 1.0)).ground(scores, ["lake"]).detections.point[0]
    tall = grounder(spacing=(5.0, 1.0)).ground(scores, ["lake"]).detections.point[0]
    for point, spacing in ((flat, (0.5, 1.0)), (tall, (5.0, 1.0))):
        inside, outside = (np.argwhere(np.pad(best, 1) == v) * spacing for v in (1, 0))
        depth = cdist(inside, outside).min(axis=1)
        assert cdist([(point + 1) * spacing], outside).min() == pytest.approx(depth.max())
    assert flat[1] <= 4 and tall[0] <= 3


def test_nothing_depends_on_the_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    best = (rng.random((40, 33)) < 0.45).astype(int)
    scores = scores_of(best, np.full(best.shape, 0.75))
    whole = grounder().ground(scores, ["lake"]).detections
    defaults = strips.strips.__defaults__
    monkeypatch.setattr(strips.strips, "__defaults__", (70,))
    read: list[Box] = []

    def reader(box: Box) -> np.ndarray:
        read.append(box)
        return scores[(slice(None), *box.slices)]

    monkeypatch.setattr(strips.find_components, "__defaults__", (70,))
    monkeypatch.setattr(strips.component_strips, "__defaults__", (70,))
    cut = grounder().ground_scene(reader, best.shape, ["lake"]).detections
    assert defaults == (strips.STRIP,) and max(b.size for b in read[:20]) == 66
    for name in ("start", "stop", "point", "score"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(whole, name))


def test_every_phrase_is_accounted_for() -> None:
    best = np.zeros((8, 8), int)
    best[1:3, 1:3] = 1
    sure = np.full((8, 8), 0.6)
    sure[1:3, 1:3] = 0.7
    phrases = ["water", "lake", "wood", "volcano", "land", "no lake", "water and wood"]
    found = grounder(threshold=0.65).ground(scores_of(best, sure), phrases)
    assert [a.phrase for a in found.accounts] == phrases
    assert [a.outcome for a in found.accounts] == [
        Outcome.found,
        Outcome.found,
        Outcome.absent,
        Outcome.unknown,
        Outcome.refused,
        Outcome.refused,
        Outcome.refused,
    ]
    assert found.detections.phrase.tolist() == [0, 1], "two phrases of one class have the same object each"
    says = [str(a) for a in found.accounts]
    assert says[0] == "1 found (class water with 1.00)"
    assert says[2] == "not found (class wood with 1.00)"
    assert says[3].startswith("not found: nearest is ")
    large = grounder(smallest=5).ground(scores_of(best, sure), ["lake"])
    assert str(large.accounts[0]).startswith("not found: 1 too small, the best with 0.70")
    strict = grounder(threshold=0.8).ground(scores_of(best, sure), ["lake"])
    assert strict.accounts[0].outcome is Outcome.below and not len(strict.detections)
    assert str(strict.accounts[0]).startswith("not found: 1 below the threshold, the best with 0.70")


def test_no_data_is_no_object() -> None:
    scores = scores_of(np.ones((4, 6), int), np.full((4, 6), 0.9))
    scores[0, :, 2] = np.nan
    d = grounder().ground(scores, ["lake"]).detections
    np.testing.assert_array_equal(d.start[:, 1], [-0.5, 2.5])
    np.testing.assert_allclose(d.score, 0.9)


def test_a_map_of_other_classes_is_refused() -> None:
    with pytest.raises(RequestError, match="found 2 classes; valid: 3, land, water, wood"):
        grounder().ground(np.zeros((2, 4, 4)), ["lake"])


def test_a_component_has_its_outline() -> None:
    """scikit-image's components, rasterised again by GDAL."""
    rng = np.random.default_rng(4)
    scores = np.kron(rng.random((9, 11)), np.ones((5, 4)))
    maps = np.stack([1 - scores, scores])
    grounder = InMemory(Vocabulary([Concept("land", ("land",), True), Concept("lake", ("lake",))], spelled))
    found = grounder.ground(maps, ["lake"]).detections
    parts = label(scores > 0.5, connectivity=2)
    assert len(found) == len(found.outline) == parts.max() > 3
    for place, outline in enumerate(found.outline):
        moved = shapely.affinity.translate(outline, 0.5, 0.5)  # edges of elements on whole numbers
        mask = rasterize([moved], scores.shape).astype(bool)
        y, x = (int(v) for v in found.point[place])
        np.testing.assert_array_equal(mask, parts == parts[y, x])
