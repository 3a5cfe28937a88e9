"""From a PyTorch network to one ONNX file that answers the same, in float32 or in int8 for CPUs."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import yaml

from segpipe.config.card import Card, load_card
from segpipe.convert.parity import Parity, compare, example_shape, noise_windows
from segpipe.errors import RequestError
from segpipe.models.network import TorchNetwork
from segpipe.models.registry import build_network, check_card, load_model
from segpipe.models.weights import resolve_weights

if TYPE_CHECKING:
    import onnx

OPSET = 18
"""The oldest that torch's exporter writes: the most runtimes read it."""
MOST_DIFFERING = 1e-4
"""Share of elements that may change class: float32 sums in another order turn near ties only."""
LARGEST = 1e-3
"""Of a difference of probabilities."""


def export_onnx(card: Card, folder: str | Path, windows: Sequence[torch.Tensor] = ()) -> Path:
    """Write a PyTorch model as an ONNX file with a card of its own.

    Batch and space stay open, space in multiples of the card's stride; where the network does not
    allow that, the card's window is fixed.

    Args:
        card: of a model that is a PyTorch module here.
        folder: of the new card and its file.
        windows: real ones, normalised, (c, …) each: on these and on noise, the file's answers are held
            against the network's.

    Returns:
        The new card's path.

    Raises:
        RequestError: a package is missing, the network cannot be written as ONNX, or the file
            answers otherwise than the network.
    """
    check_card(card)
    graph, open_space = onnx_graph(card)
    parity = check_graph(card, graph, open_space, [*noise_windows(card), *windows])
    real = f" and {len(windows)} of scenes" if windows else ""
    found = f"This ONNX file against the PyTorch model, on windows of noise{real}: {parity}."
    scores, limits = joined(card.scores, found), card.limits
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
    with TemporaryDirectory() as name:
        path = publish(card, graph, Path(name), "onnx", **window_field(card, open_space))
        after = load_model(load_card(path), "cpu", 1, "fp32")
        parity = compare(card, load_model(card, "cpu", 1, "fp32"), after, windows)
    if not (parity.share <= MOST_DIFFERING and parity.largest <= LARGEST):
        raise RequestError(
            f"{card.name}: the ONNX file answers otherwise than the network: {parity}; valid: a share of "
            f"{MOST_DIFFERING:g} and {LARGEST:g} at most. Nothing was written"
        )
    return parity


def onnx_graph(card: Card) -> tuple[onnx.ModelProto, bool]:
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
        raise card.error("provider", f"{card.provider} is no PyTorch network: nothing to export")
    example = torch.zeros(2, card.channels, *example_shape(card))
    program, open_space = _traced(card, _Exportable(network), example)
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


def _traced(card: Card, module: torch.nn.Module, example: torch.Tensor) -> tuple[Any, bool]:
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
                    module.eval(), (example,), dynamo=True, dynamic_shapes=({**shapes},), opset_version=OPSET,
                    input_names=["image"], output_names=["scores"], verbose=False,
                )  # fmt: skip
            return program, open_space
        except (torch.onnx.OnnxExporterError, NotImplementedError, ValueError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            reason = lines[-1] if lines else type(error).__name__
    raise card.error("architecture", f"{type(module).__name__} cannot be written as ONNX ({reason})")


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


def publish(card: Card, graph: onnx.ModelProto, folder: Path, kind: str, **fields: Any) -> Path:
    """Write ``NAME-KIND.onnx`` and its card into a folder.

    Args:
        card: of the model that was converted.
        graph: the converted model.
        folder: made where it is not there.
        kind: ends the new name, e.g. ``int8``.
        fields: of the card that are to differ.

    Returns:
        The new card's path.

    Raises:
        RequestError: the name with its ending is too long for a card.
    """
    import onnx

    folder.mkdir(parents=True, exist_ok=True)
    name = f"{card.name}-{kind}"
    data = card.model_dump(mode="json", exclude_defaults=True)
    data.pop("architecture", None)
    data.pop("arguments", None)
    data |= {"name": name, "provider": "onnx", "weights": f"{name}.onnx", **fields}
    if card.roi is not None:
        data["roi"]["card"] = os.path.relpath(card.folder / card.roi.card, folder.resolve())
    with TemporaryDirectory(dir=folder) as draft:
        weights, path = Path(draft) / f"{name}.onnx", Path(draft) / f"{name}.yaml"
        onnx.save(graph, str(weights))
        _write(path, data)
        load_card(path)
        weights.replace(folder / weights.name)
        return path.replace(folder / path.name)


def add_scores(path: Path, text: str) -> None:
    """Put a sentence at the end of what a card says of how good its model is."""
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    data["scores"] = joined(data.get("scores", ""), text)
    _write(path, data)


def joined(before: str, after: str) -> str:
    """Two texts of a card as one; either may be empty."""
    return " ".join(part for part in (before.strip(), after.strip()) if part)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100), encoding="utf-8")


