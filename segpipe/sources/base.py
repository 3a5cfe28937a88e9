"""One small interface for every kind of scene: lazy, windowed, in the stored dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry

if TYPE_CHECKING:
    import xarray


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
    count: int
    """Channels that `read` returns."""
    bands: tuple[str, ...]
    """Names of the channels as the file gives them; empty when it gives none."""
    scaling: tuple[Scaling, ...]
    """One per channel."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know (no CRS, no nodata value declared, …)."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """JSON object that changes when the content does: for each file its URI, size and time."""

    @property
    def chunk(self) -> tuple[int, ...] | None:
        """Shape in which the file is stored where it is tiled (array order), else None."""
        return None

    @property
    def cache_bytes(self) -> int:
        """Memory that the reader keeps of what it has decoded, at most."""
        return 0

    @abstractmethod
    def read(self, box: Box, channels: tuple[int, ...] | None = None) -> Pixels:
        """Read a box that lies inside the scene.

        Args:
            box: array order, on the native grid.
            channels: 0-based, in the order wanted; None: all.

        Raises:
            SceneError: the file is damaged; names file, what was found.
        """

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
