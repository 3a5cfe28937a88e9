"""Which networks of the transformers library are taken, and how each one's answer is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OBJECTS = ("semantic", "instance", "panoptic")


@dataclass(frozen=True)
class TransformersFamily:
    """How an architecture is used."""

    kinds: tuple[str, ...] = ("semantic",)
    """Kinds of `card.output` it can serve."""
    queries: bool = False
    """It answers with masks and their classes (MaskFormer and after it), not with a score per class."""
    enlarge: Literal["logits", "probabilities"] = "probabilities"
    """What the library resizes to the window: mask logits before the sigmoid, or what comes out of it."""
    pairs: bool = True
    """Instances are the best (query, class) pairs; False: each query with its best class."""
    rule: Literal["transformers", "paper"] = "transformers"
    """How panoptic masks compete, as `resolve_masks` names it."""
    square: bool = False
    """It takes windows of its config's `image_size` alone."""
    task: bool = False
    """It is told its task in words (OneFormer)."""


ARCHITECTURES = {
    "SegformerForSemanticSegmentation": TransformersFamily(),
    "UperNetForSemanticSegmentation": TransformersFamily(),
    "MobileNetV2ForSemanticSegmentation": TransformersFamily(),
    "BeitForSemanticSegmentation": TransformersFamily(square=True),
    "DPTForSemanticSegmentation": TransformersFamily(square=True),
    "MaskFormerForInstanceSegmentation": TransformersFamily(OBJECTS, queries=True),
    "Mask2FormerForUniversalSegmentation": TransformersFamily(OBJECTS, queries=True, enlarge="logits"),
    "OneFormerForUniversalSegmentation": TransformersFamily(OBJECTS, queries=True, task=True),
    "EomtForUniversalSegmentation": TransformersFamily(
        OBJECTS, queries=True, enlarge="logits", pairs=False, rule="paper", square=True
    ),
    "DetrForSegmentation": TransformersFamily(("semantic", "panoptic"), queries=True),
}
