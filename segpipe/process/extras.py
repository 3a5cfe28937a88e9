"""Packages that come with an extra of segpipe, and the one line that says so where they are missing."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from segpipe.errors import RequestError

EXTRAS = {
    "dask": "dask",
    "dask_cuda": "cuda",
    "dask_jobqueue": "cluster",
    "dask_kubernetes": "cluster",
    "distributed": "dask",
    "dynamic_network_architectures": "nnunet",
    "h3": "h3",
    "highdicom": "dicom",
    "huggingface_hub": "models",
    "monai": "models",
    "onnx": "export",
    "onnxruntime": "models",
    "onnxscript": "export",
    "prefect": "prefect",
    "prefect_dask": "dask",
    "pydicom": "dicom",
    "pystac_client": "stac",
    "segmentation_models_pytorch": "models",
    "skimage": "models",
    "sklearn": "models",
    "timm": "models",
    "torchvision": "models",
    "transformers": "models",
}
"""By the module's name, the extra that brings it."""
DISTRIBUTIONS = {
    "distributed": "dask",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "prefect": "Prefect",
}
"""What a module's package is called, where it is not the module's name."""


def check_installed(module: str, who: str) -> None:
    """Check that a package which an extra brings is there, without loading it.

    Args:
        module: the name it is imported by.
        who: what needs it, as the beginning of a sentence, e.g. ``compute.runner: dask``.

    Raises:
        RequestError: it is not installed; names the extra.
    """
    if find_spec(module) is None:
        raise RequestError(_line(module, who))


def require(module: str, who: str) -> ModuleType:
    """Import a module of a package that an extra brings.

    Args:
        module: its name, e.g. ``prefect_dask.task_runners``.
        who: as for `check_installed`.

    Raises:
        RequestError: as `check_installed`.
    """
    check_installed(module.partition(".")[0], who)
    return import_module(module)


def missing_extra(error: ModuleNotFoundError, who: str) -> str | None:
    """Return the line about a module that was not found; None where no extra brings it."""
    module = (error.name or "").partition(".")[0]
    return _line(module, who) if module in EXTRAS else None


def _line(module: str, who: str) -> str:
    package = DISTRIBUTIONS.get(module, module.replace("_", "-"))
    return f"{who} needs {package}, which is not installed: pip install 'segpipe[{EXTRAS[module]}]'"
