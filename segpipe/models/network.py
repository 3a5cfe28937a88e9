"""What adapters share: weights filled in, scores made of outputs, ready and compiled models."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from segpipe.config.card import Card
from segpipe.errors import RequestError
from segpipe.models.base import MaskCandidates, Network, ObjectNetwork
from segpipe.models.weights import load_state, resolve_weights
from segpipe.objects.window import WindowObjects, resolve_instances, resolve_masks


def activate(out: torch.Tensor, activation: str) -> torch.Tensor:
    """Network output (n, k, …) as float32 probabilities of each class."""
    out = out.float()
    if activation == "softmax":
        return out.softmax(1)
    if activation == "sigmoid":
        foreground = out.sigmoid()
        return torch.cat([1 - foreground, foreground], 1)
    return out


def best_class(scores: torch.Tensor) -> torch.Tensor:
    """The first channel of the highest score, (n, k, …) → (n, …).

    By `max`, which also gives the first of equals: on a CPU `argmax` over this axis is not vectorised
    and took a third of a small network's time.
    """
    return scores.max(1).indices.to(torch.uint8 if scores.shape[1] <= 256 else torch.int32)


def all_finite(scores: torch.Tensor) -> torch.Tensor:
    """One boolean, in one pass without a copy: NaN and infinity reach the extremes."""
    return torch.stack(torch.aminmax(scores)).isfinite().all()


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TorchNetwork:
    """A PyTorch module on its device."""

    module: torch.nn.Module
    device: torch.device
    channels_last: bool = False
    """2D convolutions on CPU are up to four times faster with channels innermost in memory."""

    def __post_init__(self) -> None:
        self.module.eval().requires_grad_(False).to(self.device)
        if self.channels_last:
            self.module.to(memory_format=torch.channels_last)

    @property
    def parameters(self) -> int | None:
        """Numbers learned in training."""
        return sum(p.numel() for p in self.module.parameters())

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Raw scores; they may be at a lower resolution than the batch."""
        if self.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        scores = self.module(batch)
        if isinstance(scores, list | tuple) and len(scores) == 1:
            scores = scores[0]
        if not isinstance(scores, torch.Tensor):
            raise RequestError(
                f"{type(self.module).__name__} answers with a {type(scores).__name__}, one tensor "
                "of scores was expected; turn off its auxiliary outputs in `arguments`"
            )
        return scores


