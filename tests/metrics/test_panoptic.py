"""Panoptic quality against torchmetrics."""

import math

import cc3d
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torchmetrics.detection import PanopticQuality as TorchPanopticQuality

from segpipe.errors import RequestError
from segpipe.objects.matching import ObjectCounts, panoptic_counts, panoptic_quality
from segpipe.objects.overlap_table import VOID
from tests.metrics.objects import boxes_at, dimensions, pairs_of, seeds


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
