"""Masks to objects, against transformers' own post-processing and the published code of Mask2Former."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from transformers import Mask2FormerImageProcessor

from segpipe.objects.window import WindowObjects, mask_quality, resolve_instances, resolve_masks

EDGE = 384
"""Transformers resizes masks to this; masks of this size stay as they are."""
VALUES = np.array([7, 3, 200, 11])
"""Class values of the network's channels; the last two are stuff."""


def logits_of(seed, queries=14):
    """Class logits (queries, 5), the last for no object; smooth mask logits (queries, y, x) that overlap."""
    rng = np.random.default_rng(seed)
    classes = rng.normal(scale=2.5, size=(queries, len(VALUES) + 1)).astype(np.float32)
    classes[:, 2] += 2  # much stuff, so that some is fused
    coarse = gaussian_filter(rng.normal(size=(queries, 48, 48)), (0, 5, 5)) * 90 - 3
    return classes, np.kron(coarse, np.ones((1, 8, 8))).astype(np.float32)


def stuff_last(classes, masks):
    """Queries in the order of their class: where stuff comes last, transformers' ids have no clash."""
    order = np.argsort(classes.argmax(1), kind="stable")
    return classes[order], masks[order]


def outputs_of(classes, masks):
    return SimpleNamespace(
        class_queries_logits=torch.from_numpy(classes)[None],
        masks_queries_logits=torch.from_numpy(masks)[None],
    )


def queries_of(classes, masks):
    """What an adapter hands on: mask probabilities, class values and scores; 0 is no object."""
    scores, labels = torch.from_numpy(classes).softmax(-1).max(-1)
    values = np.r_[VALUES, 0][labels.numpy()]
    return torch.from_numpy(masks).sigmoid().numpy(), values, scores.numpy()


def assert_same_objects(found, segmentation, classes, scores):
    """The same elements, class and score, whatever the ids are."""
    assert len(found.classes) == len(classes)
    for k in range(1, len(classes) + 1):
        at = segmentation[found.ids == k]
        assert at.size == np.count_nonzero(segmentation == at[0])
        assert found.classes[k - 1] == classes[at[0]]
        assert found.scores[k - 1] == pytest.approx(scores[at[0]], abs=1e-6)
    assert np.count_nonzero(found.ids) == sum(np.count_nonzero(segmentation == i) for i in classes)


def test_panoptic_segments_are_those_of_transformers():
    settings = {"mask_threshold": 0.4, "overlap_mask_area_threshold": 0.4}
    dropped = fused = 0
    for seed in range(3):
        classes, masks = stuff_last(*logits_of(seed))
        [want] = Mask2FormerImageProcessor().post_process_panoptic_segmentation(
            outputs_of(classes, masks), threshold=0.35, label_ids_to_fuse={2, 3}, **settings
        )
        found = resolve_masks(
            *queries_of(classes, masks),
            score_threshold=0.35,
            mask_threshold=0.4,
            overlap_threshold=0.4,
            things=[7, 3],
            stuff=[200, 11],
        )
        segments, segmentation = want["segments_info"], want["segmentation"].numpy()
        parts = {s["id"]: [t for t in segments if t["id"] == s["id"]] for s in segments}
        scores = {}
        for k in range(1, len(found.classes) + 1):
            own = int(segmentation[found.ids == k][0])
            several = [t["score"] for t in parts[own]]  # transformers gives them one by one
            scores[own] = several[0] if len(several) == 1 else found.scores[k - 1]
            assert min(several) - 1e-6 <= scores[own] <= max(several) + 1e-6
        assert_same_objects(
            found, segmentation, {i: VALUES[p[0]["label_id"]] for i, p in parts.items()}, scores
        )
        dropped += np.count_nonzero(segmentation == 0) > 0
        fused += len(segments) > len(parts)
    assert dropped >= 2 and fused >= 2


def test_no_two_segments_share_an_id():
    """Sky, car, sky, car: transformers 5 gives both cars one id."""
    masks = np.zeros((4, 4, 4), np.float32)
    for k in range(4):
        masks[k, k] = 0.9
    scores = np.array([0.9, 0.8, 0.7, 0.6], np.float32)
    found = resolve_masks(masks, np.array([2, 1, 2, 1]), scores, things=[1], stuff=[2])
    assert found.ids[:, 0].tolist() == [1, 2, 1, 3]
    assert found.classes.tolist() == [2, 1, 1]
    assert found.scores == pytest.approx([0.8, 0.8, 0.6])


def test_of_equal_masks_the_first_wins():
    """As torch's argmax on the CPU has it."""
    masks, scores = np.full((3, 2, 2), 0.9, np.float32), np.array([0.6, 0.8, 0.8], np.float32)
    found = resolve_masks(masks, np.array([1, 2, 3]), scores, things=[1, 2, 3], stuff=[])
    first = int((torch.from_numpy(masks) * torch.from_numpy(scores).view(-1, 1, 1)).argmax(0)[0, 0])
    assert (first, found.classes.tolist()) == (1, [2])
    assert (found.ids == 1).all()


