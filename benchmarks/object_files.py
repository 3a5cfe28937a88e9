"""Rows of other networks that find objects: Mask R-CNN of torchvision, and two kinds of ONNX files."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from benchmarks.rows import BANDS, CLASSES, Made, Row, Segments, class_fields, painted, write_card

EDGE = 256
FRONT = CLASSES - 1
"""Classes that are not background."""


def rows() -> list[Row]:
    """All of them."""
    names = ("maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2")
    return [
        *(Row(f"{name} (instance)", "torchvision", partial(_mask_rcnn, name=name)) for name in names),
        Row("ONNX decode: masks (instance)", "onnx", _onnx_masks),
        Row("ONNX decode: yolo-seg (instance)", "onnx", _onnx_yolo),
    ]


def _card(folder: Path, provider: str, score: float, **fields: Any) -> Path:
    output = {"kind": "instance", "score": score, "overlap": 0.0}
    return write_card(folder, provider, output=output, classes=class_fields(background=True), **fields)


# -- torchvision ----------------------------------------------------------------------------------


def _mask_rcnn(folder: Path, name: str) -> Made:
    """Held against the library's own network, which by its own parameters neither normalises nor resizes."""
    from torchvision.models import detection

    score = 0.2
    limits = {"box_detections_per_img": 20, "rpn_post_nms_top_n_test": 100, "box_nms_thresh": 0.7}
    direct = getattr(detection, name)(
        weights=None,
        weights_backbone=None,
        num_classes=CLASSES,
        image_mean=[0.0] * BANDS,
        image_std=[1.0] * BANDS,
        fixed_size=(EDGE, EDGE),
        **limits,
    )
    direct.backbone.body["conv1"] = nn.Conv2d(BANDS, 64, 7, stride=2, padding=3, bias=False)
    # Random weights are sure of nothing: with wider ones some boxes are clearly of a class.
    nn.init.normal_(direct.roi_heads.box_predictor.cls_score.weight, std=0.002)
    nn.init.normal_(direct.roi_heads.mask_predictor.mask_fcn_logits.weight, std=0.5)
    nn.init.constant_(direct.roi_heads.box_predictor.cls_score.bias[:1], -3.0)  # background less often
    direct.eval()
    save_file(direct.state_dict(), folder / "net.safetensors")
    card = _card(folder, "torchvision", score, architecture=name, arguments=limits, weights="net.safetensors")

    def objects(x: torch.Tensor) -> Segments:
        [found] = direct([x[0]])
        kept = found["scores"] >= score
        masks = (found["masks"][kept, 0] > 0.5).numpy()
        return painted(masks, found["labels"][kept].numpy(), found["scores"][kept].numpy())

    return Made(card, objects=objects)


# -- ONNX -----------------------------------------------------------------------------------------


class Features(nn.Module):
    """Random convolutions down to a stride, each normalised so that no weight fades."""

    def __init__(self, channels: int, halvings: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = BANDS
        for _ in range(halvings):
            layers += [
                nn.Conv2d(before, channels, 5, stride=2, padding=2),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            ]
            before = channels
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, c, y, x) → (1, channels, y / 2ⁿ, x / 2ⁿ)."""
        y: torch.Tensor = self.layers(x)
        return functional.instance_norm(y)


class MaskQueries(nn.Module):
    """Logits of masks at a quarter of the resolution, and of what each is by what it covers."""

    def __init__(self, queries: int = 12) -> None:
        super().__init__()
        self.features = Features(32, 2)
        self.masks = nn.Conv2d(32, queries, 1)
        self.classes = nn.Linear(32, FRONT)
        nn.init.normal_(self.masks.weight, std=0.5)
        nn.init.normal_(self.classes.weight, std=1.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks (n, y / 4, x / 4), classes (n,) from 1 on and scores (n,)."""
        features = self.features(x)
        masks = self.masks(features)[0]
        weights = masks.sigmoid().flatten(1)
        seen = weights @ features[0].flatten(1).T / weights.sum(1, keepdim=True)
        scores, classes = self.classes(seen).softmax(1).max(1)
        return masks, classes + 1, scores


