"""From a card to a model that runs: checked before work starts, loaded once per process."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from segpipe.config.builtin import card_files
from segpipe.config.card import Card, load_card
from segpipe.config.job import Precision
from segpipe.errors import RequestError
from segpipe.models.card_checks import check_input, check_objects, check_window
from segpipe.models.plugins import load_adapter, provider_spec
from segpipe.models.weights import resolve_weights, weights_files, weights_fingerprint

if TYPE_CHECKING:
    import torch

    from segpipe.models.base import Network, ObjectModel, ObjectNetwork, SegmentationModel

FLOPS_EDGE = {2: 256, 3: 64}
"""Edge of what a forward pass is counted on, by number of axes."""

Key = tuple[str, str, str, str, int, bool]
M = TypeVar("M")

_models: dict[Key, Any] = {}
_models_lock = threading.Lock()


@dataclass(frozen=True)
class ModelDescription:
    """What `segpipe models show` prints beside the card."""

    parameters: int | None
    """Numbers learned in training; None where the file does not tell (ONNX, detectors)."""
    weights: Path | None
    """File or folder; None where the provider needs none."""
    weights_bytes: int
    """Size of all its files."""
    fingerprint: str
    """SHA-256 of the weights."""
    window: tuple[int, ...] | None
    """Elements per model axis in one pass; None: the whole scene at its own size."""
    halo: tuple[int, ...] | None
    """Margin per model axis; None: measured when first needed."""
    stride: int
    """Total stride."""
    flops: float | None
    """Floating-point operations per element of the input, a multiply-add being two; None: not told."""


def load_model(
    card: Card, device: str, threads: int, precision: str, *, compile: bool = False
) -> SegmentationModel:
    """The card's model, ready to run; the same object for the same request in one process.

    Args:
        card: the model; its output is semantic.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        threads: CPU threads of one forward pass.
        precision: ``fp32``, ``bf16`` or ``fp16``, as `resolve_precision` gives it. A file that fixes
            its own arithmetic (ONNX, TorchScript) runs as it is stored whatever is asked here: a
            region-of-interest model may be one, and the model after it not.
        compile: by torch.compile.

    Raises:
        RequestError: the card, its weights or the device cannot be served, or nothing compiles it here.
    """
    from segpipe.models.network import ReadyModel

    return _loaded(card, device, threads, precision, ReadyModel, compile)


def load_object_model(card: Card, device: str, threads: int, precision: str) -> ObjectModel:
    """The same for a card whose output is instance or panoptic."""
    from segpipe.models.network import ReadyObjects

    return _loaded(card, device, threads, precision, ReadyObjects)


def _loaded(
    card: Card,
    device: str,
    threads: int,
    precision: str,
    ready: Callable[[Card, Any, str, int], M],
    compile: bool = False,
) -> M:
    if provider_spec(card).as_stored:
        precision = "fp32"
    with _models_lock:
        # Two threads that ask at once: the second waits, then finds the first one's.
        key = (card.prediction_fingerprint(), weights_fingerprint(card), device, precision, threads, compile)
        if key not in _models:
            network = build_network(card, device_of(device), threads)
            if compile:
                from segpipe.models.network import compiled

                network = compiled(card, cast(Network, network))
            _models[key] = ready(card, network, precision, threads)
        return cast(M, _models[key])


def resolve_precision(card: Card, precision: Precision, device: str) -> str:
    """The arithmetic of the forward pass with ``auto`` settled: bf16 on CUDA, fp32 elsewhere.

    Raises:
        RequestError: half precision is asked of a file that fixes its own arithmetic.
    """
    if provider_spec(card).as_stored:
        if precision not in (Precision.auto, Precision.fp32):
            raise RequestError(
                f"compute.precision: found {precision.value}; {card.name} runs as it is stored "
                f"({card.provider}): valid: auto or fp32"
            )
        return "fp32"
    if precision is Precision.auto:
        return "bf16" if device.startswith("cuda") else "fp32"
    return str(precision.value)


def list_cards(folder: str | Path | None = None) -> list[Card]:
    """Every card in a folder, by file name.

    Args:
        folder: None: the working folder's cards and those that come with segpipe (`card_files`).

    Raises:
        RequestError: no such folder, or a card is wrong; every mistake of every card.
    """
    if folder is not None and not Path(folder).is_dir():
        raise RequestError(f"{folder}: no such folder; give one that holds model cards (*.yaml)")
    cards, mistakes = [], []
    for path in card_files(folder).values():
        try:
            cards.append(load_card(path))
        except RequestError as error:
            mistakes.append(str(error))
    if mistakes:
        raise RequestError("\n".join(mistakes))
    return cards


def describe(card: Card, parameters: int | None = None) -> ModelDescription:
    """Facts of a model that are not written on its card; builds it on the CPU.

    Args:
        parameters: of a card that answers prompts, whose network is not built here.

    Raises:
        RequestError: as `load_model`.
    """
    import torch

    network: object = None
    if not card.answers_prompts:
        network = built = build_network(card, torch.device("cpu"), 1)
        parameters = built.parameters
    return ModelDescription(
        parameters=parameters,
        weights=resolve_weights(card) if card.weights else None,
        weights_bytes=sum(file.stat().st_size for file in weights_files(card)),
        fingerprint=weights_fingerprint(card),
        window=card.window_shape,
        halo=card.halo,
        stride=card.window.stride,
        flops=_flops(card, network),
    )


def _flops(card: Card, network: object) -> float | None:
    """Of one forward pass per element, counted by torch; None for runtimes of their own, and objects."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from segpipe.models.network import TorchNetwork

    if not isinstance(network, TorchNetwork):
        return None
    stride = card.window.stride
    small = tuple(-(-FLOPS_EDGE[card.ndim] // stride) * stride for _ in range(card.ndim))
    shape = card.window_shape if card.window.fixed and card.window_shape else small
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, card.channels, *shape))
    return counter.get_total_flops() / math.prod(shape) or None


