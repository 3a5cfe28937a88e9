"""Use SAM and its successors (SAM-HQ, MedSAM, SAM 2 and 2.1, EdgeTAM, SAM 3) as segmenters.

Kirillov et al., Segment Anything, ICCV 2023; Ke et al., SAM-HQ, NeurIPS 2023; Ma et al., MedSAM, Nature
Communications 2024; Ravi et al., SAM 2, ICLR 2025; Zhou et al., EdgeTAM, CVPR 2025; Carion et al., SAM 3,
2025. The networks are the transformers library's.

Nothing in a folder is executed: its config.json is read as numbers, its tensors as safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as library
from torch.nn import functional

from segpipe.config.card import Card
from segpipe.config.parsing import parse_json
from segpipe.errors import RequestError
from segpipe.models.card_checks import only_arguments
from segpipe.models.network import forward_pass
from segpipe.models.providers.transformers.configs import data_alone, load_pretrained
from segpipe.models.weights import resolve_weights
from segpipe.prompts.segmenters.base import Candidates, Embedding, Prompt, check_prompts
from segpipe.prompts.segmenters.torch_base import (
    TorchSegmenter,
    check_channels,
    embedding_tensors,
    library_config,
    square_window,
    wrong_window,
)

ENLARGE = ("logits", "probabilities")
"""`arguments.enlarge`: what is resized to the window. SAM's own way is logits, MedSAM's probabilities."""

TIMM_ARGUMENTS = ("in_chans", "features_only", "out_indices")
"""What EdgeTAM's config.json may say to timm: others can name files and hosts."""


@dataclass(frozen=True)
class SamFamily:
    """How networks of one `model_type` are built."""

    network: str
    """Class of the library that takes points and boxes on one image."""
    vision: str
    """`model_type` of its image encoder."""
    backbone: str = ""
    """`model_type` of the backbone in it; empty where the encoder is one piece."""


_SAM2 = SamFamily("Sam2Model", "sam2_vision_model", "sam2_hiera_det_model")
_EDGE = SamFamily("EdgeTamModel", "edgetam_vision_model", "timm_wrapper")
_SAM3 = SamFamily("Sam3TrackerModel", "sam3_vision_model", "sam3_vit_model")
FAMILIES = {
    "sam": SamFamily("SamModel", "sam_vision_model"),
    "sam_hq": SamFamily("SamHQModel", "sam_hq_vision_model"),
    "sam2": _SAM2,
    "sam2_video": _SAM2,
    "edgetam": _EDGE,
    "edgetam_video": _EDGE,
    "sam3_tracker": _SAM3,
    "sam3_tracker_video": _SAM3,
    "sam3_video": _SAM3,
}
"""By a folder's `model_type`. Published folders are those of video models, which hold the image's too."""


@dataclass(frozen=True, kw_only=True)
class SamFolder:
    """A folder whose configuration fits the card."""

    path: Path
    kind: str
    """Its `model_type`."""
    data: dict[str, Any]
    """Its config.json without the keys that ask for code."""
    family: SamFamily
    config: Any
    """The library's configuration."""
    channels: int
    """Channels of the network."""
    edge: int
    """Elements of its square window along an axis."""
    grid: int
    """Cells of its coarsest features along an axis."""


def read_folder(card: Card) -> SamFolder:
    """The folder of a card's weights, without its tensors.

    Raises:
        RequestError: it is none of a promptable network, or does not fit the card.
    """
    if card.provider != "transformers":
        raise card.error("provider", f"found {card.provider}; valid for prompts: transformers, literature")
    if card.output.kind != "prompted":
        raise card.error("output.kind", f"found {card.output.kind}; valid for prompts: prompted")
    path = resolve_weights(card)
    if path.is_file():
        raise _wrong(card, f"found the file {path}; valid: a folder as save_pretrained writes it")
    only_arguments(card, ("enlarge",))
    if (found := card.arguments.get("enlarge", ENLARGE[0])) not in ENLARGE:
        raise card.error("arguments.enlarge", f"found {found!r}; valid: {', '.join(ENLARGE)}")
    kind, data = _read_json(card, path / "config.json")
    family = FAMILIES[kind]
    if card.architecture not in (None, family.network):
        raise card.error(
            "architecture",
            f"found {card.architecture}; the folder has model_type {kind!r}: valid: {family.network}",
        )
    where = path / "config.json"
    cls = getattr(library, family.network).config_class
    config = library_config(cls, data, f"{where} makes no {cls.__name__}", partial(_wrong, card))
    channels, edge, grid = _sizes(card, path, family, config)
    if square_window(card) != edge:
        raise wrong_window(card, edge, f"{where} says image_size {edge}: valid: size:")
    check_channels(card, channels, f"{where} has num_channels")
    return SamFolder(
        path=path, kind=kind, data=data, family=family, config=config, channels=channels, edge=edge, grid=grid
    )


