"""Objects against pycocotools, torchmetrics, MONAI and networkx on random blobs, and by hand."""

import json
import math
import random
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO

import cc3d
import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.panoptic_quality import compute_panoptic_quality
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pyproj import CRS
from scipy.ndimage import gaussian_filter
from skimage.measure import label
from torchmetrics.detection import PanopticQuality as TorchPanopticQuality

from segpipe.boxes import grid_boxes
from segpipe.errors import RequestError, SceneError
from segpipe.geometry import RasterGeometry, volume_geometry
from segpipe.metrics import matching
from segpipe.metrics.average_precision import average_precision, detections, mean_average_precision
from segpipe.metrics.instances import VOID, Minimum, Objects, OverlapTable, add, overlap_tile, overlaps
from segpipe.metrics.matching import ObjectCounts, match, object_counts, pooled
from segpipe.metrics.panoptic import panoptic_counts, panoptic_quality
from segpipe.metrics.tally import MOST_ELEMENTS, SizeScale

seeds = st.integers(0, 2**32 - 1)
dimensions = st.sampled_from([2, 3])


def scene_of(shape, geographic=False):
    if len(shape) == 3:
        return volume_geometry(shape, np.diag([0.7, 1.1, 2.3, 1]))
    if geographic:
        return RasterGeometry(shape, (0.3, 0, -80, 0, -0.3, 60), CRS("EPSG:4326").to_wkt())
    return RasterGeometry(shape, (2.0, 0, 630534, 0, -2.0, 228114), CRS("EPSG:32616").to_wkt())


def table_of(predicted, reference, tile=None, geometry=None, order=None):
    geometry = geometry or scene_of(predicted.shape)
    boxes = list(grid_boxes(geometry.shape, tile or geometry.shape))
    if order is not None:
        random.Random(order).shuffle(boxes)
    scale = SizeScale.of(geometry)
    return add(overlap_tile(predicted[b.slices], reference[b.slices], b, scale) for b in boxes)


def objects_of(ids, classes=1, scores=None):
    """Every object in an array; ``classes`` and ``scores`` by id, or one class for all."""
    found = np.unique(ids[ids > 0]).tolist()
    return Objects.of(
        found,
        [classes if isinstance(classes, int) else classes[i] for i in found],
        None if scores is None else [scores[i] for i in found],
    )


def pairs_of(predicted, reference, classes=(1, 1), scores=None, geometry=None, **options):
    geometry = geometry or scene_of(predicted.shape)
    return overlaps(
        table_of(predicted, reference, geometry=geometry),
        objects_of(predicted, classes[0], scores),
        objects_of(reference, classes[1]),
        SizeScale.of(geometry),
        **options,
    )


def components(mask):
    """Objects of a mask by faces: scikit-image's in 2D, cc3d's in 3D."""
    if mask.ndim == 2:
        return label(mask, connectivity=1).astype(np.int64)
    return cc3d.connected_components(mask, connectivity=6).astype(np.int64)


def blobs(rng, ndim=2, change=0.5, void=False):
    """Objects of a random field, and of the same field somewhat changed: (predicted, reference)."""
    shape = (40, 47) if ndim == 2 else (14, 15, 16)
    field, other = (gaussian_filter(rng.normal(size=shape), 1.7) for _ in range(2))
    predicted = components(field + change * other > 0.3 * field.std())
    reference = components(field > 0.3 * field.std())
    if void:
        predicted[gaussian_filter(rng.normal(size=shape), 3) > 0.15 * (1.3 - 0.3 * ndim)] = VOID
        reference[gaussian_filter(rng.normal(size=shape), 3) > 0.1 * (1.3 - 0.3 * ndim)] = VOID
    return predicted, reference


def classes_of(rng, ids, values=(1, 2, 3)):
    return {i: int(rng.choice(values)) for i in np.unique(ids[ids > 0]).tolist()}