def check_card(card: Card) -> None:
    """Refuse, before any work, a card that could not run: everything but building the network.

    Raises:
        RequestError: names the card, the field, what was found and what would be valid.
    """
    if card.weights or provider_spec(card).needs_weights:
        resolve_weights(card)
    if card.answers_prompts:
        found = f"found {card.output.kind}, which answers prompts"
        raise card.error("output.kind", f"{found}; valid here: semantic, instance, panoptic")
    load_adapter(card).check(card)
    check_window(card)
    check_input(card)
    if card.output.kind != "semantic":
        check_objects(card)
    if card.roi is not None:
        _check_roi(card, card.roi.card)


def build_network(card: Card, device: torch.device, threads: int) -> Network | ObjectNetwork:
    """The card's network with its weights, as its provider's adapter builds it; anew at every call."""
    return load_adapter(card).build(card, device, threads)


def runtime_without_cuda(card: Card) -> str:
    """The runtime that computes the card's model where it has no CUDA here; empty: torch, or one that has."""
    return str(getattr(load_adapter(card), "without_cuda", str)())


def device_of(name: str) -> torch.device:
    """The device, which exists, set to repeatable whole-float32 arithmetic."""
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RequestError(f"compute.device: found {name!r}; valid: cpu, cuda, cuda:1") from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise RequestError(
                f"compute.device: found {name!r}; this machine has {count} CUDA devices: "
                "valid here: auto or cpu" + (f", cuda:0 to cuda:{count - 1}" if count else "")
            )
        # TF32 keeps 10 bits of float32's 23, and the fastest algorithms are not repeatable.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    return device


def _check_roi(card: Card, path: str) -> None:
    first = load_card(card.folder / path)
    valid = first.kind == card.kind and first.window.size == "whole" and first.roi is None
    if not valid:
        raise card.error("roi.card", f"{path}: valid: a {card.kind} card, window whole, without roi")
    if (first.input.bands, first.input.orientation) != (card.input.bands, card.input.orientation):
        raise card.error("roi.card", f"{path}: its bands and orientation must be those of this card")
    check_card(first)
