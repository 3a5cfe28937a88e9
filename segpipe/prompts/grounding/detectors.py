"""Load open-vocabulary detectors of the transformers library as grounders, from folders of save_pretrained.

Grounding DINO (Liu et al., ECCV 2024), MM-Grounding-DINO (Zhao et al., 2024), OWLv2 (Minderer et al., NeurIPS
2023) and CLIPSeg (Lüddecke & Ecker, CVPR 2022). Images are resized and scaled, and outputs made boxes, by the
library's own processors. Nothing in a folder is executed: its JSON files are read as numbers, its tensors as
safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segpipe.errors import RequestError
from segpipe.geometry.box import Box
from segpipe.prompts.grounding import sam3 as concepts
from segpipe.prompts.grounding.base import Detections, Grounder, Grounding, PhraseAccount
from segpipe.prompts.grounding.processors import (
    check_length,
    image_tensor,
    load_network,
    load_processor,
    read_kind,
)
from segpipe.prompts.inputs.components import component_means, deepest, find_components

_DINO = ("GroundingDinoImageProcessor", "GroundingDinoProcessor")
FAMILIES = {
    "grounding-dino": ("GroundingDinoForObjectDetection", *_DINO),
    "mm-grounding-dino": ("MMGroundingDinoForObjectDetection", *_DINO),
    "owlv2": ("Owlv2ForObjectDetection", "Owlv2ImageProcessor", "Owlv2Processor"),
    "clipseg": ("CLIPSegForImageSegmentation", "ViTImageProcessor", "CLIPSegProcessor"),
}
"""Network, image processor and processor of the library, by a folder's `model_type`."""


def check_detector(folder: Path) -> tuple[str, dict[str, Any]]:
    """A folder's `model_type` and configuration.

    Raises:
        RequestError: it is none of a network that finds phrases.
    """
    return read_kind(folder, (*FAMILIES, *concepts.KINDS))


def load_detector(
    folder: Path, device: torch.device, box_threshold: float | None = None, text_threshold: float = 0.25
) -> Grounder:
    """The detector in a folder; SAM 3 is one too, asked for boxes.

    Args:
        folder: as save_pretrained of the network and of its processor writes it.
        device: where it runs.
        box_threshold: least score, 0…1; none: the field's own, 0.25 (Grounding DINO), 0.1 (OWLv2), 0.5
            (CLIPSeg: of an element), 0.3 (SAM 3).
        text_threshold: Grounding DINO: least probability of a word, for a box to answer the word's phrase.

    Raises:
        RequestError: the folder is none of a detector, damaged, or asks for what is not in it.
    """
    kind, data = check_detector(folder)
    if kind in concepts.KINDS:
        return concepts.load_concepts(folder, device, 0.3 if box_threshold is None else box_threshold)
    if kind.endswith("dino"):
        _check_backbone(folder, data)
    name, image, processor_name = FAMILIES[kind]
    network = load_network(folder, name, data).to(device)
    words = "BertTokenizer" if kind.endswith("dino") else "CLIPTokenizer"
    processor = load_processor(folder, processor_name, image, words)
    if kind == "owlv2":
        return Owl(network, processor, 0.1 if box_threshold is None else box_threshold)
    if kind == "clipseg":
        return ClipSeg(network, processor, 0.5 if box_threshold is None else box_threshold)
    return GroundingDino(network, processor, 0.25 if box_threshold is None else box_threshold, text_threshold)