def _wrong(card: Card, problem: str) -> RequestError:
    return card.error("weights", problem)


def _read_json(card: Card, path: Path) -> tuple[str, dict[str, Any]]:
    """`model_type`, and the configuration of the network for images without the keys that ask for code."""
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _wrong(card, f"{path} is not JSON ({error})") from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    if kind not in FAMILIES:
        raise _wrong(card, f"{path}: model_type is {kind!r}; valid for prompts: {', '.join(FAMILIES)}")
    if kind == "sam3_video":
        data = data.get("tracker_config")
        if not isinstance(data, dict):
            raise _wrong(card, f"{path}: found no tracker_config; valid: as save_pretrained writes it")
    alone = data_alone(data)
    assert isinstance(alone, dict)
    return str(kind), alone


def _sizes(card: Card, path: Path, family: SamFamily, config: Any) -> tuple[int, int, int]:
    """Channels, edge of the window and edge of the coarsest features; encoder and decoder agree on them."""
    where = path / "config.json"
    vision, prompts = config.vision_config, config.prompt_encoder_config
    backbone = vision.backbone_config if family.backbone else None
    for part, name in ((vision, family.vision), (backbone, family.backbone)):
        if part is not None and part.model_type != name:
            raise _wrong(card, f"{where}: found an encoder {part.model_type!r}; valid: {name!r}")
    edge, patch = prompts.image_size, prompts.patch_size
    if not (isinstance(edge, int) and isinstance(patch, int)) or patch < 1 or edge < patch or edge % patch:
        raise card.error(
            "weights",
            f"{where}: found image_size {edge}, patch_size {patch}; valid: one number each, the first a "
            "multiple of the second",
        )
    grid = edge // patch
    if backbone is None:
        found: list[Any] = [vision.image_size, vision.patch_size]
        valid: list[Any] = [edge, patch]
    else:
        found, valid = vision.backbone_feature_sizes, [[n * grid, n * grid] for n in (4, 2, 1)]
    if json.dumps(found) != json.dumps(valid):
        raise _wrong(card, f"{where}: found an encoder of sizes {found}; valid for its decoder: {valid}")
    if family.backbone == "timm_wrapper":
        return _timm_channels(card, path, backbone), edge, grid
    return (vision if backbone is None else backbone).num_channels, edge, grid


def _timm_channels(card: Card, path: Path, backbone: Any) -> int:
    """Input channels of a backbone that timm builds by name, without looking anything up."""
    arguments = backbone.model_args or {}
    name = str(backbone.architecture)
    for field, wrong in (
        ("architecture", [name] if ":" in name or "/" in name else []),
        ("model_args", [key for key in arguments if key not in TIMM_ARGUMENTS]),
    ):
        if wrong:
            valid = "a name of timm itself" if field == "architecture" else ", ".join(TIMM_ARGUMENTS)
            raise _wrong(card, f"{path / 'config.json'}: {field}: found {wrong[0]!r}; valid: {valid}")
    return int(arguments.get("in_chans", 3))


