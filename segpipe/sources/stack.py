"""Rasters of one grid as the bands of one scene, without copying a pixel: ``stack:FILE|FILE``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from segpipe.errors import RequestError, SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import RasterGeometry
from segpipe.redact import seal, whole
from segpipe.sources.base import Pixels, Source, rename_bands
from segpipe.sources.gdal import CACHE_LIMIT
from segpipe.sources.raster import RasterSource, common_dtype
from segpipe.sources.remote import is_remote

STACK = "stack:"
SEPARATOR = "|"

OFF_GRID = 0.01
"""Pixels by which a file's corners may lie beside the first's: more would need resampling."""


class StackSource(Source):
    """Rasters (c, y, x) of one grid, their bands one after the other in the order of the files.

    Each file keeps its own nodata value, mask and scaling. A pixel is valid where every band that is read
    holds data, as in one file. Files of several dtypes are read in the smallest that holds them all exactly.
    """

    geometry: RasterGeometry

    def __init__(self, uri: str, *, band_names: Sequence[str] = ()) -> None:
        """Open every file.

        Raises:
            SceneError: a file is missing or damaged, lies on another grid than the first, or no dtype holds
                the values of all.
            RequestError: ``band_names`` has not one name per band, or fewer than two files are given.
        """
        self.uri = uri
        with ExitStack() as unless_open:
            self._parts: list[RasterSource] = []
            unless_open.callback(self.close)
            for name in stack_files(uri):
                self._parts.append(RasterSource(name))
                _require_same_grid(self._parts[0], self._parts[-1])
            parts = self._parts
            self.geometry = parts[0].geometry
            self.dtype = common_dtype(uri, [part.dtype.name for part in parts])
            self.count = sum(part.count for part in parts)
            named = all(part.bands for part in parts)
            self.bands = tuple(b for part in parts for b in part.bands) if named else ()
            identities = [part.identity for part in parts]
            uris = SEPARATOR.join(str(identity["uri"]) for identity in identities)
            self.identity = {"uri": uris, "files": identities}
            self.scaling = tuple(s for part in parts for s in part.scaling)
            self.notes = tuple(dict.fromkeys(note for part in parts for note in part.notes))
            # GDAL's cache is one for all files, and a box is read from each of them in turn.
            cache = min(CACHE_LIMIT, sum(part.cache_bytes for part in parts))
            for part in parts:
                part.set_cache_bytes(cache)
            rename_bands(self, band_names)
            unless_open.pop_all()

    @property
    def cache_bytes(self) -> int:
        """Of GDAL's block cache, which all files share."""
        return self._parts[0].cache_bytes

    def _read(self, box: Box, channels: tuple[int, ...]) -> Pixels:
        values = np.empty((len(channels), *box.shape), dtype=self.dtype)
        valid = np.ones(box.shape, dtype=bool)
        first = 0
        for part in self._parts:
            places = [n for n, c in enumerate(channels) if first <= c < first + part.count]
            if places:
                pixels = part.read(box, tuple(channels[n] - first for n in places))
                values[places] = pixels.values
                valid &= pixels.valid
            first += part.count
        return Pixels(values, valid)

    def close(self) -> None:
        """Close all files."""
        for part in self._parts:
            part.close()


def stack_files(uri: str) -> list[str]:
    """The files of ``stack:FILE|FILE``, absolute unless they are URLs, in their order.

    Raises:
        RequestError: fewer than two.
    """
    parts = [seal(part) for part in whole(uri).removeprefix(STACK).split(SEPARATOR)]
    if len(parts) < 2 or not all(part.strip() for part in parts):
        raise RequestError(f"{uri}: expected {STACK}FILE{SEPARATOR}FILE, two files or more")
    local = (None if is_remote(p) else Path(p.removeprefix("file://")).expanduser() for p in parts)
    return [p if path is None else str(path.absolute()) for p, path in zip(parts, local, strict=True)]


def _require_same_grid(first: RasterSource, other: RasterSource) -> None:
    """Refuse a file whose pixels do not lie on those of the first."""
    a, b = first.geometry, other.geometry
    if b.shape != a.shape:
        what = f"it has {b.shape[0]} x {b.shape[1]} pixels, not {a.shape[0]} x {a.shape[1]} as"
    elif (off := _corners_apart(a, b)) > OFF_GRID:
        what = f"its corners lie {off:.3g} pixels beside those of"
    elif a.crs != b.crs and a.projection != b.projection:
        names = [g.projection.name if g.projection else "none" for g in (b, a)]
        what = f"its CRS is {names[0]}, not {names[1]} as of"
    else:
        return
    raise SceneError(f"{other.uri}: cannot join the stack, {what} {first.uri}; warp it onto that grid first")


def _corners_apart(a: RasterGeometry, b: RasterGeometry) -> float:
    """Greatest distance between corners of the same name, in pixels of the first."""
    rows, columns = a.shape
    corners = np.array([[0, columns, 0, columns], [0, 0, rows, rows], [1, 1, 1, 1]], dtype=np.float64)
    first, other = (np.array([*g.transform, 0, 0, 1]).reshape(3, 3) for g in (a, b))
    return float(np.abs(np.linalg.solve(first, other @ corners) - corners).max())
