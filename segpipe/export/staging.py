"""What every export shares: the reader's contract, the smallest dtype, atomic files."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.config.card import Class
from segpipe.errors import SceneError
from segpipe.geometry.box import Box

SLAB_BYTES = 16 * 2**20
"""Bytes read at once; at least one slice."""


def label_dtype(classes: Sequence[Class], nodata: int | None) -> np.dtype[Any]:
    """The smallest of uint8 and uint16 that holds every class value and the nodata value."""
    largest = max([c.value for c in classes] + ([] if nodata is None else [nodata]))
    return np.dtype(np.uint8 if largest <= 255 else np.uint16)


def fit_labels(values: np.ndarray, dtype: np.dtype[Any], box: Box, path: Path) -> np.ndarray:
    """The window in the file's dtype; a value that does not fit is refused, never wrapped around.

    Raises:
        SceneError: a label lies outside the dtype's range, or the window has another shape.
    """
    if values.shape != box.shape:
        raise SceneError(f"{path}: labels at {box} have shape {values.shape}, not {box.shape}")
    limit = np.iinfo(dtype).max
    if values.dtype != dtype and values.size and (values.min() < 0 or values.max() > limit):
        raise SceneError(
            f"{path}: a label at {box} lies in {values.min()}…{values.max()}, outside 0…{limit}: "
            "the model's card must list every class value"
        )
    return np.ascontiguousarray(values, dtype=dtype)


def slab_boxes(shape: Sequence[int], itemsize: int) -> Iterator[Box]:
    """Boxes of whole slices (y, x) of a volume (z, y, x), in order, each of about `SLAB_BYTES`."""
    depth, rows, columns = shape
    step = max(1, SLAB_BYTES // max(1, rows * columns * itemsize))
    for start in range(0, depth, step):
        yield Box((start, 0, 0), (min(start + step, depth), rows, columns))


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A private folder beside ``path``: what is finished there gets its name by `commit`, the rest goes.

    Beside it is the same file system, so a file is there whole or not at all: a crash leaves a hidden
    folder, never half a file under the final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        yield Path(folder)


def commit(source: Path, target: Path) -> None:
    """Make a finished file visible under its name.

    One that is there stays: the same request, run twice at once, was faster, and has its checksum.
    """
    try:
        target.hardlink_to(source)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        source.replace(target)