class GroundingDino:
    """Grounding DINO and MM-Grounding-DINO."""

    def __init__(self, network: Any, processor: Any, box_threshold: float, text_threshold: float) -> None:
        """Thresholds as in `load_detector`."""
        self.network, self.processor = network, processor
        self.box_threshold, self.text_threshold = box_threshold, text_threshold

    def ground(self, window: np.ndarray, phrases: Sequence[str]) -> Grounding:
        """Boxes over the box threshold, each for the phrase that has its most probable word.

        All phrases are asked in one text, "lake. dock.", so they influence each other a little. A box whose
        best word stays at or below the text threshold is counted as below. `Detections.label` has every word
        over that threshold, as the library tells it; boxes may reach beyond the window.

        Args:
            window: (3, y, x) float, 0…1.
            phrases: in words, without full stops.

        Raises:
            RequestError: a phrase has a full stop, or there are more word pieces than the network takes.
        """
        image = image_tensor(window)
        for phrase in phrases:
            if "." in phrase:
                raise RequestError(
                    f"phrase {phrase!r}: found a full stop, which ends a phrase; valid: without"
                )
        names = [phrase.strip().lower() for phrase in phrases]
        text = " ".join(f"{name}." for name in names)
        tokens = self.processor.tokenizer(text, return_offsets_mapping=True)
        limit = self.network.config.max_text_len
        if len(tokens["input_ids"]) > limit:
            raise RequestError(
                f"phrases: found {len(tokens['input_ids'])} word pieces; valid: at most {limit} together"
            )
        batch, output = _run(self.network, self.processor, image, text)
        # Thresholds are "greater than", so −1 keeps every box: those below are counted, too.
        result = self.processor.post_process_grounded_object_detection(
            output, batch["input_ids"], -1.0, self.text_threshold, [tuple(window.shape[1:])]
        )[0]
        words = torch.sigmoid(output.logits[0]).cpu().numpy()
        spans = np.array(tokens["offset_mapping"])
        owner = _owners(names, spans)
        per_phrase = np.stack(
            [words[:, : len(owner)][:, owner == i].max(axis=1) for i in range(len(names))], axis=1
        )
        score = result["scores"].cpu().numpy().astype(np.float64)
        kept = (score > self.box_threshold) & (per_phrase.max(axis=1) > self.text_threshold)
        return _boxes(phrases, result["boxes"], per_phrase.argmax(axis=1), score, kept, result["text_labels"])


class _ThresholdDetector:
    """A network, its processor, and the least score of a box or an element."""

    def __init__(self, network: Any, processor: Any, threshold: float) -> None:
        self.network, self.processor, self.threshold = network, processor, threshold


class Owl(_ThresholdDetector):
    """OWLv2."""

    def ground(self, window: np.ndarray, phrases: Sequence[str]) -> Grounding:
        """Boxes over the threshold, each for its most probable phrase; they may reach beyond the window.

        Args:
            window: (3, y, x) float, 0…1.
            phrases: in words.

        Raises:
            RequestError: a phrase has more word pieces than the network takes.
        """
        image = _checked(self.network, self.processor, window, phrases)
        _, output = _run(self.network, self.processor, image, [list(phrases)])
        result = self.processor.post_process_grounded_object_detection(
            output, -1.0, [tuple(window.shape[1:])], [list(phrases)]
        )[0]
        score = result["scores"].cpu().numpy().astype(np.float64)
        phrase = result["labels"].cpu().numpy()
        return _boxes(phrases, result["boxes"], phrase, score, score > self.threshold, result["text_labels"])


class ClipSeg(_ThresholdDetector):
    """CLIPSeg: a score map for each phrase."""

    def score_maps(self, window: np.ndarray, phrases: Sequence[str]) -> np.ndarray:
        """Probability of every phrase at every element, (n, y, x) float32, each for itself.

        The network's map is enlarged to the window bilinearly, half-pixel centres.

        Args:
            window: (3, y, x) float, 0…1.
            phrases: in words.

        Raises:
            RequestError: a phrase has more word pieces than the network takes.
        """
        image = _checked(self.network, self.processor, window, phrases)
        maps = []
        for phrase in phrases:
            logits = _run(self.network, self.processor, image, [phrase])[1].logits
            small = torch.sigmoid(logits).reshape(1, 1, *logits.shape[-2:])
            large = torch.nn.functional.interpolate(
                small, size=window.shape[1:], mode="bilinear", align_corners=False
            )
            maps.append(large[0, 0].float().cpu().numpy())
        return np.stack(maps)

    def ground(self, window: np.ndarray, phrases: Sequence[str]) -> Grounding:
        """Components of the elements that reach the threshold; a component's score is their mean.

        Args and errors as of `score_maps`.
        """
        parts, accounts = [], []
        for i, scores in enumerate(self.score_maps(window, phrases)):
            part = _components(scores, self.threshold, i, phrases[i])
            parts.append(part)
            best = float(part.score.max()) if len(part) else float(scores.max())
            accounts.append(PhraseAccount(phrase=phrases[i], found=len(part), below=0, best=best))
        return Grounding(Detections.join(parts, 2), tuple(accounts))