CALIBRATION = 16
"""Windows of noise where no real ones are given."""
METHODS = ("static", "dynamic")
"""static: activations' ranges are learned once, from windows. dynamic: anew in each pass."""


def quantise(
    card: Card, folder: str | Path, method: str = "static", windows: Sequence[torch.Tensor] = ()
) -> Path:
    """Write a model in 8-bit whole numbers, as an ONNX file with a card of its own.

    Static: QDQ with signed 8 bits, weights per channel, ranges by the extremes of `windows`. Dynamic:
    weights per tensor, since onnxruntime's whole-number convolution takes no others.

    Args:
        card: of a PyTorch model, or of an ONNX file in float32.
        folder: of the new card and its file.
        method: one of `METHODS`.
        windows: to calibrate with and to compare on, normalised, (c, …) each; empty: noise.

    Returns:
        The new card's path; the card says how far the answers moved.

    Raises:
        RequestError: as `export_onnx`, or onnxruntime cannot quantise the graph.
    """
    needs("onnx")
    check_card(card)
    shown = windows or noise_windows(card, CALIBRATION)
    graph, fields = _float_graph(card, shown)
    small = _quantised(card, graph, method, shown)
    kind = "int8" if method == "static" else "int8-dynamic"
    what = f"{len(shown)} windows of {'scenes' if windows else 'noise'}"
    with TemporaryDirectory() as name:
        draft = load_card(publish(card, small, Path(name), kind, **fields))
        before = load_model(card, "cpu", 1, "fp32")
        parity = compare(card, before, load_model(draft, "cpu", 1, "fp32"), shown)
    if parity.largest != parity.largest:
        raise RequestError(f"{card.name}: in int8 it answers with NaN; nothing was written")
    scores = f"Of the model before int8: {card.scores.strip()}" if card.scores else ""
    found = f"In int8 ({method}), against it on {what}: {parity}."
    limits = "int8 is for CPUs: on those without VNNI instructions its sums may saturate."
    if method == "static":
        limits = f"Ranges of values were learned from {what}; others are cut off. {limits}"
    fields |= {"scores": joined(scores, found), "limits": joined(card.limits, limits)}
    return publish(card, small, Path(folder), kind, **fields)


def _float_graph(card: Card, windows: Sequence[torch.Tensor]) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The model in float32 as a graph, and what its card must say beside."""
    import onnx

    if card.weights and (path := resolve_weights(card)).suffix == ".onnx":
        return onnx.load(str(path)), {"arguments": card.arguments}
    graph, open_space = onnx_graph(card)
    check_graph(card, graph, open_space, windows)
    return graph, window_field(card, open_space)


def _quantised(
    card: Card, graph: onnx.ModelProto, method: str, windows: Sequence[torch.Tensor]
) -> onnx.ModelProto:
    """The graph in int8."""
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as name:
        folder = Path(name)
        ready, small = str(folder / "ready.onnx"), str(folder / "small.onnx")
        try:
            # Fuses batch norms into convolutions first, where it can: apart they would be rounded twice.
            quant_pre_process(graph, ready, skip_symbolic_shape=True)
            if method == "static":
                # One that could not be fused stays float32: onnxruntime has no whole-number form of it.
                norms = [n.name for n in onnx.load(ready).graph.node if n.op_type == "BatchNormalization"]
                reader = _Calibration(card, graph.graph.input[0].name, windows)
                quantize_static(
                    ready, small, reader, quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QInt8, weight_type=QuantType.QInt8,
                    nodes_to_exclude=norms,
                )  # fmt: skip
            else:
                quantize_dynamic(ready, small, weight_type=QuantType.QUInt8)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise RequestError(f"{card.name}: onnxruntime cannot quantise its graph ({reason})") from error
        return onnx.load(small)


class _Calibration:
    """Windows one by one, as onnxruntime's `CalibrationDataReader` wants them."""

    def __init__(self, card: Card, name: str, windows: Sequence[torch.Tensor]) -> None:
        self.name = str(card.arguments.get("input", name))
        self.nhwc = card.arguments.get("layout") == "nhwc"
        self.windows = iter(windows)

    def get_next(self) -> dict[str, Any] | None:
        """The next feed, or None at the end."""
        window = next(self.windows, None)
        if window is None:
            return None
        batch = window[None].movedim(1, -1) if self.nhwc else window[None]
        return {self.name: batch.contiguous().numpy()}
