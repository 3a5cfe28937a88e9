"""Open-vocabulary detectors of the transformers library as grounders, from folders of save_pretrained.

Grounding DINO (Liu et al., ECCV 2024), MM-Grounding-DINO (Zhao et al., 2024), OWLv2 (Minderer et al., NeurIPS
2023) and CLIPSeg (Lüddecke & Ecker, CVPR 2022). Images are resized and scaled, and outputs made boxes, by the
library's own processors. Nothing in a folder is executed: its JSON files are read as numbers, its tensors as
safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as library

from segpipe.boxes import Box
from segpipe.errors import RequestError
from segpipe.models.transformers.folder import REFUSED, data_alone, load_pretrained
from segpipe.prompts.components import component_strips, deepest, find_components
from segpipe.prompts.grounders import Detections, Grounder, Grounding, PhraseAccount, joined

FAMILIES = {
    "grounding-dino": (
        "GroundingDinoForObjectDetection",
        "GroundingDinoImageProcessor",
        "GroundingDinoProcessor",
    ),
    "mm-grounding-dino": (
        "MMGroundingDinoForObjectDetection",
        "GroundingDinoImageProcessor",
        "GroundingDinoProcessor",
    ),
    "owlv2": ("Owlv2ForObjectDetection", "Owlv2ImageProcessor", "Owlv2Processor"),
    "clipseg": ("CLIPSegForImageSegmentation", "ViTImageProcessor", "CLIPSegProcessor"),
}
"""Network, image processor and processor of the library, by a folder's `model_type`."""

TOKENIZERS = {
    "bert": ("BertTokenizer", ["vocab.txt"]),
    "clip": ("CLIPTokenizer", ["vocab.json", "merges.txt"]),
}
"""Class of the library, and the files that it reads where there is no tokenizer.json."""


def load_detector(
    folder: Path,
    device: torch.device,
    box_threshold: float | None = None,
    text_threshold: float = 0.25,
) -> Grounder:
    """The detector in a folder.

    Args:
        folder: as save_pretrained of the network and of its processor writes it.
        device: where it runs.
        box_threshold: least score, 0…1; none: the field's own, 0.25 (Grounding DINO), 0.1 (OWLv2), 0.5
            (CLIPSeg: of an element).
        text_threshold: Grounding DINO: least probability of a word, for a box to answer the word's phrase.

    Raises:
        RequestError: the folder is none of a detector, damaged, or asks for what is not in it.
    """
    path = folder / "config.json"
    try:
        data = data_alone(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{path}: not readable as JSON ({error}); valid: a folder of save_pretrained"
        ) from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind not in FAMILIES:
        raise RequestError(f"{path}: model_type is {kind!r}; valid for text: {', '.join(FAMILIES)}")
    network = _load_network(folder, kind, data).to(device)
    processor = _load_processor(folder, kind)
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
        image = _image(window)
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
        batch = self.processor(images=image, text=text, do_rescale=False, return_tensors="pt")
        with torch.inference_mode():
            output = self.network(**batch.to(self.network.device))
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


class Owl:
    """OWLv2."""

    def __init__(self, network: Any, processor: Any, threshold: float) -> None:
        """``threshold``: least score of a box."""
        self.network, self.processor, self.threshold = network, processor, threshold

    def ground(self, window: np.ndarray, phrases: Sequence[str]) -> Grounding:
        """Boxes over the threshold, each for its most probable phrase; they may reach beyond the window.

        Args:
            window: (3, y, x) float, 0…1.
            phrases: in words.

        Raises:
            RequestError: a phrase has more word pieces than the network takes.
        """
        image = _image(window)
        _check_length(self.processor, phrases, self.network.config.text_config.max_position_embeddings)
        batch = self.processor(images=image, text=[list(phrases)], do_rescale=False, return_tensors="pt")
        with torch.inference_mode():
            output = self.network(**batch.to(self.network.device))
        result = self.processor.post_process_grounded_object_detection(
            output, -1.0, [tuple(window.shape[1:])], [list(phrases)]
        )[0]
        score = result["scores"].cpu().numpy().astype(np.float64)
        phrase = result["labels"].cpu().numpy()
        return _boxes(phrases, result["boxes"], phrase, score, score > self.threshold, result["text_labels"])


