"""One small interface for every kind of scene, and what its readers share: reasons, checks."""

from __future__ import annotations

import glob
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from segpipe.config.card import Card
from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry

if TYPE_CHECKING:
    import xarray

    from segpipe.sources.dicom.series import DicomSlice

TIMES = (("IMAGERY", "ACQUISITIONDATETIME"), (None, "EXIF_DateTimeOriginal"), (None, "TIFFTAG_DATETIME"))
"""GDAL's domain and tag that say when a scene was taken, the surest first."""

MOST_CHANNELS = 1024
"""Imaging spectrometers have some hundred."""
MOST_ELEMENTS = 2**40
"""Of one band: a million by a million pixels."""


@dataclass(frozen=True)
class SceneRef:
    """A scene that was found but not yet opened."""

    name: str
    """Unique in the run and safe as a folder name; never a patient's name."""
    uri: str
    """What `open_source` opens: a path or URL, with ``#frame=N`` for one frame of a 4D file."""


@dataclass(frozen=True)
class Scaling:
    """Stored value to real unit: ``real = stored · scale + offset``."""

    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Pixels:
    """A window of a scene as stored."""

    values: np.ndarray
    """(c, y, x) or (c, z, y, x) in the source's dtype."""
    valid: np.ndarray
    """bool, (y, x) or (z, y, x): False at nodata, outside masks, and where any band is NaN."""


class Source(ABC):
    """An open scene. Reads are thread-safe or locked inside; nothing is kept in memory."""

    uri: str
    geometry: Geometry
    dtype: np.dtype[Any]
    """Of the stored values that `read` returns; all channels share one."""
    count: int = 1
    """Channels that `read` returns."""
    bands: tuple[str, ...] = ()
    """Names of the channels as the file gives them; empty when it gives none."""
    scaling: tuple[Scaling, ...]
    """One per channel."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know (no CRS, no nodata value declared, …)."""

    identity: dict[str, Any]
    """JSON object that changes when the content does (`segpipe.sources.identity`), as it was when opened."""

    tags: Mapping[str, str] = {}
    """When the scene was taken, by the tags of `TIMES` that the file has."""

    @property
    def slices(self) -> tuple[DicomSlice, ...]:
        """The headers of a DICOM series, in the order of the volume's first axis; empty for other kinds."""
        return ()

    @property
    def cache_bytes(self) -> int:
        """Memory that the reader keeps of what it has decoded, at most."""
        return 0

    def read(self, box: Box, channels: tuple[int, ...] | None = None) -> Pixels:
        """Read a box that lies inside the scene: values (c, y, x) or (c, z, y, x) as stored, and validity.

        Args:
            box: array order, on the native grid.
            channels: 0-based, in the order wanted; None: all.

        Raises:
            SceneError: the file is damaged; names file, what was found.
            ValueError: the box sticks out of the scene or has another number of axes, a channel does not
                exist, or none is asked for (mistakes of the caller).
        """
        chosen = tuple(range(self.count)) if channels is None else tuple(channels)
        if not chosen or any(not 0 <= c < self.count for c in chosen):
            raise ValueError(f"channels {chosen} of a source with {self.count}")
        if box.ndim != self.geometry.ndim or not self.geometry.box.contains(box):
            raise ValueError(f"{box} does not lie inside {self.uri} of {self.geometry.shape}")
        if box.size == 0:
            values = np.empty((len(chosen), *box.shape), dtype=self.dtype)
            return Pixels(values, np.empty(box.shape, dtype=bool))
        return self._read(box, chosen)

    @abstractmethod
    def _read(self, box: Box, channels: tuple[int, ...]) -> Pixels:
        """What `read` answers for a box with elements, once box and channels are checked."""

    def to_xarray(self) -> xarray.DataArray:
        """The stored values as (band, y, x) or (band, z, y, x), read when they are asked for.

        Returns:
            A DataArray with the coordinate `valid` and the geometry as `segpipe.sources.arrays`
            describes. The source must stay open for as long as it is read from.
        """
        from segpipe.sources.arrays import lazy_array  # here: xarray is needed by few

        bands = self.bands or [str(c + 1) for c in range(self.count)]
        return lazy_array(
            lambda box: self.read(box).values,
            self.geometry,
            self.dtype,
            bands,
            self.uri,
            lambda box: self.read(box).valid,
        )

    def _repr_html_(self) -> str:
        """What it is, for a notebook."""
        return str(self.to_xarray()._repr_html_())  # type: ignore[no-untyped-call]

    def close(self) -> None:  # noqa: B027  a source without handles has nothing to release
        """Release file handles."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LabelReader(Protocol):
    """Reads a window of a label map on the native grid: ``read(box)`` has the box's shape."""

    def __call__(self, box: Box, /) -> np.ndarray: ...


