"""What of a scene may be left unmeasured without withholding its map, and how that is reported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

from obstore.exceptions import BaseError as StorageError

from segpipe.errors import RequestError, SceneError
from segpipe.pipeline.scene import MeasurableScene

S = TypeVar("S", bound=MeasurableScene)
Part = Literal["size", "regions", "reference", "intensity", "surface"]
"""Without ``size`` nothing is measured: only the values of the map are looked up, for its files."""
_WITHOUT: dict[str, Any] = {"regions": None, "reference": None}
_NOT_MEASURED: dict[str, Any] = {"intensity": False, "surface": False}


class UnmeasuredError(SceneError):
    """A part of the measuring cannot be done; the labels can."""

    def __init__(self, part: Part, error: Exception) -> None:
        """Of the error that shows it."""
        plain = isinstance(error, SceneError | RequestError)
        super().__init__(str(error) if plain else f"{type(error).__name__}: {error}")
        self.part = part
        self.may_pass = not plain
        """Whether storage or memory is at fault."""


@contextmanager
def measuring(part: Part) -> Iterator[None]:
    """Within this block what goes wrong is the fault of this part alone.

    Raises:
        UnmeasuredError: something did; of a block within, its own.
    """
    try:
        yield
    except UnmeasuredError:
        raise
    except (SceneError, RequestError, OSError, MemoryError, StorageError) as error:
        raise UnmeasuredError(part, error) from error


def without(scene: S, part: Part) -> S:
    """The scene as if its job did not ask for this part."""
    job, whole = scene.job, part == "size"
    measure = {name: off for name, off in _NOT_MEASURED.items() if whole or name == part}
    asked = {name: off for name, off in _WITHOUT.items() if whole or name == part}
    update = {**asked, "measure": job.measure.model_copy(update=measure)}
    return replace(scene, job=job.model_copy(update=update))
