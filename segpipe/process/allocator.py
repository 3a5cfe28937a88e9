"""The C library's allocator, told twice what it cannot know: law 3 is about resident memory."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from functools import lru_cache
from typing import Any

EVERY = 0.5
"""Seconds: a device that finishes a block in less must not wait for page faults."""


def use_huge_pages() -> None:
    """Ask PyTorch for huge pages on a CPU; before its first tensor, or it has no effect.

    Activations of many MiB come and go with every forward pass. In pages of 4 KiB their faults took
    about a tenth of a U-Net's time (`python -m benchmarks.allocator`). A value that the user
    set stands.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


_released = 0.0


def release() -> None:
    """Give free memory back to the system, after a block or tile; not more often than `EVERY` seconds.

    glibc keeps what was freed between two pieces in use, and with blocks read, computed and written by
    three threads that grows with the scene.
    """
    global _released
    trim, now = _malloc_trim(), time.monotonic()
    if trim is not None and now - _released >= EVERY:
        _released = now
        trim(0)


@lru_cache(maxsize=1)
def _malloc_trim() -> Any:
    """glibc's function; None on other systems, which do without."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
