"""ONNX through onnxruntime: a graph of known operators, arrays in and out on the CPU."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state as state

from segpipe.config.card import Card
from segpipe.models.base import Network
from segpipe.models.card_checks import only_arguments
from segpipe.models.network import other_channels
from segpipe.models.providers import onnx_objects
from segpipe.models.providers.onnx_objects import OnnxObjects
from segpipe.models.weights import resolve_weights

logger = logging.getLogger(__name__)

ARGUMENTS = ("execution", "input", "layout", "output")
LAYOUTS = ("nchw", "nhwc")
EXECUTION = {
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu and TensorRT"),
}
"""Who computes instead of onnxruntime itself, by the name in a card, and what to install for it."""
DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}

_UNREADABLE = (
    *(state.EPFail, state.Fail, state.InvalidArgument, state.InvalidGraph),
    *(state.InvalidProtobuf, state.NotImplemented, state.RuntimeException, UnicodeDecodeError),
)
"""onnxruntime's errors have no common base but Exception."""


@dataclass
class OnnxNetwork:
    """A session and how to feed it."""

    session: Any
    input: str
    output: str
    dtype: np.dtype[Any]
    batch: int | None
    """The only batch size the file takes, or None: any."""
    channels_last: bool
    device: torch.device
    """Where batches are expected: the CPU, also when the session computes on a GPU."""
    parameters: int | None = None

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Raw scores, as many windows as were given whatever batch the file is fixed to."""
        windows = batch.numpy().astype(self.dtype, copy=False)
        if self.channels_last:
            windows = np.moveaxis(windows, 1, -1)
        step = self.batch or len(windows)
        parts = [self._run(windows[i : i + step], step) for i in range(0, len(windows), step)]
        scores = np.concatenate(parts) if len(parts) > 1 else parts[0]
        return torch.from_numpy(np.moveaxis(scores, -1, 1) if self.channels_last else scores)

    def _run(self, windows: np.ndarray, step: int) -> np.ndarray:
        count = len(windows)
        if count < step:
            padding = [(0, step - count)] + [(0, 0)] * (windows.ndim - 1)
            windows = np.pad(windows, padding)
        feed = {self.input: np.ascontiguousarray(windows)}
        scores: np.ndarray = self.session.run([self.output], feed)[0]
        return scores[:count]


def without_cuda() -> str:
    """This onnxruntime, where it has no CUDA."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return ""
    return f"onnxruntime {onnxruntime.__version__} (onnxruntime-gpu would)"


def check(card: Card) -> None:
    """Whether the arguments are known, and what they ask for is installed.

    Raises:
        RequestError: one is not, the layout is neither nchw nor nhwc, or onnxruntime here lacks what
            `execution` names.
    """
    if card.output.kind != "semantic":
        onnx_objects.check(card)
        more = onnx_objects.ARGUMENTS[card.arguments["decode"]]
        only_arguments(card, {*ARGUMENTS, *more} - {"output"})
    else:
        only_arguments(card, ARGUMENTS)
    layout = card.arguments.get("layout", "nchw")
    if layout not in LAYOUTS:
        raise card.error("arguments.layout", f"found {layout!r}; valid: {' or '.join(LAYOUTS)}")
    wanted = card.arguments.get("execution")
    if wanted is None:
        return
    if wanted not in EXECUTION:
        valid = ", ".join(EXECUTION)
        raise card.error("arguments.execution", f"found {wanted!r}; valid: {valid}, or leave it out")
    provider, package = EXECUTION[wanted]
    if provider not in onnxruntime.get_available_providers():
        raise card.error(
            "arguments.execution",
            f"found {wanted!r}, which onnxruntime {onnxruntime.__version__} lacks here; install {package}, "
            "or leave it out",
        )


