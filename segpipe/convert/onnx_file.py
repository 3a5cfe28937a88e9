"""From a PyTorch network to one ONNX file that answers the same."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segpipe.config.card import Card, card_error, load_card
from segpipe.convert.cards import joined, publish
from segpipe.convert.parity import Parity, compare, example_shape, noise_windows
from segpipe.errors import RequestError
from segpipe.models.network import TorchNetwork
from segpipe.models.registry import build_network, check_card, load_model

if TYPE_CHECKING:
    import onnx

OPSET = 18
"""The oldest that torch's exporter writes: the most runtimes read it."""
MOST_DIFFERING = 1e-4
"""Share of elements that may change class: float32 sums in another order turn near ties only."""
LARGEST = 1e-3
"""Of a difference of probabilities."""


def export_onnx(
    card: Card,
    folder: str | Path,
    *,
    opset: int = OPSET,
    check: bool = True,
    windows: Sequence[torch.Tensor] = (),
) -> Path:
    """Write a PyTorch model as an ONNX file with a card of its own.

    Batch and space stay open, space in multiples of the card's stride; where the network does not
    allow that, the card's window is fixed.

    Args:
        card: of a model that is a PyTorch module here.
        folder: of the new card and its file.
        opset: version of ONNX's operators.
        check: hold the file's answers against the network's, for noise and for `windows`.
        windows: real ones, normalised, (c, …) each.

    Returns:
        The new card's path.

    Raises:
        RequestError: a package is missing, the network cannot be written as ONNX, or the file
            answers otherwise than the network.
    """
    check_card(card)
    graph, open_space = onnx_graph(card, opset)
    scores, limits = card.scores, card.limits
    if check:
        parity = check_graph(card, graph, open_space, [*noise_windows(card), *windows])
        real = f" and {len(windows)} of scenes" if windows else ""
        scores = joined(
            scores, f"This ONNX file against the PyTorch model, on windows of noise{real}: {parity}."
        )
    if not open_space:
        limits = joined(limits, "As ONNX its window is fixed: smaller scenes are padded up to it.")
    return publish(
        card, graph, Path(folder), "onnx", scores=scores, limits=limits, **window_field(card, open_space)
    )


def check_graph(
    card: Card, graph: onnx.ModelProto, open_space: bool, windows: Sequence[torch.Tensor]
) -> Parity:
    """The graph's answers against the network's, in float32 on one thread.

    Raises:
        RequestError: they differ by more than rounding does; says by how much.
    """
    with tempfile.TemporaryDirectory() as name:
        path = publish(card, graph, Path(name), "onnx", **window_field(card, open_space))
        after = load_model(load_card(path), "cpu", 1, "fp32")
        parity = compare(card, load_model(card, "cpu", 1, "fp32"), after, windows)
    if not (parity.share <= MOST_DIFFERING and parity.largest <= LARGEST):
        raise RequestError(
            f"{card.name}: the ONNX file answers otherwise than the network: {parity}; valid: a share of "
            f"{MOST_DIFFERING:g} and {LARGEST:g} at most. Nothing was written"
        )
    return parity


def onnx_graph(card: Card, opset: int = OPSET) -> tuple[onnx.ModelProto, bool]:
    """A card's network as a graph from ``image`` (n, c, …) to ``scores`` (n, k, …).

    Returns:
        The graph, and whether it takes windows of any size.

    Raises:
        RequestError: as `export_onnx`.
    """
    needs("onnx", "onnxscript")
    import onnx

    network = build_network(card, torch.device("cpu"), 1)
    if not isinstance(network, TorchNetwork):
        raise card_error(card, "provider", f"{card.provider} is no PyTorch network: nothing to export")
    example = torch.zeros(2, card.channels, *example_shape(card))
    program, open_space = _traced(card, _Exportable(network), example, opset)
    graph: onnx.ModelProto = program.model_proto
    # Where in whose files each operator came from: paths of this machine.
    for node in [*graph.graph.node, *(n for f in graph.functions for n in f.node)]:
        del node.metadata_props[:]
    onnx.checker.check_model(graph)
    return graph, open_space


class _Exportable(torch.nn.Module):
    """A network as segpipe calls it, with the memory layout left to the runtime."""

    def __init__(self, network: TorchNetwork) -> None:
        super().__init__()
        self.module = network.module
        self.network = TorchNetwork(network.module, network.device)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.network(batch)


def _traced(card: Card, module: torch.nn.Module, example: torch.Tensor, opset: int) -> tuple[Any, bool]:
    """The exporter's program with as much left open as the network allows."""
    dim, stride, axes = torch.export.Dim, card.window.stride, range(2, example.ndim)
    batch = {0: dim("n")}
    space = {a: stride * dim(f"s{a}") if stride > 1 else dim(f"s{a}") for a in axes}
    whole = card.window.size == "whole" and card.window.shape is None
    reason = ""
    for shapes, open_space in (({**batch, **space}, True), (batch, False), ({}, False)):
        if whole and not open_space:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on types that torch's own modules will lose one day
                program = torch.onnx.export(
                    module.eval(), (example,), dynamo=True, dynamic_shapes=({**shapes},), opset_version=opset,
                    input_names=["image"], output_names=["scores"], verbose=False,
                )  # fmt: skip
            return program, open_space
        except (torch.onnx.OnnxExporterError, NotImplementedError, ValueError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
    raise card_error(card, "architecture", f"{type(module).__name__} cannot be written as ONNX ({reason})")


def window_field(card: Card, open_space: bool) -> dict[str, Any]:
    """What a converted card must say of its window: nothing new where any size is taken."""
    if open_space:
        return {}
    window = card.window.model_dump(mode="json", exclude_defaults=True)
    return {"window": {**window, "size": card.window.size, "fixed": True}}


def needs(*packages: str) -> None:
    """Refuse where a package of the extra ``export`` is missing.

    Raises:
        RequestError: names it.
    """
    from importlib.util import find_spec

    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RequestError(f"an export to ONNX needs the package {missing[0]}: pip install 'segpipe[export]'")
