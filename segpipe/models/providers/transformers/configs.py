"""A network's configuration, from a folder's config.json or from a card's arguments, and whether it fits."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NoReturn

import transformers as library

from segpipe.config.card import Card, card_error
from segpipe.models.network import output_channels
from segpipe.models.providers.transformers.families import ARCHITECTURES
from segpipe.models.providers.transformers.folder import REFUSED, data_alone


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
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise card_error(card, "weights", f"{path} is not JSON ({error})") from error
    kind = data.get("model_type") if isinstance(data, dict) else None
    cls = network_class(card).config_class
    if kind != cls.model_type:
        raise card_error(card, "weights", f"{path}: model_type is {kind!r}; valid: {cls.model_type!r}")
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
            raise card_error(card, f"arguments.{name}", f"unknown; valid: fields of {cls.__name__}")
    _check_backbone(card, given, "arguments.backbone_config", "it")
    backbone = given.get("backbone_config")
    if isinstance(backbone, dict):
        given["backbone_config"] = {"num_channels": card.channels, **backbone}
    if "num_channels" in names:
        given.setdefault("num_channels", card.channels)
    labels = output_channels(card)
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
        raise card_error(card, "input.bands", f"found {card.channels}; {where} says num_channels {channels}")
    if card.output.kind == "semantic":
        if config.num_labels != output_channels(card):
            raise card_error(
                card,
                "classes",
                f"the card needs {output_channels(card)} output channels; "
                f"{where} has {config.num_labels} labels",
            )
    elif len(found := labelled(card, config.num_labels)) != config.num_labels:
        raise card_error(
            card,
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
        raise card_error(
            card,
            "window.size",
            f"found {card.window.size}, fixed {str(card.window.fixed).lower()}; {where} says image_size "
            f"{size}: valid: size: {list(sizes)} with fixed: true",
        )


def _check_backbone(card: Card, data: dict[str, Any], field: str, where: str) -> None:
    """Refuse backbones that the library or timm would look up on the hub."""
    name, inner = data.get("backbone"), data.get("backbone_config")
    if name and not inner and data.get("model_type") != "detr":
        raise card_error(
            card,
            field,
            f"{where} names its backbone ({name!r}), which would have to be asked for on the hub; valid: "
            "backbone_config, as save_pretrained writes it",
        )
    for timm in (name, inner.get("backbone") if isinstance(inner, dict) else None):
        if isinstance(timm, str) and (":" in timm or "/" in timm):
            raise card_error(card, field, f"{where} has backbone {timm!r}; valid: a name of timm itself")


def _refuse(card: Card, field: str, text: str, error: Exception) -> NoReturn:
    reason = " ".join(str(error).split())
    raise card_error(card, field, f"{text}: {reason}") from error
