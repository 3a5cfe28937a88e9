"""Matching of objects against MONAI and networkx, and by hand: counts, void and sizes."""

import math

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.panoptic_quality import compute_panoptic_quality

from segpipe.errors import RequestError
from segpipe.metrics.tally import SizeScale
from segpipe.objects import matching
from segpipe.objects.average_precision import average_precision, detections
from segpipe.objects.matching import ObjectCounts, match, object_counts, panoptic_counts, pooled
from segpipe.objects.overlap_table import VOID, Minimum, overlaps
from tests.metrics.objects import (
    blobs,
    boxes_at,
    classes_of,
    dimensions,
    objects_of,
    pairs_of,
    scene_of,
    seeds,
    table_of,
)

# matching


@settings(deadline=None, max_examples=40)
@given(seeds, dimensions, st.sampled_from([0.5, 0.6003, 0.7003, 0.8003]), st.floats(0, 1))
def test_counts_above_half_are_those_of_monai(seed, ndim, threshold, change):
    predicted, reference = blobs(np.random.default_rng(seed), ndim, change)
    above = math.nextafter(threshold, 1)  # MONAI asks for more than the threshold
    counts = pooled(object_counts(pairs_of(predicted, reference), above).values())
    oracle = compute_panoptic_quality(
        torch.from_numpy(predicted), torch.from_numpy(reference),
        match_iou_threshold=threshold, output_confusion_matrix=True,
    )  # fmt: skip
    assert (counts.tp, counts.fp, counts.fn) == tuple(oracle[:3].int().tolist())
    if counts.tp:
        assert counts.mean_iou == pytest.approx(float(oracle[3]) / counts.tp, rel=1e-5)  # float32


