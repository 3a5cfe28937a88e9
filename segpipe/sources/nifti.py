"""NIfTI (1, 2, pairs) and Analyze volumes, by slices, as stored."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import unit_codes
from nibabel.spatialimages import HeaderDataError, HeaderTypeError

from segpipe.errors import SceneError
from segpipe.geometry.box import Box
from segpipe.geometry.geometry import VolumeGeometry, volume_geometry
from segpipe.redact import address, seal, whole
from segpipe.sources.base import (
    Pixels,
    Source,
    check_size,
    finite,
    reason,
    rename_bands,
    require_file,
    scaling_of,
)
from segpipe.sources.identity import file_identity
from segpipe.sources.remote import fetch, is_remote

READ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    OverflowError,
    MemoryError,
    KeyError,  # a code outside the standard's tables: data type, unit
    TypeError,
    IndexError,
    zlib.error,
    ImageFileError,
    HeaderDataError,
    HeaderTypeError,
)
"""What nibabel and indexed_gzip raise at a damaged file."""

NO_UNIT = "no unit of the standard"

COMPRESSED = (".gz", ".bz2", ".zst")
SLAB_BYTES = 256 * 2**20
"""Most that is kept of a compressed file's slices: without them each row of blocks decodes them anew."""


class NiftiSource(Source):
    """A volume (c, z, y, x): the file's (i, j, k) axes reversed, one channel.

    Values are as stored, in the machine's byte order; slope and intercept are `scaling`. The
    affine is nibabel's: sform where its code is set, else qform. Floating-point voxels that are
    not finite are invalid; the format declares no other.

    Compressed files are read through one persistent handle with seek points (indexed_gzip), so
    that reading forward never starts again and reading back resumes at the nearest point; the
    slices decoded last are kept for the next block beside, up to `SLAB_BYTES`.
    """

    geometry: VolumeGeometry

    def __init__(
        self,
        path: str,
        *,
        frame: int | None = None,
        band_names: Sequence[str] = (),
        copy: tuple[str, dict[str, Any]] | None = None,
    ) -> None:
        """Open a volume.

        Args:
            path: of the image, or of either file of a pair; or the URL of an image in one file.
            frame: which one of a 4D file, from 0.
            band_names: a name for the one channel.
            copy: path and identity of a local copy of what lies behind a URL.

        Raises:
            SceneError: missing, empty, damaged, not 3D, 4D without a frame, of a dtype or unit
                that cannot be a scene.
            RequestError: ``band_names`` has not one name.
        """
        self.uri = path if frame is None else seal(f"{whole(path)}#frame={frame}")
        if copy is None and is_remote(path):
            self._kept = fetch(path)  # for as long as this source
            copy = str(self._kept.path), self._kept.identity
        self._copied = copy is not None
        local = path if copy is None else copy[0]
        require_file(Path(local))
        self._lock = threading.Lock()
        image = _load(local, path)
        stored = image.dataobj
        self._path = str(stored.file_like)
        self._compressed = self._path.lower().endswith(COMPRESSED)
        self._spec = (stored.shape, stored.dtype, stored.offset)
        self._bytes = int(np.prod(stored.shape[:3], dtype=np.int64)) * stored.dtype.itemsize
        self._proxy: ArrayProxy | None = None
        self._slab: tuple[range, np.ndarray] = (range(0), np.empty(0))
        self._frame = _frame(self.uri, stored.shape, frame)
        self.dtype = _native(self.uri, stored.dtype)
        self._require_all_bytes()
        check_size(self.uri, 1, stored.shape[:3])
        self.geometry = _geometry(self.uri, image, stored.shape[:3])
        self.scaling = (scaling_of(stored.slope, stored.inter),)
        self.notes = tuple(_notes(image))
        # Analyze's third file, .mat, is optional.
        held = [h.filename for h in image.file_map.values() if h.filename]
        there = [f for f in held if Path(f).exists()]
        files = file_identity(there) if copy is None else [copy[1]]
        self.identity = {"uri": self.uri if copy is None else address(self.uri), "files": files}
        rename_bands(self, band_names)

    def _read(self, box: Box, channels: tuple[int, ...]) -> Pixels:
        try:
            with self._lock:
                volume = self._voxels(box)
        except READ_ERRORS as error:
            raise SceneError(f"{self.uri}: {_damage(error)}") from error
        values = np.stack([volume] * len(channels)) if len(channels) > 1 else volume[np.newaxis]
        return Pixels(values, finite(values))

    def close(self) -> None:
        """Release the file; a later read opens it again."""
        with self._lock:
            self._proxy = None
            self._slab = (range(0), np.empty(0))

    @property
    def cache_bytes(self) -> int:
        """Of the slices kept of a compressed file."""
        return min(self._bytes, SLAB_BYTES) if self._compressed else 0

    def _voxels(self, box: Box) -> np.ndarray:
        """The box (k, j, i); called with the lock held."""
        (k0, k1), (j0, j1), (i0, i1) = zip(box.start, box.stop, strict=True)
        rows, columns = self.geometry.shape[1:]
        if not self._compressed or (k1 - k0) * rows * columns * self.dtype.itemsize > SLAB_BYTES:
            return self._slices(range(k0, k1), range(j0, j1), range(i0, i1))
        kept, slab = self._slab
        if not (k0 >= kept.start and k1 <= kept.stop):
            kept, slab = range(k0, k1), self._slices(range(k0, k1), range(rows), range(columns))
            self._slab = (kept, slab)
        return slab[k0 - kept.start : k1 - kept.start, j0:j1, i0:i1].copy()

    def _slices(self, numbers: range, rows: range, columns: range) -> np.ndarray:
        """A box (k, j, i), one read a slice: a crop would be one a row, and more than half of the time."""
        proxy = self._open()
        volume = np.empty((len(numbers), len(rows), len(columns)), dtype=self.dtype)
        for place, k in enumerate(numbers):
            whole = np.asarray(proxy[(slice(None), slice(rows.start, rows.stop), k, *self._frame)])
            volume[place] = whole.T[:, columns.start : columns.stop]  # (i, j) in Fortran order is (j, i)
        return volume

    def _open(self) -> ArrayProxy:
        """The proxy of the unscaled values; called with the lock held."""
        if self._proxy is None:
            # Slope 1 and intercept 0: the proxy hands out what is stored. keep_file_open holds
            # the one decompressor whose position and seek points make reads cheap.
            spec = (*self._spec, 1.0, 0.0)
            self._proxy = ArrayProxy(self._path, spec, mmap=False, keep_file_open=True)
        return self._proxy

    def _require_all_bytes(self) -> None:
        """A plain file that is too short is known before the first read."""
        shape, dtype, offset = self._spec
        if self._compressed:
            return
        size = Path(self._path).stat().st_size
        told = self.uri if self._copied else self._path
        wanted = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if size < wanted:
            what = f"shape {tuple(shape)} of {dtype}"
            raise SceneError(f"{told}: truncated: {size} bytes, but {what} needs {wanted}")


