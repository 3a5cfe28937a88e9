"""``torch.export`` programs (.pt2): a graph of ATen operators, checked by `pt2` before it is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from segpipe.config.card import Card, card_error
from segpipe.errors import RequestError
from segpipe.models.card_checks import only_arguments
from segpipe.models.network import Network, output_channels
from segpipe.models.providers.pt2 import UnsafeProgramError, sanitised
from segpipe.models.weights import resolve_weights

_ANY = 2**31
"""A limit from here on is none."""


@dataclass(frozen=True)
class Dimension:
    """What a program takes along one axis: multiples of ``factor`` from ``low`` to ``high``."""

    low: int
    high: int | None
    """None: any number."""
    factor: int = 1

    def fits(self, n: int) -> bool:
        """Whether the program takes n elements."""
        return self.low <= n and (self.high is None or n <= self.high) and n % self.factor == 0

    def __str__(self) -> str:
        if self.low == self.high:
            return str(self.low)
        top = f" to {self.high}" if self.high is not None else ""
        return f"{self.low}{top}" + (f" in multiples of {self.factor}" if self.factor > 1 else "")


@dataclass
class ExportedNetwork:
    """A program, and how many windows it takes at once."""

    program: torch.nn.Module
    device: torch.device
    batch: Dimension
    parameters: int | None

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Raw scores, as many windows as were given whatever batch the program is fixed to."""
        step = min(len(batch), self.batch.high or len(batch))
        parts = [self._run(batch[i : i + step]) for i in range(0, len(batch), step)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _run(self, windows: torch.Tensor) -> torch.Tensor:
        count = len(windows)
        if count < self.batch.low:
            windows = functional.pad(windows, (0, 0) * (windows.ndim - 1) + (0, self.batch.low - count))
        try:
            scores: torch.Tensor = self.program(windows)
        except RuntimeError as error:
            if not str(error).startswith("Expected input"):
                raise
            raise RequestError(
                f"window {tuple(windows.shape)}: the exported program says: {error}"
            ) from error
        return scores[:count]


def check(card: Card) -> None:
    """Whether the file is a plain program and fits the card.

    Raises:
        RequestError: it is not, or takes other bands or windows than the card's.
    """
    only_arguments(card, ())
    _read(card, resolve_weights(card))


def build(card: Card, device: torch.device, threads: int) -> Network:
    """The program on its device; it is in the mode in which it was exported.

    Raises:
        RequestError: as `check`.
    """
    only_arguments(card, ())
    program, batch = _read(card, resolve_weights(card))
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    module = program.module()
    count = sum(p.numel() for p in module.parameters())
    return ExportedNetwork(module.requires_grad_(False), device, batch, count)


def _read(card: Card, path: Path) -> tuple[torch.export.ExportedProgram, Dimension]:
    try:
        program = torch.export.load(sanitised(path.read_bytes()))
    except UnsafeProgramError as error:
        raise card_error(card, "weights", f"{path}: {error}") from error
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise card_error(card, "weights", f"{path}: this torch cannot load it ({reason})") from error
    (entry,) = program.graph_signature.user_inputs
    (out,) = program.graph_signature.user_outputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    taken = [_dimension(n, program) for n in values[str(entry)].shape]
    given = [_dimension(n, program) for n in values[str(out)].shape]
    _check_shape(card, taken)
    if len(given) > 1 and not given[1].fits(output_channels(card)):
        raise card_error(
            card,
            "classes",
            f"the card needs {output_channels(card)} output channels; the file answers with {given[1]}",
        )
    return program, taken[0]


def _dimension(size: Any, program: torch.export.ExportedProgram) -> Dimension:
    """A size of the graph: a number, or a multiple of a symbol that has a range."""
    if isinstance(size, int):
        return Dimension(size, size)
    expression = size.node.expr
    factor, symbol = expression.as_coeff_Mul()
    ranges = program.range_constraints
    if not (symbol.is_Symbol and factor.is_Integer) or not {expression, symbol} & ranges.keys():
        return Dimension(1, None)
    # The range of the product itself where there is one, else that of its symbol.
    scale, limits = (1, ranges[expression]) if expression in ranges else (int(factor), ranges[symbol])
    high = int(limits.upper) * scale if limits.upper.is_Integer and limits.upper < _ANY else None
    return Dimension(max(1, int(limits.lower) * scale), high, int(factor))


def _check_shape(card: Card, taken: list[Dimension]) -> None:
    if len(taken) != card.ndim + 2:
        raise card_error(
            card, "kind", f"a {card.kind} model takes {card.ndim + 2} axes; the file's input has {len(taken)}"
        )
    if not taken[1].fits(card.channels):
        raise card_error(card, "input.bands", f"found {card.channels}; the file takes {taken[1]} channels")
    window, whole = card.window_shape, card.window.size == "whole"
    sizes = ", ".join(map(str, taken[2:]))
    if window is not None and not all(d.fits(n) for d, n in zip(taken[2:], window, strict=True)):
        raise card_error(card, "window.size", f"found {list(window)}; the file takes {sizes}")
    rigid = any(d.low == d.high for d in taken[2:])
    if rigid and not (card.window.fixed or (whole and window is not None)):
        raise card_error(
            card, "window", f"the file takes {sizes} only; give that as `size` with `fixed: true`"
        )
    if any(card.window.stride % d.factor for d in taken[2:]) and not (card.window.fixed or whole or rigid):
        raise card_error(card, "window.stride", f"found {card.window.stride}; the file takes {sizes}")
