"""Scenes that a reader opens and decodes (`segpipe.sources.readers`): here are descriptions and pixels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import geometry_from_dict
from segpipe.redact import seal, whole
from segpipe.sources import readers
from segpipe.sources.base import Pixels, Scaling, Source, local_path
from segpipe.sources.gdal import SUFFIX, read_vrt
from segpipe.sources.mosaic import MOSAIC, mosaic_files
from segpipe.sources.remote import Copy, fetch, is_remote
from segpipe.sources.stack import STACK, stack_files
from segpipe.sources.uri import ONE_FILE_NIFTI, PACKAGE, package_file, parse_frame, parse_series

if TYPE_CHECKING:
    from segpipe.sources.dicom.series import DicomSlice

_numbers = itertools.count()


def describe(source: Source) -> dict[str, Any]:
    """Everything that is known of an open source but its pixels, as JSON."""
    return {
        "uri": whole(source.uri),
        "geometry": source.geometry.to_dict(),
        "dtype": source.dtype.str,
        "count": source.count,
        "bands": source.bands,
        "scaling": [[s.scale, s.offset] for s in source.scaling],
        "notes": source.notes,
        "identity": source.identity,
        "cache_bytes": source.cache_bytes,
        "tags": source.tags,
        "slices": [{**asdict(s), "dtype": s.dtype.str} for s in source.slices],
    }


class IsolatedSource(Source):
    """A scene of any kind that another process has open."""

    def __init__(self, uri: str, *, band_names: Sequence[str] = ()) -> None:
        """Open it there.

        Raises:
            SceneError: as `segpipe.sources.open_source`; or its reader ended.
            RequestError: as `segpipe.sources.open_source`.
        """
        location = parse_series(parse_frame(uri)[0])[0]
        self._copy = _copy_of(location)
        self._access = _access(uri, location, self._copy)
        self._token = str(next(_numbers))
        self._told = uri
        self._request: dict[str, Any] = {
            "token": self._token,
            "uri": whole(uri),
            "names": list(band_names),
            "copy": None if self._copy is None else [str(self._copy.path), self._copy.identity],
        }
        found, _ = self._ask({"do": "open"})
        self.uri = seal(found["uri"])
        self.geometry = geometry_from_dict(found["geometry"])
        self.dtype = np.dtype(found["dtype"])
        self.count = found["count"]
        self.bands = tuple(found["bands"])
        self.scaling = tuple(Scaling(*pair) for pair in found["scaling"])
        self.notes = tuple(found["notes"])
        self.identity = found["identity"]
        self.tags = found["tags"]
        self._cache_bytes = found["cache_bytes"]
        self._slices: list[dict[str, Any]] = found["slices"]

    @property
    def cache_bytes(self) -> int:
        """Of the reader."""
        return int(self._cache_bytes)

    @property
    def slices(self) -> tuple[DicomSlice, ...]:
        """The headers of a DICOM series."""
        if not self._slices:
            return ()
        from segpipe.sources.dicom.series import DicomSlice  # here: it loads pydicom

        return tuple(_slice(DicomSlice, found) for found in self._slices)

    def _read(self, box: Box, channels: tuple[int, ...]) -> Pixels:
        values = np.empty((len(channels), *box.shape), dtype=self.dtype)
        valid = np.empty(box.shape, dtype=bool)
        asked = {
            "do": "read",
            "identity": self.identity,
            "start": box.start,
            "stop": box.stop,
            "channels": channels,
        }
        self._ask(asked, into=(values, valid))
        return Pixels(values, valid)

    def close(self) -> None:
        """Let the readers close it; a later read opens it again."""
        readers.readers.close(self._token)

    def _ask(self, request: dict[str, Any], into: Sequence[np.ndarray] = ()) -> tuple[dict[str, Any], bytes]:
        asked = self._request | request
        return readers.readers.ask(self._told, self._access, asked, token=self._token, into=into)


def dicom_groups(folder: Path, names: Sequence[str]) -> tuple[dict[tuple[str, str], list[str]], list[str]]:
    """The files of a folder by DICOM series and frame of reference, and those that cannot be read.

    Where the reader ends, all files count as such: opening the scene tells why.
    """
    if readers.trusted():
        from segpipe.sources.dicom.series import group_files  # here: it loads pydicom

        return group_files(folder, names)
    asked = {"do": "groups", "uri": str(folder), "names": list(names)}
    access = readers.Access(readers.roots_of([folder]))
    try:
        answer, _ = readers.readers.ask(str(folder), access, asked)
    except SceneError:
        return {}, list(names)
    return {(series, frame): files for series, frame, files in answer["groups"]}, answer["broken"]


def _slice(kind: type[DicomSlice], found: dict[str, Any]) -> DicomSlice:
    """A slice from JSON, which has no tuples and no dtypes."""
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
    }
    fields["dtype"] = np.dtype(found["dtype"])
    return kind(**fields)


def _copy_of(location: str) -> Copy | None:
    """The copy of a remote file that cannot be read in parts: a reader may write none."""
    if is_remote(location) and location.partition("?")[0].lower().endswith(ONE_FILE_NIFTI):
        return fetch(location)
    return None


def _access(uri: str, location: str, copy: Copy | None) -> readers.Access:
    """What a reader must touch to read a scene.

    Raises:
        SceneError: a VRT is none, or more than copies of pixels.
    """
    names = stack_files(uri) if uri.startswith(STACK) else [location]
    if uri.startswith(MOSAIC):
        names = mosaic_files(uri)
    local = [_local(name) for name in names if not is_remote(name)]
    links = uri.startswith(MOSAIC)
    for path in list(local):
        if path.name.lower().endswith(SUFFIX) and path.is_file():
            links = True
            local += [Path(source) for source in read_vrt(path)[1]]
    if copy is not None:
        return readers.Access(readers.roots_of([copy.path]))
    return readers.Access(readers.roots_of(local), any(map(is_remote, names)), links)


def _local(name: str) -> Path:
    return package_file(name) if name.startswith(PACKAGE) else local_path(name.removeprefix("file://"))
