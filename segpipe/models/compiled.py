"""torch.compile: a network's own machine code, made at its first window."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

import torch
from torch._dynamo.exc import TorchDynamoException

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.network import Network, TorchNetwork

COMPILERS = ("g++", "clang++", "c++")


@dataclass
class CompiledNetwork(TorchNetwork):
    """A network whose module went through torch.compile; takes windows of one shape."""

    name: str = ""
    """Of the card, for messages."""

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Raw scores.

        Raises:
            RequestError: the compiler cannot cope with the network.
        """
        try:
            return super().__call__(batch)
        except TorchDynamoException as error:
            reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise RequestError(
                f"compute.compile: torch.compile cannot compile {self.name} ({reason}); use compile: false"
            ) from error


def compiled(card: Card, network: Network) -> Network:
    """The network compiled for windows of one shape.

    Bits differ from those of the plain network, so this is part of a prediction's key.

    Raises:
        RequestError: no PyTorch network, no fixed window, or no C++ compiler here.
    """
    if not isinstance(network, TorchNetwork):
        raise RequestError(
            f"compute.compile: {card.name} ({card.provider}) is no PyTorch network; use compile: false"
        )
    if card.window_shape is None:
        # Each scene's shape would be compiled anew, and after eight torch would quietly stop compiling.
        raise RequestError(
            f"compute.compile: {card.name} takes whole scenes of any shape; use compile: false"
        )
    wanted = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((wanted,) if wanted else COMPILERS)):
        raise RequestError(
            f"compute.compile: no C++ compiler here (looked for {wanted or ', '.join(COMPILERS)}); "
            "install one, e.g. g++, or use compile: false"
        )
    module = torch.compile(network.module, dynamic=False)
    assert isinstance(module, torch.nn.Module)
    return CompiledNetwork(module, network.device, network.channels_last, card.name)
