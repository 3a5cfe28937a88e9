"""Several models as one: the mean of their probabilities. Or one model several times, with dropout.

``arguments``: ``cards`` (a list, relative to this card), or ``card``, ``dropout`` (passes) and ``seed``:
Monte-Carlo dropout (Gal and Ghahramani, ICML 2016). Pass k draws its masks from ``seed`` + k, the same for
every window and each window by itself, so that neither order nor batch can change a bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.modules.dropout import _DropoutNd

from segpipe.config.card import Card, card_error
from segpipe.models.ensemble_members import check_members, dropout_passes, member_cards
from segpipe.models.network import Network, TorchNetwork, at_resolution, output_channels
from segpipe.models.outputs import activate
from segpipe.models.registry import build_network, check_card


@dataclass
class Member:
    """A network, and what its card says of its answer."""

    card: Card
    network: Network

    def probabilities(self, batch: torch.Tensor) -> torch.Tensor:
        """(n, k, …) float32 on the batch's device, at its resolution."""
        scores = self.network(batch.to(self.network.device)).to(batch.device)
        scores = at_resolution(scores.float(), batch, output_channels(self.card), self.card.name)
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
    check_members(card)
    dropout_passes(card)
    for member in member_cards(card):
        check_card(member)


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The members' networks, each on the device.

    Raises:
        RequestError: as `check`; or a member that is to drop has no dropout layers.
    """
    check_members(card)
    passes, seed = dropout_passes(card)
    members = [Member(found, _network(found, device, threads)) for found in member_cards(card)]
    if not passes:
        return MeanNetwork(members, device)
    (member,) = members
    _activate_dropout(card, member.network)
    return DropoutNetwork(member, device, passes, seed)


def _network(card: Card, device: torch.device, threads: int) -> Network:
    network = build_network(card, device, threads)
    assert callable(network)  # semantic: `check_members` saw to it
    return network


def _activate_dropout(card: Card, network: Network) -> None:
    """Only layers of dropout as in training; normalisation stays as in prediction."""
    layers = network.module.modules() if isinstance(network, TorchNetwork) else ()
    dropping = [layer for layer in layers if isinstance(layer, _DropoutNd) and layer.p > 0]
    if not dropping:
        raise card_error(
            card, "arguments.dropout", "its member has no dropout layers; valid: a PyTorch network that has"
        )
    for layer in dropping:
        layer.train()