class OneOutput(torch.nn.Module):
    """One of the outputs that a library's network gives by name."""

    def __init__(self, network: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.network = network
        self._name = name

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """(n, k, y, x), at whatever resolution it comes."""
        scores = self.network(batch)[self._name]
        assert isinstance(scores, torch.Tensor)
        return scores


def other_channels(card: Card, found: object) -> RequestError:
    """What is said where a file answers with other channels than the card needs."""
    needed = card.output_channels
    return card.error("classes", f"the card needs {needed} output channels; the file answers with {found}")


def with_weights(
    card: Card, module: torch.nn.Module, device: torch.device, *, channels_last: bool = False
) -> TorchNetwork:
    """A module with the card's weights, on its device.

    Raises:
        RequestError: the weights do not fit the module.
    """
    fill(card, module, load_state(resolve_weights(card)))
    return TorchNetwork(module, device, channels_last)


def fill(card: Card, module: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy the weights into the module; every tensor must have its place and every place a tensor.

    Raises:
        RequestError: a name or shape does not fit; the first of each kind is named.
    """
    wanted = module.state_dict()
    # A tensor under two names (DynUNet's skip_layers) is stored once in safetensors.
    filled = {wanted[name].data_ptr() for name in state if name in wanted}
    missing = [
        name
        for name, tensor in wanted.items()
        if name not in state
        and tensor.data_ptr() not in filled
        # A counter of training steps: older checkpoints lack it, prediction does not read it.
        and not name.endswith("num_batches_tracked")
    ]
    unexpected = [name for name in state if name not in wanted]
    if missing or unexpected:
        raise card.error("weights", _mismatch(card, missing, unexpected))
    for name, tensor in state.items():
        if tensor.shape != wanted[name].shape:
            raise card.error(
                "weights",
                f"{name} is {tuple(tensor.shape)} in {card.weights}, and "
                f"{tuple(wanted[name].shape)} in {card.architecture}; "
                "`arguments`, `input.bands` or `classes` do not fit the file",
            )
    for name, _ in module.named_parameters():
        if name in state and not bool(torch.isfinite(state[name]).all()):
            raise card.error("weights", f"{name} in {card.weights} holds NaN or infinity")
    module.load_state_dict(dict(state), strict=False)


def _mismatch(card: Card, missing: list[str], unexpected: list[str]) -> str:
    found = []
    if missing:
        found.append(f"lacks {missing[0]} ({len(missing)} missing)")
    if unexpected:
        found.append(f"has {unexpected[0]} ({len(unexpected)} unexpected)")
    return (
        f"{card.weights} {' and '.join(found)} for {card.architecture}; "
        "`architecture` or `arguments` do not fit the file"
    )


class ReadyModel:
    """A network with its arithmetic, whose answer keeps the promises of `SegmentationModel`."""

    def __init__(self, card: Card, network: Network, precision: str, threads: int) -> None:
        self.device = network.device
        self._network = network
        self._name = card.name
        self._channels = card.output_channels
        self._precision = precision
        self._threads = threads

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        """Scores of a batch: float32, contiguous, (n, k, …) with the batch's spatial shape.

        Raises:
            RequestError: the network answers with another number of channels than the card has
                classes, or with a spatial shape that is no whole fraction of the input's.
        """
        with torch.inference_mode():
            with forward_pass(self.device, self._precision, self._threads):
                scores = self._network(batch)
            return at_resolution(scores.float(), batch, self._channels, self._name).contiguous()


class ReadyObjects:
    """An object network with its arithmetic, and the rules by which its masks compete."""

    def __init__(self, card: Card, network: ObjectNetwork, precision: str, threads: int) -> None:
        self.device = network.device
        self._network = network
        self._output = card.output
        self._precision = precision
        self._threads = threads
        self._rule = network.rule
        front = [c for c in card.classes if not c.background]
        self._things = [c.value for c in front if c.thing]
        self._stuff = [c.value for c in front if not c.thing]

    def objects(self, batch: torch.Tensor) -> list[WindowObjects]:
        """The objects of each window of a batch (n, c, …), normalised, on `device`.

        Background takes no part; nor, for instances, does stuff. On a CPU windows go through the network
        one by one, so that a window's place in its batch cannot change a bit.
        """
        parts = batch.split(1) if self.device.type == "cpu" else (batch,)
        with forward_pass(self.device, self._precision, self._threads):
            found = [window for part in parts for window in self._network.candidates(part)]
        return [self._resolved(window) for window in found]

    def _resolved(self, window: MaskCandidates) -> WindowObjects:
        output = self._output
        thresholds = {
            "score_threshold": output.score,
            "mask_threshold": output.mask,
            "overlap_threshold": output.overlap,
        }
        if self._output.kind == "panoptic":
            return resolve_masks(
                window.masks,
                window.classes,
                window.scores,
                **thresholds,
                things=self._things,
                stuff=self._stuff,
                rule=self._rule,
            )
        kept = np.isin(window.classes, self._things)
        return resolve_instances(window.masks[kept], window.classes[kept], window.scores[kept], **thresholds)


def at_resolution(scores: torch.Tensor, batch: torch.Tensor, channels: int, name: str) -> torch.Tensor:
    """Scores (n, k, …) at the batch's resolution: bi- or trilinear, half-pixel centres.

    Raises:
        RequestError: another number of channels or axes, or a shape that is no whole fraction.
    """
    wanted, found = batch.shape[2:], scores.shape[2:]
    if scores.ndim != batch.ndim or scores.shape[1] != channels:
        raise RequestError(
            f"{name}: classes: the network answers with shape {tuple(scores.shape)}; "
            f"{channels} channels and {len(wanted)} spatial axes were expected"
        )
    if wanted == found:
        return scores
    # A network with valid convolutions answers for a smaller *area*: never stretch that one.
    factor = -(-wanted[0] // found[0])
    if any(-(-n // factor) != k for n, k in zip(wanted, found, strict=True)):
        raise RequestError(
            f"{name}: window.size: a window of {tuple(wanted)} is answered with "
            f"{tuple(found)}, which is no whole fraction of it"
        )
    return enlarged(scores, wanted)


def enlarged(maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Maps (n, k, …), of which there may be none, at another size: bi- or trilinear, half-pixel centres."""
    if not maps.shape[1]:
        return maps.new_zeros(*maps.shape[:2], *size)
    if maps.shape[2:] == tuple(size):
        return maps
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return functional.interpolate(maps, size=tuple(size), mode=mode, align_corners=False)


@contextmanager
def forward_pass(device: torch.device, precision: str, threads: int) -> Iterator[None]:
    """The arithmetic of a prediction: no gradients, ``precision``, and on a CPU ``threads``."""
    if device.type == "cpu" and torch.get_num_threads() != threads:
        # The setting belongs to the calling thread, and changes the last bits of some sums.
        torch.set_num_threads(threads)
    dtype = AUTOCAST.get(precision)
    with torch.inference_mode(), nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype):
        yield


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
        from torch._dynamo.exc import TorchDynamoException

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
