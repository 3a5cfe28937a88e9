"""SegFormer from a folder that save_pretrained wrote, or from a pinned snapshot of the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import SegformerForSemanticSegmentation
from transformers.utils import logging

from segpipe.models.card import Card
from segpipe.models.naming import known, only_arguments
from segpipe.models.network import Network, TorchNetwork, output_channels
from segpipe.models.weights import card_error, resolve_weights

ARCHITECTURES = ("SegformerForSemanticSegmentation",)


class _Logits(torch.nn.Module):
    """The logits alone, a quarter of the input's resolution."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        logits = self.network(pixel_values=batch).logits
        assert isinstance(logits, torch.Tensor)
        return logits


def check(card: Card) -> None:
    """Whether the architecture is supported and the folder's config.json is of its kind.

    Raises:
        RequestError: it is not; names what was found.
    """
    known(card, ARCHITECTURES)
    only_arguments(card, ())
    _check_config(card, resolve_weights(card) / "config.json")


def _check_config(card: Card, path: Path) -> None:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise card_error(card, "weights", f"{path} is not JSON ({error})") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "segformer":
        raise card_error(card, "weights", f"{path}: model_type is {kind!r}; valid: 'segformer'")
    channels = config.get("num_channels", 3)
    if channels != card.channels:
        raise card_error(card, "input.bands", f"found {card.channels}; {path} says num_channels {channels}")


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The network as stored; nothing in the folder is executed.

    Raises:
        RequestError: the folder is damaged, or its tensors do not fit its config.json.
    """
    from safetensors import SafetensorError

    check(card)
    path = resolve_weights(card)
    # A library draws no bars on stderr; the caller's own choice comes back afterwards.
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = SegformerForSemanticSegmentation.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError) as error:
        raise card_error(card, "weights", f"{path} cannot be loaded: {error}") from error
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    network, report = loaded
    # from_pretrained fills what is missing with random numbers, and only warns.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report[problem])
        if names:
            what = problem.replace("_", " ")
            raise card_error(card, "weights", f"{path}: {what}: {names[0]} ({len(names)} in all)")
    if network.config.num_labels != output_channels(card):
        raise card_error(
            card,
            "classes",
            f"the card needs {output_channels(card)} output channels; "
            f"{path / 'config.json'} has {network.config.num_labels} labels",
        )
    return TorchNetwork(_Logits(network), device)
