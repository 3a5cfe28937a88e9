"""Scenes of every kind behind one interface: found by `discover`, opened by `open_source`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from segpipe.errors import SceneError
from segpipe.process.extras import check_installed
from segpipe.redact import seal
from segpipe.sources.base import Pixels, Scaling, SceneRef, Source, local_path, require_file
from segpipe.sources.discover import discover
from segpipe.sources.isolated import IsolatedSource
from segpipe.sources.memory import MEMORY, MemorySource
from segpipe.sources.mosaic import MOSAIC, open_mosaic
from segpipe.sources.raster import RasterSource
from segpipe.sources.readers import trusted
from segpipe.sources.remote import is_remote
from segpipe.sources.stack import STACK, StackSource
from segpipe.sources.uri import (
    DICOM_SUFFIXES,
    NIFTI_SUFFIXES,
    ONE_FILE_NIFTI,
    PACKAGE,
    Kind,
    kind_of,
    package_file,
    parse_frame,
    parse_series,
)

__all__ = [
    "Pixels",
    "Scaling",
    "SceneRef",
    "Source",
    "discover",
    "open_source",
    "package_file",
]


def open_source(uri: str, *, band_names: Sequence[str] = ()) -> Source:
    """Open a scene lazily.

    Args:
        uri: a raster, NIfTI file or DICOM series folder; a URL of a raster or NIfTI file; ``mosaic:GLOB``;
            ``stack:FILE|FILE``; ``memory://…`` (`segpipe.sources.memory.hold`);
            ``pkg://distribution/path``; with ``#frame=N`` (from 0) for one frame of a 4D file,
            ``#series=UID`` for one DICOM series of a folder that holds several.
        band_names: names of the channels in file order, over those of the file.

    Raises:
        SceneError: missing, damaged, or of a kind that cannot be a scene.
        RequestError: ``band_names`` has not one name per channel, or the URI is malformed.
    """
    uri = seal(uri)
    if uri.startswith(MEMORY):
        return MemorySource(uri, band_names=band_names)
    return (open_in_process if trusted() else IsolatedSource)(uri, band_names=band_names)


def open_in_process(
    uri: str, *, band_names: Sequence[str] = (), copy: tuple[str, dict[str, Any]] | None = None
) -> Source:
    """Open a file as `open_source`, in this process.

    Args:
        uri: as of `open_source`, but no array in memory.
        band_names: names of the channels in file order, over those of the file.
        copy: path and identity of a local copy of a volume behind a URL.

    Raises:
        SceneError, RequestError: as `open_source`.
    """
    if uri.startswith(MOSAIC):
        return open_mosaic(uri, band_names=band_names)
    if uri.startswith(STACK):
        return StackSource(uri, band_names=band_names)
    location, frame = parse_frame(uri)
    location, series = parse_series(location)
    if is_remote(location):
        return _open_remote(location, frame, band_names, copy)
    if location.startswith(PACKAGE):
        path = package_file(location)
    else:
        path = local_path(location.removeprefix("file://"))
    if not path.is_dir():
        require_file(path)
    kind = kind_of(path)
    if series is not None and not path.is_dir():
        raise SceneError(f"{uri}: only a folder of DICOM files has series; leave out #series=")
    if kind is Kind.nifti:
        from segpipe.sources.nifti import NiftiSource

        return NiftiSource(str(path), frame=frame, band_names=band_names)
    if frame is not None:
        raise SceneError(f"{uri}: only a 4D NIfTI file has frames; leave out #frame={frame}")
    if kind is Kind.dicom:
        # Imported here: pydicom loads its dictionaries, which rasters never need.
        check_installed("pydicom", f"{uri}: a DICOM series")
        from segpipe.sources.dicom.reader import DicomSource

        return DicomSource(str(path), series=series, band_names=band_names)
    return RasterSource(str(path), band_names=band_names)


def _open_remote(
    uri: str, frame: int | None, band_names: Sequence[str], copy: tuple[str, dict[str, Any]] | None
) -> Source:
    """Open a raster behind a URL in place, or a copy of a NIfTI file.

    Raises:
        SceneError: DICOM or half of a pair, or what the sources raise.
    """
    address = uri.partition("?")[0].lower()
    if address.endswith(ONE_FILE_NIFTI):
        from segpipe.sources.nifti import NiftiSource

        return NiftiSource(uri, frame=frame, band_names=band_names, copy=copy)
    if frame is not None or address.endswith((*DICOM_SUFFIXES, *NIFTI_SUFFIXES)):
        raise SceneError(
            f"{uri}: cannot be read from there; valid behind a URL: rasters and {', '.join(ONE_FILE_NIFTI)}"
        )
    return RasterSource(uri, band_names=band_names)