@pytest.mark.parametrize("cells", [matching.DENSE_CELLS, 0], ids=["dense", "sparse"])
@pytest.mark.parametrize("threshold", [0.05, 0.15, 0.3, 0.5])
@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_networkx_matching_of_most_pairs_and_most_iou(monkeypatch, cells, threshold, seed):
    monkeypatch.setattr(matching, "DENSE_CELLS", cells)
    rng = np.random.default_rng(seed)
    predicted, reference = (
        np.kron(rng.permutation(90)[: (36 // k) ** 2].reshape(36 // k, 36 // k), np.ones((k, k), int))
        for k in (4, 6)
    )
    predicted = np.roll(predicted, rng.integers(1, 4, 2), (0, 1)) * (rng.random((36, 36)) < 0.9)
    scene = pairs_of(predicted, reference)
    pairs = match(scene, threshold)
    graph = nx.Graph()
    for p in set(predicted.ravel().tolist()) - {0}:
        for r in set(reference[predicted == p].tolist()) - {0}:
            iou = ((predicted == p) & (reference == r)).sum() / ((predicted == p) | (reference == r)).sum()
            if iou >= threshold:
                graph.add_edge(("p", p), ("r", r), weight=iou)
    oracle = nx.max_weight_matching(graph, maxcardinality=True)
    assert len(pairs) == len(oracle)
    assert scene.iou[pairs].sum() == pytest.approx(sum(graph.edges[e]["weight"] for e in oracle))
    ids = scene.predicted.objects.ids[scene.first[pairs]], scene.reference.objects.ids[scene.second[pairs]]
    assert all(graph.has_edge(("p", p), ("r", r)) for p, r in zip(*ids, strict=True))
    assert len(set(ids[0].tolist())) == len(set(ids[1].tolist())) == len(pairs)


@settings(deadline=None, max_examples=40)
@given(seeds, dimensions, st.sampled_from([0.1, 0.3, 0.5, 0.55, 0.75]))
def test_permuting_ids_changes_nothing_and_swapping_sides_swaps_precision_and_recall(seed, ndim, threshold):
    rng = np.random.default_rng(seed)
    predicted, reference = blobs(rng, ndim, void=True)
    classes = classes_of(rng, predicted), classes_of(rng, reference)
    scores = {i: float(rng.choice([0.2, 0.5, 0.9])) for i in classes[0]}
    scene = pairs_of(predicted, reference, classes, scores, stuff={3})

    def renamed(ids):
        new = rng.choice(np.arange(1, 10**6), ids.max() + 2, replace=False) * 2**40
        return np.where(ids > 0, new[ids], ids), dict(enumerate(new.tolist()))

    (p, p_new), (r, r_new) = renamed(predicted), renamed(reference)
    again = pairs_of(
        p,
        r,
        ({p_new[i]: c for i, c in classes[0].items()}, {r_new[i]: c for i, c in classes[1].items()}),
        {p_new[i]: s for i, s in scores.items()},
        stuff={3},
    )
    counts = object_counts(scene, threshold)
    for value, other in object_counts(again, threshold).items():
        # the order of a sum of floats decides between equally good assignments
        assert other.iou == pytest.approx(counts[value].iou, rel=1e-9)
        assert ObjectCounts(**{**vars(other), "iou": counts[value].iou}) == counts[value]
    assert average_precision([detections(again)]) == average_precision([detections(scene)])

    swapped = object_counts(pairs_of(reference, predicted, classes[::-1], stuff={3}), threshold)
    assert swapped.keys() == counts.keys()
    for value, other in swapped.items():
        one = counts[value]
        assert (other.precision, other.recall) == pytest.approx((one.recall, one.precision), nan_ok=True)
        assert (other.void_predicted, other.void_reference) == (one.void_reference, one.void_predicted)
        assert (other.f1, other.mean_iou) == pytest.approx((one.f1, one.mean_iou), nan_ok=True)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("shift", [0, 1, 2, 3, 5, 9])
def test_shifted_squares(ndim, shift):
    """A side of 10 moved by k: the intersection is 10 − k wide, the union 10 + k."""
    rest = (slice(2, 12),) * (ndim - 1)
    shape = (24,) * ndim
    predicted = boxes_at(shape, (slice(shift, shift + 10), *rest))
    scene = pairs_of(predicted, boxes_at(shape, (slice(0, 10), *rest)))
    iou = (10 - shift) / (10 + shift)
    assert scene.iou.tolist() == [iou]
    assert object_counts(scene, iou) == {1: ObjectCounts(tp=1, iou=round(iou * 2**48))}
    if iou < 1:
        assert object_counts(scene, math.nextafter(iou, 1)) == {1: ObjectCounts(fp=1, fn=1)}
    passed = sum(100 * (10 - shift) >= t * (10 + shift) for t in range(50, 100, 5))  # whole numbers
    assert average_precision([detections(scene)])[1].ap == pytest.approx(passed / 10)


def test_two_objects_merged_into_one():
    """IoU is 1/2 with both: one match at 0.5, none above; a recall of 1/2 reaches 51 of 101 recalls."""
    reference = boxes_at((10, 20), np.s_[:, :10], np.s_[:, 10:])
    scene = pairs_of((reference > 0).astype(int), reference)
    counts = object_counts(scene, 0.5)[1]
    assert (counts.tp, counts.fp, counts.fn, counts.mean_iou) == (1, 0, 1, 0.5)
    assert (counts.precision, counts.recall, counts.f1) == (1, 0.5, 2 / 3)
    assert object_counts(scene, 0.51)[1] == panoptic_counts(scene)[1] == ObjectCounts(fp=1, fn=2)
    found = average_precision([detections(scene)])[1]
    assert (found.ap50, found.ap75, found.ap) == pytest.approx((51 / 101, 0, 51 / 1010))


def test_one_object_split_into_two():
    """Parts of 6 and 4 tenths: the larger one is the match, the other a false positive."""
    predicted = boxes_at((10, 10), np.s_[:, :6], np.s_[:, 6:])
    scene = pairs_of(predicted, np.ones((10, 10), int), scores={1: 0.3, 2: 0.8})
    for threshold in (0.1, 0.4, 0.6):
        assert object_counts(scene, threshold)[1] == ObjectCounts(tp=1, fp=1, iou=round(0.6 * 2**48))
    assert object_counts(scene, 0.61)[1] == ObjectCounts(fp=2, fn=1)
    # the wrong one has the better score: precision is 1/2 where recall is 1, and everywhere below
    assert average_precision([detections(scene)])[1].ap50 == 0.5


def test_more_pairs_go_before_more_overlap():
    """p1 could have r1 (IoU 5/9) or r2 (1/6), p2 only r1 (1/8): two pairs, without the best one."""
    predicted = np.array([[1, 1, 1, 1, 1, 1, 2, 0, 0]])
    reference = np.array([[2, 1, 1, 1, 1, 1, 1, 1, 1]])
    scene = pairs_of(predicted, reference)
    assert sorted(scene.iou) == pytest.approx([1 / 8, 1 / 6, 5 / 9])
    assert scene.iou[match(scene, 0.1)] == pytest.approx([1 / 6, 1 / 8])
    assert scene.iou[match(scene, 0.15)] == pytest.approx([5 / 9])


def test_another_class_is_another_object():
    ids = boxes_at((4, 9), np.s_[:, :4], np.s_[:, 5:])
    scene = pairs_of(ids, ids, ({1: 1, 2: 1}, {1: 1, 2: 5}))
    counts = object_counts(scene, 0.5)
    assert counts == {1: ObjectCounts(tp=1, fp=1, iou=1 << 48), 5: ObjectCounts(fn=1)}
    assert pooled(counts.values()) == ObjectCounts(tp=1, fp=1, fn=1, iou=1 << 48)


def test_what_is_not_defined_says_why():
    for counts, reason in [
        (ObjectCounts(), "absent in both"),
        (ObjectCounts(fn=2), "precision: not predicted; mean IoU: nothing matched"),
        (ObjectCounts(fp=2), "recall: not in the reference; mean IoU: nothing matched"),
        (ObjectCounts(tp=1, iou=1 << 47), ""),
        (ObjectCounts(void_predicted=1), "mostly void where it is"),
    ]:
        assert counts.reason == reason
        assert math.isnan(counts.precision) == (counts.tp + counts.fp == 0)
        assert math.isnan(counts.recall) == (counts.tp + counts.fn == 0)
        assert math.isnan(counts.mean_iou) == (counts.tp == 0)
    for threshold in (0, 1.01, math.nan):
        with pytest.raises(RequestError, match=r"IoU threshold .* above 0 and at most 1"):
            match(pairs_of(np.ones((2, 2), int), np.ones((2, 2), int)), threshold)
    nothing = pairs_of(np.zeros((2, 2), int), np.zeros((2, 2), int))
    assert object_counts(nothing, 0.3) == detections(nothing) == {}


# void and sizes


@pytest.mark.parametrize(("void", "fp"), [(5, 1), (6, 0), (10, 0)])
def test_an_object_mostly_in_void_is_no_mistake(void, fp):
    """Ten elements, of which so many are ignored in the reference."""
    predicted, reference = np.ones((1, 10), int), np.zeros((1, 10), int)
    reference[:, :void] = VOID
    scene = pairs_of(predicted, reference)
    assert object_counts(scene, 0.3)[1] == ObjectCounts(fp=fp, void_predicted=1 - fp)
    assert panoptic_counts(scene)[1].fp == fp
    other = pairs_of(reference, predicted)
    assert object_counts(other, 0.3)[1] == ObjectCounts(fn=fp, void_reference=1 - fp)
    assert average_precision([detections(other)])[1].reason == ("" if fp else "mostly void where it is")


def test_void_counts_in_no_union():
    """Seven of ten elements void, three of the others found, one too many: IoU 3/4, matched."""
    predicted = np.array([[1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    reference = np.array([[VOID] * 7 + [1, 1, 1, 0]])
    scene = pairs_of(predicted, reference)
    assert scene.iou.tolist() == [0.75]
    assert object_counts(scene, 0.75)[1].tp == 1
    # above it, the prediction is mostly void, the reference not
    assert object_counts(scene, 0.8)[1] == ObjectCounts(fn=1, void_predicted=1)
    found = average_precision([detections(scene)])[1]
    assert (found.ap50, found.ap75, found.ap) == (1, 1, pytest.approx(0.6))


@pytest.mark.parametrize("ids", [(1, 2), (2, 1)])
def test_of_two_halves_the_one_mostly_void_stays_alone(ids):
    """Both have IoU 1/2 with the reference object; matched with the other, nothing is a mistake."""
    predicted = np.repeat(ids, (10, 4))[None]
    reference = np.array([[VOID] * 6 + [1] * 8])
    scene = pairs_of(predicted, reference)
    assert scene.iou.tolist() == [0.5, 0.5]
    assert object_counts(scene, 0.5)[1] == ObjectCounts(tp=1, iou=1 << 47, void_predicted=1)
    assert average_precision([detections(scene)])[1].ap50 == 1


def test_a_minimum_holds_for_whole_objects_of_either_side():
    """4 × 4 pixels of 4 m² in tiles of 2 × 2: no part reaches the minimum, the object does."""
    predicted = boxes_at((12, 12), np.s_[1:5, 1:5], np.s_[8:10, 8:10])
    table = table_of(predicted, predicted, (2, 2))
    scale = SizeScale.of(scene_of((12, 12)))
    for minimum, tp in [
        (Minimum(elements=16), 1), (Minimum(elements=17), 0), (Minimum(elements=4), 2),
        (Minimum(size=64.0), 1), (Minimum(size=64.1), 0), (Minimum(size=16.0), 2), (None, 2),
    ]:  # fmt: skip
        scene = overlaps(table, objects_of(predicted), objects_of(predicted), scale, minimum=minimum)
        assert pooled(object_counts(scene, 0.5).values()) == ObjectCounts(tp=tp, iou=tp << 48)
    smaller = predicted.copy()
    smaller[1] = 0
    counts = object_counts(pairs_of(predicted, smaller, minimum=Minimum(elements=13)), 0.5)
    assert counts == {1: ObjectCounts(fp=1)}
    scene = pairs_of(smaller, np.where(predicted == 1, VOID, 0), minimum=Minimum(elements=12))
    assert object_counts(scene, 0.5) == {1: ObjectCounts(void_predicted=1)}  # sizes are with void


def test_a_minimum_in_square_metres_on_the_globe():
    """The same 3 × 3 pixels at 59° and at 40° N: area goes with the cosine of latitude."""
    ids = boxes_at((70, 9), np.s_[1:4, 1:4], np.s_[63:66, 1:4])
    geometry = scene_of(ids.shape, geographic=True)
    sphere = 9 * np.radians(0.3) ** 2 * 6371007.2**2 * np.cos(np.radians([59.25, 40.65]))
    for factor, left in [(0.98, 2), (1.02, 1)]:
        counts = object_counts(
            pairs_of(ids, ids, geometry=geometry, minimum=Minimum(size=sphere[0] * factor)), 0.5
        )
        assert counts[1].tp == left
    counts = object_counts(pairs_of(ids, ids, geometry=geometry, minimum=Minimum(size=sphere[1] * 1.02)), 0.5)
    assert counts == {}