def embedding_shapes(folder: SamFolder) -> dict[str, tuple[int, int, int]]:
    """Name and shape (c, y, x) of each array of an embedding, in the order of the network."""
    config, n = folder.config, folder.grid
    vision = config.vision_config
    if folder.family.backbone:
        hidden = config.mask_decoder_config.hidden_size
        return {
            "high4": (hidden // 8, 4 * n, 4 * n),
            "high2": (hidden // 4, 2 * n, 2 * n),
            "image": (vision.fpn_hidden_size, n, n),
        }
    image = {"image": (vision.output_channels, n, n)}
    layers = any(i < vision.num_hidden_layers for i in vision.global_attn_indexes)
    if folder.family.network == "SamHQModel" and layers:
        return {"vit": (vision.hidden_size, n, n), **image}
    return image


SATURATED = 1e-6
"""Probabilities are kept this far from 0 and 1, so that their logits are finite."""


class SamSegmenter(TorchSegmenter):
    """A `Segmenter` of the SAM families."""

    def __init__(self, card: Card, device: torch.device, threads: int, precision: str, batch: int) -> None:
        """As `load_segmenter`."""
        folder = read_folder(card)
        cls = getattr(library, folder.family.network)
        network = load_pretrained(cls, folder.path, folder.config, partial(_wrong, card))
        super().__init__(
            network, card, folder.channels, folder.edge, 4 * folder.grid, embedding_shapes(folder), device,
            threads, precision, batch,
        )  # fmt: skip
        self._hq, self._levels = folder.family.network == "SamHQModel", bool(folder.family.backbone)
        self._probabilities = card.arguments.get("enlarge", ENLARGE[0]) == "probabilities"

    def _encoded(self, batch: torch.Tensor) -> Sequence[torch.Tensor]:
        found = self._network.get_image_embeddings(batch)
        if self._hq:
            image, layers = found
            # The decoder looks at the first layer with global attention alone; it is (n, y, x, c).
            return [layer.permute(0, 3, 1, 2) for layer in layers[:1]] + [image]
        return found if isinstance(found, list) else [found]

    def decode(
        self, embedding: Embedding, prompts: Sequence[Prompt], *, multimask: bool = True
    ) -> Candidates:
        """As `Segmenter.decode`."""
        check_prompts(prompts, self.window, self.mask_shape)
        maps = self._maps(embedding)
        count = self._network.config.mask_decoder_config.num_multimask_outputs if multimask else 1
        low = np.empty((len(prompts), count, *self.mask_shape), np.float32)
        iou = np.empty((len(prompts), count), np.float32)
        logits = np.empty((len(prompts), count, *self.window), np.float32)
        with forward_pass(self.device, "fp32", self._threads):
            for numbers in alike(prompts, self._batch):
                chosen = [prompts[i] for i in numbers]
                # Short batches repeat their last prompt: a batch's shape is part of its bits.
                chosen += chosen[-1:] * (self._batch - len(chosen))
                # A coarse mask belongs to an image in the library, so each prompt with one has its own.
                images = 1 if chosen[0].mask is None else len(chosen)
                out = self._network(
                    **_repeated(maps, images), **self._tensors(chosen, images), multimask_output=multimask
                )
                masks = out.pred_masks.flatten(0, 1)[: len(numbers)].float()
                low[numbers] = masks.cpu().numpy()
                iou[numbers] = out.iou_scores.flatten(0, 1)[: len(numbers)].float().cpu().numpy()
                logits[numbers] = self._enlarged(masks).cpu().numpy()
        return Candidates(logits, iou, low)

    def _maps(self, embedding: Embedding) -> dict[str, Any]:
        """The embedding as the network's arguments."""
        tensors = embedding_tensors(embedding, self.shapes, self.device)
        if self._levels:
            return {"image_embeddings": tensors}
        layers = [t.permute(0, 2, 3, 1) for t in tensors[:-1]]
        return {"image_embeddings": tensors[-1], **({"intermediate_embeddings": layers} if self._hq else {})}

    def _tensors(self, prompts: Sequence[Prompt], images: int) -> dict[str, torch.Tensor]:
        """Prompts of one kind as the network's arguments: all of one image, or one an image."""
        first, arrays = prompts[0], {}
        if len(first.points_xy):
            arrays["input_points"] = np.stack([p.points_xy for p in prompts]).astype(np.float32)
            arrays["input_labels"] = np.stack([p.labels for p in prompts]).astype(np.int64)
        if first.box_xyxy is not None:
            arrays["input_boxes"] = np.stack([p.box_xyxy for p in prompts if p.box_xyxy is not None]).astype(
                np.float32
            )
        if first.mask is not None:
            arrays["input_masks"] = np.stack([p.mask for p in prompts if p.mask is not None])
        shaped = {name: a.reshape(images, -1, *a.shape[1:]) for name, a in arrays.items()}
        return {name: torch.from_numpy(a).to(self.device) for name, a in shaped.items()}

    def _enlarged(self, masks: torch.Tensor) -> torch.Tensor:
        """(n, k, y, x) at the window's size: bilinear, half-pixel centres."""
        given = masks.sigmoid() if self._probabilities else masks
        large = functional.interpolate(given, size=self.window, mode="bilinear", align_corners=False)
        return large.logit(eps=SATURATED) if self._probabilities else large


def alike(prompts: Sequence[Prompt], batch: int) -> Iterator[list[int]]:
    """Numbers of prompts that can be decoded together, at most ``batch`` at a time.

    They have as many points and the same other parts: the library fills up missing points with tokens that
    others attend to, which would make a mask depend on its neighbours.
    """
    kinds: dict[tuple[int, bool, bool], list[int]] = {}
    for number, prompt in enumerate(prompts):
        kind = (len(prompt.points_xy), prompt.box_xyxy is not None, prompt.mask is not None)
        kinds.setdefault(kind, []).append(number)
    for numbers in kinds.values():
        for start in range(0, len(numbers), batch):
            yield numbers[start : start + batch]


def _repeated(maps: Mapping[str, Any], images: int) -> dict[str, Any]:
    """The same embedding for several images."""
    if images == 1:
        return dict(maps)

    def expand(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(images, *tensor.shape[1:])

    return {
        name: [expand(t) for t in value] if isinstance(value, list) else expand(value)
        for name, value in maps.items()
    }