def _components(scores: np.ndarray, threshold: float, phrase: int, label: str) -> Detections:
    mask = (scores >= threshold).astype(np.uint8)

    def read(box: Box) -> np.ndarray:
        return mask[box.slices]

    found = find_components(read, mask.shape, ids=False)
    mean = component_means(read, lambda box: scores[box.slices], mask.shape, found)
    places = [deepest(read, found, i, False, (1.0, 1.0), mask.shape) for i in range(len(found))]
    return Detections(
        start=found.start - 0.5, stop=found.stop - 0.5, point=np.array(places, np.float64).reshape(-1, 2),
        phrase=np.full(len(found), phrase, np.int64), score=mean, label=(label,) * len(found),
    )  # fmt: skip


def _run(network: Any, processor: Any, image: torch.Tensor, text: Any) -> tuple[Any, Any]:
    """The processor's batch of one image, and the network's answer to it."""
    batch = processor(images=[image], text=text, do_rescale=False, return_tensors="pt")
    with torch.inference_mode():
        return batch, network(**batch.to(network.device))


def _checked(network: Any, processor: Any, window: np.ndarray, phrases: Sequence[str]) -> torch.Tensor:
    """A window as an image, where the network takes it and each of the phrases for itself."""
    check_length(processor, phrases, network.config.text_config.max_position_embeddings)
    return image_tensor(window)


def _owners(names: Sequence[str], spans: np.ndarray) -> np.ndarray:
    """Which phrase of "lake. dock." each token is of; −1: a full stop or a special token."""
    ends = np.cumsum([len(name) + 2 for name in names])  # ". " after each
    starts = ends - [len(name) + 2 for name in names]
    owner = np.full(len(spans), -1)
    for i, (start, end) in enumerate(zip(starts, ends - 2, strict=True)):
        owner[(spans[:, 0] >= start) & (spans[:, 1] <= end) & (spans[:, 1] > spans[:, 0])] = i
    return owner


def _boxes(
    phrases: Sequence[str],
    corners: torch.Tensor,
    phrase: np.ndarray,
    score: np.ndarray,
    kept: np.ndarray,
    labels: Sequence[str],
) -> Grounding:
    """Detections of candidates, and how many were none.

    Args:
        corners: (n, 4) x, y of the first corner and of the opposite one, 0 at the window's outer edge.
        phrase: (n,) which.
        score: (n,).
        kept: (n,) bool.
        labels: n.
    """
    box = corners.cpu().numpy().astype(np.float64) - 0.5
    every = Detections(
        start=box[:, [1, 0]], stop=box[:, [3, 2]], point=np.full((len(box), 2), np.nan),
        phrase=phrase.astype(np.int64), score=score, label=tuple(labels),
    )  # fmt: skip
    accounts = []
    for i, name in enumerate(phrases):
        mine = phrase == i
        best = float(score[mine].max()) if mine.any() else float("nan")
        found, below = int((mine & kept).sum()), int((mine & ~kept).sum())
        accounts.append(PhraseAccount(phrase=name, found=found, below=below, best=best))
    return Grounding(every.take(kept), tuple(accounts))


def _check_backbone(folder: Path, data: dict[str, Any]) -> None:
    """A backbone of the library itself: others are fetched by name.

    Raises:
        RequestError: it is another.
    """
    backbone = data.get("backbone_config")
    if not isinstance(backbone, dict) or str(backbone.get("model_type")).startswith("timm"):
        found = data.get("backbone") if backbone is None else backbone
        raise RequestError(
            f"{folder / 'config.json'}: backbone_config: found {found!r}, which would have to be asked for; "
            "valid: a backbone of the library itself, e.g. swin"
        )
