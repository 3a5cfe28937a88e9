"""Several models as one: the mean of their probabilities. Or one model several times, with dropout.

``arguments``: ``cards`` (a list, relative to this card), or ``card``, ``dropout`` (passes) and ``seed``:
Monte-Carlo dropout (Gal and Ghahramani, ICML 2016). Pass k draws its masks from ``seed`` + k, the same for
every window and each window by itself, so that neither order nor batch can change a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd

from segpipe.config.card import Card, load_card
from segpipe.models.base import Network
from segpipe.models.card_checks import only_arguments
from segpipe.models.network import TorchNetwork, activate, at_resolution
from segpipe.models.plugins import provider_spec
from segpipe.models.registry import build_network, check_card

ARGUMENTS = ("cards", "card", "dropout", "seed")


@dataclass
class Member:
    """A network, and what its card says of its answer."""

    card: Card
    network: Network

    def probabilities(self, batch: torch.Tensor) -> torch.Tensor:
        """(n, k, …) float32 on the batch's device, at its resolution."""
        scores = self.network(batch.to(self.network.device)).to(batch.device)
        scores = at_resolution(scores.float(), batch, self.card.output_channels, self.card.name)
        return activate(scores, self.card.output.activation)


@dataclass
class MeanNetwork:
    """The mean of several members' probabilities."""

    members: Sequence[Member]
    device: torch.device

    @property
    def parameters(self) -> int | None:
        """Numbers learned in training, of all members; None where a file does not tell."""
        counts = [member.network.parameters for member in self.members]
        return None if None in counts else sum(count or 0 for count in counts)

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean probabilities (n, k, …), added in the members' order."""
        total = self.members[0].probabilities(batch)
        for member in self.members[1:]:
            total = total + member.probabilities(batch)
        return total / len(self.members)


@dataclass
class DropoutNetwork:
    """The mean of one member's probabilities over passes with dropout active."""

    member: Member
    device: torch.device
    passes: int
    seed: int

    @property
    def parameters(self) -> int | None:
        """Numbers learned in training."""
        return self.member.network.parameters

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean probabilities (n, k, …); one window at a time, for masks follow a batch's shape."""
        return torch.cat([self._window(window) for window in batch.split(1)])

    def _window(self, window: torch.Tensor) -> torch.Tensor:
        devices = [self.device] if self.device.type == "cuda" else []
        passes = []
        for number in range(self.passes):
            with torch.random.fork_rng(devices):
                torch.manual_seed(self.seed + number)
                passes.append(self.member.probabilities(window))
        return torch.stack(passes).mean(0)


def check(card: Card) -> None:
    """Whether the members can run, and agree with one another.

    Raises:
        RequestError: names the member and the field.
    """
    _check_members(card)
    _dropout_passes(card)
    for member in members(card):
        check_card(member)


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The members' networks, each on the device.

    Raises:
        RequestError: as `check`; or a member that is to drop has no dropout layers.
    """
    _check_members(card)
    passes, seed = _dropout_passes(card)
    averaged = [Member(found, _network(found, device, threads)) for found in members(card)]
    if not passes:
        return MeanNetwork(averaged, device)
    (member,) = averaged
    _activate_dropout(card, member.network)
    return DropoutNetwork(member, device, passes, seed)


def _network(card: Card, device: torch.device, threads: int) -> Network:
    network = build_network(card, device, threads)
    assert callable(network)  # semantic: `_check_members` saw to it
    return network


def _activate_dropout(card: Card, network: Network) -> None:
    """Only layers of dropout as in training; normalisation stays as in prediction."""
    layers = network.module.modules() if isinstance(network, TorchNetwork) else ()
    dropping = [layer for layer in layers if isinstance(layer, _DropoutNd) and layer.p > 0]
    if not dropping:
        raise card.error(
            "arguments.dropout", "its member has no dropout layers; valid: a PyTorch network that has"
        )
    for layer in dropping:
        layer.train()


def members(card: Card) -> list[Card]:
    """The cards of an ensemble, in the order given: of ``cards``, or the one of ``card``.

    Raises:
        RequestError: none or both are given, a file is wrong, or a member is an ensemble itself.
    """
    only_arguments(card, ARGUMENTS)
    cards, one = card.arguments.get("cards"), card.arguments.get("card")
    paths = [one] if cards is None else cards
    if (cards is None) == (one is None) or not isinstance(paths, list) or not paths:
        raise card.error(
            "arguments", "valid: `cards`, a list of model cards, or `card` with `dropout`, one member"
        )
    found = []
    for path in paths:
        if not isinstance(path, str):
            raise card.error("arguments.cards", f"found {path!r}; valid: paths relative to this card")
        member = load_card(card.folder / path)
        if provider_spec(member).composite:
            raise card.error("arguments.cards", f"{path} is an ensemble; list its members instead")
        found.append(member)
    return found


def _check_members(card: Card) -> None:
    """Whether members and ensemble see the same input and name the same classes.

    Raises:
        RequestError: names the member and the field, what it has and what the ensemble has.
    """
    if card.output.activation != "none" or card.output.kind != "semantic":
        raise card.error(
            "output", "an ensemble's answer is a mean of probabilities: valid: activation none, semantic"
        )
    for member in members(card):
        for field, found, wanted in _in_common(member, card):
            if found != wanted:
                raise card.error(field, f"found {wanted}; its member {member.name} has {found}")
        if member.roi is not None:
            raise card.error("arguments.cards", f"{member.name} has a roi; give that to the ensemble")
        if card.window.stride % member.window.stride:
            raise card.error(
                "window.stride",
                f"found {card.window.stride}; {member.name} has {member.window.stride}: valid: a multiple",
            )
        rigid = (member.window.fixed, member.window_shape)
        if member.window.fixed and rigid != (card.window.fixed, card.window_shape):
            raise card.error(
                "window", f"{member.name} takes {list(member.window_shape or ())} only: give that, fixed"
            )


def _in_common(member: Card, card: Card) -> list[tuple[str, Any, Any]]:
    """Field, the member's value and the ensemble's, of all that must be equal."""
    fields = ("bands", "orientation", "spacing", "image_resampling", "normalisation")
    pairs = [(f"input.{f}", getattr(member.input, f), getattr(card.input, f)) for f in fields]
    return [
        ("kind", member.kind, card.kind),
        ("output.kind", member.output.kind, "semantic"),
        *pairs,
        ("window.padding", member.window.padding, card.window.padding),
        ("classes", list(member.values), list(card.values)),
    ]


def _dropout_passes(card: Card) -> tuple[int, int]:
    """Passes with dropout active, and the seed of the first; (0, 0) where none are asked for.

    Raises:
        RequestError: no whole numbers, or several members.
    """
    passes, seed = card.arguments.get("dropout"), card.arguments.get("seed", 0)
    if passes is None and "card" not in card.arguments and "seed" not in card.arguments:
        return 0, 0
    if "card" not in card.arguments:
        raise card.error("arguments.dropout", "goes with `card`, one member, and not with `cards`")
    for name, value, least in (("dropout", passes, 2), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise card.error(f"arguments.{name}", f"found {value!r}; valid: a whole number from {least}")
    assert isinstance(passes, int)
    return passes, int(seed)
