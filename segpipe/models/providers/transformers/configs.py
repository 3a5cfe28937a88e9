"""Networks of the library that are taken: their configuration, whether a card fits it, and their folders.

Folders that save_pretrained wrote are read as data: numbers from JSON, tensors from safetensors, no code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
import transformers as library
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from segpipe.config.card import Card
from segpipe.config.parsing import parse_json
from segpipe.errors import RequestError

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


def network_class(card: Card) -> Any:
    """The library's class of the card's architecture."""
    return getattr(library, str(card.architecture))


def stored_config(card: Card, folder: Path) -> Any:
    """The configuration that a folder holds; what it asks for beyond numbers is not followed.

    Raises:
        RequestError: it is damaged, of another kind, or would fetch its backbone; or the card does not fit.
    """
    path = folder / "config.json"
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise card.error("weights", f"{path} is not JSON ({error})") from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    cls = network_class(card).config_class
    if kind != cls.model_type:
        raise card.error("weights", f"{path}: model_type is {kind!r}; valid: {cls.model_type!r}")
    _check_backbone(card, data, "weights", str(path))
    try:
        config = cls.from_dict(data_alone(data))
    except REFUSED as error:
        _refuse(card, "weights", f"{path} makes no {cls.__name__}", error)
    check_config(card, config, f"{path}")
    return config


def argued_config(card: Card, arguments: dict[str, Any]) -> Any:
    """The configuration that a card's arguments give: fields of the library's class, plain values.

    Raises:
        RequestError: a field is unknown or refused, or the card does not fit.
    """
    cls = network_class(card).config_class
    names = {field.name.lstrip("_") for field in dataclasses.fields(cls)}
    given = data_alone(arguments)
    for name in arguments:
        if name not in names or name not in given or name in ("id2label", "label2id"):
            raise card.error(f"arguments.{name}", f"unknown; valid: fields of {cls.__name__}")
    _check_backbone(card, given, "arguments.backbone_config", "it")
    backbone = given.get("backbone_config")
    if isinstance(backbone, dict):
        given["backbone_config"] = {"num_channels": card.channels, **backbone}
    if "num_channels" in names:
        given.setdefault("num_channels", card.channels)
    labels = card.output_channels
    if card.output.kind != "semantic":
        labels = len(labelled(card, None))
    try:
        config = cls(**{"num_labels": labels, **given})
    except REFUSED as error:
        _refuse(card, "arguments", f"{cls.__name__} refuses {arguments}", error)
    check_config(card, config, "arguments")
    return config


def labelled(card: Card, labels: int | None) -> tuple[int, ...]:
    """Class value of each label of a network that finds objects, in the order of its `id2label`.

    They are the card's classes in their order: all of them, or those that are not background, whichever
    has as many as the network has labels. Without ``labels``: those that are not background.
    """
    front = tuple(c.value for c in card.classes if not c.background)
    return card.values if labels == len(card.values) else front


def check_config(card: Card, config: Any, where: str) -> None:
    """Whether bands, classes and window are those of the network.

    Raises:
        RequestError: names the card's field, what was found and what would be valid.
    """
    family = ARCHITECTURES[str(card.architecture)]
    backbone = getattr(config, "backbone_config", None)
    channels = getattr(backbone, "num_channels", getattr(config, "num_channels", 3))
    if channels != card.channels:
        raise card.error("input.bands", f"found {card.channels}; {where} says num_channels {channels}")
    if card.output.kind == "semantic":
        if config.num_labels != card.output_channels:
            raise card.error(
                "classes",
                f"the card needs {card.output_channels} output channels; "
                f"{where} has {config.num_labels} labels",
            )
    elif len(found := labelled(card, config.num_labels)) != config.num_labels:
        raise card.error(
            "classes",
            f"found {len(card.classes)} ({len(found)} without background); {where} has "
            f"{config.num_labels} labels: valid: as many, in their order, with or without background",
        )
    fixed = config if family.square else backbone
    if fixed is not None and (family.square or fixed.model_type == "beit"):
        _check_square(card, fixed.image_size, where)


def _check_square(card: Card, size: int | list[int], where: str) -> None:
    sizes = (size, size) if isinstance(size, int) else tuple(size)
    if card.window_shape != sizes or not card.window.fixed:
        raise card.error(
            "window.size",
            f"found {card.window.size}, fixed {str(card.window.fixed).lower()}; {where} says image_size "
            f"{size}: valid: size: {list(sizes)} with fixed: true",
        )


def _check_backbone(card: Card, data: dict[str, Any], field: str, where: str) -> None:
    """Refuse backbones that the library or timm would look up on the hub."""
    name, inner = data.get("backbone"), data.get("backbone_config")
    if name and not inner and data.get("model_type") != "detr":
        raise card.error(
            field,
            f"{where} names its backbone ({name!r}), which would have to be asked for on the hub; valid: "
            "backbone_config, as save_pretrained writes it",
        )
    for timm in (name, inner.get("backbone") if isinstance(inner, dict) else None):
        if isinstance(timm, str) and (":" in timm or "/" in timm):
            raise card.error(field, f"{where} has backbone {timm!r}; valid: a name of timm itself")


def _refuse(card: Card, field: str, text: str, error: Exception) -> NoReturn:
    reason = " ".join(str(error).split())
    raise card.error(field, f"{text}: {reason}") from error


REFUSED = (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError)
"""What a configuration that makes no sense raises in the library."""

NOT_FOLLOWED = ("auto_map", "quantization_config", "attn_implementation", "experts_implementation")
"""Keys by which a config.json can ask for code: from the folder, from other packages, from the hub."""

COUNTERS = ("num_batches_tracked", "relative_position_index")
"""Endings of tensors that old checkpoints hold and no network reads."""


def data_alone(data: Any) -> Any:
    """The same without the keys that ask for code, at any depth."""
    if isinstance(data, dict):
        return {k: data_alone(v) for k, v in data.items() if str(k).lstrip("_") not in NOT_FOLLOWED}
    return [data_alone(v) for v in data] if isinstance(data, list) else data


def load_pretrained(
    network: Any, folder: Path, config: Any, refuse: Callable[[str], RequestError] = RequestError
) -> torch.nn.Module:
    """The network of a folder, float32, in evaluation mode, every tensor where it belongs.

    Args:
        network: class of the library.
        folder: with tensors as safetensors.
        config: the library's configuration of it, checked.
        refuse: makes the error of what is wrong with the folder.

    Raises:
        RequestError: the folder is damaged, holds an adapter, or its tensors do not fit the configuration.
    """
    if (folder / "adapter_config.json").exists():
        raise refuse(f"{folder} holds an adapter (adapter_config.json): merge it first")
    # A library draws no bars on stderr; the caller's own choice comes back afterwards.
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded, report = network.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ImportError, *REFUSED) as error:
        raise refuse(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    # from_pretrained fills what is missing with random numbers, and only warns.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report[problem] if not str(name).endswith(COUNTERS))
        if names:
            raise refuse(f"{folder}: {problem.replace('_', ' ')}: {names[0]} ({len(names)} in all)")
    for name, tensor in loaded.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise refuse(f"{name} in {folder} holds NaN or infinity")
    assert isinstance(loaded, torch.nn.Module)
    return loaded.eval().requires_grad_(False)
