"""TorchScript: a program in a file, run only when the card says so."""

from __future__ import annotations

import warnings

import torch

from segpipe.config.card import Card
from segpipe.models.base import Network
from segpipe.models.card_checks import only_arguments
from segpipe.models.network import TorchNetwork
from segpipe.models.weights import resolve_weights


class _Plain(torch.nn.Module):
    """Runs the program as written: the profiling optimiser could change bits after a few passes."""

    def __init__(self, program: torch.nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            scores: torch.Tensor = self.program(batch)
        return scores


def check(card: Card) -> None:
    """Whether the card allows it and has no arguments, which the file could not take.

    Raises:
        RequestError: it does not.
    """
    if not card.allow_torchscript:
        raise card.error(
            "allow_torchscript",
            "provider torchscript runs the file as a program: set `allow_torchscript: true` if you trust its "
            "origin",
        )
    only_arguments(card, ())


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The program of the card's weights file.

    Raises:
        RequestError: the card does not allow it, or the file is no TorchScript.
    """
    check(card)
    path = resolve_weights(card)
    try:
        with warnings.catch_warnings():
            # Known: torch.export follows it. Published models still come this way.
            warnings.filterwarnings("ignore", message=r"`torch\.jit\.load` is deprecated")
            program = torch.jit.load(str(path), map_location=device)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise card.error("weights", f"{path} is not readable TorchScript ({reason})") from error
    return TorchNetwork(_Plain(program), device)
