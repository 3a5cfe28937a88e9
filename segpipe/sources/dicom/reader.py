"""A DICOM series (a folder of single-frame files) as a volume, decoded slice by slice."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import dcmread
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import VolumeGeometry, volume_geometry
from segpipe.sources.base import (
    Pixels,
    Scaling,
    Source,
    finite,
    reason,
    rename_bands,
    scaling_of,
)
from segpipe.sources.dicom.series import (
    DICOM_ERRORS,
    DicomSlice,
    in_order,
    read_series,
    series_affine,
    tilted,
)
from segpipe.sources.identity import file_identity
from segpipe.sources.uri import SERIES

CACHE_BYTES = 128 * 2**20
"""Decoded slices kept: 256 of 512x512 in 16 bits, so that blocks side by side decode once."""


class DicomSource(Source):
    """A volume (c, z, y, x) = (1, slice, row, column), slices sorted along their normal.

    Values are as stored, in a dtype that holds those of all slices (signed and unsigned 16 bits
    together become int32), and `scaling` turns them into HU or the like. Where slices differ in
    slope or intercept (PET), no one scaling does: then values are real, as float32. MONOCHROME1
    values are kept as they are. The affine is RAS, converted from DICOM's LPS once.
    """

    geometry: VolumeGeometry

    def __init__(self, folder: str, *, series: str | None = None, band_names: Sequence[str] = ()) -> None:
        """Open the series in a folder.

        Args:
            folder: holds the series' files.
            series: which one, where the folder holds several: its SeriesInstanceUID, empty for files without,
                with ``@`` and a FrameOfReferenceUID where it has several.
            band_names: a name for the one channel.

        Raises:
            SceneError: no series or several, files damaged, missing or double, slices that do
                not stack evenly, or a compression without decoder.
            RequestError: ``band_names`` has not one name.
        """
        self.uri = folder if series is None else f"{folder}{SERIES}{series}"
        path = Path(folder)
        if not path.exists():
            raise SceneError(f"{folder}: no such folder")
        if not path.is_dir():
            raise SceneError(f"{folder}: a single DICOM file; give the folder of its series")
        slices, notes = read_series(path, series)
        self._slices = in_order(slices)
        affine = series_affine(path, self._slices)
        self.geometry = volume_geometry((len(slices), *slices[0].shape), affine)
        _require_decoders(self._slices)
        self._rescaled = len({s.rescale for s in slices}) > 1
        self.dtype = np.dtype("float32") if self._rescaled else stored_dtype(slices)
        self.scaling = (Scaling() if self._rescaled else scaling_of(*slices[0].rescale),)
        self.notes = (*notes, *_notes(self._slices, self._rescaled))
        self.identity = {"uri": self.uri, "files": file_identity(s.path for s in slices)}
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        rename_bands(self, band_names)

    @property
    def slices(self) -> tuple[DicomSlice, ...]:
        """The files' headers, in the order of the volume's first axis."""
        return tuple(self._slices)

    def _read(self, box: Box, channels: tuple[int, ...]) -> Pixels:
        values = np.empty((len(channels), *box.shape), dtype=self.dtype)
        for n, k in enumerate(range(box.start[0], box.stop[0])):
            values[:, n] = self._decoded(k)[box.slices[1:]]
        return Pixels(values, finite(values))

    def close(self) -> None:
        """Forget the decoded slices."""
        with self._lock:
            self._cache.clear()

    def _decoded(self, k: int) -> np.ndarray:
        """Slice k (rows, columns) in `dtype`, from the cache or the file."""
        with self._lock:
            if k in self._cache:
                self._cache.move_to_end(k)
                return self._cache[k]
        # Outside the lock, so that threads decode side by side.
        pixels = _pixels(self._slices[k])
        if self._rescaled:
            slope, intercept = self._slices[k].rescale
            pixels = pixels * np.float64(slope) + np.float64(intercept)
        plane = pixels.astype(self.dtype)
        most = max(1, CACHE_BYTES // max(1, plane.nbytes))
        with self._lock:
            self._cache[k] = plane
            while len(self._cache) > most:
                self._cache.popitem(last=False)
        return plane


def stored_dtype(slices: Sequence[DicomSlice]) -> np.dtype[Any]:
    """The dtype that holds the stored values of every slice exactly.

    Raises:
        SceneError: there is none that the store knows.
    """
    common = np.result_type(*{s.dtype for s in slices})
    if common.kind == "f":
        raise SceneError(f"{slices[0].path}: no integer type holds the values of all slices")
    return common


def _pixels(s: DicomSlice) -> np.ndarray:
    """The stored values of one slice, (rows, columns).

    Raises:
        SceneError: they cannot be decoded, or are not what the header said.
    """
    try:
        pixels = dcmread(s.path).pixel_array
    except DICOM_ERRORS as error:
        raise SceneError(f"{s.path}: cannot be decoded: {reason(error)}") from error
    if pixels.shape != s.shape:
        raise SceneError(f"{s.path}: decodes to {pixels.shape}, its header says {s.shape}")
    return pixels


def _require_decoders(slices: Sequence[DicomSlice]) -> None:
    """Refuse a compression that no installed decoder knows, before any work is done."""
    for s in slices:
        if not s.transfer_syntax:
            raise SceneError(f"{s.path}: names no transfer syntax, so it cannot be decoded")
    for syntax in {s.transfer_syntax for s in slices}:
        uid = UID(syntax)
        try:
            available = get_decoder(uid).is_available
        except NotImplementedError:
            available = False
        if not available:
            raise SceneError(
                f"{slices[0].path}: compressed as {uid.name}, for which no decoder is installed; "
                "pip install pylibjpeg-libjpeg reads JPEG and JPEG-LS"
            )


def _notes(slices: Sequence[DicomSlice], rescaled: bool) -> list[str]:
    notes = []
    if rescaled:
        notes.append("rescale differs between slices: values are real (float32), not as stored")
    if len({s.dtype for s in slices}) > 1:
        notes.append("slices are stored in several dtypes, read in one that holds them all")
    if any(s.inverted for s in slices):
        notes.append("MONOCHROME1 (small values are bright): values kept as stored")
    if any(s.padding for s in slices):
        notes.append("a padding value is declared; such voxels are read as data")
    if tilted(slices):
        notes.append("slices are shifted against each other (gantry tilt): the affine has shear")
    return notes
