"""Folders that save_pretrained wrote, read as data: numbers from JSON, tensors from safetensors, no code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.utils import logging

from segpipe.errors import RequestError

REFUSED = (TypeError, ValueError, KeyError, AttributeError, StrictDataclassError)
"""What a configuration that makes no sense raises in the library."""

NOT_FOLLOWED = ("auto_map", "quantization_config", "attn_implementation", "experts_implementation")
"""Keys by which a config.json can ask for code: from the folder, from other packages, from the hub."""

COUNTERS = ("num_batches_tracked", "relative_position_index")
"""Endings of tensors that old checkpoints hold and no network reads."""


def data_alone(data: Any) -> Any:
    """The same without the keys that ask for code, at any depth."""
    if isinstance(data, dict):
        return {k: data_alone(v) for k, v in data.items() if str(k).lstrip("_") not in NOT_FOLLOWED}
    return [data_alone(v) for v in data] if isinstance(data, list) else data


def load_pretrained(
    network: Any, folder: Path, config: Any, refuse: Callable[[str], RequestError] = RequestError
) -> torch.nn.Module:
    """The network of a folder, float32, in evaluation mode, every tensor where it belongs.

    Args:
        network: class of the library.
        folder: with tensors as safetensors.
        config: the library's configuration of it, checked.
        refuse: makes the error of what is wrong with the folder.

    Raises:
        RequestError: the folder is damaged, holds an adapter, or its tensors do not fit the configuration.
    """
    if (folder / "adapter_config.json").exists():
        raise refuse(f"{folder} holds an adapter (adapter_config.json): merge it first")
    # A library draws no bars on stderr; the caller's own choice comes back afterwards.
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded, report = network.from_pretrained(
            folder,
            config=config,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (SafetensorError, OSError, RuntimeError, ImportError, *REFUSED) as error:
        raise refuse(f"{folder} cannot be loaded: {' '.join(str(error).split())}") from error
    finally:
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]
    # from_pretrained fills what is missing with random numbers, and only warns.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(name) for name in report[problem] if not str(name).endswith(COUNTERS))
        if names:
            raise refuse(f"{folder}: {problem.replace('_', ' ')}: {names[0]} ({len(names)} in all)")
    for name, tensor in loaded.named_parameters():
        if not bool(torch.isfinite(tensor).all()):
            raise refuse(f"{name} in {folder} holds NaN or infinity")
    assert isinstance(loaded, torch.nn.Module)
    return loaded.eval().requires_grad_(False)
