"""transformers: segments and instances are those of the library's image processors."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as t

from segpipe.models.network import ReadyObjects
from segpipe.models.providers.transformers import build
from tests.models.tiny_transformers import LOW_RESOLUTION, PROCESSORS, QUERIES, SEEDS, answer, card_for, saved

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


ROUNDED = 2e-3
"""Share of a window's elements whose side rounding decides; low maps are enlarged, so some move together."""


def commonest(ids):
    """The id of most elements."""
    return int(np.bincount(ids).argmax())


def assert_same_segments(found, segmentation, infos):
    """The same elements, class and score, whatever the ids are."""
    assert len(found.classes) == len(infos)
    wanted = np.zeros(segmentation.shape, int)
    for info in infos:
        here = segmentation == info["id"]
        k = commonest(found.ids[here])
        assert k > 0 and k not in wanted
        wanted[here] = k
        assert found.classes[k - 1] == info["label_id"] + 1  # the fixture's values, after background
        assert found.scores[k - 1] == pytest.approx(info["score"], abs=5e-5)
    assert np.mean(found.ids != wanted) <= ROUNDED


@pytest.mark.parametrize("architecture", QUERIES)
def test_panoptic_segments_are_the_processors(make_card, tmp_path, architecture):
    """All classes are things: transformers 5 mixes up ids after stuff (tests/instances/test_window.py)."""
    edge = 384 if architecture.startswith("Mask2") else 64
    for seed in SEEDS[architecture]:
        torch.manual_seed(seed)
        direct = saved(tmp_path, architecture)
        card = card_for(make_card, architecture, "panoptic", classes=4)
        batch = torch.randn(1, 4, edge, edge)
        fused = {} if architecture.startswith("Eomt") else {"label_ids_to_fuse": set()}
        [expected] = PROCESSORS[architecture]().post_process_panoptic_segmentation(
            answer(direct, batch),
            threshold=0.4,
            overlap_mask_area_threshold=0.3,
            target_sizes=[(edge, edge)],
            **fused,
        )
        [found] = ReadyObjects(card, build(card, CPU, 1), "fp32", 1).objects(batch)
        infos = expected["segments_info"]
        assert_same_segments(found, expected["segmentation"].numpy(), infos)
        assert len(infos) > 1


def test_stuff_is_one_segment(make_card, tmp_path):
    torch.manual_seed(0)
    architecture = "EomtForUniversalSegmentation"
    direct = saved(tmp_path, architecture)
    card = card_for(make_card, architecture, "panoptic", classes=4)
    batch = torch.randn(1, 4, 64, 64)
    out = answer(direct, batch)
    common = 2  # a label of two segments
    stuff = card.classes[1 + common].model_copy(update={"thing": False})
    classes = [stuff if c.value == stuff.value else c for c in card.classes]
    card = card.model_copy(update={"classes": classes})
    [expected] = PROCESSORS[architecture]().post_process_panoptic_segmentation(
        out, [(64, 64)], threshold=0.4, overlap_mask_area_threshold=0.3, stuff_classes=[common]
    )
    [found] = ReadyObjects(card, build(card, CPU, 1), "fp32", 1).objects(batch)
    segmentation = expected["segmentation"].numpy()
    assert len(found.classes) == len(expected["segments_info"])
    for info in expected["segments_info"]:
        k = commonest(found.ids[segmentation == info["id"]])
        assert np.mean((found.ids == k) != (segmentation == info["id"])) <= ROUNDED
        assert found.classes[k - 1] == info["label_id"] + 1
    assert found.classes.tolist().count(1 + common) == 1


def instances_of(architecture, out, masks, threshold):
    """(score, label, mask) of the processor's instances; ``masks``: probabilities at the window's size."""
    if architecture.startswith("Eomt"):
        [one] = PROCESSORS[architecture]().post_process_instance_segmentation(out, [(64, 64)], threshold)
        return one["segments_info"], one["segmentation"].numpy()
    logits = torch.logit(masks.double())  # above 0 exactly where the probability is above one half
    # OneFormer's processor lets masks compete before they are masks; its authors' rule is MaskFormer's.
    [one] = t.MaskFormerImageProcessor().post_process_instance_segmentation(
        SimpleNamespace(class_queries_logits=out.class_queries_logits, masks_queries_logits=logits),
        threshold=threshold,
        return_binary_maps=True,
    )
    return one["segments_info"], one["segmentation"].numpy()


@pytest.mark.parametrize("architecture", QUERIES[:3])
def test_instances_are_the_processors(make_card, tmp_path, architecture):
    direct = saved(tmp_path, architecture)
    card = card_for(make_card, architecture, "instance", classes=4)
    batch = torch.randn(1, 4, 64, 64)
    out = answer(direct, batch)
    logits = out.masks_queries_logits
    if architecture in LOW_RESOLUTION:
        masks = torch.nn.functional.interpolate(logits.sigmoid(), size=(64, 64), mode="bilinear")
    else:
        masks = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").sigmoid()
    infos, maps = instances_of(architecture, out, masks, 0.4)
    expected = [(i["score"], i["label_id"] + 1, m > 0) for i, m in zip(infos, maps, strict=True)]
    network = build(card, CPU, 1)
    with torch.inference_mode():
        [found] = network.candidates(batch)
    own = [
        (s, c, m > 0.5)
        for s, c, m in zip(found.scores, found.classes, found.masks, strict=True)
        if s >= 0.4 and (m > 0.5).any()
    ]
    assert len(own) == len(expected) > 1
    for score, label, mask in expected:
        same = [e[1] == label and np.mean(e[2] != mask) <= ROUNDED and abs(e[0] - score) < 5e-5 for e in own]
        own.pop(same.index(True))


def test_eomt_instances_are_painted_in_their_order(make_card, tmp_path):
    """The processor lets the last query paint over the others, this library the best: where they agree."""
    architecture = "EomtForUniversalSegmentation"
    direct = saved(tmp_path, architecture)
    card = card_for(make_card, architecture, "instance", classes=4)
    batch = torch.randn(2, 4, 64, 64)
    out = answer(direct, batch[:1])
    infos, segmentation = instances_of(architecture, out, None, 0.4)
    network = build(card, CPU, 1)
    with torch.inference_mode():
        [found] = network.candidates(batch[:1])
    kept = [k for k in range(len(found.scores)) if found.scores[k] >= 0.4 and (found.masks[k] > 0.5).any()]
    assert [i["label_id"] + 1 for i in infos] == found.classes[kept].tolist() and len(kept) > 1
    assert np.allclose([i["score"] for i in infos], found.scores[kept], atol=5e-5)
    painted = np.full((64, 64), -1)
    for number, k in enumerate(kept):
        painted[found.masks[k] > 0.5] = number
    assert np.mean(painted != segmentation) <= ROUNDED


@pytest.mark.parametrize(
    "architecture", ["MaskFormerForInstanceSegmentation", "EomtForUniversalSegmentation"]
)
def test_place_in_a_batch_changes_no_bit(make_card, tmp_path, architecture):
    saved(tmp_path, architecture)
    card = card_for(make_card, architecture, "panoptic", classes=4)
    model = ReadyObjects(card, build(card, CPU, 1), "fp32", 1)
    batch = torch.randn(3, 4, 64, 64)
    together = model.objects(batch)
    for k in range(3):
        [alone] = model.objects(batch[k : k + 1])
        assert np.array_equal(together[k].ids, alone.ids)
        assert together[k].scores.tobytes() == alone.scores.tobytes()