def published_panoptic(masks, classes, scores, things, stuff, threshold, overlap):
    """`panoptic_inference` of facebookresearch/Mask2Former (maskformer_model.py, MIT), step by step."""
    keep = (scores > threshold) & np.isin(classes, [*things, *stuff])
    masks, classes, scores = masks[keep], classes[keep], scores[keep]
    segmentation, info, memory = np.zeros(masks.shape[1:], int), {}, {}
    if not len(masks):
        return segmentation, info
    owner = (masks * scores[:, None, None]).argmax(0)
    for k, value in enumerate(classes.tolist()):
        mask = (owner == k) & (masks[k] >= 0.5)
        area, original = (owner == k).sum(), (masks[k] >= 0.5).sum()
        if not (area and original and mask.any()) or area / original < overlap:
            continue
        if value in memory:
            segmentation[mask] = memory[value]
            continue
        info[len(info) + 1] = value
        if value in stuff:
            memory[value] = len(info)
        segmentation[mask] = len(info)
    return segmentation, info


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_rule_is_that_of_the_published_code(seed):
    masks, values, scores = queries_of(*logits_of(seed))
    want, info = published_panoptic(masks, values, scores, [7, 3], [200, 11], 0.35, 0.4)
    found = resolve_masks(
        masks,
        values,
        scores,
        score_threshold=0.35,
        overlap_threshold=0.4,
        things=[7, 3],
        stuff=[200, 11],
        rule="paper",
    )
    np.testing.assert_array_equal(found.ids, want)
    assert found.classes.tolist() == list(info.values())


def test_a_lone_object_fills_its_window_by_transformers_rule_only():
    mask = np.full((1, EDGE, EDGE), 1e-3, np.float32)
    mask[0, 100:120, 50:90] = 0.95
    logits = torch.logit(torch.from_numpy(mask)).numpy()
    [want] = Mask2FormerImageProcessor().post_process_panoptic_segmentation(
        outputs_of(np.array([[9.0, 0, 0, 0, 0]], np.float32), logits), label_ids_to_fuse=set()
    )
    filled = resolve_masks(mask, np.array([7]), np.array([0.99]), things=[7], stuff=[])
    exact = resolve_masks(mask, np.array([7]), np.array([0.99]), things=[7], stuff=[], rule="paper")
    assert np.count_nonzero(filled.ids) == np.count_nonzero(want["segmentation"] == 1) == EDGE * EDGE
    np.testing.assert_array_equal(exact.ids, mask[0] > 0.5)


@pytest.mark.parametrize("seed", range(3))
def test_instances_are_those_of_transformers(seed):
    """Its binary maps, painted from the lowest score to the highest."""
    classes, masks = logits_of(seed)
    [want] = Mask2FormerImageProcessor().post_process_instance_segmentation(
        outputs_of(classes, masks), threshold=0.3, return_binary_maps=True
    )
    canvas = np.zeros((EDGE, EDGE), int)
    order = np.argsort([s["score"] for s in want["segments_info"]])
    for row in order:
        canvas[want["segmentation"][row].numpy() == 1] = row + 1
    probabilities = torch.from_numpy(classes).softmax(-1)[:, :-1].flatten()
    top = probabilities.topk(len(classes)).indices.numpy()
    masks = torch.from_numpy(masks).sigmoid().numpy()[top // len(VALUES)]
    found = resolve_instances(
        masks,
        VALUES[top % len(VALUES)],
        probabilities.numpy()[top] * mask_quality(masks),
        score_threshold=0.3,
    )
    seen = [i for i in range(1, len(order) + 1) if (canvas == i).any()]
    segments = {i: want["segments_info"][i - 1] for i in seen}
    assert len(seen) > 2
    assert_same_objects(
        found,
        canvas,
        {i: VALUES[s["label_id"]] for i, s in segments.items()},
        {i: s["score"] for i, s in segments.items()},
    )


def test_a_hidden_instance_frees_its_elements():
    """Front 0–9, then 5–14 of which half is hidden, then 10–19: without the second it has all its own."""
    masks = np.zeros((3, 1, 1, 20), np.float32)
    for k, (a, b) in enumerate([(0, 10), (5, 15), (10, 20)]):
        masks[k, ..., a:b] = 0.8
    scores = np.array([0.9, 0.8, 0.7], np.float32)
    plain = resolve_instances(masks, np.array([1, 2, 3]), scores)
    strict = resolve_instances(masks, np.array([1, 2, 3]), scores, overlap_threshold=0.6)
    assert plain.ids.ravel().tolist() == [1] * 10 + [2] * 5 + [3] * 5
    assert strict.ids.ravel().tolist() == [1] * 10 + [2] * 10
    assert strict.classes.tolist() == [1, 3]
    tie = resolve_instances(masks, np.array([1, 2, 3]), np.full(3, 0.5, np.float32))
    np.testing.assert_array_equal(tie.ids, plain.ids)


@pytest.mark.parametrize("resolve", [resolve_instances, lambda *a: resolve_masks(*a, things=[1], stuff=[2])])
def test_nothing_found(resolve):
    none = resolve(np.zeros((0, 4, 5), np.float32), np.zeros(0, int), np.zeros(0, np.float32))
    low = resolve(np.ones((2, 4, 5), np.float32), np.array([1, 2]), np.array([0.2, 0.49], np.float32))
    for found in (none, low):
        assert found.ids.shape == (4, 5)
        assert not found.ids.any() and not len(found.classes)


def test_wrong_window_objects_are_refused():
    one, ids = np.array([1]), np.array([[0, 2]], np.int32)
    with pytest.raises(ValueError, match="ids 0 to 2 of 1 objects"):
        WindowObjects(ids, one, np.array([0.5], np.float32))
    with pytest.raises(ValueError, match=r"a score outside \[0, 1\]"):
        WindowObjects(ids - ids, one, np.array([1.5], np.float32))
    with pytest.raises(ValueError, match=r"classes \(1,\) and scores \(2,\)"):
        WindowObjects(ids - ids, one, np.array([0.5, 0.5], np.float32))
