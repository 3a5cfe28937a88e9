"""The network in training: weights to begin with, arithmetic, moving average, and its way to a file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segpipe.config.card import load_card
from segpipe.config.job import Precision
from segpipe.config.recipe import Recipe, Stored
from segpipe.errors import RequestError
from segpipe.inference.object_merger import ground_value
from segpipe.models.base import Truth
from segpipe.models.network import AUTOCAST, at_resolution, best_class
from segpipe.models.trainable import built_state, finder, objective, untrained
from segpipe.models.weights import load_state, resolve_weights
from segpipe.objects.window import WindowObjects
from segpipe.training.losses import of_all_classes


def precision_here(wanted: Precision, device: torch.device) -> str:
    """``fp32``, ``bf16`` or ``fp16``; auto is bf16 where the device has instructions for it.

    Raises:
        RequestError: fp16 on a CPU, where gradients would be slow and lost.
    """
    if wanted is Precision.fp16 and device.type == "cpu":
        raise RequestError("compute.precision: found fp16 on a CPU; valid there: auto, fp32, bf16")
    if wanted is not Precision.auto:
        return str(wanted.value)
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return "bf16" if supported() else "fp32"


class TrainNetwork:
    """A network, its moving average, and the arithmetic of its forward pass."""

    def __init__(self, recipe: Recipe, device: torch.device, precision: str) -> None:
        """Build it; the same recipe gives the same random weights.

        Raises:
            RequestError: the card cannot be built, or `start` fits none of it.
        """
        self.recipe, self.card = recipe, recipe.card
        self.device, self.precision = device, precision
        torch.manual_seed(recipe.optimise.seed)
        module = untrained(self.card)
        self.notes = begin_with(module, self.card.channels, recipe.start) if recipe.start else []
        layout = torch.channels_last if self.card.ndim == 2 else torch.channels_last_3d
        self.module = module.to(device).to(memory_format=layout)
        self.layout = layout
        self.average = self.module
        self._ema: AveragedModel | None = None
        if recipe.optimise.ema:
            self._ema = AveragedModel(
                self.module, multi_avg_fn=get_ema_multi_avg_fn(recipe.optimise.ema), use_buffers=True
            )
            self.average = self._ema.module
        self._objective = objective(self.card)
        self._finder = None
        if self._objective is not None:
            self._finder = finder(self.card, self.average, device, precision, torch.get_num_threads())

    @property
    def parameters(self) -> int:
        """Numbers that are learned."""
        return sum(p.numel() for p in self.module.parameters())

    def groups(self) -> list[dict[str, object]]:
        """Parameters for the optimiser: weight decay for matrices and kernels alone."""
        learned = [p for p in self.module.parameters() if p.requires_grad]
        return [
            {"params": [p for p in learned if p.ndim > 1], "weight_decay": self.recipe.optimise.decay},
            {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
        ]

    def logits(self, module: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Logits (n, k, …) float32 at the images' resolution."""
        with self._arithmetic():
            scores = module(images.contiguous(memory_format=self.layout))
        if isinstance(scores, dict):  # torchvision's
            scores = scores["out"]
        if isinstance(scores, list | tuple):
            scores = scores[0]
        return at_resolution(scores.float(), images, self.card.output_channels, self.card.name)

    def own_loss(
        self, module: torch.nn.Module, images: torch.Tensor, truths: Sequence[Truth]
    ) -> torch.Tensor:
        """The library's own loss of a network that finds objects."""
        assert self._objective is not None
        with self._arithmetic():
            loss = self._objective(module, images.contiguous(memory_format=self.layout), truths)
        return loss.float()

    def find(self, image: torch.Tensor) -> WindowObjects:
        """What the moving average finds in a window (1, c, …)."""
        assert self._finder is not None
        self.average.eval()
        (found,) = self._finder.objects(image.to(self.device))
        return found

    def answer(self, image: torch.Tensor) -> tuple[np.ndarray, np.ndarray | None]:
        """Class values of a window (1, c, …), and ids where the network finds objects: as shown to people."""
        if self._finder is not None:
            found = self.find(image)
            values = np.concatenate([[ground_value(self.card)], found.classes])
            return values[found.ids], found.ids
        logits = of_all_classes(self.predict(image))
        return np.array(self.card.values)[best_class(logits)[0].cpu().numpy()], None

    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the moving average, in evaluation mode."""
        self.average.eval()
        return self.logits(self.average, images.to(self.device))

    def update_average(self, step: int) -> None:
        """Take the weights after a step into the average."""
        if self._ema is None:
            return
        if step * (1 - self.recipe.optimise.ema) < 1:
            # Early on an average of few steps would still be mostly the random start.
            self._ema.n_averaged.zero_()
        self._ema.update_parameters(self.module)

    def _arithmetic(self) -> AbstractContextManager[object]:
        dtype = AUTOCAST.get(self.precision)
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def state(self) -> dict[str, object]:
        """For a checkpoint."""
        ema = None if self._ema is None else self._ema.state_dict()
        return {"module": self.module.state_dict(), "ema": ema}

    def load(self, state: dict[str, object]) -> None:
        """The inverse of `state`."""
        self.module.load_state_dict(state["module"])  # type: ignore[arg-type]
        if self._ema is not None:
            self._ema.load_state_dict(state["ema"])  # type: ignore[arg-type]

    def save(self, path: Path) -> None:
        """Write the averaged weights as safetensors, and round the average to what is stored."""
        half = self.recipe.weights is Stored.fp16
        kept, seen = {}, set()
        for name, tensor in self.average.state_dict().items():
            if tensor.data_ptr() in seen and tensor.numel():
                continue  # one tensor under two names is stored once
            seen.add(tensor.data_ptr())
            value = tensor.detach().cpu().contiguous()
            kept[name] = _halved(value) if half else value
            if value.is_floating_point():
                tensor.copy_(kept[name].to(tensor.dtype))
        save_file(kept, path)


def _halved(value: torch.Tensor) -> torch.Tensor:
    """Numbers as fp16; as they are where one is too large for it, as a variance of the data may be."""
    halved = value.half() if value.is_floating_point() else value
    return halved if bool(halved.isfinite().all()) else value


def begin_with(module: torch.nn.Module, channels: int, start: str) -> list[str]:
    """Copy the weights of another card's network where names and shapes fit; says what does not.

    A convolution of the image takes, where the other has another number of bands, these in turn, scaled by
    their numbers, as smp and timm do: filters of single bands and of differences between bands live on.

    Args:
        module: to be filled.
        channels: of its input.
        start: path or name of the other's card.

    Raises:
        RequestError: nothing fits.
    """
    card = load_card(start)
    path = resolve_weights(card)
    state = load_state(path) if path.is_file() else built_state(card)
    bands = (channels, card.channels)
    wanted = module.state_dict()
    fitting, notes = {}, []
    for name, tensor in wanted.items():
        other = state.get(name)
        if other is None:
            continue
        if other.shape == tensor.shape:
            fitting[name] = other
        elif tensor.ndim > 2 and (tensor.shape[1], other.shape[1]) == bands and _but_bands(tensor, other):
            in_turn = torch.arange(bands[0]) % bands[1]
            fitting[name] = other[:, in_turn] * (bands[1] / bands[0])
            notes.append(f"{name}: {bands[1]} bands in turn for {bands[0]}")
    filled = {wanted[name].data_ptr() for name in fitting}  # one tensor under two names is stored once
    rest = [
        name
        for name, tensor in wanted.items()
        if tensor.data_ptr() not in filled and not name.endswith("num_batches_tracked")
    ]
    if not fitting:
        raise RequestError(
            f"start: no tensor of {start} fits this network; give a card of the same architecture"
        )
    if rest:
        notes.append(f"{len(rest)} of {len(wanted)} tensors begin at random, e.g. {rest[0]}")
    module.load_state_dict(fitting, strict=False)
    return notes


def _but_bands(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two kernels (out, in, …) differ in their inputs alone."""
    return (first.shape[0], *first.shape[2:]) == (second.shape[0], *second.shape[2:])
