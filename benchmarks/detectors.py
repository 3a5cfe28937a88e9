"""Detectors of every family, held against the transformers library: ``python -m benchmarks.detectors``.

Networks are tiny, of real architecture and with random weights, saved and read back from folders; the window
is noise. A row: boxes (CLIPSeg: objects; CLIP: crops) over a threshold that a share of the candidates passes,
the largest difference of what is compared to the library's own processor and model on the same window, and
whether phrases are equal. Ends with 1 where something differs.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.ndimage import label
from torch.nn import functional
from transformers.utils import logging

from benchmarks.detector_files import clip, clipseg, dino, owl, sam3, sam3_video, save
from segpipe.prompts.grounding.base import Detections
from segpipe.prompts.grounding.clip import PHOTO, load_labeller
from segpipe.prompts.grounding.detectors import ClipSeg, load_detector
from segpipe.prompts.grounding.sam3 import enlarged, load_concepts

CPU = torch.device("cpu")
PHRASES = ["lake", "small docks", "field"]
SHAPE = (64, 96)
WINDOW = np.random.default_rng(0).random((3, *SHAPE)).astype(np.float32)
ALLOWED = {"px": 1e-3, "score": 1e-4, "elements": 1e-4}
"""Largest difference that rounding explains; of elements: the share that lies at a half exactly."""


@dataclass(frozen=True)
class Compared:
    """A row."""

    boxes: int
    differences: dict[str, float]
    """Largest absolute difference by what is compared: corners (px), scores, share of masks' elements."""
    phrases: bool
    """Whether they are equal."""

    @property
    def equal(self) -> bool:
        return self.boxes > 0 and self.phrases and all(d <= ALLOWED[k] for k, d in self.differences.items())


def main() -> None:
    """A row a family."""
    rows: dict[str, Callable[[Path], Compared]] = {
        "Grounding DINO": partial(grounding_dino, prefix="GroundingDino"),
        "MM-Grounding-DINO": partial(grounding_dino, prefix="MMGroundingDino"),
        "OWLv2": owlv2,
        "CLIPSeg": clip_seg,
        "SAM 3": partial(concepts, make=sam3),
        "SAM 3, in the video model": partial(concepts, make=sam3_video),
        "CLIP": labels,
    }
    logging.disable_progress_bar()  # of files saved, on stderr
    print(f"{'family':<28}{'boxes':>6}  {'phrases':<9} largest difference to the library")
    failed = 0
    for name, row in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            found = row(Path(folder) / "model")
        failed += not found.equal
        told = ", ".join(f"{kind} {d:.1e}" for kind, d in found.differences.items())
        print(f"{name:<28}{found.boxes:>6}  {'equal' if found.phrases else 'DIFFER':<9} {told}", flush=True)
    print(f"{len(rows)} families, {failed} differ")
    sys.exit(bool(failed))


@torch.inference_mode()
def grounding_dino(folder: Path, prefix: str) -> Compared:
    """Boxes over a threshold that half of the queries pass, each with the words that the library tells."""
    network, processor = save(folder, dino, prefix)
    batch = processor(images=WINDOW, text=[PHRASES], do_rescale=False, return_tensors="pt")
    output = network(**batch)
    threshold = float(torch.sigmoid(output.logits[0]).max(dim=-1).values.median())
    own = processor.post_process_grounded_object_detection(
        output, batch["input_ids"], threshold=threshold, text_threshold=0.0, target_sizes=[SHAPE]
    )[0]
    found = load_detector(folder, CPU, threshold, 0.0).ground(WINDOW, PHRASES).detections
    return _boxes(found, own, list(found.label) == own["text_labels"])


@torch.inference_mode()
def owlv2(folder: Path) -> Compared:
    """Boxes over a threshold that half of the patches pass."""
    network, processor = save(folder, owl, factor=0.35)
    batch = processor(images=WINDOW, text=[PHRASES], do_rescale=False, return_tensors="pt")
    output = network(**batch)
    threshold = float(torch.sigmoid(output.logits).max(dim=-1).values.median())
    own = processor.post_process_grounded_object_detection(
        output, threshold=threshold, target_sizes=[SHAPE], text_labels=[PHRASES]
    )[0]
    found = load_detector(folder, CPU, threshold).ground(WINDOW, PHRASES).detections
    return _boxes(found, own, [PHRASES[i] for i in found.phrase] == own["text_labels"])


