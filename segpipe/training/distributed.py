"""Several processes that train one model, as `torchrun` starts them; one process is a world of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among those that share the work."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that tries, writes and tells."""
        return self.rank == 0

    def wrap(self, module: torch.nn.Module) -> torch.nn.Module:
        """The module, with gradients averaged over all processes."""
        return DistributedDataParallel(module) if self.size > 1 else module

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        return self._sum(float(here)) > 0

    def mean(self, number: float) -> float:
        """The mean over all processes."""
        return self._sum(number) / self.size

    def _sum(self, number: float) -> float:
        if self.size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64)
        if distributed.get_backend() == "nccl":
            total = total.cuda()
        distributed.all_reduce(total)
        return float(total)

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def join_world(device: str) -> Iterator[tuple[World, str]]:
    """The world that the environment tells of (RANK, WORLD_SIZE), and this process's device."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(), device
        return
    on_gpu = device.startswith("cuda")
    if on_gpu:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(distributed.get_rank(), size), device
    finally:
        distributed.destroy_process_group()
