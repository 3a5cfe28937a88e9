"""What `auto` becomes on this machine: device, precision, batch and threads, decided once per run."""

from __future__ import annotations

from dataclasses import dataclass

from segpipe.config.card import Card
from segpipe.config.job import Compute
from segpipe.errors import RequestError
from segpipe.models.registry import resolve_precision, runtime_without_cuda
from segpipe.process.cpus import cpu_count


@dataclass(frozen=True)
class Settings:
    """What `auto` became, once, for all workers: part of every predict key."""

    device: str
    """cpu, cuda or cuda:1: where this process computes."""
    device_class: str
    """What the bits depend on: ``cpu-t2`` (threads) or the GPU's name."""
    precision: str
    batch: int
    threads: int
    tta: bool
    compile: bool = False
    """Whether the network goes through torch.compile."""


def resolve_settings(compute: Compute, card: Card) -> Settings:
    """Decide device, precision, batch and threads.

    Raises:
        RequestError: a device that is not there, or a precision that the card's file cannot take.
    """
    device = resolve_device(compute.device, card)
    on_gpu = device.startswith("cuda")
    # those that this process may use: a container's limit counts
    threads = int(compute.threads) if compute.threads != "auto" else cpu_count()
    precision = resolve_precision(card, compute.precision, device)
    batch = int(compute.batch) if compute.batch != "auto" else (8 if on_gpu else 1)
    import torch

    if on_gpu:
        device_class = torch.cuda.get_device_name(device)
    else:  # vector width and threads change the last bits
        device_class = f"cpu-{torch.backends.cpu.get_cpu_capability().lower()}-t{threads}"
    flips = compute.tta.value == "flips"
    return Settings(device, device_class, precision, batch, threads, flips, compute.compile)


def resolve_device(wanted: str, card: Card) -> str:
    """What `auto` is here; a model with a runtime of its own computes where that can.

    Raises:
        RequestError: a GPU that is not there.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    who = f"torch {torch.__version__}"
    if count and (runtime := runtime_without_cuda(card)):
        count, who = 0, runtime
    if wanted == "auto":
        return "cuda" if count else "cpu"
    index = int(wanted.partition(":")[2] or 0)
    if wanted.startswith("cuda") and index >= count:
        found = f"sees {count} GPUs" if count else "sees no GPU"
        raise RequestError(f"compute.device: found {wanted!r}, but {who} {found}; use auto or cpu")
    return wanted


NO_MODEL = Settings("cpu", "no model", "none", 1, 1, False)
"""Settings of a run without a model."""
