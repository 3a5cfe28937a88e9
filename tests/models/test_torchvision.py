"""torchvision: the adapter's answer is the library's own, for any number of bands."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import detection, segmentation

from segpipe.errors import RequestError
from segpipe.models.network import ReadyObjects
from segpipe.models.providers.torchvision import build
from segpipe.models.registry import load_model
from segpipe.models.trainable import untrained

CPU = torch.device("cpu")
BIG = pytest.mark.slow
SEMANTIC = [
    "lraspp_mobilenet_v3_large",
    "deeplabv3_mobilenet_v3_large",
    "fcn_resnet50",
    pytest.param("deeplabv3_resnet50", marks=BIG),
    pytest.param("fcn_resnet101", marks=BIG),
    pytest.param("deeplabv3_resnet101", marks=BIG),
]


pytestmark = pytest.mark.usefixtures("one_thread")


def direct_semantic(name, bands=3, **more):
    """The library's own network; for other bands, a first convolution written here by hand."""
    network = getattr(segmentation, name)(weights=None, weights_backbone=None, num_classes=3, **more)
    if bands != 3:
        if "mobilenet" in name:
            network.backbone["0"][0] = torch.nn.Conv2d(bands, 16, 3, stride=2, padding=1, bias=False)
        else:
            network.backbone["conv1"] = torch.nn.Conv2d(bands, 64, 7, stride=2, padding=3, bias=False)
    return network.eval()


def semantic_card(make_card, name, **fields):
    return make_card("torchvision", "w.safetensors", **{"architecture": name, **fields})


@pytest.mark.parametrize("name", SEMANTIC)
def test_scores_equal_the_library(make_card, tmp_path, name):
    for bands in (5, 3) if "mobilenet" in name else (5,):
        direct = direct_semantic(name, bands)
        save_file(direct.state_dict(), tmp_path / "w.safetensors")
        batch = torch.randn(1, bands, 64, 96)
        direct.to(memory_format=torch.channels_last)
        with torch.inference_mode():
            expected = direct(batch.contiguous(memory_format=torch.channels_last))["out"]
        found = load_model(semantic_card(make_card, name, bands=bands), "cpu", 1, "fp32")(batch)
        assert torch.equal(found, expected)
        assert found.shape == (1, 3, 64, 96) and float(found.std()) > 0


def test_auxiliary_classifier_is_there_when_asked_for(make_card, tmp_path):
    name = "deeplabv3_mobilenet_v3_large"
    direct = direct_semantic(name, aux_loss=True)
    save_file(direct.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(RequestError, match=r"has aux_classifier.* unexpected"):
        load_model(semantic_card(make_card, name, bands=3), "cpu", 1, "fp32")
    card = semantic_card(make_card, name, bands=3, arguments={"aux_loss": True})
    direct.to(memory_format=torch.channels_last)
    batch = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = direct(batch.contiguous(memory_format=torch.channels_last))["out"]
    assert torch.equal(load_model(card, "cpu", 1, "fp32")(batch), expected)


def test_untrained_network_learns_and_comes_back(make_card, tmp_path):
    card = semantic_card(make_card, "lraspp_mobilenet_v3_large", bands=7)
    network = untrained(card).train()
    images, truth = torch.randn(2, 7, 64, 64), torch.zeros(2, 64, 64, dtype=torch.long)
    torch.nn.functional.cross_entropy(network(images)["out"], truth).backward()
    assert all(p.grad is not None for p in network.parameters())
    assert float(network.backbone["0"][0].weight.detach().std()) > 0
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    network.eval().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = network(images[:1].contiguous(memory_format=torch.channels_last))["out"]
    assert torch.equal(load_model(card, "cpu", 1, "fp32")(images[:1]), expected)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"architecture": "fcn_resnet18"}, "architecture: found 'fcn_resnet18'; did you mean fcn_resnet"),
        ({"kind": "volume"}, "kind: found volume"),
        (
            {"output": {"kind": "instance"}},
            "output.kind: found instance; valid for lraspp",
        ),
        ({"arguments": {"aux_loss": True}}, "arguments.aux_loss: unknown"),
        ({"arguments": {"weights": "DEFAULT"}}, "arguments.weights: unknown"),
        ({"window": {"stride": 8}}, "window.stride: found 8; this network's total stride is 16"),
        ({"bands": 4}, "weights: backbone.0.0.weight is (16, 3, 3, 3)"),
        ({"classes": 2}, "weights: classifier.high_classifier.bias is (3,)"),
    ],
)
def test_mistakes_name_the_field(make_card, tmp_path, fields, told):
    save_file(direct_semantic("lraspp_mobilenet_v3_large").state_dict(), tmp_path / "w.safetensors")
    fields = {"bands": 3, **fields}
    with pytest.raises(RequestError) as error:
        load_model(semantic_card(make_card, "lraspp_mobilenet_v3_large", **fields), "cpu", 1, "fp32")
    assert told in str(error.value)


