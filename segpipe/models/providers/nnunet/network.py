"""Trained nnU-Net v2 folders: plans read as data, networks from a closed list, folds averaged.

``arguments``: ``configuration`` (needed, e.g. 3d_fullres), ``folds`` (a list; default all there are),
``checkpoint`` (``final`` or ``best``), ``mirror`` (true: also mirror images along the axes that training
mirrored, as nnU-Net itself predicts; 2 to 8 times the work).
"""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from torch import nn

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.base import Network
from segpipe.models.card_checks import only_arguments
from segpipe.models.network import TorchNetwork, fill
from segpipe.models.providers.nnunet.plans import NnunetPlan, read_plan
from segpipe.models.weights import resolve_weights

ARGUMENTS = ("configuration", "folds", "checkpoint", "mirror")
CHECKPOINTS = ("final", "best")
NETWORKS: dict[str, type[nn.Module]] = {c.__name__: c for c in (PlainConvUNet, ResidualEncoderUNet)}
LAYERS: dict[str, type[nn.Module]] = {
    c.__name__: c
    for c in (
        nn.Conv2d,
        nn.Conv3d,
        nn.InstanceNorm2d,
        nn.InstanceNorm3d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.Dropout2d,
        nn.Dropout3d,
        nn.LeakyReLU,
        nn.ReLU,
        nn.GELU,
        nn.SiLU,
    )
}
"""Classes that plans may name; a dotted name is looked up here by its end and never imported."""

