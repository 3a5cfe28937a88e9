"""What every kind of source needs: one-line reasons, file identities, checks of a read."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.sources.base import Pixels, Scaling, Source


def reason(error: BaseException) -> str:
    """What a library said, on one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def require_file(path: Path) -> None:
    """Refuse a path that holds nothing to open.

    Raises:
        SceneError: there is no such file, it is a folder, or it is empty.
    """
    if not path.exists():
        raise SceneError(f"{path}: no such file")
    if path.is_dir():
        raise SceneError(f"{path}: is a folder; expected a file")
    if path.stat().st_size == 0:
        raise SceneError(f"{path}: the file is empty (0 bytes)")


def matches(pattern: str) -> list[Path]:
    """Files and folders that a glob matches (``**``: any depth), absolute, sorted by path."""
    whole = str(Path(pattern).expanduser().absolute())
    # Not Path.glob: it takes no absolute pattern, and its * matches hidden files.
    return sorted(Path(p) for p in glob.glob(whole, recursive=True))  # noqa: PTH207


def file_identity(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Path, size in bytes and time of change in ns of each file, sorted by path.

    Raises:
        SceneError: a file has gone.
    """
    found = []
    for path in sorted({str(p) for p in paths}):
        try:
            stat = Path(path).stat()
        except OSError as error:
            raise SceneError(f"{path}: {reason(error)}") from error
        found.append({"uri": path, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return found


def scaling_of(scale: float | None, offset: float | None) -> Scaling:
    """The scaling a file declares; identity where the scale is 0, infinite, NaN or missing.

    NIfTI says so for ``scl_slope`` 0, and a zero scale elsewhere would erase every value.
    """
    if scale is None or not math.isfinite(scale) or scale == 0:
        return Scaling()
    usable = offset is not None and math.isfinite(offset)
    return Scaling(float(scale), float(offset) if usable and offset is not None else 0.0)


def resolve_channels(source: Source, channels: Sequence[int] | None) -> tuple[int, ...]:
    """The channels to read, 0-based.

    Raises:
        ValueError: a channel does not exist, or none is asked for (a mistake of the caller).
    """
    if channels is None:
        return tuple(range(source.count))
    if not channels or any(not 0 <= c < source.count for c in channels):
        raise ValueError(f"channels {tuple(channels)} of a source with {source.count}")
    return tuple(channels)


def check_box(source: Source, box: Box) -> None:
    """Refuse a box that is not inside the scene (a mistake of the caller).

    Raises:
        ValueError: wrong number of axes, or it sticks out.
    """
    if box.ndim != source.geometry.ndim or not source.geometry.box.contains(box):
        raise ValueError(f"{box} does not lie inside {source.uri} of {source.geometry.shape}")


def no_pixels(source: Source, box: Box, channels: Sequence[int]) -> Pixels:
    """The answer to a read of an empty box."""
    values = np.empty((len(channels), *box.shape), dtype=source.dtype)
    return Pixels(values, np.empty(box.shape, dtype=bool))


def finite(values: np.ndarray) -> np.ndarray:
    """Where every channel holds a number: bool, the shape of ``values`` without its first axis."""
    if values.dtype.kind != "f":
        return np.ones(values.shape[1:], dtype=bool)
    valid = np.isfinite(values[0])
    for channel in values[1:]:
        valid &= np.isfinite(channel)
    return np.asarray(valid)


def rename_bands(source: Source, names: Sequence[str]) -> None:
    """Give the channels names in file order, over any the file has.

    Raises:
        RequestError: not one name per channel, or a name twice.
    """
    if not names:
        return
    if len(names) != source.count:
        raise RequestError(
            f"{source.uri}: {len(names)} band names given ({', '.join(names)}), "
            f"but the scene has {source.count} {'band' if source.count == 1 else 'bands'}"
        )
    if len(set(names)) != len(names):
        raise RequestError(f"{source.uri}: a band name is given twice: {', '.join(names)}")
    source.bands = tuple(names)