class YoloHead(nn.Module):
    """Boxes, class scores and mask coefficients at a stride of 8, prototypes at 4, as Ultralytics exports."""

    def __init__(self, coefficients: int = 8) -> None:
        super().__init__()
        self.near, self.far = Features(32, 2), Features(32, 3)
        self.boxes = nn.Conv2d(32, 4, 1)
        self.classes = nn.Conv2d(32, FRONT, 1)
        self.mix = nn.Conv2d(32, coefficients, 1)
        self.prototypes = nn.Conv2d(32, coefficients, 1)
        for part in (self.classes, self.mix, self.prototypes):
            nn.init.normal_(part.weight, std=0.4)
        steps = torch.arange(EDGE // 8) * 8.0 + 4
        y, x = torch.meshgrid(steps, steps, indexing="ij")
        self.register_buffer("centres", torch.stack([x, y])[None])

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(1, 4 + k + c, anchors) and (1, c, y / 4, x / 4)."""
        features = self.far(image)
        boxes = self.boxes(features)
        boxes = torch.cat([self.centres + 8 * boxes[:, :2].tanh(), 16 + 48 * boxes[:, 2:].sigmoid()], 1)
        rows = torch.cat([boxes, self.classes(features).sigmoid(), self.mix(features)], 1)
        return rows.flatten(2), self.prototypes(self.near(image))


def _session(network: nn.Module, folder: Path, outputs: list[str]) -> Any:
    """The network as ONNX, opened by onnxruntime itself."""
    import onnxruntime

    path = folder / "net.onnx"
    torch.onnx.export(
        network.eval(), (torch.zeros(1, BANDS, EDGE, EDGE),), path, dynamo=True, external_data=False,
        verbose=False, input_names=["image"], output_names=outputs,
    )  # fmt: skip
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _onnx_masks(folder: Path) -> Made:
    """Held against onnxruntime's answer, enlarged, thresholded and painted here."""
    score = 0.3
    session = _session(MaskQueries(), folder, ["masks", "classes", "scores"])
    arguments = {"decode": "masks", "logits": True}
    card = _card(folder, "onnx", score, weights="net.onnx", arguments=arguments, window={"fixed": True})

    def objects(x: torch.Tensor) -> Segments:
        masks, classes, scores = session.run(["masks", "classes", "scores"], {"image": x.numpy()})
        large = functional.interpolate(torch.from_numpy(masks)[None], size=x.shape[2:], mode="bilinear")
        kept = scores >= score
        return painted(large[0].numpy()[kept] > 0, classes[kept], scores[kept])

    return Made(card, objects=objects)


def _onnx_yolo(folder: Path) -> Made:
    """Held against onnxruntime's answer, decoded here box by box as Ultralytics 8.0 publishes it."""
    score, iou, most = 0.6, 0.5, 100
    session = _session(YoloHead(), folder, ["output0", "output1"])
    arguments = {"decode": "yolo-seg", "iou": iou, "detections": most}
    card = _card(folder, "onnx", score, weights="net.onnx", arguments=arguments, window={"fixed": True})

    def objects(x: torch.Tensor) -> Segments:
        rows, prototypes = session.run(["output0", "output1"], {"image": x.numpy()})
        likely = rows[0, 4 : 4 + FRONT]
        classes, scores = likely.argmax(0) + 1, likely.max(0)
        x0, y0 = rows[0, :2] - rows[0, 2:4] / 2
        x1, y1 = rows[0, :2] + rows[0, 2:4] / 2
        boxes = np.stack([x0, y0, x1, y1], 1)
        kept: list[int] = []
        for k in np.argsort(-scores, kind="stable"):
            rivals = [j for j in kept if classes[j] == classes[k]]
            if scores[k] > score and all(_iou(boxes[k], boxes[j]) <= iou for j in rivals):
                kept.append(int(k))
        kept = kept[:most]
        mixed = np.tensordot(rows[0, 4 + FRONT :, kept], prototypes[0], 1)
        masks = torch.from_numpy(_inside(boxes[kept] / 4, mixed))
        large = functional.interpolate(masks[None], size=x.shape[2:], mode="bilinear")[0].numpy()
        return painted(large > 0.5, classes[kept], scores[kept])

    return Made(card, objects=objects)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    sides = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
    areas = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])
    return float(np.prod(sides) / (areas - np.prod(sides)))


def _inside(boxes: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Sigmoid of (n, y, x) logits, 0 outside their boxes."""
    y, x = np.mgrid[: logits.shape[1], : logits.shape[2]]
    masks = 1 / (1 + np.exp(-logits))
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[(x < x0) | (x >= x1) | (y < y0) | (y >= y1)] = 0
    return np.asarray(masks, np.float32)