def build(card: Card, device: torch.device, threads: int) -> Network | OnnxObjects:
    """A session on the card's file; for objects, with the decoder that the card names.

    Raises:
        RequestError: the file is damaged, or takes other bands or another window than the card's.
    """
    check(card)
    session = _session(card, device, threads)
    source = _pick(card, "input", session.get_inputs())
    if source.type not in DTYPES:
        raise card.error("weights", f"input {source.name!r} is {source.type}; valid: float or float16")
    channels_last = card.arguments.get("layout") == "nhwc"
    _check_shape(card, source.shape, channels_last)
    if card.output.kind != "semantic":
        onnx_objects.check_outputs(card, session.get_outputs())
        return OnnxObjects(
            session, source.name, DTYPES[source.type], channels_last, card, torch.device("cpu")
        )
    target = _pick(card, "output", session.get_outputs())
    _check_outputs(card, target.shape, channels_last)
    batch = source.shape[0] if isinstance(source.shape[0], int) else None
    return OnnxNetwork(
        session=session,
        input=source.name,
        output=target.name,
        dtype=DTYPES[source.type],
        batch=batch,
        channels_last=channels_last,
        device=torch.device("cpu"),
    )


def _session(card: Card, device: torch.device, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    path = resolve_weights(card)
    try:
        # From bytes, not from the path: a file that points to others beside it is refused, so
        # that what was hashed is all that is read.
        session = onnxruntime.InferenceSession(
            path.read_bytes(), sess_options=options, providers=_providers(card, device, threads)
        )
        for end in (*session.get_inputs(), *session.get_outputs()):
            str((end.name, end.shape))  # whose names may be no text
        return session
    except _UNREADABLE as error:
        reason = str(error).strip().partition("\n")[0]
        raise card.error(
            "weights",
            f"{path} cannot be loaded by onnxruntime ({reason}); valid: one whole ONNX file "
            "without external data",
        ) from error


def _providers(card: Card, device: torch.device, threads: int) -> list[Any]:
    wanted = card.arguments.get("execution")
    if wanted == "openvino":
        options = {"device_type": "CPU", "precision": "FP32", "num_of_threads": str(threads)}
        return [(EXECUTION[wanted][0], options), "CPUExecutionProvider"]
    if wanted == "tensorrt":
        return [(EXECUTION[wanted][0], {"device_id": device.index or 0}), "CPUExecutionProvider"]
    if device.type != "cuda":
        return ["CPUExecutionProvider"]
    if without_cuda():
        logger.warning(
            "%s: onnxruntime has no CUDA here (install onnxruntime-gpu): the model runs on the CPU", card.name
        )
        return ["CPUExecutionProvider"]
    # Fixed algorithms and whole float32: the default search and TF32 change bits between runs.
    settings = {"device_id": device.index or 0, "cudnn_conv_algo_search": "DEFAULT", "use_tf32": 0}
    return [("CUDAExecutionProvider", settings), "CPUExecutionProvider"]


def _pick(card: Card, kind: str, candidates: list[Any]) -> Any:
    """The input or output that the card names, or the file's first."""
    name = card.arguments.get(kind)
    for candidate in candidates:
        if name is None or candidate.name == name:
            return candidate
    names = ", ".join(candidate.name for candidate in candidates)
    raise card.error(f"arguments.{kind}", f"found {name!r}; the file has: {names}")


def _check_shape(card: Card, shape: list[int | str | None], channels_last: bool) -> None:
    """Whether the file's fixed sizes are the card's."""
    if len(shape) != card.ndim + 2:
        raise card.error(
            "kind", f"a {card.kind} model takes {card.ndim + 2} axes; the file's input has {shape}"
        )
    channels, spatial = (shape[-1], shape[1:-1]) if channels_last else (shape[1], shape[2:])
    if isinstance(channels, int) and channels != card.channels:
        raise card.error("input.bands", f"found {card.channels}; the file takes {channels} channels")
    window = card.window_shape
    fixed = [n for n in spatial if isinstance(n, int)]
    if not fixed:
        return
    fits = window is not None and all(
        not isinstance(n, int) or n == w for n, w in zip(spatial, window, strict=True)
    )
    whole = card.window.size == "whole"
    if not fits or not (whole or card.window.fixed):
        raise card.error("window", f"the file takes {spatial} only; give that as `size` with `fixed: true`")


def _check_outputs(card: Card, shape: list[int | str | None], channels_last: bool) -> None:
    if len(shape) < 2:
        return
    channels = shape[-1] if channels_last else shape[1]
    if isinstance(channels, int) and channels != card.output_channels:
        raise other_channels(card, channels)