class ScoreReader(Protocol):
    """Reads a window of a score map: ``read(box)`` is (class, *box.shape), floating point."""

    def __call__(self, box: Box, /) -> np.ndarray: ...


def reason(error: BaseException) -> str:
    """What a library said, on one line."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


def local_path(text: str) -> Path:
    """A path with ``~`` written out, which may be a glob or not be there.

    Raises:
        RequestError: the system cannot look it up: too long, a loop of links, an unknown user, not permitted.
    """
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL; RuntimeError: no such user
        why = getattr(error, "strerror", None) or reason(error)
        raise RequestError(f"{text[:200]!r}: cannot be looked up: {why}; give another path") from error
    return path


def require_file(path: Path) -> None:
    """Refuse a path that holds nothing to open.

    Raises:
        SceneError: there is no such file, it is a folder, or it is empty.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise SceneError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # too long, a loop of links, a NUL in it, not permitted
        why = getattr(error, "strerror", None) or reason(error)
        raise SceneError(f"{str(path)[:200]!r}: cannot be opened: {why}") from error
    if S_ISDIR(found.st_mode):
        raise SceneError(f"{path}: is a folder; expected a file")
    if not S_ISREG(found.st_mode):  # opening a pipe waits for whoever writes into it
        raise SceneError(f"{path}: is no regular file but a pipe, socket or device")
    if found.st_size == 0:
        raise SceneError(f"{path}: the file is empty (0 bytes)")


def check_size(uri: str, channels: int, shape: Sequence[int]) -> None:
    """Refuse what a header says of a scene, before anything follows it: a few bytes can say anything.

    Raises:
        SceneError: it has more than `MOST_CHANNELS`, `MOST_ELEMENTS`, or no element.
    """
    elements = math.prod(shape)
    if channels > MOST_CHANNELS:
        raise SceneError(f"{uri}: found {channels} bands; valid: up to {MOST_CHANNELS}")
    if not 0 < elements <= MOST_ELEMENTS:
        size = " x ".join(map(str, shape))
        raise SceneError(f"{uri}: found {size} elements; valid: 1 to {MOST_ELEMENTS:,} in all")


def matches(pattern: str) -> list[Path]:
    """Files and folders that a glob matches (``**``: any depth), absolute, sorted by path."""
    whole = str(Path(pattern).expanduser().absolute())
    # Not Path.glob: it takes no absolute pattern, and its * matches hidden files.
    return sorted(Path(p) for p in glob.glob(whole, recursive=True))  # noqa: PTH207


def scaling_of(scale: float | None, offset: float | None) -> Scaling:
    """The scaling a file declares; identity where the scale is 0, infinite, NaN or missing.

    NIfTI says so for ``scl_slope`` 0, and a zero scale elsewhere would erase every value.
    """
    if scale is None or not math.isfinite(scale) or scale == 0:
        return Scaling()
    usable = offset is not None and math.isfinite(offset)
    return Scaling(float(scale), float(offset) if usable and offset is not None else 0.0)


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


def match_bands(card: Card, source: Source) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The source's channel for each of the model's.

    By name where the source has names (case does not matter), by position where it has none and
    the counts agree.

    Raises:
        SceneError: kind, names or counts do not fit; says what the scene has and what the card asks.
    """
    kind = source.geometry.kind
    if kind != card.kind:
        raise SceneError(f"the scene is a {kind}, the card {card.name!r} is for a {card.kind}")
    wanted = card.input.bands
    if not wanted:
        if source.count != 1:
            raise SceneError(f"the scene has {source.count} channels, the card {card.name!r} takes one")
        return (0,), source.bands or ("image",)
    have = {name.lower(): i for i, name in enumerate(source.bands)}
    if all(name.lower() in have for name in wanted):
        return tuple(have[name.lower()] for name in wanted), tuple(wanted)
    if source.bands and len(have) == source.count:
        missing = [name for name in wanted if name.lower() not in have]
        raise SceneError(
            f"bands: the scene has no {', '.join(missing)}; it has {', '.join(source.bands)}; the card "
            f"{card.name!r} asks for {', '.join(wanted)}; name the scene's bands with the job's `bands`"
        )
    if source.count != len(wanted):
        raise SceneError(
            f"bands: the scene has {source.count} unnamed bands, the card {card.name!r} asks for "
            f"{len(wanted)} ({', '.join(wanted)}); name the scene's bands with the job's `bands`"
        )
    return tuple(range(len(wanted))), tuple(wanted)
