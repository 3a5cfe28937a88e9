"""ONNX networks whose answer is objects: masks as they are, or YOLO's boxes with mask coefficients.

``arguments.decode`` says what the file's outputs are, for one window:

- ``masks``: outputs named ``masks`` (n, …), ``classes`` (n,): k is the k-th class of the card, and
  ``scores`` (n,). ``logits: true`` where the masks are logits. Smaller masks are upsampled. Of panoptic cards
  too: masks of stuff are among them.
- ``yolo-seg``: as Ultralytics exports YOLOv8-seg, YOLO11-seg and FastSAM: the first output (1, 4 + k + c,
  anchors) has centre, width and height in elements of the window, a score for each of the k classes of the
  card that are no background, and c coefficients; the second (1, c, h', w') has prototypes. ``iou``: above
  it the lower of two boxes of a class is dropped (0.7); ``detections``: most objects of a window (300).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torchvision.ops import batched_nms, box_convert

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.base import MaskCandidates
from segpipe.models.network import enlarged

DECODERS = ("masks", "yolo-seg")
ARGUMENTS = {"masks": ("decode", "logits"), "yolo-seg": ("decode", "detections", "iou")}
MASKS = ("masks", "classes", "scores")
IOU = 0.7
DETECTIONS = 300


@dataclass
class OnnxObjects:
    """A session whose outputs are decoded into candidates."""

    session: Any
    input: str
    dtype: np.dtype[Any]
    channels_last: bool
    card: Card
    device: torch.device
    parameters: int | None = None
    rule: Literal["transformers", "paper"] = "paper"

    def candidates(self, batch: torch.Tensor) -> Sequence[MaskCandidates]:
        """Masks proposed for each window of a batch (n, c, …), each window by itself."""
        return [self._decoded(window) for window in batch.split(1)]

    def _decoded(self, window: torch.Tensor) -> MaskCandidates:
        values = window.numpy().astype(self.dtype, copy=False)
        if self.channels_last:
            values = np.moveaxis(values, 1, -1)
        names = [output.name for output in self.session.get_outputs()]
        wanted = MASKS if self.card.arguments["decode"] == "masks" else names[:2]
        found = self.session.run(list(wanted), {self.input: np.ascontiguousarray(values)})
        outputs = [torch.from_numpy(np.asarray(a)) for a in found]
        shape = tuple(window.shape[2:])
        if self.card.arguments["decode"] == "masks":
            return decode_masks(self.card, outputs[0], outputs[1], outputs[2], shape)
        return decode_yolo(self.card, outputs[0][0].float(), outputs[1][0].float(), shape)


def check(card: Card) -> None:
    """Whether the card says how the outputs are decoded.

    Raises:
        RequestError: it does not, or a value is out of range.
    """
    decode = card.arguments.get("decode")
    if decode not in DECODERS:
        raise card.error("arguments.decode", f"found {decode!r}; valid: {' or '.join(DECODERS)}")
    if decode == "yolo-seg" and card.kind != "raster":
        raise card.error("kind", "found volume; yolo-seg decodes boxes in two axes")
    if decode == "yolo-seg" and card.output.kind != "instance":
        raise card.error("output.kind", f"found {card.output.kind}; valid for yolo-seg: instance")
    iou, most = card.arguments.get("iou", IOU), card.arguments.get("detections", DETECTIONS)
    if not isinstance(iou, int | float) or not 0 < iou <= 1:
        raise card.error("arguments.iou", f"found {iou!r}; valid: above 0, at most 1")
    if not isinstance(most, int) or most < 1:
        raise card.error("arguments.detections", f"found {most!r}; valid: a whole number from 1")
    if not isinstance(card.arguments.get("logits", False), bool):
        raise card.error("arguments.logits", f"found {card.arguments['logits']!r}; valid: true or false")


def check_outputs(card: Card, outputs: Sequence[Any]) -> None:
    """Whether the file has the outputs that are decoded, as far as it fixes their shapes.

    Raises:
        RequestError: it has not; names those it has.
    """
    names = [output.name for output in outputs]
    if card.arguments["decode"] == "masks":
        if set(MASKS) - set(names):
            raise card.error(
                "weights", f"the file's outputs are {', '.join(names)}; valid: {', '.join(MASKS)}"
            )
        return
    shapes = [list(output.shape) for output in outputs[:2]]
    if [len(shape) for shape in shapes] != [3, 4]:
        raise card.error(
            "weights", f"the file's outputs are {shapes}; valid: (1, 4 + k + c, anchors), (1, c, h, w)"
        )
    rows, coefficients = shapes[0][1], shapes[1][1]
    if isinstance(rows, int) and isinstance(coefficients, int):
        classes = rows - 4 - coefficients
        if classes != len(_in_front(card)):
            raise card.error(
                "classes", f"the card has {len(_in_front(card))} beside background; the file {classes}"
            )


def _in_front(card: Card) -> list[int]:
    """Values of the classes that are no background."""
    return [c.value for c in card.classes if not c.background]


def decode_masks(
    card: Card, masks: torch.Tensor, classes: torch.Tensor, scores: torch.Tensor, shape: tuple[int, ...]
) -> MaskCandidates:
    """Candidates of masks (n, …), (n, 1, …) or (1, n, …), classes and scores of n elements.

    Raises:
        RequestError: a class number outside the card's classes, or masks and scores of other numbers.
    """
    numbers = classes.reshape(-1).long()
    count = len(numbers)
    space = masks.shape[-len(shape) :]
    if scores.numel() != count or masks.numel() != count * space.numel():
        raise RequestError(
            f"{card.name}: weights: masks {tuple(masks.shape)}, classes {tuple(classes.shape)} and scores "
            f"{tuple(scores.shape)}; valid: n of each"
        )
    if count and not 0 <= int(numbers.min()) <= int(numbers.max()) < len(card.classes):
        found = sorted(set(numbers.tolist()))
        raise RequestError(
            f"{card.name}: classes: the file says {found}; valid: 0 to {len(card.classes) - 1}"
        )
    stack = enlarged(masks.reshape(1, count, *space).float(), shape)[0]
    if card.arguments.get("logits", False):
        stack = stack.sigmoid()
    values = np.asarray(card.values, np.int64)[numbers.numpy()]
    return MaskCandidates(stack.numpy(), values, scores.reshape(-1).float().numpy())


def decode_yolo(
    card: Card, rows: torch.Tensor, prototypes: torch.Tensor, shape: tuple[int, ...]
) -> MaskCandidates:
    """Candidates of YOLO's segmentation head for one window.

    Each anchor's best class counts. A mask is the sigmoid of its coefficients' mix of prototypes, cut to its
    box at the prototypes' resolution, then upsampled (bilinear): `process_mask` of Ultralytics 8.0.

    Args:
        rows: (4 + k + c, anchors).
        prototypes: (c, h', w').
    """
    classes, size = _in_front(card), len(prototypes)
    if len(rows) != 4 + len(classes) + size:
        raise RequestError(
            f"{card.name}: classes: the file answers with {len(rows) - 4 - size} classes; the card has "
            f"{len(classes)} beside background"
        )
    boxes, likely, coefficients = rows.T.split([4, len(classes), size], 1)
    scores, best = likely.max(1)
    sure = scores > card.output.score
    boxes = box_convert(boxes[sure], "cxcywh", "xyxy")
    scores, best, coefficients = scores[sure], best[sure], coefficients[sure]
    kept = batched_nms(boxes, scores, best, float(card.arguments.get("iou", IOU)))
    kept = kept[: int(card.arguments.get("detections", DETECTIONS))]
    masks = torch.einsum("nc,chw->nhw", coefficients[kept], prototypes).sigmoid()
    height, width = prototypes.shape[1:]
    scale = torch.tensor([width / shape[1], height / shape[0]]).repeat(2)
    masks = enlarged(_cut(masks, boxes[kept] * scale)[None], shape)[0]
    values = np.asarray(classes, np.int64)[best[kept].numpy()]
    return MaskCandidates(masks.numpy(), values, scores[kept].clamp(0, 1).numpy())


def _cut(masks: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Masks (n, h, w) with 0 outside their boxes (n, 4): x and y from, x and y to, the last ones excluded."""
    x0, y0, x1, y1 = (edge[:, None, None] for edge in boxes.T)
    y = torch.arange(masks.shape[1])[None, :, None]
    x = torch.arange(masks.shape[2])[None, None, :]
    inside: torch.Tensor = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    return masks * inside
