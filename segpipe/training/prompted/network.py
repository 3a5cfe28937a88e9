"""The network as training begins with it, and the file that it becomes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from segpipe.errors import RequestError
from segpipe.prompts.segmenters.looknet import LookNet


def build(arguments: dict[str, Any], seed: int) -> LookNet:
    """The network with random weights.

    Raises:
        RequestError: the network takes no such arguments.
    """
    torch.manual_seed(seed)
    try:
        network = LookNet(**arguments)
    except (TypeError, ValueError) as error:
        raise RequestError(f"network: {error}") from error
    return network.to(memory_format=torch.channels_last)


def save(network: torch.nn.Module, path: Path) -> None:
    """Write the weights, float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: t.half() if t.is_floating_point() else t
        for name, t in network.state_dict().items()
        if not name.endswith("num_batches_tracked")  # counts steps of training
    }
    part = path.with_suffix(".part")
    save_file({name: t.contiguous() for name, t in state.items()}, part)
    part.replace(path)