def _load(path: str, told: str) -> Any:
    """nibabel's image of a file, header only.

    Args:
        path: of the file here.
        told: what it is called in errors: where it came from.

    Raises:
        SceneError: nibabel cannot read it, or it is of a kind without voxels.
    """
    try:
        image: Any = nib.load(path)
    except READ_ERRORS as error:
        raise SceneError(f"{told}: cannot be opened: {_damage(error)}") from error
    kinds = (nib.Nifti1Pair, nib.Nifti2Pair, nib.AnalyzeImage)
    if not isinstance(image, kinds) or not isinstance(image.dataobj, ArrayProxy):
        raise SceneError(f"{told}: {type(image).__name__} is no NIfTI volume")
    if not Path(str(image.dataobj.file_like)).exists():
        raise SceneError(f"{told}: its data file {image.dataobj.file_like} is missing")
    return image


def _damage(error: BaseException) -> str:
    """nibabel's words for a short file are "Whoops, not enough data in file"."""
    text = reason(error)
    short = ("not enough data", "end of file", "could the file be damaged")
    if isinstance(error, EOFError) or any(words in text for words in short):
        return "truncated: the file ends before its last voxel"
    return text


def _frame(uri: str, shape: Sequence[int], frame: int | None) -> tuple[int, ...]:
    """Indices on the axes after the third.

    Raises:
        SceneError: not 3D or 4D, or a frame is missing, not there, or not asked for.
    """
    sizes = list(shape)
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes.pop()
    trailing = (0,) * (len(shape) - len(sizes))
    if len(sizes) not in (3, 4) or 0 in sizes:
        raise SceneError(f"{uri}: shape {tuple(shape)}; expected a 3D volume or frames of one")
    frames = sizes[3] if len(sizes) == 4 else 1
    if frame is None and frames > 1:
        syntax = f"{uri}#frame=N, N from 0 to {frames - 1}"
        raise SceneError(f"{uri}: holds {frames} frames; choose one with {syntax}")
    chosen = 0 if frame is None else frame
    if not 0 <= chosen < frames:
        raise SceneError(f"{uri}: no frame {chosen}; it holds {frames}, counted from 0")
    return (chosen, *trailing) if len(sizes) == 4 else trailing


def _native(uri: str, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in the machine's byte order.

    Raises:
        SceneError: colour, complex or extended precision.
    """
    if dtype.fields is not None:
        raise SceneError(f"{uri}: colour voxels ({dtype}); expected one number per voxel")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise SceneError(f"{uri}: voxels of {dtype}; expected integers or floats up to 64 bits")
    return dtype.newbyteorder("=")


def _geometry(uri: str, image: Any, shape: Sequence[int]) -> VolumeGeometry:
    """The grid as the file has it.

    Raises:
        SceneError: the affine is singular or not finite, or in metres or microns.
    """
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise SceneError(f"{uri}: its affine gives voxels no volume: {affine.tolist()}")
    units = _length_unit(image.header)
    if units not in ("mm", "unknown", NO_UNIT):
        raise SceneError(
            f"{uri}: its header says lengths are in {units}; some tools convert them and others "
            "do not, so rewrite it with an affine and units in mm"
        )
    return volume_geometry(tuple(int(n) for n in shape[::-1]), affine)


def _length_unit(header: Any) -> str:
    """nibabel's name of the unit of length; `NO_UNIT` where it has none for the code."""
    if not hasattr(header, "get_xyzt_units"):
        return "mm"
    code = int(header["xyzt_units"]) % 8  # the unit of time is in the bits above
    return str(unit_codes.label[code]) if code in unit_codes.label else NO_UNIT


def _notes(image: Any) -> list[str]:
    """What of the geometry is assumed rather than read."""
    header = image.header
    if not isinstance(image, nib.Nifti1Pair):
        return ["Analyze file: it records no orientation, nibabel's convention is assumed"]
    notes = []
    sform, qform = int(header["sform_code"]), int(header["qform_code"])
    if sform == 0 and qform == 0:
        notes.append("sform and qform codes are both 0: position and orientation are assumed")
    if sform > 0 and qform > 0:
        declared = header.get_qform()
        if not np.allclose(declared, header.get_sform(), atol=1e-2):
            notes.append("sform and qform differ: the sform is used")
    if _length_unit(header) == NO_UNIT:
        notes.append("the unit code is outside the standard: millimetres are assumed")
    if _length_unit(header) == "unknown":
        notes.append("no unit of length declared: millimetres are assumed")
    return notes
