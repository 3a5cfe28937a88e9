"""segpipe: segmentation over lakes of large rasters and 3D volumes, and the numbers that follow."""

from importlib import import_module
from typing import Any

from segpipe.process.allocator import use_huge_pages
from segpipe.process.gdal_drivers import skip_other_drivers

__version__ = "0.2.0"

ENGINE_VERSION = 2
"""Raised only when the same inputs give other bits; part of every predict key."""
ANSWER_VERSION = 2
"""The same of answers to prompts and the objects they become."""

use_huge_pages()
skip_other_drivers()

__all__ = [
    "RequestError",
    "Run",
    "SceneError",
    "SegpipeError",
    "measure",
    "open",
    "open_run",
    "plan",
    "predict",
]
__all__ += ["prompt", "run"]

_HOMES = {name: "segpipe.errors" if name.endswith("Error") else "segpipe.api" for name in __all__}


def __getattr__(name: str) -> Any:
    """Load what is asked for: `import segpipe` alone loads neither arrays nor torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'segpipe' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