def direct_maskrcnn(name="maskrcnn_resnet50_fpn", bands=4, **more):
    """The library's network that neither normalises nor resizes, by its own parameters for 64 x 64."""
    network = getattr(detection, name)(
        weights=None,
        weights_backbone=None,
        num_classes=3,
        image_mean=[0.0] * bands,
        image_std=[1.0] * bands,
        fixed_size=(64, 64),
        **more,
    )
    network.backbone.body["conv1"] = torch.nn.Conv2d(bands, 64, 7, stride=2, padding=3, bias=False)
    # Random weights are sure of nothing: with wider ones some boxes are clearly of a class.
    torch.nn.init.normal_(network.roi_heads.box_predictor.cls_score.weight, std=0.002)
    torch.nn.init.normal_(network.roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.5)
    return network.eval()


def instance_card(make_card, name="maskrcnn_resnet50_fpn", **fields):
    output = {"kind": "instance", "score": 0.4, "overlap": 0.0}
    return make_card("torchvision", "w.safetensors", **{"architecture": name, "output": output, **fields})


@pytest.mark.parametrize(
    "name", ["maskrcnn_resnet50_fpn", pytest.param("maskrcnn_resnet50_fpn_v2", marks=BIG)]
)
def test_detections_are_the_librarys_and_the_best_is_in_front(make_card, tmp_path, name):
    limits = {"box_detections_per_img": 8, "rpn_post_nms_top_n_test": 40, "box_nms_thresh": 1.0}
    direct = direct_maskrcnn(name, **limits)
    save_file(direct.state_dict(), tmp_path / "w.safetensors")
    card = instance_card(make_card, name, arguments=limits)
    network = build(card, CPU, 1)
    batch = torch.randn(1, 4, 64, 64) * 3
    with torch.inference_mode():
        [expected] = direct([batch[0]])
        [found] = network.candidates(batch)
    assert len(found.scores) == 8
    assert np.array_equal(found.scores, expected["scores"].numpy())
    assert np.array_equal(found.masks, expected["masks"][:, 0].numpy())
    assert np.array_equal(found.classes, expected["labels"].numpy())  # the fixture's values are 0, 1, 2
    # By hand: from the lowest score up, each mask painted over those before it.
    painted = np.zeros((64, 64), int)
    for k in np.argsort(-found.scores, kind="stable")[::-1]:
        if found.scores[k] >= 0.4:
            painted[found.masks[k] > 0.5] = k + 1
    [objects] = ReadyObjects(card, network, "fp32", 1).objects(batch)
    kept = [k for k in range(8) if (painted == k + 1).any()]
    assert len(objects.classes) == len(kept) > 0
    for k, row in enumerate(kept):
        assert np.array_equal(objects.ids == k + 1, painted == row + 1)
        assert objects.classes[k] == found.classes[row]
        assert objects.scores[k] == pytest.approx(found.scores[row])


def test_mask_rcnn_trains_on_windows_as_they_are(make_card):
    network = untrained(instance_card(make_card)).train()
    box = torch.tensor([[8.0, 8.0, 40.0, 48.0]])
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 8:48, 8:40] = 1
    images, targets = network.transform([torch.full((4, 64, 64), 7.0)], [{"boxes": box, "masks": mask}])
    assert torch.equal(images.tensors, torch.full((1, 4, 64, 64), 7.0))
    assert torch.equal(targets[0]["boxes"], box) and torch.equal(targets[0]["masks"], mask)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"output": {}}, "output.kind: found semantic; valid for maskrcnn_resnet50_fpn: instance"),
        ({"arguments": {"min_size": 800}}, "arguments.min_size: unknown; valid: box_batch_size_per_image"),
        ({"window": {"stride": 16}}, "window.stride: found 16; this network's total stride is 32"),
        (
            {"front": True},
            "classes.0: found house; maskrcnn_resnet50_fpn counts from a background",
        ),
    ],
)
def test_mask_rcnn_mistakes_name_the_field(make_card, fields, told):
    front = fields.get("front", False)
    card = instance_card(make_card, **{k: v for k, v in fields.items() if k != "front"})
    if front:
        card = card.model_copy(update={"classes": card.classes[1:]})
    with pytest.raises(RequestError) as error:
        untrained(card)
    assert told in str(error.value)