class ClipSeg:
    """CLIPSeg: a score map for each phrase."""

    def __init__(self, network: Any, processor: Any, threshold: float) -> None:
        """``threshold``: least score of an element."""
        self.network, self.processor, self.threshold = network, processor, threshold

    def score_maps(self, window: np.ndarray, phrases: Sequence[str]) -> np.ndarray:
        """Probability of every phrase at every element, (n, y, x) float32, each for itself.

        The network's map is enlarged to the window bilinearly, half-pixel centres.

        Args:
            window: (3, y, x) float, 0…1.
            phrases: in words.

        Raises:
            RequestError: a phrase has more word pieces than the network takes.
        """
        image = _image(window)
        _check_length(self.processor, phrases, self.network.config.text_config.max_position_embeddings)
        maps = []
        for phrase in phrases:
            batch = self.processor(text=[phrase], images=[image], do_rescale=False, return_tensors="pt")
            with torch.inference_mode():
                logits = self.network(**batch.to(self.network.device)).logits
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
            accounts.append(PhraseAccount(phrases[i], len(part), 0, best))
        return Grounding(joined(parts, 2), tuple(accounts))


def _components(scores: np.ndarray, threshold: float, phrase: int, label: str) -> Detections:
    mask = (scores >= threshold).astype(np.uint8)

    def read(box: Box) -> np.ndarray:
        return mask[box.slices]

    found = find_components(read, mask.shape, ids=False)
    total = np.zeros(len(found))
    for box, number in component_strips(read, mask.shape, False, found):
        total += np.bincount(number.ravel(), scores[box.slices].ravel(), len(found) + 1)[1:]
    places = [deepest(read, found, i, False, (1.0, 1.0), mask.shape) for i in range(len(found))]
    return Detections(
        found.start - 0.5,
        found.stop - 0.5,
        np.array(places, np.float64).reshape(-1, 2),
        np.full(len(found), phrase, np.int64),
        total / found.elements,
        (label,) * len(found),
    )


def _image(window: np.ndarray) -> torch.Tensor:
    if window.ndim != 3 or len(window) != 3:
        raise RequestError(
            f"window: found shape {window.shape}; valid: (3, y, x), a composite of three bands"
        )
    return torch.from_numpy(np.ascontiguousarray(window, dtype=np.float32))


def _check_length(processor: Any, phrases: Sequence[str], limit: int) -> None:
    for phrase in phrases:
        if (found := len(processor.tokenizer(phrase)["input_ids"])) > limit:
            raise RequestError(f"phrase {phrase!r}: found {found} word pieces; valid: at most {limit}")


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
    detections = Detections(
        box[kept][:, [1, 0]],
        box[kept][:, [3, 2]],
        np.full((int(kept.sum()), 2), np.nan),
        phrase[kept].astype(np.int64),
        score[kept],
        tuple(label for label, keep in zip(labels, kept.tolist(), strict=True) if keep),
    )
    accounts = []
    for i, name in enumerate(phrases):
        mine = phrase == i
        best = float(score[mine].max()) if mine.any() else float("nan")
        accounts.append(PhraseAccount(name, int((mine & kept).sum()), int((mine & ~kept).sum()), best))
    return Grounding(detections, tuple(accounts))


def _load_network(folder: Path, kind: str, data: dict[str, Any]) -> Any:
    backbone = data.get("backbone_config")
    if kind.endswith("dino") and (
        not isinstance(backbone, dict) or str(backbone.get("model_type")).startswith("timm")
    ):
        found = data.get("backbone") if backbone is None else backbone
        raise RequestError(
            f"{folder / 'config.json'}: backbone_config: found {found!r}, which would have to be asked for; "
            "valid: a backbone of the library itself, e.g. swin"
        )
    cls = getattr(library, FAMILIES[kind][0])
    try:
        config = cls.config_class.from_dict(data)
    except REFUSED as error:
        reason = " ".join(str(error).split())
        raise RequestError(f"{folder / 'config.json'} makes no {cls.__name__}: {reason}") from error
    return load_pretrained(cls, folder, config)


def _load_processor(folder: Path, kind: str) -> Any:
    """The processor, its two parts by their own classes: nothing in the folder chooses them."""
    _, image, processor = FAMILIES[kind]
    words, vocabulary = TOKENIZERS["bert" if kind.endswith("dino") else "clip"]
    # The library makes an empty tokenizer where there are no files, for which every word is unknown.
    if not ((folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in vocabulary)):
        raise RequestError(f"{folder}: found no tokenizer.json; valid: it, or {' with '.join(vocabulary)}")
    try:
        parts = [
            getattr(library, name).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            for name in (image, words)
        ]
    except (OSError, *REFUSED) as error:
        raise RequestError(
            f"{folder}: no processor ({' '.join(str(error).split())}); valid: preprocessor_config.json or "
            "processor_config.json, and the tokenizer's files, as the processor's save_pretrained writes them"
        ) from error
    return getattr(library, processor)(*parts)