@torch.inference_mode()
def clip_seg(folder: Path) -> Compared:
    """Score maps; objects are components of two fifths of the elements."""
    network, processor = save(folder, clipseg, factor=1)
    images = [WINDOW] * len(PHRASES)
    batch = processor(text=PHRASES, images=images, do_rescale=False, padding=True, return_tensors="pt")
    small = torch.sigmoid(network(**batch).logits)[:, None]
    own = functional.interpolate(small, size=SHAPE, mode="bilinear", align_corners=False)[:, 0].numpy()
    threshold = float(np.quantile(own, 0.6))
    detector = load_detector(folder, CPU, threshold)
    assert isinstance(detector, ClipSeg)
    maps = detector.score_maps(WINDOW, PHRASES)
    found = detector.ground(WINDOW, PHRASES)
    objects = [label(scores >= threshold, np.ones((3, 3)))[1] for scores in own]
    equal = [account.found for account in found.accounts] == objects
    return Compared(len(found.detections), {"score": _largest(maps, own)}, equal)


@torch.inference_mode()
def concepts(folder: Path, make: Callable[[Path], Any]) -> Compared:
    """Boxes and masks over a threshold that three fifths of the candidates pass; the empty ones are out."""
    network, processor = save(folder, make, factor=5)
    network = getattr(network, "detector_model", network)
    outputs = []
    for phrase in PHRASES:
        batch = processor(images=WINDOW, text=phrase, do_rescale=False, return_tensors="pt")
        names = ("pixel_values", "input_ids", "attention_mask")
        outputs.append(network(**{name: batch[name] for name in names}))
    scores = torch.stack([o.pred_logits.sigmoid() * o.presence_logits.sigmoid() for o in outputs])
    threshold = float(scores.quantile(0.4))
    found = load_concepts(folder, CPU, threshold).ground(WINDOW, PHRASES)
    own, ours = [], []
    for output, score in zip(outputs, scores, strict=True):
        result = processor.post_process_instance_segmentation(
            output, threshold=threshold, target_sizes=[SHAPE]
        )[0]
        there = result["masks"].flatten(1).any(dim=1)
        own.append({name: tensor[there] for name, tensor in result.items()})
        ours.append(enlarged(output.pred_masks[0, score[0] > threshold], SHAPE)[there.numpy()] > 0)
    phrase = np.repeat(np.arange(len(PHRASES)), [len(o["scores"]) for o in own])
    together = {name: torch.cat([o[name] for o in own]) for name in own[0]}
    equal = found.detections.phrase.tolist() == phrase.tolist()
    compared = _boxes(found.detections, together, equal)
    masks = together["masks"].numpy() > 0
    differ = (masks != np.concatenate(ours)).mean()
    return Compared(compared.boxes, {**compared.differences, "elements": float(differ)}, equal)


@torch.inference_mode()
def labels(folder: Path) -> Compared:
    """Probabilities of the phrases for crops of several sizes."""
    network, processor = save(folder, clip, factor=6)
    crops = [WINDOW[:, :n, :n] * np.float32(gain) for n, gain in ((9, 1), (32, 0.2), (40, 0.6), (64, 0.4))]
    texts = [PHOTO[0].replace("{}", phrase) for phrase in PHRASES]
    batch = processor(text=texts, images=crops, padding=True, do_rescale=False, return_tensors="pt")
    own = network(**batch).logits_per_image.softmax(dim=1).numpy()
    found = load_labeller(folder, CPU, 0.0).label(crops, PHRASES)
    equal = found.phrase.tolist() == own.argmax(axis=1).tolist()
    return Compared(len(crops), {"score": _largest(found.probability, own)}, equal)


def _boxes(found: Detections, own: dict[str, Any], phrases: bool) -> Compared:
    """Corners and scores; boxes of the library are x, y from the window's outer edge."""
    corners = np.column_stack((found.start, found.stop))[:, [1, 0, 3, 2]] + 0.5
    differences = {
        "px": _largest(corners, own["boxes"].numpy()),
        "score": _largest(found.score, own["scores"].numpy()),
    }
    return Compared(len(found), differences, phrases)


def _largest(one: np.ndarray, two: np.ndarray) -> float:
    """Largest absolute difference; infinity where there is another number of them."""
    return float(np.abs(one - two).max(initial=0.0)) if one.shape == two.shape else np.inf


if __name__ == "__main__":
    main()
