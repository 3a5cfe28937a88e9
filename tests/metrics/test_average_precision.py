"""Average precision against pycocotools."""

from contextlib import redirect_stdout
from io import StringIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from segpipe.objects.average_precision import average_precision, detections
from tests.metrics.objects import blobs, boxes_at, classes_of, pairs_of, seeds


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
