"""int8 on the CPU with onnxruntime: weights, and with calibration activations, as 8-bit whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from segpipe.config.card import Card, load_card
from segpipe.convert.cards import joined, publish
from segpipe.convert.onnx_file import check_graph, needs, onnx_graph, window_field
from segpipe.convert.parity import compare, noise_windows
from segpipe.errors import RequestError
from segpipe.models.registry import check_card, load_model
from segpipe.models.weights import resolve_weights

if TYPE_CHECKING:
    import onnx

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
