"""The losses of networks that find objects: their libraries' own, of the right masks, boxes and labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from skimage.measure import regionprops

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.base import Truth
from segpipe.models.trainable import finder, objective, untrained
from tests.models.tiny_transformers import EOMT

SIZE = 96
CLASSES = [
    {"value": 0, "name": "ground", "color": "#000000", "background": True},
    {"value": 7, "name": "house", "color": "#ff0000"},
    {"value": 3, "name": "tree", "color": "#00ff00"},
]
BACKBONE = {
    "model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage1", "stage2", "stage3", "stage4"],
}  # fmt: skip
MASKS = {
    "num_queries": 12, "hidden_dim": 32, "dim_feedforward": 16, "encoder_feedforward_dim": 32,
    "num_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2, "backbone_config": BACKBONE,
}  # fmt: skip
QUERIES = {
    "Mask2FormerForUniversalSegmentation": MASKS,
    "MaskFormerForInstanceSegmentation": {
        "backbone_config": BACKBONE,
        "decoder_config": {
            "model_type": "detr", "d_model": 32, "num_queries": 12, "decoder_layers": 1,
            "encoder_layers": 1, "decoder_attention_heads": 2, "encoder_attention_heads": 2,
        },
        "fpn_feature_size": 32,
        "mask_feature_size": 32,
    },
    "EomtForUniversalSegmentation": {**EOMT, "image_size": SIZE, "patch_size": 16},
}  # fmt: skip


def card(provider: str, architecture: str | None, kind: str = "instance", **fields: Any) -> Card:
    return Card.model_validate(
        {
            "name": "objects", "kind": "raster", "provider": provider, "architecture": architecture,
            "input": {"bands": ["red", "nir"]}, "output": {"kind": kind},
            "window": {"size": [SIZE], "halo": [32], "stride": 32 if provider == "torchvision" else 16,
                       "fixed": str(architecture).startswith("Eomt")},
            "classes": CLASSES, **fields,
        }
    )  # fmt: skip


def two_windows() -> tuple[torch.Tensor, list[Truth]]:
    """Two images; three objects on the first, one of them a line of pixels, and none on the second."""
    ids = np.zeros((SIZE, SIZE), int)
    ids[4:20, 6:30] = 1
    ids[40:60, 33:61] = 2
    ids[30, 5:25] = 3
    masks = torch.from_numpy(np.stack([ids == k for k in (1, 2, 3)]))
    truths = [
        Truth(masks, torch.tensor([3, 7, 3])),
        Truth(torch.zeros(0, SIZE, SIZE, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)),
    ]
    return torch.randn(2, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0)), truths


def test_mask_rcnn_gets_boxes_labels_and_masks() -> None:
    torch.manual_seed(0)
    arguments = {"backbone": "resnet18", "anchor_sizes": [8, 16, 32, 64, 128]}
    maskrcnn = card("torchvision", "MaskRCNN", arguments=arguments)
    network, own = untrained(maskrcnn).train(), objective(maskrcnn)
    assert own is not None
    images, truths = two_windows()
    torch.manual_seed(1)
    found = own(network, images, truths)
    found.backward()
    assert all(p.grad is not None for p in network.roi_heads.mask_predictor.parameters())  # type: ignore[union-attr]
    targets = []
    for truth in truths:
        boxes = [regionprops(mask.numpy().astype(int))[0].bbox for mask in truth.masks]
        targets.append(
            {
                "boxes": torch.tensor([[x0, y0, x1, y1] for y0, x0, y1, x1 in boxes]).reshape(-1, 4).float(),
                "labels": torch.tensor([{7: 1, 3: 2}[c] for c in truth.classes.tolist()], dtype=torch.int64),
                "masks": truth.masks.to(torch.uint8),
            }
        )
    torch.manual_seed(1)
    losses = network([images[0], images[1]], targets)
    assert set(losses) >= {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness"}
    assert float(found) == pytest.approx(float(sum(losses.values())), rel=1e-5)


@pytest.mark.parametrize("architecture", QUERIES)
def test_queries_get_masks_and_labels_without_background(architecture: str) -> None:
    torch.manual_seed(0)
    instance = card("transformers", architecture, arguments=QUERIES[architecture])
    network, own = untrained(instance), objective(instance)
    assert own is not None
    images, truths = two_windows()
    with torch.no_grad():
        torch.manual_seed(1)
        found = own(network, images, truths)
        torch.manual_seed(1)
        wanted = network(
            pixel_values=images,
            mask_labels=[t.masks.float() for t in truths],
            class_labels=[torch.tensor([1, 0, 1]), torch.zeros(0, dtype=torch.int64)],
        ).loss
    assert network.config.num_labels == 2  # type: ignore[union-attr]
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)
    own(network.train(), images, truths).backward()


def test_detr_gets_boxes_as_shares_of_the_window() -> None:
    torch.manual_seed(0)
    config = {
        "num_channels": 2, "backbone_config": BACKBONE, "d_model": 128,
        "num_queries": 6, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16,
    }  # fmt: skip
    classes = [*CLASSES[:2], {**CLASSES[2], "thing": False}]
    panoptic = card("transformers", "DetrForSegmentation", "panoptic", arguments=config, classes=classes)
    network, own = untrained(panoptic).eval(), objective(panoptic)
    assert own is not None
    images, truths = two_windows()
    wanted = [
        {
            "class_labels": torch.tensor([1, 0, 1]),
            "boxes": torch.tensor(
                [[18, 12, 24, 16], [47, 50, 28, 20], [15, 30.5, 20, 1]], dtype=torch.float32
            ) / SIZE,
            "masks": truths[0].masks.float(),
        },
        {
            "class_labels": torch.zeros(0, dtype=torch.int64),
            "boxes": torch.zeros(0, 4),
            "masks": truths[1].masks.float(),
        },
    ]  # fmt: skip
    with torch.no_grad():
        found = own(network, images, truths)
        loss = network(pixel_values=images, labels=wanted).loss
    assert float(found) == pytest.approx(float(loss), rel=1e-5)


def test_a_network_in_training_finds_with_its_present_weights() -> None:
    torch.manual_seed(0)
    output = {"kind": "panoptic", "score": 0.0, "overlap": 0.0}
    mask2former = card("transformers", "Mask2FormerForUniversalSegmentation", arguments=MASKS, output=output)
    network = untrained(mask2former).eval()
    found = finder(mask2former, network, torch.device("cpu"), "fp32", 1)
    image = two_windows()[0][:1]
    before = found.objects(image)[0]
    assert all(p.requires_grad for p in network.parameters())  # it goes on learning
    with torch.no_grad():
        network.class_predictor.bias += torch.tensor([30.0, 0.0, 0.0])  # type: ignore[union-attr,operator]
    after = found.objects(image)[0]
    assert set(after.classes.tolist()) == {7}
    assert len(before.classes) != len(after.classes) or set(before.classes.tolist()) != {7}


def test_what_is_not_trained_here_says_so() -> None:
    onnx = card("onnx", None, weights="x.onnx", arguments={"decode": "masks"})
    with pytest.raises(RequestError, match=r"valid: torchvision's Mask R-CNN, or networks of transformers"):
        objective(onnx)
    one_former = card("transformers", "OneFormerForUniversalSegmentation",
                      arguments={"contrastive_temperature": 0.07, "backbone_config": BACKBONE,
                                 "task_tokens": [1, 2]})  # fmt: skip
    with pytest.raises(RequestError, match="without its loss of texts"):
        objective(one_former)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet19"}, "arguments.backbone: found 'resnet19'; valid: resnet18"),
        ({"anchor_sizes": [32, 16, 8, 4, 2]}, "valid: 5 ascending sizes in pixels"),
        ({"anchor_sizes": [32, 64]}, "valid: 5 ascending sizes in pixels"),
        ({"hidden": 3}, "arguments.hidden: unknown; valid: anchor_sizes, backbone"),
    ],
)
def test_mask_rcnn_names_a_wrong_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        untrained(card("torchvision", "MaskRCNN", arguments=arguments))
