"""Arrays of this process as scenes: `hold` gives one an address that every reader of scenes understands."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import Geometry
from segpipe.sources.base import Pixels, Scaling, Source

MEMORY = "memory://"

_held: dict[str, tuple[np.ndarray, np.ndarray | None, Geometry, tuple[str, ...]]] = {}


@contextmanager
def hold(
    values: np.ndarray, geometry: Geometry, bands: Sequence[str] = (), valid: np.ndarray | None = None
) -> Iterator[str]:
    """Keep an array under an address for as long as the block lasts.

    Args:
        values: (c, y, x) of a raster, (c, z, y, x) of a volume; not copied, and not to be changed meanwhile.
        geometry: of the same shape without channels.
        bands: names of the channels; empty: none.
        valid: bool, of the geometry's shape; None: every element that is no NaN.

    Yields:
        The URI, for `segpipe.sources.open_source` and a job's `scenes`, `labels` and `reference.path`. It
        names the content, so that the same array has the same results in a store.

    Raises:
        RequestError: the shapes do not go together.
    """
    if values.shape[1:] != geometry.shape or (bands and len(bands) != len(values)):
        raise RequestError(
            f"array: found shape {values.shape} with {len(bands)} band names for a grid of {geometry.shape}; "
            "valid: (channels, *grid)"
        )
    content = hashlib.sha256(np.ascontiguousarray(values).tobytes())
    content.update(b"" if valid is None else np.packbits(valid).tobytes())
    content.update(repr((values.dtype.str, geometry.to_dict(), tuple(bands))).encode())
    uri = f"{MEMORY}array-{content.hexdigest()[:16]}"
    _held[uri] = values, valid, geometry, tuple(bands)
    try:
        yield uri
    finally:
        _held.pop(uri, None)


class MemorySource(Source):
    """An array that this process holds."""

    def __init__(self, uri: str, *, band_names: Sequence[str] = ()) -> None:
        """Find it.

        Raises:
            SceneError: this process holds no such array.
            RequestError: ``band_names`` has not one name per channel.
        """
        if uri not in _held:
            raise SceneError(
                f"{uri}: this process holds no such array; arrays do not travel to other workers"
            )
        self._values, self._valid, self.geometry, bands = _held[uri]
        self.uri, self.identity = uri, {"uri": uri}
        self.dtype = self._values.dtype
        self.count = len(self._values)
        if band_names and len(band_names) != self.count:
            raise RequestError(f"bands: found {len(band_names)} names for {self.count} channels")
        self.bands = tuple(band_names) or bands
        self.scaling = (Scaling(),) * self.count

    def _read(self, box: Box, channels: tuple[int, ...]) -> Pixels:
        values = self._values[(slice(None), *box.slices)][np.array(channels)]
        if self._valid is not None:
            return Pixels(values, self._valid[box.slices])
        missing = np.isnan(values).any(axis=0) if values.dtype.kind == "f" else np.zeros(box.shape, bool)
        return Pixels(values, ~missing)