# the table


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=3), seeds, st.integers(1, 12), st.booleans())
def test_any_tiling_and_order_gives_the_same_table(shape, seed, step, geographic):
    rng = np.random.default_rng(seed)
    geometry = scene_of(tuple(shape), geographic)
    predicted = rng.choice([VOID, 0, 0, 1, 7, 2**62], shape)
    reference = rng.choice([-9, 0, 0, 3, 2**40], shape)
    whole = table_of(predicted, reference, geometry=geometry)
    tile = tuple(max(1, (step + i) % 7) for i in range(len(shape)))
    assert table_of(predicted, reference, tile, geometry, order=seed) == whole
    assert OverlapTable.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    # … and it is the joint histogram of the elements with an object
    pairs = Counter(
        zip(predicted.ravel().tolist(), np.maximum(reference, VOID).ravel().tolist(), strict=True)
    )
    expected = {pair: n for pair, n in pairs.items() if max(pair) > 0}
    got = dict(
        zip(zip(whole.predicted.tolist(), whole.reference.tolist(), strict=True), whole.count, strict=True)
    )
    assert got == expected
    assert list(got) == sorted(got)
    sizes = np.broadcast_to(geometry.element_sizes().reshape(-1, *[1] * (len(shape) - 1)), shape)
    for (p, r), units in zip(got, whole.size.tolist(), strict=True):
        here = (predicted == p) & (np.maximum(reference, VOID) == r)
        assert SizeScale.of(geometry).size(units) == pytest.approx(sizes[here].sum(), rel=1e-8)


def test_a_tile_of_another_shape_or_with_ids_too_large_is_refused():
    geometry = scene_of((4, 4))
    ids, scale = np.ones((4, 4), np.uint64), SizeScale.of(geometry)
    with pytest.raises(ValueError, match="another shape"):
        overlap_tile(ids[:3], ids, geometry.box, scale)
    with pytest.raises(SceneError, match=r"reference object id 9223372036854775808: .* 2\*\*63 - 1"):
        overlap_tile(ids, ids << np.uint64(63), geometry.box, scale)
    large = scene_of((MOST_ELEMENTS + 1, 1))
    empty = np.zeros(large.shape, np.uint8)
    with pytest.raises(ValueError, match="at most 4194304"):
        overlap_tile(empty, empty, large.box, SizeScale.of(large))


