"""Networks of the transformers library, from a folder that save_pretrained wrote or a pinned hub snapshot.

`config.id2label` is in the order of the card's classes. Nothing in a folder is executed: its config.json is
read as numbers, its tensors as safetensors. With a file of tensors instead of a folder, or without weights,
the network's configuration is the card's `arguments`.
"""

from __future__ import annotations

from typing import Any

import torch

from segpipe.config.card import Card
from segpipe.models.base import Network, ObjectNetwork
from segpipe.models.card_checks import known, only_arguments
from segpipe.models.network import OneOutput, TorchNetwork, fill
from segpipe.models.providers.transformers import configs, queries
from segpipe.models.weights import load_state, resolve_weights


def check(card: Card) -> None:
    """Whether the architecture is taken, serves the card's output, and its configuration fits the card.

    Raises:
        RequestError: it does not; names what was found.
    """
    _config(card)


def module(card: Card) -> torch.nn.Module:
    """The network with random weights, configured by the card's arguments, or by its folder of weights.

    For scores per class it maps images (n, c, y, x) to logits (universal networks: to scores). For objects
    it is the library's own, which makes its own loss of `mask_labels` and `class_labels`.

    Raises:
        RequestError: as `check`.
    """
    network = configs.network_class(card)(_config(card))
    assert isinstance(network, torch.nn.Module)
    return _scorer(card, network) if card.output.kind == "semantic" else network


def build(card: Card, device: torch.device, threads: int) -> Network | ObjectNetwork:
    """The network as stored.

    Raises:
        RequestError: as `check`; or the folder is damaged, or its tensors do not fit its config.json.
    """
    path = resolve_weights(card)
    if path.is_file():
        network = module(card)
        fill(card, network, load_state(path))
    else:
        network = configs.load_pretrained(
            configs.network_class(card),
            path,
            _config(card),
            lambda problem: card.error("weights", problem),
        )
        if card.output.kind == "semantic":
            network = _scorer(card, network)
    if card.output.kind == "semantic":
        return TorchNetwork(network, device)
    return finder(card, network.eval().requires_grad_(False).to(device), device)


def finder(card: Card, network: torch.nn.Module, device: torch.device) -> ObjectNetwork:
    """A network that is already on the device, e.g. one in training, as what finds objects."""
    config: Any = network.config
    return queries.QueryObjects(
        card, _queries(card, network), configs.labelled(card, config.num_labels), device
    )


def objective(card: Card) -> queries.QueryLoss | None:
    """The library's own loss; None where networks are trained by losses of ours."""
    if card.output.kind == "semantic":
        return None
    return queries.QueryLoss(card, configs.labelled(card, _config(card).num_labels))


def _config(card: Card) -> Any:
    family = configs.ARCHITECTURES[known(card, configs.ARCHITECTURES)]
    if card.kind != "raster":
        raise card.error("kind", f"found {card.kind}; {card.architecture} has two axes: valid: raster")
    if card.output.kind not in family.kinds:
        raise card.error(
            "output.kind",
            f"found {card.output.kind}; valid for {card.architecture}: {', '.join(family.kinds)}",
        )
    if family.queries and card.output.kind == "semantic" and card.output.activation != "none":
        raise card.error(
            "output.activation",
            f"found {card.output.activation}; {card.architecture} answers with scores of masks: valid: none",
        )
    path = resolve_weights(card) if card.weights else None
    own = queries.TASK_ARGUMENTS if family.task else ()
    if path is None or path.is_file():
        return configs.argued_config(card, {k: v for k, v in card.arguments.items() if k not in own})
    only_arguments(card, own)
    config = configs.stored_config(card, path)
    if family.task:
        queries.task_tokens(card, config)
    return config


def _scorer(card: Card, network: torch.nn.Module) -> torch.nn.Module:
    if configs.ARCHITECTURES[str(card.architecture)].queries:
        return queries.ClassScores(_queries(card, network))
    return OneOutput(network, "logits")


def _queries(card: Card, network: torch.nn.Module) -> queries.Queries:
    family = configs.ARCHITECTURES[str(card.architecture)]
    return queries.Queries(
        network, family, queries.task_tokens(card, network.config) if family.task else None
    )
