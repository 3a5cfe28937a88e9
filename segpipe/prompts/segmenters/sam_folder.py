"""Read folders of promptable networks of the transformers library: which are taken, and how.

Nothing in a folder is executed: its config.json is read as numbers, its tensors as safetensors.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as library

from segpipe.config.card import Card, card_error
from segpipe.errors import RequestError
from segpipe.models.card_checks import only_arguments
from segpipe.models.providers.transformers.configs import REFUSED, data_alone, load_pretrained
from segpipe.models.weights import resolve_weights
from segpipe.prompts.segmenters.torch_base import check_channels, square_window, wrong_window

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
        raise card_error(
            card, "provider", f"found {card.provider}; valid for prompts: transformers, literature"
        )
    if card.output.kind != "prompted":
        raise card_error(card, "output.kind", f"found {card.output.kind}; valid for prompts: prompted")
    path = resolve_weights(card)
    if path.is_file():
        raise _wrong(card, f"found the file {path}; valid: a folder as save_pretrained writes it")
    only_arguments(card, ("enlarge",))
    if (found := card.arguments.get("enlarge", ENLARGE[0])) not in ENLARGE:
        raise card_error(card, "arguments.enlarge", f"found {found!r}; valid: {', '.join(ENLARGE)}")
    kind, data = _read_json(card, path / "config.json")
    family = FAMILIES[kind]
    if card.architecture not in (None, family.network):
        raise card_error(
            card,
            "architecture",
            f"found {card.architecture}; the folder has model_type {kind!r}: valid: {family.network}",
        )
    where = path / "config.json"
    cls = getattr(library, family.network).config_class
    try:
        config = cls.from_dict(data)
    except REFUSED as error:
        reason = " ".join(str(error).split())
        raise _wrong(card, f"{where} makes no {cls.__name__}: {reason}") from error
    channels, edge, grid = _sizes(card, path, family, config)
    if square_window(card) != edge:
        raise wrong_window(card, edge, f"{where} says image_size {edge}: valid: size:")
    check_channels(card, channels, f"{where} has num_channels")
    return SamFolder(path=path, family=family, config=config, channels=channels, edge=edge, grid=grid)


def _wrong(card: Card, problem: str) -> RequestError:
    return card_error(card, "weights", problem)


def _read_json(card: Card, path: Path) -> tuple[str, dict[str, Any]]:
    """`model_type`, and the configuration of the network for images without the keys that ask for code."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
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
        raise card_error(
            card,
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


def load_network(card: Card, folder: SamFolder) -> torch.nn.Module:
    """The network with its tensors, float32, in evaluation mode.

    Raises:
        RequestError: the folder is damaged, or its tensors do not fit its config.json.
    """
    network = getattr(library, folder.family.network)
    return load_pretrained(
        network, folder.path, folder.config, lambda problem: card_error(card, "weights", problem)
    )