def test_objects_that_contradict_themselves_are_refused():
    with pytest.raises(SceneError, match="object id 4 occurs twice"):
        Objects.of([4, 2, 4], [1, 1, 2])
    with pytest.raises(SceneError, match="object id 0: ids are above 0"):
        Objects.of([0, 1], [1, 1])
    with pytest.raises(SceneError, match="object 3 has an infinite score"):
        Objects.of([2, 3], [1, 1], [0.5, np.inf])
    with pytest.raises(ValueError, match="2,"):
        Objects.of([2, 3], [1])
    ids = np.array([[1, 5]])
    with pytest.raises(SceneError, match="reference object 5 has elements, but no class"):
        overlaps(
            table_of(ids, ids), objects_of(ids), Objects.of([1, 2], [1, 1]), SizeScale.of(scene_of((1, 2)))
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


def boxes_at(shape, *slices):
    """Ids 1, 2 … in these places."""
    ids = np.zeros(shape, np.int64)
    for i, place in enumerate(slices, 1):
        ids[place] = i
    return ids


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
    assert mean_average_precision([]).reason == "no class is in the reference"


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


# average precision


def coco_precision(scenes):
    """pycocotools' AP by class and threshold from (predicted, reference, classes, scores) per scene."""
    images, annotations, results = [], [], []
    for image, (predicted, reference, classes, scores) in enumerate(scenes, 1):
        images.append({"id": image, "height": predicted.shape[0], "width": predicted.shape[1]})
        for ids, names, rows in ((predicted, classes[0], results), (reference, classes[1], annotations)):
            for i in names:
                mask = rle.encode(np.asfortranarray(ids == i, dtype=np.uint8))
                rows.append(
                    {"image_id": image, "category_id": names[i], "segmentation": mask}
                    | ({"score": scores[i]} if rows is results else
                       {"id": len(rows) + 1, "iscrowd": 0, "area": float(rle.area(mask))})
                )  # fmt: skip
    truth = COCO()
    truth.dataset = {
        "images": images, "annotations": annotations, "categories": [{"id": c} for c in (1, 2, 3)], "info": {}
    }  # fmt: skip
    with redirect_stdout(StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.maxDets = [10_000]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]  # threshold, recall, class
    return np.where((precision == -1).all(1), np.nan, precision.mean(1)).T


@settings(deadline=None, max_examples=25)
@given(seeds, st.floats(0.05, 0.9), st.integers(1, 3))
def test_average_precision_is_that_of_pycocotools(seed, change, count):
    rng = np.random.default_rng(seed)
    scenes, found = [], []
    for _ in range(count):
        predicted, reference = blobs(rng, 2, change)
        truth = classes_of(rng, reference, (1, 1, 2))
        classes = {}
        for i in np.unique(predicted[predicted > 0]).tolist():  # most often the right one
            under = reference[(predicted == i) & (reference > 0)]
            right = len(under) and rng.random() < 0.8
            classes[i] = truth[int(under[0])] if right else int(rng.integers(1, 4))
        scores = {i: float(rng.random()) for i in classes}
        scenes.append((predicted, reference, (classes, truth), scores))
        found.append(detections(pairs_of(predicted, reference, (classes, truth), scores)))
    oracle = coco_precision(scenes)
    got = average_precision(found)
    for value in (1, 2, 3):
        by_threshold = oracle[value - 1]
        expected = by_threshold.mean(), by_threshold[0], by_threshold[5]
        if value in got:
            assert (got[value].ap, got[value].ap50, got[value].ap75) == pytest.approx(expected, nan_ok=True)
            assert got[value].reason == ("not in the reference" if np.isnan(expected[0]) else "")
            assert got[value].note == ""
        else:
            assert np.isnan(expected).all()
    assert mean_average_precision(got.values()).ap == pytest.approx(np.nanmean(oracle))


@pytest.mark.parametrize(("scores", "ap50"), [((0.9, 0.6, 0.3), 1), ((0.3, 0.6, 0.9), 1 / 2)])
def test_of_two_halves_the_better_score_is_taken(scores, ap50):
    """Scores of one half, of the other and of a false positive: the better half comes first, or second."""
    predicted = boxes_at((2, 12), np.s_[:, :4], np.s_[:, 8:], np.s_[:, 4:8])
    reference = boxes_at((2, 12), np.s_[:, :8])
    by_id = dict(zip((1, 3, 2), scores, strict=True))
    found = average_precision([detections(pairs_of(predicted, reference, scores=by_id))])[1]
    assert (found.ap50, found.ap75) == (ap50, 0)


def test_without_scores_it_is_one_operating_point():
    """Two of three predicted are right, two of four are found: 2/3 at the 51 recalls up to 1/2."""
    places = [np.s_[:, i : i + 3] for i in range(0, 20, 4)]
    predicted, reference = boxes_at((3, 20), *places[:3]), boxes_at((3, 20), *places[1:])
    for scores in (None, {1: 0.4, 2: 0.4, 3: 0.4}):
        found = average_precision([detections(pairs_of(predicted, reference, scores=scores))])[1]
        assert found.ap == found.ap50 == pytest.approx(2 / 3 * 51 / 101)
        assert found.note == ("" if scores else "no object has a score: AP is of one operating point")
    # the wrong one last: precision 1 up to the recall of 1/2. One without a score counts as 1
    some = {1: 0.4, 2: np.nan, 3: 0.5}
    found = average_precision([detections(pairs_of(predicted, reference, scores=some))])[1]
    assert found.ap == pytest.approx(51 / 101)
    assert found.note == "1 of 3 objects have no score and count as 1"
    assert mean_average_precision([found]).note == found.note


# panoptic quality


@settings(deadline=None, max_examples=30)
@given(seeds, dimensions, st.floats(0.05, 1), st.booleans())
def test_panoptic_quality_is_that_of_torchmetrics(seed, ndim, change, void):
    """Classes 1 and 2 things, 3 and 4 stuff, 9 unknown to torchmetrics: its void."""
    rng = np.random.default_rng(seed)
    things, stuff = {1, 2}, {3, 4}
    oracle = TorchPanopticQuality(
        things, stuff, allow_unknown_preds_category=True, return_sq_and_rq=True, return_per_class=True
    )
    found = []
    for _ in range(2):
        shape = (40, 47) if ndim == 2 else (12, 13, 14)
        fields = gaussian_filter(rng.normal(size=(5, *shape)), (0, *[2] * ndim))
        noise = gaussian_filter(rng.normal(size=(5, *shape)), (0, *[2] * ndim))
        maps = []
        for field in (fields + change * noise, fields):
            classes = np.array([1, 2, 3, 4, 9])[(field if void else field[:4]).argmax(0)]
            instances = cc3d.connected_components(classes, connectivity=4 if ndim == 2 else 6)
            maps.append((classes, instances.astype(np.int64)))
        tensors = (torch.from_numpy(np.stack(m, -1).astype(np.int64))[None] for m in maps)
        oracle.update(*tensors)
        ids = [np.where(classes == 9, VOID, instances) for classes, instances in maps]
        names = [dict(zip(i.ravel().tolist(), c.ravel().tolist(), strict=True)) for c, i in maps]
        found.append(panoptic_counts(pairs_of(*ids, names, stuff=stuff)))
    got = panoptic_quality(found, things, stuff)
    for value, expected in zip((1, 2, 3, 4), oracle.compute().squeeze().tolist(), strict=True):
        quality = got.by_class[value]
        if quality.classes:
            assert (quality.pq, quality.rq) == pytest.approx((expected[0], expected[2]))
        if got.counts[value].tp:
            assert (quality.sq, quality.reason) == (pytest.approx(expected[1]), "")
        else:
            assert (expected[1], quality.reason != "") == (0, True)
            assert math.isnan(quality.sq)
    mean = TorchPanopticQuality(things, stuff, allow_unknown_preds_category=True)
    for state in ("iou_sum", "true_positives", "false_positives", "false_negatives"):
        setattr(mean, state, getattr(oracle, state))
    mean._update_count = 1
    assert got.all.pq == pytest.approx(float(mean.compute()))


def test_panoptic_means_and_what_is_not_defined():
    """Class 1 found at IoU 0.8, class 2 missed, stuff 3 (in two pieces, two ids) right, 4 nowhere."""
    reference = boxes_at((10, 40), np.s_[:, :10], np.s_[:, 12:18], np.s_[:, 20:24], np.s_[:, 30:36])
    predicted = boxes_at((10, 40), np.s_[:8, :10], np.s_[:, 20:24], np.s_[:, 30:36])
    scene = pairs_of(predicted, reference, ({1: 1, 2: 3, 3: 3}, {1: 1, 2: 2, 3: 3, 4: 3}), stuff={3, 4})
    got = panoptic_quality([panoptic_counts(scene)], {1, 2}, {3, 4})
    assert got.counts[3] == ObjectCounts(tp=1, iou=1 << 48)
    assert got.by_class[1].pq == pytest.approx(0.8)
    assert (got.by_class[2].pq, got.by_class[2].reason) == (0, "SQ: nothing matched")
    assert math.isnan(got.by_class[4].pq)
    assert got.by_class[4].reason == "absent in both"
    assert (got.things.pq, got.things.sq, got.things.rq) == pytest.approx((0.4, 0.8, 0.5))
    assert (got.stuff.pq, got.stuff.classes, got.things.classes, got.all.classes) == (1, 1, 2, 3)
    assert (got.all.pq, got.all.sq) == pytest.approx((0.6, 0.9))
    none = panoptic_quality([], {1}, ())
    assert (none.things.reason, none.stuff.reason) == ("no class is defined",) * 2
    with pytest.raises(RequestError, match="class 3 is both thing and stuff"):
        panoptic_quality([], {1, 3}, {3})