# nnU-Net logs numpy scalars into its checkpoints. Under both of numpy's names: 1.x wrote the second.
_SCALAR: Any = np.float64(0).__reduce__()[0]
SAFE_GLOBALS: list[Any] = [
    (_SCALAR, "numpy._core.multiarray.scalar"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float32DType,
    np.dtypes.Float64DType,
]


class FoldedNetwork(nn.Module):
    """Mean of the logits of several folds, in the image's axis order.

    As `nnUNetPredictor` does: first over the mirror images of each fold, then over the folds.
    """

    def __init__(self, networks: Sequence[nn.Module], order: Sequence[int], mirrored: Sequence[int]) -> None:
        """Args: order: image axis of each network axis; mirrored: network axes, 0 the first spatial one."""
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.forth = (0, 1, *(2 + axis for axis in order))
        self.back = tuple(int(i) for i in np.argsort(self.forth))
        self.views = [
            tuple(2 + axis for axis in view)
            for count in range(1, len(mirrored) + 1)
            for view in combinations(mirrored, count)
        ]

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        batch = batch.permute(self.forth).contiguous()
        total: torch.Tensor = self._mirrored(self.networks[0], batch)
        for network in self.networks[1:]:
            total += self._mirrored(network, batch)
        if len(self.networks) > 1:
            total /= len(self.networks)
        return total.permute(self.back)

    def _mirrored(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        total: torch.Tensor = network(batch)
        for view in self.views:
            total += network(batch.flip(view)).flip(view)
        if self.views:
            total /= 1 + len(self.views)
        return total


def check(card: Card) -> None:
    """Whether card and plans agree.

    Raises:
        RequestError: they do not; names the card's field.
    """
    only_arguments(card, ARGUMENTS)
    folder = resolve_weights(card)
    plan = _plan(card, folder)
    fold_files(card, folder)
    network_class(card, plan)
    if len(plan.patch) != card.ndim:
        raise card.error("kind", f"found {card.kind}; {plan.configuration} has {len(plan.patch)} axes")
    if len(plan.channels) != card.channels:
        names = ", ".join(c.name for c in plan.channels)
        raise card.error("input.bands", f"found {card.channels}; the model takes {names}")
    if card.output.activation != "softmax" or card.output.kind != "semantic":
        raise card.error("output", "valid: kind semantic with activation softmax")
    if card.values != tuple(v for v, _ in plan.labels):
        valid = ", ".join(f"{v} {name}" for v, name in plan.labels)
        raise card.error("classes", f"found values {list(card.values)}; valid: {valid}")
    _check_window(card, plan)


def _check_window(card: Card, plan: NnunetPlan) -> None:
    strides = plan.in_image_order(plan.strides)
    window = card.window_shape
    if window is None or not (card.window.fixed or card.window.size == "whole"):
        raise card.error(
            "window", f"valid: a size with `fixed: true`; trained on {plan.in_image_order(plan.patch)}"
        )
    if any(n % s for n, s in zip(window, strides, strict=True)):
        raise card.error(
            "window.size", f"found {list(window)}; valid: multiples of {strides}, the network's strides"
        )


def _plan(card: Card, folder: Path) -> NnunetPlan:
    configuration = card.arguments.get("configuration")
    if not isinstance(configuration, str):
        raise card.error("arguments.configuration", "needed, e.g. 3d_fullres: as in the folder's name")
    try:
        return read_plan(folder, configuration)
    except RequestError as error:
        raise card.error("weights", str(error)) from error


def fold_files(card: Card, folder: Path) -> list[Path]:
    """The checkpoints that the card asks for, in the order given; by default each numbered fold's.

    Raises:
        RequestError: one is not there.
    """
    kind = card.arguments.get("checkpoint", "final")
    if kind not in CHECKPOINTS:
        raise card.error("arguments.checkpoint", f"found {kind!r}; valid: {' or '.join(CHECKPOINTS)}")
    if not isinstance(card.arguments.get("mirror", False), bool):
        raise card.error("arguments.mirror", f"found {card.arguments['mirror']!r}; valid: true or false")
    file = f"checkpoint_{kind}.pth"
    there = [p.parent.name.removeprefix("fold_") for p in sorted(folder.glob(f"fold_*/{file}"))]
    numbered = [name for name in there if name != "all"]
    folds = card.arguments.get("folds", numbered or there)
    if not isinstance(folds, list) or not folds or any(str(fold) not in there for fold in folds):
        raise card.error(
            "arguments.folds", f"found {folds}; valid: a list of {', '.join(there) or 'none'} ({file})"
        )
    return [folder / f"fold_{fold}" / file for fold in folds]


def network_class(card: Card, plan: NnunetPlan) -> tuple[type[nn.Module], dict[str, Any]]:
    """The plan's network and its arguments, classes from `LAYERS`.

    Raises:
        RequestError: the plan names a class outside the lists.
    """
    name = plan.network.rpartition(".")[2]
    if name not in NETWORKS:
        raise card.error("weights", f"plans.json: network {plan.network!r}; valid: {', '.join(NETWORKS)}")
    arguments = dict(plan.arguments)
    for key in plan.imported:
        wanted = arguments.get(key)
        if wanted is None:
            continue
        layer = str(wanted).rpartition(".")[2]
        if layer not in LAYERS:
            raise card.error("weights", f"plans.json: {key} {wanted!r}; valid: {', '.join(LAYERS)}")
        arguments[key] = LAYERS[layer]
    return NETWORKS[name], arguments


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of nnU-Net's trainer: network_weights, init_args, inference_allowed_mirroring_axes, …

    Raises:
        RequestError: damaged, of another kind, or it would have to run code to be read.
    """
    try:
        with torch.serialization.safe_globals(SAFE_GLOBALS):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content["network_weights"], dict) and isinstance(content["init_args"], dict):
            return dict(content)
    except pickle.UnpicklingError as error:
        raise RequestError(
            f"{path}: damaged, or it would have to run code to be read, which segpipe never does"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        raise RequestError(f"{path}: no checkpoint of nnU-Net v2 ({error})") from error
    raise RequestError(f"{path}: no checkpoint of nnU-Net v2 (network_weights and init_args are no mappings)")


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The mean of the card's folds.

    Raises:
        RequestError: card, plans and checkpoints do not fit one another.
    """
    check(card)
    folder = resolve_weights(card)
    plan = _plan(card, folder)
    factory, arguments = network_class(card, plan)
    arguments["deep_supervision"] = False
    networks: list[nn.Module] = []
    mirrored = None
    for path in fold_files(card, folder):
        checkpoint = read_checkpoint(path)
        trained = checkpoint["init_args"].get("configuration")
        if trained != plan.configuration:
            raise card.error("arguments.configuration", f"found {plan.configuration!r}; valid: {trained!r}")
        if not networks:  # nnU-Net too takes the first fold's
            mirrored = checkpoint.get("inference_allowed_mirroring_axes")
        try:
            network = factory(input_channels=card.channels, num_classes=card.output_channels, **arguments)
        except (TypeError, ValueError, AssertionError, IndexError) as error:
            raise card.error(
                "weights", f"plans.json: {plan.network} refuses its arguments: {error}"
            ) from error
        fill(card, network, checkpoint["network_weights"])
        networks.append(network)
    axes = tuple(mirrored or ()) if card.arguments.get("mirror", False) else ()
    return TorchNetwork(FoldedNetwork(networks, plan.order, axes), device)
